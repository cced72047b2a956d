"""The data sets: where they are published, and files in their formats -> arrays.

MNIST, Fashion-MNIST (idx), CIFAR-100 (the binary version; nothing is ever unpickled)
and tinyshakespeare. Every `folder` is either the data set's own or the one that has it
under its usual name: `DATA/mnist` or `DATA`. A file that is missing, truncated, corrupt
or another one is a DataError that names it. `fetch` downloads what is not there.
"""

import hashlib
import math
import os
import pathlib
import tarfile
import tempfile
import zlib
from typing import NamedTuple

import numpy as np

from rmtdamp.demo._data import DataError, read_idx

PIXELS = 32 * 32 * 3
IDX_FILES = tuple(
    f"{part}-{what}-ubyte"
    for part in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
)


class Source(NamedTuple):
    """Where a data set is published, and how it lies on disk."""

    folder: str  # its usual name
    files: tuple[str, ...]  # what must be in it, without .gz
    url: str  # what the names below are appended to
    md5: dict[str, str]  # of each published file
    sizes: tuple[int, ...] = ()  # of each file, where they come in one archive


def _idx(folder, url, *sums) -> Source:
    md5 = {f"{name}.gz": x for name, x in zip(IDX_FILES, sums, strict=True)}
    return Source(folder, IDX_FILES, url, md5)


SOURCES = {
    "mnist": _idx(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": _idx(
        "fashion-mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "cifar-100": Source(
        "cifar-100-binary",
        ("train.bin", "test.bin"),
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        (50_000 * (2 + PIXELS), 10_000 * (2 + PIXELS)),
    ),
    "tinyshakespeare": Source(
        "tinyshakespeare",
        ("input.txt",),
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
        "tinyshakespeare/",
        {"input.txt": "6fb458f1232090904fb40fe944165e91"},
    ),
}


