"""Downloads from a server on this machine: whole files or none."""

import gzip
import hashlib
import http.server
import io
import sys
import tarfile
import threading

import pytest

from benchmarks.shared.data import IDX_FILES, SOURCES, fetch
from rmtdamp.demo._data import DataError

FILES = {f"{name}.gz": gzip.compress(name.encode()) for name in IDX_FILES}
SIZES = 2 * 3074, 3074
MEMBERS = {
    f"cifar-100-binary/{name}": bytes([i]) * size
    for i, (name, size) in enumerate(zip(("train.bin", "test.bin"), SIZES, strict=True))
}


def tar(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `contents`; of what is named in `cut`, promises all and sends half."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents, self.cut, self.asked = {}, set(), []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:]
        self.server.asked.append(name)
        if name not in self.server.contents:
            self.send_error(404)
            return
        content = self.server.contents[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        cut = name in self.server.cut
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server in the place of every source, with the right sums of what it has."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def serve(name, contents, **changes):
            server.contents |= contents
            md5 = {k: hashlib.md5(v).hexdigest() for k, v in contents.items()}
            source = SOURCES[name]._replace(url=server.url, md5=md5, **changes)
            monkeypatch.setitem(SOURCES, name, source)

        server.serve = serve
        yield server
        server.shutdown()
        thread.join()


def serve_cifar(server, members=MEMBERS):
    archive = {"cifar-100-binary.tar.gz": tar(members)}
    server.serve("cifar-100", archive, sizes=SIZES)


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("own", ["", "mnist"], ids=["above", "own"])
def test_files_are_fetched_once_with_a_progress_bar(tmp_path, server, capsys, own):
    server.serve("mnist", FILES)
    assert fetch("mnist", tmp_path / own) == tmp_path / "mnist"
    assert tree(tmp_path / "mnist") == FILES
    assert "B/s]" in capsys.readouterr().err
    assert fetch("mnist", tmp_path / own) == tmp_path / "mnist"
    assert sorted(server.asked) == sorted(FILES)


def test_damaged_file_is_fetched_again(tmp_path, server):
    server.serve("mnist", FILES)
    fetch("mnist", tmp_path)
    name = "t10k-images-idx3-ubyte.gz"
    (tmp_path / "mnist" / name).write_bytes(FILES[name][:-1])
    fetch("mnist", tmp_path)
    assert tree(tmp_path / "mnist") == FILES
    assert server.asked[4:] == [name]


def test_archive_is_unpacked_whole_and_not_kept(tmp_path, server):
    serve_cifar(server, {**MEMBERS, "cifar-100-binary/fine_label_names.txt": b"x"})
    for _ in range(2):
        assert fetch("cifar-100", tmp_path) == tmp_path / "cifar-100-binary"
        assert tree(tmp_path) == MEMBERS
    assert server.asked == ["cifar-100-binary.tar.gz"]
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(b"cut")
    fetch("cifar-100", tmp_path)
    assert tree(tmp_path) == MEMBERS


def test_wrong_checksum_leaves_nothing(tmp_path, server):
    server.serve("mnist", FILES)
    server.contents["train-labels-idx1-ubyte.gz"] += b"more"
    message = r"mnist could not be fetched from http\S+train-labels.*hash.*try again"
    with pytest.raises(DataError, match=message):
        fetch("mnist", tmp_path)
    first = "train-images-idx3-ubyte.gz"
    assert tree(tmp_path / "mnist") == {first: FILES[first]}


@pytest.mark.parametrize("name", ["mnist", "cifar-100"])
def test_download_that_stops_half_way_leaves_nothing(tmp_path, server, name):
    server.serve("mnist", FILES)
    serve_cifar(server)
    server.cut |= {"train-images-idx3-ubyte.gz", "cifar-100-binary.tar.gz"}
    with pytest.raises(DataError, match=r"could not be fetched.*Nothing half-written"):
        fetch(name, tmp_path)
    assert tree(tmp_path) == {}
    server.cut.clear()
    fetch(name, tmp_path)
    assert tree(tmp_path)


def test_missing_page_is_named(tmp_path, server):
    server.serve("mnist", FILES)
    server.contents.clear()
    with pytest.raises(DataError, match=r"train-images.*404.*by hand"):
        fetch("mnist", tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cifar-100-binary/train.bin": bytes(SIZES[0])}, r"holds no \S+/test\.bin"),
        (
            {**MEMBERS, "cifar-100-binary/test.bin": b"short"},
            r"test\.bin in \S+tar\.gz has 5 bytes, expected 3074",
        ),
    ],
    ids=["member", "size"],
)
def test_bad_archive_leaves_no_member(tmp_path, server, members, message):
    serve_cifar(server, members)
    with pytest.raises(DataError, match=message):
        fetch("cifar-100", tmp_path)
    assert set(tree(tmp_path)) <= {"cifar-100-binary.tar.gz"}


def test_what_is_no_archive_is_named(tmp_path, server):
    contents = {"cifar-100-binary.tar.gz": b"not a tar"}
    server.serve("cifar-100", contents, sizes=SIZES)
    with pytest.raises(DataError, match=r"cifar-100 could not be fetched"):
        fetch("cifar-100", tmp_path)
    assert not (tmp_path / "cifar-100-binary").exists()


def test_missing_pooch_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'rmtdamp\[paper\]'"):
        fetch("mnist", tmp_path)
