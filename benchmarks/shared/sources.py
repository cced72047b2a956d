"""Where the data sets are published, and how they get here whole."""

import os
import pathlib
import tarfile
import tempfile
import zlib
from typing import NamedTuple

from rmtdamp.demo._data import DataError

PIXELS = 32 * 32 * 3
S3 = "https://ossci-datasets.s3.amazonaws.com/mnist/"
S3_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
TORONTO = "https://www.cs.toronto.edu/~kriz/"
KARPATHY = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
)


class Source(NamedTuple):
    """Where a data set is published, and how it lies on disk."""

    folder: str  # its usual name
    files: tuple[str, ...]  # what must be in it, without .gz
    url: str  # what the names below are appended to
    md5: dict[str, str]  # of each published file
    record: int = 0  # bytes of a record, where the archive holds records
    num_records: tuple[int, ...] = ()  # of each file


IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx(folder, url, *sums) -> Source:
    md5 = {f"{name}.gz": x for name, x in zip(IDX_FILES, sums, strict=True)}
    return Source(folder, IDX_FILES, url, md5)


SOURCES = {
    "mnist": _idx(
        "mnist",
        S3,
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": _idx(
        "fashion-mnist",
        S3_FASHION,
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "cifar-10": Source(
        "cifar-10-batches-bin",
        (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
        TORONTO,
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        1 + PIXELS,
        (10_000,) * 6,
    ),
    "cifar-100": Source(
        "cifar-100-binary",
        ("train.bin", "test.bin"),
        TORONTO,
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        2 + PIXELS,
        (50_000, 10_000),
    ),
    "tinyshakespeare": Source(
        "tinyshakespeare",
        ("input.txt",),
        KARPATHY,
        {"input.txt": "6fb458f1232090904fb40fe944165e91"},
    ),
}


def source_of(name: str) -> Source:
    """The source of a data set; ValueError if there is none of that name."""
    if name not in SOURCES:
        raise ValueError(f"no data set is called {name!r}: {', '.join(SOURCES)}")
    return SOURCES[name]


def _unpack(source: Source, archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Members of a tar into `folder`: each is there whole or not at all."""
    # Next to the folder: on the same file system renaming is atomic.
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as name,
        tarfile.open(archive) as tar,
    ):
        parts = []
        for file, records in zip(source.files, source.num_records, strict=True):
            member = f"{source.folder}/{file}"
            try:
                tar.extract(member, name, filter="data")
            except KeyError:
                raise DataError(f"{archive} holds no {member}") from None
            parts.append(pathlib.Path(name) / member)
            if (size := parts[-1].stat().st_size) != records * source.record:
                raise DataError(
                    f"{member} in {archive} has {size} bytes, expected "
                    f"{records * source.record}"
                )
        folder.mkdir(exist_ok=True)
        for part in parts:
            part.replace(folder / part.name)


def fetch(name: str, folder: str | os.PathLike) -> pathlib.Path:
    """Download a data set, with a progress bar, unless it is there: its own folder.

    Files are checked against their published md5 sums; what has another sum, or for
    CIFAR another size, is replaced. A file appears under its name when it is whole.
    `folder` is the data set's or the one above it, and made if need be.
    """
    source = source_of(name)
    try:
        import pooch
    except ImportError:
        raise ImportError("fetch needs pooch: pip install 'rmtdamp[paper]'") from None
    own = pathlib.Path(folder)
    if own.resolve().name != source.folder:
        own = own / source.folder
    sizes = [n * source.record for n in source.num_records]
    paths = [own / file for file in source.files]
    if sizes and [p.stat().st_size for p in paths if p.is_file()] == sizes:
        return own
    for file, md5 in source.md5.items():
        url, where = source.url + file, own.parent if sizes else own
        try:
            archive = pooch.retrieve(
                url, f"md5:{md5}", fname=file, path=where, progressbar=True
            )
            if sizes:
                _unpack(source, pathlib.Path(archive), own)
                pathlib.Path(archive).unlink()
        except (OSError, ValueError, tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(
                f"{name} could not be fetched from {url}: {error}. Nothing half-"
                f"written was kept; try again, or put {', '.join(source.files)} into "
                f"{own} by hand"
            ) from error
    return own