def _unpack(source: Source, archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Members of a tar into `folder`: each is there whole or not at all."""
    # Next to the folder: on the same file system renaming is atomic.
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as name,
        tarfile.open(archive) as tar,
    ):
        parts = []
        for file, expected in zip(source.files, source.sizes, strict=True):
            member = f"{source.folder}/{file}"
            try:
                tar.extract(member, name, filter="data")
            except KeyError:
                raise DataError(f"{archive} holds no {member}") from None
            parts.append(pathlib.Path(name) / member)
            if (size := parts[-1].stat().st_size) != expected:
                found = f"{member} in {archive} has {size} bytes, expected {expected}"
                raise DataError(found)
        folder.mkdir(exist_ok=True)
        for part in parts:
            part.replace(folder / part.name)


def fetch(name: str, folder: str | os.PathLike) -> pathlib.Path:
    """Download a data set, with a progress bar, unless it is there: its own folder.

    A file with another md5 sum than the published one, or for CIFAR another size, is
    replaced. It appears under its name when it is whole. `folder` is the data set's or
    the one above it, and made if need be.
    """
    source = SOURCES[name]
    try:
        import pooch
    except ImportError:
        raise ImportError("fetch needs pooch: pip install 'rmtdamp[paper]'") from None
    own = pathlib.Path(folder)
    own = own if own.resolve().name == source.folder else own / source.folder
    sizes = tuple(p.stat().st_size for f in source.files if (p := own / f).is_file())
    if source.sizes and sizes == source.sizes:
        return own
    for file, md5 in source.md5.items():
        url, where = source.url + file, own.parent if source.sizes else own
        try:
            options = {"fname": file, "path": where, "progressbar": True}
            archive = pathlib.Path(pooch.retrieve(url, f"md5:{md5}", **options))
            if source.sizes:
                _unpack(source, archive, own)
                archive.unlink()
        except (OSError, ValueError, tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(
                f"{name} could not be fetched from {url}: {error}. Nothing half-"
                f"written was kept; try again, or put {', '.join(source.files)} into "
                f"{own} by hand"
            ) from error
    return own


Split = tuple[np.ndarray, np.ndarray]


class Dataset(NamedTuple):
    """Training and test examples as they are in the files."""

    name: str
    train: Split  # (n, h, w, c) uint8, (n,) int32
    test: Split
    num_classes: int


def _find(name: str, folder: str | os.PathLike) -> list[pathlib.Path]:
    """The paths of the data set's files, each checked to exist."""
    source, folder = SOURCES[name], pathlib.Path(folder)
    own_name = folder.resolve().name
    way_out = f'fetch("{name}", folder) downloads it'
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: it should hold {name}; {way_out}")
    if (folder / source.folder).is_dir():
        folder = folder / source.folder
    elif other := next(
        (k for k, v in SOURCES.items() if k != name and v.folder == own_name), None
    ):
        raise DataError(
            f"{folder} is the folder of {other}, not of {name}, which should be called "
            f"{source.folder}; {way_out}"
        )
    paths = {}
    for file in source.files:
        names = [x for x in (file, f"{file}.gz") if x in (*source.md5, file)]
        if found := [folder / x for x in names if (folder / x).exists()]:
            paths[file] = found[-1]
        else:
            raise DataError(
                f"{folder} holds no {file}: {name} is {', '.join(source.files)}, there "
                f"or in a folder {source.folder}; {way_out}"
            )
    return list(paths.values())


def _labelled(path: pathlib.Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels as int32, none of them out of range."""
    worst = int(labels.argmax())
    if labels[worst] >= num_classes:
        raise DataError(
            f"{path} is corrupt, or another data set: label {worst} is "
            f"{labels[worst]}, expected 0 to {num_classes - 1}; fetch it again"
        )
    return labels.astype(np.int32)


def _idx_split(images_path: pathlib.Path, labels_path: pathlib.Path) -> Split:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{images_path} and {labels_path} do not belong together: shapes "
            f"{images.shape} and {labels.shape}, expected (n, h, w) and (n,); fetch "
            "them again"
        )
    return images[..., None], _labelled(labels_path, labels, 10)


def _cifar_file(path: pathlib.Path, coarse: bool) -> Split:
    """Records of two labels, then R, G and B planes -> images and one of the labels."""
    try:
        raw = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(raw) == 0 or len(raw) % (2 + PIXELS):
        raise DataError(
            f"{path} is truncated, or not of the binary version: {len(raw)} bytes, "
            f"expected a multiple of {2 + PIXELS} (2 label and {PIXELS} pixel bytes "
            "per image); fetch it again"
        )
    records = raw.reshape(-1, 2 + PIXELS)
    labels = [_labelled(path, records[:, i], size) for i, size in enumerate((20, 100))]
    planes = records[:, 2:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels[not coarse]


def load(name: str, folder: str | os.PathLike, *, coarse: bool = False) -> Dataset:
    """A data set of images; `coarse` takes CIFAR-100's 20 labels, not its 100."""
    if name == "tinyshakespeare":
        raise ValueError("tinyshakespeare has no images: use load_text")
    if coarse and name != "cifar-100":
        raise ValueError(f"only cifar-100 has coarse labels, {name} has not")
    paths = _find(name, folder)
    if name == "cifar-100":
        train, test = (_cifar_file(path, coarse) for path in paths)
        return Dataset(name, train, test, 20 if coarse else 100)
    train, test = _idx_split(*paths[:2]), _idx_split(*paths[2:])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{paths[0]} and {paths[2]} do not belong together: images of "
            f"{train[0].shape[1:3]} and {test[0].shape[1:3]} pixels; fetch them again"
        )
    return Dataset(name, train, test, 10)


def load_text(folder: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, str]:
    """Tinyshakespeare: tokens to train and, the last tenth, to test; the characters."""
    (path,) = _find("tinyshakespeare", folder)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    expected = SOURCES["tinyshakespeare"].md5["input.txt"]
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is truncated or not tinyshakespeare: md5 {found} of "
            f"{len(raw)} bytes, expected {expected}; fetch it again"
        )
    text = raw.decode()
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    vocabulary, tokens = np.unique(points, return_inverse=True)
    tokens = tokens.astype(np.int32)
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:], "".join(map(chr, vocabulary))


