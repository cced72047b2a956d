"""The paper's data sets, from files written here by their formats' specifications."""

import gzip
import hashlib
import struct

import numpy as np
import pytest

from benchmarks.shared.data import (
    IDX_FILES,
    SOURCES,
    Dataset,
    load,
    load_text,
    long_tail,
    standardise,
    take,
)
from rmtdamp.demo._data import DataError

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
PIXELS = 3 * 32 * 32


def random_bytes(*shape, high=256):
    return RNG.integers(0, high, shape, np.uint8)


def idx(array):
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


IMAGES = random_bytes(30, 6, 5), random_bytes(20, 6, 5)
LABELS = random_bytes(30, high=10), random_bytes(20, high=10)
IDX = dict(
    zip(
        IDX_FILES,
        map(idx, (IMAGES[0], LABELS[0], IMAGES[1], LABELS[1])),
        strict=True,
    )
)
PLANES = random_bytes(12, 3, 32, 32)
FINE, COARSE = random_bytes(12, high=100), random_bytes(12, high=20)


def records(labels, planes=PLANES):
    flat = planes.reshape(len(planes), -1)
    return np.concatenate([np.stack(labels, 1), flat], 1).tobytes()


CIFAR_100 = {
    "train.bin": records([COARSE, FINE]),
    "test.bin": records([COARSE[:4], FINE[:4]], PLANES[:4]),
}
TEXT = "".join("abc\néz"[i] for i in RNG.integers(0, 6, 105))


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def zipped(files):
    return {f"{k}.gz": gzip.compress(v) for k, v in files.items()}


same = np.testing.assert_array_equal


