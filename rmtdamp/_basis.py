"""Vectors in few arrays, and blocks of them: what Krylov and sketching methods need.

    pytree  --pack-->  small leaves joined, large ones as they are  --unpack-->  pytree

Algorithms hold their vectors packed. An operation on a pytree is a kernel per leaf, and
each takes XLA a tenth of a second to compile on a CPU: the step of `eigsh` on a network
of 17 leaves took longer to compile than its Hessian-vector product. Large leaves stay
apart: a copy costs more than a kernel there. So do all leaves on a mesh of devices: one
that is split would have to be gathered to be joined.

A block of vectors has a leading axis, a row for each. Its rows are contracted by dots,
over as many axes as they have: XLA:CPU sums over a leading axis a thousand times
slower, and a reshape would gather what is split. Dots are made at the highest
precision, for recent GPUs round their inputs to ten bits otherwise (TF32).
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ._sharding import (
    automatic,
    explicitly_split,
    may_be_split,
    placed,
    placement,
    whole,
)
from ._tree import SMALL, accumulation_dtype, norm, random_like, scale
from ._types import Key, Params

# What is left of a vector within a space is rounding: tens of epsilons, for products
# are sums of many rounded terms.
BREAKDOWN = 64


def _joined(like: Params, small: int, anywhere: bool) -> list[bool]:
    leaves = jax.tree.leaves(like)
    fits = lambda x: math.prod(x.shape) <= small
    return [fits(x) and (anywhere or not may_be_split(x)) for x in leaves]


def pack(
    tree: Params, like: Params, small: int = SMALL, *, anywhere: bool = False
) -> list[jax.Array]:
    """A vector as few arrays.

    Args:
        tree: the vector.
        like: pytree whose leaves say what is joined: those that are small and, unless
            `anywhere`, not on a mesh of devices.
        small: the most elements of a leaf that is joined.
        anywhere: whether a leaf on a mesh is joined too, whole on every device.

    Returns:
        Arrays in the accumulation dtype of `tree`.
    """
    dtype = accumulation_dtype(tree)
    leaves = [x.astype(dtype) for x in jax.tree.leaves(tree)]
    each = list(zip(leaves, _joined(like, small, anywhere), strict=True))
    joined = [jnp.ravel(whole(x, x) if anywhere else x) for x, yes in each if yes]
    apart = [x for x, yes in each if not yes]
    return [jnp.concatenate(joined), *apart] if joined else apart


def unpack(
    vector: list[jax.Array], like: Params, small: int = SMALL, *, anywhere: bool = False
) -> Params:
    """What was packed, in the structure of `like`; leading axes and the dtype stay."""
    leaves, treedef = jax.tree.flatten(like)
    joined = _joined(like, small, anywhere)
    sizes = [math.prod(x.shape) for x, yes in zip(leaves, joined, strict=True) if yes]
    apart, pieces = iter(vector), iter(())
    if sizes:
        pieces = iter(jnp.split(next(apart), np.cumsum(sizes)[:-1], axis=-1))
    found = []
    for leaf, yes in zip(leaves, joined, strict=True):
        x = next(pieces) if yes else next(apart)
        if yes:
            x = jnp.reshape(x, (*x.shape[:-1], *leaf.shape))
            x = whole(x, leaf) if anywhere else x
        found.append(x)
    return placed(jax.tree.unflatten(treedef, found), like)


def draw(key: Key, like: Params, sampler, number=None) -> list[jax.Array]:
    """A packed vector of independent draws of `sampler(key, shape, dtype)`.

    With a `number` the key is folded with it, in the same program.

    The numbers are those of one device, on whatever mesh `like` lies; each device makes
    the part of a large leaf that it holds.

    Returns:
        Arrays in the accumulation dtype of `like`.
    """
    return _draw(key, number, like, sampler, placement(like))


@functools.partial(jax.jit, static_argnames=("sampler", "where"))
def _draw(key, number, like, sampler, where):
    key = key if number is None else jax.random.fold_in(key, number)
    parts = jax.eval_shape(functools.partial(pack, anywhere=True), like, like)
    parts = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in parts]
    if len(parts) == 1:  # A key less to derive is half a draw less to compile.
        drawn = [sampler(key, parts[0].shape, parts[0].dtype)]
    else:
        drawn = random_like(key, parts, sampler)
    if _joined(like, SMALL, True) != _joined(like, SMALL, False):
        drawn = pack(unpack(drawn, like, anywhere=True), like)
    return lay(drawn, like, where)


def lay(vector: list, like: Params, where: tuple) -> list:
    """A packed vector where `like` lies, whose placement is `where`."""
    split = [not yes for yes in _joined(like, SMALL, False)]
    apart = list(itertools.compress(jax.tree.leaves(like), split))
    where = tuple(itertools.compress(where, split))
    start = len(vector) - len(apart)
    return [*vector[:start], *placed(vector[start:], apart, where)]


def zeros(like: Params, *rows: int) -> Params:
    """A block of vectors like `like`, all zero; without `rows`, one vector."""
    wide = lambda x: jnp.broadcast_to(x, (*rows, *x.shape)) if rows else x
    # Zeros like an array lie where it does, and so does what they are spread to.
    return jax.tree.map(lambda x: wide(jnp.zeros_like(x)), like)


def row(basis: Params, i) -> Params:
    """Vector i of a block."""
    return jax.tree.map(lambda q: q[i], basis)


def store(basis: Params, i, vector: Params) -> Params:
    """The block with vector i replaced; in place where the block is donated."""
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda q, x: put(q, x.astype(q.dtype), i, 0), basis, vector)


def project(basis: Params, vector: Params) -> jax.Array:
    """Q^T x for a block of rows q_i: shape (rows,)."""

    def dots(q, x):
        axes = tuple(range(1, q.ndim)), tuple(range(x.ndim))
        dot = functools.partial(
            jax.lax.dot_general, dimension_numbers=(axes, ((), ())), precision="highest"
        )
        return automatic(dot, lambda: explicitly_split(q), q, x)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dots, basis, vector)))


def combine(coefficients: jax.Array, basis: Params) -> Params:
    """sum_i c_i q_i, or several such sums for a matrix (num_sums, rows)."""
    return jax.tree.map(
        lambda q: jnp.tensordot(
            coefficients.astype(q.dtype), q, axes=1, precision="highest"
        ),
        basis,
    )


def remove(basis: Params, vector: Params, coefficients: jax.Array) -> Params:
    """The vector less sum_i c_i q_i."""
    return jax.tree.map(jnp.subtract, vector, combine(coefficients, basis))


def orthogonalise(
    basis: Params, vector: Params, passes: int = 2
) -> tuple[Params, jax.Array]:
    """By Gram and Schmidt, (I - Q Q^T) x and Q^T x."""
    # Two passes are enough: the second takes off what rounding left in the first, which
    # is all there is where x lies almost within the span.
    coefficients = project(basis, vector)
    vector = remove(basis, vector, coefficients)
    for _ in range(passes - 1):
        again = project(basis, vector)
        vector = remove(basis, vector, again)
        coefficients = coefficients + again
    return vector, coefficients


def magnitude(vector: Params) -> jax.Array:
    """The largest magnitude of an element, or 1: what to divide by before squaring."""
    # The square of 1e25 is beyond float32, and that of 1e-25 below it.
    largest = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(vector)]
    largest = functools.reduce(jnp.maximum, largest, 0.0)
    return jnp.where(largest > 0, largest, 1)


def normalised(vector: Params) -> tuple[Params, jax.Array]:
    """X / ||x|| and ||x||, also where the square is out of range; zero stays zero."""
    unit = magnitude(vector)
    x = scale(1 / unit, vector)
    length = norm(x)
    positive = length > 0
    x = scale(jnp.where(positive, 1 / jnp.where(positive, length, 1), 0), x)
    return x, unit * length
