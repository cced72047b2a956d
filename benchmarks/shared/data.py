"""A folder of files in their original formats -> uint8 images, labels, tokens.

MNIST, Fashion-MNIST (idx), CIFAR-10, CIFAR-100 (the binary version; nothing is ever
unpickled) and tinyshakespeare. Every `folder` is either the data set's own or the one
that has it under its usual name: `DATA/mnist` or `DATA`. A file that is missing,
truncated, corrupt or another one is a DataError that names it.
"""

import functools
import hashlib
import math
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp.demo._data import DataError, read_idx

from .sources import PIXELS, SOURCES, source_of

Split = tuple[np.ndarray, np.ndarray]


class Dataset(NamedTuple):
    """Training and test examples as they are in the files."""

    name: str
    train: Split  # (n, h, w, c) uint8, (n,) int32
    test: Split
    num_classes: int


def _find(name: str, folder: str | os.PathLike) -> list[pathlib.Path]:
    """The paths of the data set's files, each checked to exist."""
    source, folder = source_of(name), pathlib.Path(folder)
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
    paths = []
    for file in source.files:
        names = [x for x in (f"{file}.gz", file) if x in (*source.md5, file)]
        found = [folder / x for x in names if (folder / x).exists()]
        if not found:
            raise DataError(
                f"{folder} holds no {file}: {name} is {', '.join(source.files)}, there "
                f"or in a folder {source.folder}; {way_out}"
            )
        paths.append(found[0])
    return paths


def _labelled(path: pathlib.Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels as int32, none of them out of range."""
    if len(labels) == 0:
        raise DataError(f"{path} is empty: it has no labels; fetch it again")
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


def _cifar_file(path: pathlib.Path, sizes: tuple[int, ...], column: int) -> Split:
    """Records of label bytes, then R, G, B planes -> images and one of the labels."""
    record = len(sizes) + PIXELS
    try:
        raw = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(raw) == 0 or len(raw) % record:
        raise DataError(
            f"{path} is truncated, or not of the binary version: {len(raw)} bytes, "
            f"expected a multiple of {record} ({len(sizes)} label and {PIXELS} pixel "
            "bytes per image); fetch it again"
        )
    records = raw.reshape(-1, record)
    labels = [_labelled(path, records[:, i], size) for i, size in enumerate(sizes)]
    planes = records[:, len(sizes) :].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels[column]


def load(name: str, folder: str | os.PathLike, *, coarse: bool = False) -> Dataset:
    """A data set of images; `coarse` takes CIFAR-100's 20 labels, not its 100."""
    if name == "tinyshakespeare":
        raise ValueError("tinyshakespeare has no images: use load_text")
    if coarse and name != "cifar-100":
        raise ValueError(f"only cifar-100 has coarse labels, {name} has not")
    paths = _find(name, folder)
    if not name.startswith("cifar"):
        train, test = _idx_split(*paths[:2]), _idx_split(*paths[2:])
        if train[0].shape[1:] != test[0].shape[1:]:
            raise DataError(
                f"{paths[0]} and {paths[2]} do not belong together: images of "
                f"{train[0].shape[1:3]} and {test[0].shape[1:3]} pixels; fetch them "
                "again"
            )
        return Dataset(name, train, test, 10)
    sizes = (10,) if name == "cifar-10" else (20, 100)
    column = 0 if coarse else len(sizes) - 1
    *parts, test = [_cifar_file(path, sizes, column) for path in paths]
    images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    return Dataset(name, (images, labels), test, sizes[column])


def load_text(
    folder: str | os.PathLike, *, any_text: bool = False
) -> tuple[np.ndarray, np.ndarray, str]:
    """Tinyshakespeare: tokens to train and, the last tenth, to test; the characters.

    `any_text` accepts another text of that name: one that is cut short cannot be told
    from a whole one but by its checksum.
    """
    (path,) = _find("tinyshakespeare", folder)
    try:
        raw = path.read_bytes()
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a text in UTF-8: {error}") from None
    if len(text) < 10:
        raise DataError(f"{path} is truncated: {len(text)} characters, expected 10")
    expected = SOURCES["tinyshakespeare"].md5["input.txt"]
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if not any_text and found != expected:
        raise DataError(
            f"{path} is truncated or not tinyshakespeare: md5 {found} of "
            f"{len(raw)} bytes, expected {expected}; fetch it again, or say "
            "any_text=True"
        )
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    vocabulary, tokens = np.unique(points, return_inverse=True)
    tokens = tokens.astype(np.int32)
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:], "".join(map(chr, vocabulary))


def take(
    dataset: Dataset, num_train: int | None = None, num_test: int | None = None
) -> Dataset:
    """A subset: as many of every class for training, the first for testing.

    Training examples come class by class in turn, the first of each class in the
    file's order; where `num_train` is no multiple of the classes, the first classes
    have one more. None means all of them, in the file's order.
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


@functools.partial(jax.jit, static_argnames="pad")
def augment(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Shift each image by up to `pad` pixels, zeros coming in; mirror every second."""
    n, h, w, c = images.shape
    shift_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(shift_key, (n, 2), 0, 2 * pad + 1, jnp.int32)
    flips = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    crop = lambda image, corner: jax.lax.dynamic_slice(
        image, (corner[0], corner[1], jnp.int32(0)), (h, w, c)
    )
    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(flips, cropped[:, :, ::-1], cropped)