@pytest.mark.parametrize("files", [IDX, zipped(IDX)], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_come_back_bit_for_bit(tmp_path, name, files):
    own = write(tmp_path / name, files)
    for folder in (own, str(tmp_path)):
        data = load(name, folder)
        assert (data.name, data.num_classes) == (name, 10)
        for split, images, labels in zip(data[1:3], IMAGES, LABELS, strict=True):
            same(split[0], images[..., None])
            same(split[1], labels)
            assert (split[0].dtype, split[1].dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("coarse", [False, True])
def test_cifar_100_comes_back_bit_for_bit(tmp_path, coarse):
    own = write(tmp_path / "cifar-100-binary", CIFAR_100)
    for folder in (own, tmp_path):
        data = load("cifar-100", folder, coarse=coarse)
        assert data.num_classes == (20 if coarse else 100)
        same(data.train[0].transpose(0, 3, 1, 2), PLANES)
        same(data.test[0].transpose(0, 3, 1, 2), PLANES[:4])
        same(data.train[1], COARSE if coarse else FINE)
        same(data.test[1], (COARSE if coarse else FINE)[:4])


def test_text_comes_back_character_for_character(tmp_path, monkeypatch):
    md5 = {"input.txt": hashlib.md5(TEXT.encode()).hexdigest()}
    source = SOURCES["tinyshakespeare"]._replace(md5=md5)
    monkeypatch.setitem(SOURCES, "tinyshakespeare", source)
    own = write(tmp_path / "tinyshakespeare", {"input.txt": TEXT.encode()})
    for folder in (own, tmp_path):
        train, test, vocabulary = load_text(folder)
        assert (len(train), len(test)) == (95, 10)
        assert vocabulary == "\nabczé"
        assert "".join(vocabulary[i] for i in [*train, *test]) == TEXT
        assert train.dtype == test.dtype == np.int32


BAD_LABEL = np.array([3, 9, 10, 1] * 5, np.uint8)
IDX_ERRORS = {
    "missing": ({"t10k-labels-idx1-ubyte": None}, r"no t10k-labels.*fetch\(\"mnist\""),
    "cut": ({"train-images-idx3-ubyte": idx(IMAGES[0])[:-1]}, r"train-im.*truncated"),
    "other": ({"train-labels-idx1-ubyte": b"PK\3\4"}, r"train-labels.*not an idx"),
    "label": (
        {"t10k-labels-idx1-ubyte": idx(BAD_LABEL)},
        r"t10k-labels\S+ is corrupt.*label 2 is 10, expected 0 to 9; fetch it again",
    ),
    "count": ({"t10k-labels-idx1-ubyte": idx(LABELS[0])}, r"not belong.*\(30,\)"),
    "rank": ({"train-images-idx3-ubyte": idx(LABELS[0])}, r"not belong.*\(n, h, w\)"),
    "size": (
        {"t10k-images-idx3-ubyte": idx(IMAGES[1].reshape(20, 5, 6))},
        r"not belong together: images of \(6, 5\) and \(5, 6\) pixels",
    ),
    "empty": (
        {
            "train-images-idx3-ubyte": idx(IMAGES[0][:0]),
            "train-labels-idx1-ubyte": idx(LABELS[0][:0]),
        },
        r"train-images\S+ is empty: an array of shape \(0, 6, 5\)",
    ),
}
HALF = CIFAR_100["test.bin"][:5000]
CIFAR_ERRORS = {
    "missing": ({"test.bin": None}, r"no test\.bin: cifar-100 is train\.bin, test"),
    "cut": ({"test.bin": HALF}, r"test\.bin is trunc.*5000 bytes.*multiple of 3074"),
    "nothing": ({"train.bin": b""}, r"train\.bin is truncated.*0 bytes"),
    "fine": (
        {"train.bin": records([COARSE, FINE + np.uint8(100)])},
        r"train\.bin is corrupt.*label \d+ is 1\d\d, expected 0 to 99",
    ),
    "coarse": (
        {"train.bin": records([np.full(12, 20, np.uint8), FINE])},
        r"train\.bin is corrupt.*label 0 is 20, expected 0 to 19",
    ),
}
ERRORS = {
    "mnist": (IDX, "mnist", IDX_ERRORS),
    "cifar-100": (CIFAR_100, "cifar-100-binary", CIFAR_ERRORS),
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in ERRORS for case in ERRORS[name][2]]
)
def test_bad_files_are_named(tmp_path, name, case):
    good, folder, errors = ERRORS[name]
    changes, message = errors[case]
    files = {k: v for k, v in {**good, **changes}.items() if v is not None}
    with pytest.raises(DataError, match=message):
        load(name, write(tmp_path / folder, files))


def test_damaged_gzip_is_named(tmp_path):
    files = zipped(IDX)
    files["train-images-idx3-ubyte.gz"] = files["train-images-idx3-ubyte.gz"][:-9]
    with pytest.raises(DataError, match=r"train-images\S+\.gz is damaged.*fetch it"):
        load("mnist", write(tmp_path / "mnist", files))


def test_file_that_cannot_be_read_is_named(tmp_path):
    own = write(tmp_path / "cifar-100-binary", {"test.bin": b""})
    (own / "train.bin").mkdir()
    with pytest.raises(DataError, match=r"train\.bin cannot be read"):
        load("cifar-100", tmp_path)


@pytest.mark.parametrize("content", [b"", TEXT.encode()], ids=["empty", "other"])
def test_bad_text_is_named(tmp_path, content):
    write(tmp_path / "tinyshakespeare", {"input.txt": content})
    message = (
        rf"truncated or not tinyshakespeare: md5 \w+ of {len(content)} b.*fetch it"
    )
    with pytest.raises(DataError, match=message):
        load_text(tmp_path)


def test_text_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tinyshakespeare" / "input.txt").mkdir(parents=True)
    with pytest.raises(DataError, match=r"input\.txt cannot be read"):
        load_text(tmp_path)


def test_bad_names_and_folders_are_named(tmp_path):
    own = write(tmp_path / "mnist", IDX)
    with pytest.raises(DataError, match=r"is the folder of mnist, not of fashion-mni"):
        load("fashion-mnist", own)
    with pytest.raises(DataError, match=r"nowhere is not a folder.*fetch\(\"mnist\""):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"only cifar-100 has coarse labels, mnist"):
        load("mnist", tmp_path, coarse=True)
    with pytest.raises(ValueError, match=r"no images: use load_text"):
        load("tinyshakespeare", tmp_path)