def take(
    dataset: Dataset, num_train: int | None = None, num_test: int | None = None
) -> Dataset:
    """A subset: as many of every class for training, the first for testing.

    Training examples come class by class in turn, the first classes having one more
    where need be. None means all, in the file's order.
    """
    (images, labels), test = dataset.train, dataset.test
    if num_train is not None:
        if num_train < 1:
            raise ValueError(f"num_train is {num_train}, expected at least 1")
        counts = np.bincount(labels, minlength=dataset.num_classes)
        wanted = (num_train + np.arange(dataset.num_classes)[::-1]) // len(counts)
        if (counts < wanted).any():
            short = int(np.argmax(wanted - counts))
            raise ValueError(
                f"num_train is {num_train}, which needs {wanted[short]} examples of "
                f"class {short}; {dataset.name} has {counts[short]}: take at most "
                f"{counts.min() * dataset.num_classes}, or all by num_train=None"
            )
        by_class = np.argsort(labels, kind="stable")
        rank = np.empty(len(labels), np.int64)
        rank[by_class] = np.concatenate([np.arange(n) for n in counts])
        chosen = np.lexsort((labels, rank))[:num_train]
        images, labels = images[chosen], labels[chosen]
    if num_test is not None:
        if not 1 <= num_test <= len(test[1]):
            raise ValueError(
                f"num_test is {num_test}, expected 1 to {len(test[1])}, as many as "
                f"{dataset.name} has"
            )
        test = test[0][:num_test], test[1][:num_test]
    return dataset._replace(train=(images, labels), test=test)


def long_tail(labels: np.ndarray, ratio: float, first: int = 0) -> np.ndarray:
    """Rows of a long-tailed part: class sizes that fall exponentially, by `ratio`.

    Of K classes, in turn from class `first` on, the k-th from 0 keeps its first
    n ratio^(-k / (K - 1)), n the size of the smallest class. The order is as it was.
    """
    counts = np.bincount(labels)
    if not (ratio >= 1 and len(counts) > 1 and 0 <= first < len(counts)):
        raise ValueError(
            f"ratio is {ratio} and first {first} of {len(counts)} classes, expected a "
            "ratio of at least 1, and one of two classes or more"
        )
    shares = ratio ** (-np.arange(len(counts)) / (len(counts) - 1))
    wanted = np.roll(np.rint(counts.min() * shares).astype(int), first)
    rows = [np.flatnonzero(labels == k)[:n] for k, n in enumerate(wanted)]
    return np.sort(np.concatenate(rows))


def _pool(images: np.ndarray, pool: int) -> np.ndarray:
    n, h, w, c = images.shape
    if pool == 1:
        return images.astype(np.float32)
    blocks = images.reshape(n, h // pool, pool, w // pool, pool, c)
    return blocks.mean((2, 4), dtype=np.float32)


def standardise(dataset: Dataset, pool: int = 1) -> tuple[Split, Split]:
    """Means of `pool` x `pool` pixels, with mean 0 and deviation 1 in every channel.

    Mean and deviation are the training set's, over its images and pixels.
    """
    h, w = dataset.train[0].shape[1:3]
    if pool < 1 or h % pool or w % pool:
        raise ValueError(f"pool is {pool}, expected a divisor of {h} and of {w}")
    train, test = _pool(dataset.train[0], pool), _pool(dataset.test[0], pool)
    # Within an image in float32, over images in float64.
    mean = train.mean((1, 2)).mean(0, dtype=np.float64).astype(np.float32)
    train -= mean
    square = np.einsum("nhwc,nhwc->nc", train, train).mean(0, dtype=np.float64)
    deviation = np.sqrt(square / math.prod(train.shape[1:3])).astype(np.float32)
    if not deviation.all():
        raise ValueError(
            f"channel {int(deviation.argmin())} of {dataset.name} is constant over the "
            "training images: it cannot be brought to deviation 1"
        )
    train /= deviation
    test -= mean
    test /= deviation
    return (train, dataset.train[1]), (test, dataset.test[1])
