"""A folder in its original format, or scikit-learn's digits -> arrays.

Images come out flat, float32, with the training set's mean 0 and deviation 1 over all
pixels; labels as int32.
"""

import gzip
import math
import pathlib
import zlib
from typing import NamedTuple

import numpy as np

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class DataError(ValueError):
    """A data file is missing or not what it should be; the message names it."""


class Dataset(NamedTuple):
    """Training and test examples."""

    name: str
    train: tuple[np.ndarray, np.ndarray]  # (n, pixels) float32, (n,) int32
    test: tuple[np.ndarray, np.ndarray]
    num_classes: int


def _prepare(name, train, test) -> Dataset:
    mean, deviation = train[0].mean(), train[0].std()
    flat = lambda x: ((x.reshape(len(x), -1) - mean) / deviation).astype(np.float32)
    pair = lambda split: (flat(split[0]), split[1].astype(np.int32))
    return Dataset(name, pair(train), pair(test), int(train[1].max()) + 1)


def load_digits() -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; comes with it."""
    from sklearn.datasets import load_digits as bundled

    images, labels = bundled(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    return _prepare(
        "digits", (images[:1280], labels[:1280]), (images[1280:], labels[1280:])
    )


_LARGEST = 2**31  # bytes: four times the largest set that is published as idx files


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Read an idx file of unsigned bytes in 1 to 3 dimensions, gzipped or not.

    It takes no more memory than the header promises, and at most 2 GiB.

    Returns:
        The array, uint8.

    Raises:
        DataError: the file is missing, damaged, or not of that format.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is no file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or magic[3:] not in (b"\1", b"\2", b"\3"):
                raise DataError(
                    f"{path} is not an idx file of unsigned bytes: it begins with "
                    f"{magic.hex() or 'nothing'}, not 00000801, 02 or 03"
                )
            header = file.read(4 * magic[3])
            shape = tuple(
                x.item() for x in np.frombuffer(header, ">u4", len(header) // 4)
            )
            size = math.prod(shape)
            if size > _LARGEST:
                raise DataError(
                    f"{path} promises an array of shape {shape}, {size} bytes; at most "
                    f"{_LARGEST} are read"
                )
            raw = bytearray()
            # In pieces: there may be less than promised, and in a gzip file much more.
            while len(raw) <= size and (piece := file.read(2**20)):
                raw += piece
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; fetch it again") from None
    if len(header) < 4 * magic[3] or len(raw) != size:
        raise DataError(
            f"{path} is truncated or has too much in it: {len(raw)} bytes or more "
            f"after a header that promises an array of shape {shape}; fetch it again"
        )
    if size == 0:
        raise DataError(f"{path} is empty: an array of shape {shape}; fetch it again")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def load_idx(folder: pathlib.Path) -> Dataset:
    """MNIST, Fashion-MNIST or anything in their format: four idx files, .gz or not.

    Returns:
        The data set, named after the folder.

    Raises:
        DataError: a file is missing, damaged, or disagrees with its partner.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    paths = []
    for name in _IDX_FILES:
        found = [p for p in (folder / f"{name}.gz", folder / name) if p.exists()]
        if not found:
            raise DataError(
                f"{folder} holds no {name}.gz: it needs the four idx files "
                f"{', '.join(_IDX_FILES)}, gzipped or not"
            )
        paths.append(found[0])
    arrays = [read_idx(path) for path in paths]
    for i in (0, 2):
        if arrays[i].ndim != 3 or arrays[i + 1].shape != arrays[i].shape[:1]:
            raise DataError(
                f"{paths[i]} and {paths[i + 1]} do not belong together: shapes "
                f"{arrays[i].shape} and {arrays[i + 1].shape}"
            )
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DataError(
            f"{paths[0]} and {paths[2]} do not belong together: images of "
            f"{arrays[0].shape[1:]} and {arrays[2].shape[1:]} pixels"
        )
    if arrays[3].max() > arrays[1].max():
        raise DataError(
            f"{paths[3]} has the label {arrays[3].max()}, and {paths[1]} none above "
            f"{arrays[1].max()}: fetch them again"
        )
    if arrays[0].min() == arrays[0].max():
        raise DataError(f"{paths[0]} is blank: every pixel is {arrays[0].min()}")
    train, test = (arrays[0], arrays[1]), (arrays[2], arrays[3])
    return _prepare(folder.resolve().name, train, test)