def dataset(labels, num_classes=3, shape=(4, 6, 2)):
    images = random_bytes(len(labels), *shape)
    images[:, 0, 0, 0] = np.arange(len(labels))  # which is which
    test = images[::-1], np.asarray(labels, np.int32)[::-1]
    return Dataset("toy", (images, np.asarray(labels, np.int32)), test, num_classes)


def test_take_is_balanced_and_in_turn():
    full = dataset([2, 2, 0, 1, 1, 2, 0, 0, 1, 2])
    few = take(full, 6, 4)
    same(few.train[1], [0, 1, 2, 0, 1, 2])
    same(few.train[0][:, 0, 0, 0], [2, 3, 0, 6, 4, 1])
    same(few.test[0], full.test[0][:4])
    same(few.test[1], full.test[1][:4])
    same(take(full, 8).train[1], [0, 1, 2, 0, 1, 2, 0, 1])
    # What is taken of a class first is taken of it in any number.
    same(take(full, 3).train[0], few.train[0][:3])
    all_of_it = take(full)
    same(all_of_it.train[0], full.train[0])
    same(all_of_it.test[1], full.test[1])


def test_take_refuses_what_is_not_there():
    full = dataset([2, 2, 0, 1, 1, 2, 0, 2])
    with pytest.raises(ValueError, match=r"needs 3 examples of class 0.*at most 6"):
        take(full, 7)
    with pytest.raises(ValueError, match=r"num_train is 0, expected at least 1"):
        take(full, 0)
    for number in (0, 9):
        with pytest.raises(ValueError, match=rf"num_test is {number}, expected 1 to 8"):
            take(full, num_test=number)


def test_a_long_tail_falls_exponentially_from_any_class():
    labels = np.tile(np.arange(3), 100)  # 100, 10 and 1 of each at a ratio of 100
    rows = long_tail(labels, 100.0)
    same(np.bincount(labels[rows]), [100, 10, 1])
    same(rows[labels[rows] == 1], np.arange(1, 30, 3))  # the first, in their order
    assert (np.diff(rows) > 0).all()
    same(np.bincount(labels[long_tail(labels, 100.0, first=2)]), [10, 1, 100])
    same(np.bincount(labels[long_tail(labels[:-1], 1.0)]), [99, 99, 99])


@pytest.mark.parametrize(("ratio", "first"), [(0.5, 0), (2.0, 3)])
def test_a_long_tail_refuses_what_is_none(ratio, first):
    with pytest.raises(
        ValueError, match=rf"ratio is {ratio} and first {first} of 3 cl"
    ):
        long_tail(np.arange(3), ratio, first)


@pytest.mark.parametrize("pool", [1, 2])
def test_standardise_is_its_definition(pool):
    full = dataset(list(range(3)) * 4)
    means = [
        np.stack(
            [
                images[:, i : i + pool, j : j + pool].astype(float).mean((1, 2))
                for i in range(0, 4, pool)
                for j in range(0, 6, pool)
            ],
            1,
        ).reshape(-1, 4 // pool, 6 // pool, 2)
        for images in (full.train[0], full.test[0][:5])
    ]
    expected = [(m - means[0].mean((0, 1, 2))) / means[0].std((0, 1, 2)) for m in means]
    found = standardise(take(full, num_test=5), pool)
    for (images, labels), theirs, split in zip(found, expected, full[1:3], strict=True):
        np.testing.assert_allclose(images, theirs, rtol=1e-5, atol=1e-6)
        assert images.dtype == np.float32
        same(labels, split[1][: len(labels)])


def test_standardise_refuses():
    with pytest.raises(ValueError, match=r"pool is 4, expected a divisor of 4 and of"):
        standardise(dataset([0, 1, 2]), 4)
    flat = dataset([0, 1, 2])
    flat.train[0][..., 1] = 7
    with pytest.raises(ValueError, match=r"channel 1 of toy is constant"):
        standardise(flat)
