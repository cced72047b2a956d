"""matvec -> the whole matrix, where P is small; matrix -> eigenpairs, matvec, moments.

With some hundreds of parameters the P products that make up the matrix cost less than
the estimates of its trace, its extreme eigenvalues and its density, and what they give
is exact. Rows and columns are in the order of `jax.flatten_util.ravel_pytree`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import pack, unpack
from rmtdamp._tree import accumulation_dtype, aligned, check_params, size
from rmtdamp._types import Matvec, Params

from ._apply import HostMatvec, as_argument
from ._moments import HessianMoments
from ._tridiagonal import EigenPairs

# Products in one call: below that, small models leave a machine idle.
_AT_ONCE = 128


def _tree(vector, like):
    return aligned(unpack([vector], like, size(like), anywhere=True), like)


def _flat(tree, like):
    return pack(aligned(tree, like), like, size(like), anywhere=True)[0]


_tree_jitted, _flat_jitted = jax.jit(_tree), jax.jit(_flat)


@functools.partial(jax.jit, static_argnames="count")
def _columns(matvec, like, first, count: int):
    """Columns `first` to `first` + `count` of the matrix, as rows."""
    rows = first + jnp.arange(count, dtype=jnp.int32)
    units = rows[:, None] == jnp.arange(size(like), dtype=jnp.int32)[None]
    one = lambda e: _flat(matvec(_tree(e, like)), like)
    return jax.vmap(one)(units.astype(accumulation_dtype(like)))


def to_dense(matvec: Matvec, like: Params, *, max_size: int = 20_000) -> np.ndarray:
    r"""The matrix of a matvec, from its products with the P unit vectors. Eager.

    Cost: P products, 128 in one compiled call (a data set's: one by one). Memory: P^2
    numbers, 4 MB for P = 1,000, and what 128 products need.

    Args:
        matvec: v -> A v, from `hessian_matvec` or any function of pytrees.
        like: pytree of P real floating numbers, for structure, shapes and dtypes.
        max_size: the largest P that is taken; at 20,000 the matrix has 1.6 GB.

    Returns:
        A, shape (P, P), in float32 or the dtype of `like` if wider, on the host.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: P is above `max_size`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import hessian_matvec, to_dense
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> matvec = hessian_matvec(loss_fn, jnp.zeros(2), batch)
        >>> print(to_dense(matvec, jnp.zeros(2)))
        [[1. 0.]
         [0. 4.]]
    """
    check_params(like)
    p = size(like)
    if p > max_size:
        memory = p**2 * accumulation_dtype(like).itemsize / 1e9
        raise ValueError(
            f"the matrix of {p} parameters would take {memory:.3g} GB and as many "
            "products: take eigsh, spectral_density or trace, restrict to a layer "
            f"(rmtdamp.hessian.restrict), or raise max_size, which is {max_size}"
        )
    if isinstance(matvec, HostMatvec):
        columns = [
            _flat_jitted(matvec(_tree_jitted(unit, like)), like)[None]
            for unit in np.eye(p, dtype=accumulation_dtype(like))
        ]
    else:
        count = min(p, _AT_ONCE)
        columns = [
            _columns(as_argument(matvec), like, np.int32(first), count)
            for first in range(0, p, count)
        ]
    return np.concatenate([np.asarray(part) for part in columns])[:p].T


def dense_matvec(matrix: Any, like: Params) -> Matvec:
    """A matrix as a function v -> A v on pytrees, the inverse of `to_dense`.

    Args:
        matrix: A, shape (P, P).
        like: pytree of P real floating numbers, for structure, shapes and dtypes.

    Returns:
        A `jax.tree_util.Partial`.

    Raises:
        ValueError: the matrix is not of that shape.
        TypeError: it is a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import dense_matvec
        >>> like = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        >>> matvec = dense_matvec([[1.0, 2.0], [2.0, 3.0]], like)
        >>> print(matvec({"a": jnp.ones(1), "b": jnp.zeros(1)}))
        {'a': Array([1.], dtype=float32), 'b': Array([2.], dtype=float32)}
    """
    matrix = _checked(matrix, like).astype(accumulation_dtype(like))
    return jax.tree_util.Partial(_multiply, jnp.asarray(matrix), like)


@jax.jit
def _multiply(matrix, like, vector):
    flat = _flat(vector, like)
    return _tree(jnp.matmul(matrix, flat, precision="highest"), like)


def _checked(matrix: Any, like: Params) -> np.ndarray:
    if callable(matrix):
        raise TypeError(
            "the matrix is a function: hand over its elements, to_dense(matvec, params)"
        )
    matrix = np.asarray(matrix, np.float64)
    p = size(like)
    if matrix.shape != (p, p):
        raise ValueError(
            f"the matrix has shape {matrix.shape}, and `like` holds {p} parameters: it "
            f"must be of shape ({p}, {p})"
        )
    return matrix


def eigh(matrix: Any, like: Params) -> EigenPairs:
    """All eigenpairs of a symmetric matrix, ascending. Eager.

    By NumPy, in float64 on the host: some P^3 10 FLOPs, a second for P = 1,000.

    Args:
        matrix: A, shape (P, P), from `to_dense`. What rounding has left of asymmetry is
            halved, and is in the residuals.
        like: pytree of P real floating numbers, for structure, shapes and dtypes.

    Returns:
        `EigenPairs` of all P eigenvalues; `leading` picks the first of them in another
        order. NaN where the matrix is not finite.

    Raises:
        ValueError: the matrix is not of that shape.
        TypeError: it is a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import eigh
        >>> print(eigh([[2.0, 1.0], [1.0, 2.0]], jnp.zeros(2)).eigenvalues)
        [1. 3.]
    """
    matrix = _checked(matrix, like)
    if not np.all(np.isfinite(matrix)):
        matrix = np.full_like(matrix, np.nan)
        values, vectors = matrix[0], matrix
    else:
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    residuals = np.linalg.norm(matrix @ vectors - vectors * values[None], axis=0)
    dtype = accumulation_dtype(like)
    return EigenPairs(
        jnp.asarray(values, dtype),
        _unpacked(vectors.T.astype(dtype), like),
        jnp.asarray(residuals, dtype),
        0,
    )


@jax.jit
def _unpacked(rows, like):
    return unpack([rows], like, size(like), anywhere=True)


def dense_moments(
    hessians: Sequence[Any], *, microbatch_size: int, batch_size: int
) -> HessianMoments:
    r"""What `moments` measures, from the Hessians of n microbatches: exact traces.

    With H_i the Hessian of microbatch i and Hbar their mean, P^-1 Tr Hbar and
    m = (b/B) (n-1)^-1 sum_i P^-1 ||H_i - Hbar||_F^2: `moments`, averaged over all
    probes.

    Args:
        hessians: n matrices of shape (P, P), such as `to_dense` gives, n at least 2.
        microbatch_size: b, examples of a microbatch.
        batch_size: B, examples of the batch whose Hessian's variance is asked for.

    Returns:
        `HessianMoments`; `probe_stderr` is 0, for there are no probes.

    Raises:
        ValueError: fewer than two matrices.

    Example:
        >>> import numpy as np
        >>> from rmtdamp.hessian import dense_moments
        >>> pair = np.diag([1.0, 1.0]), np.diag([3.0, 3.0])
        >>> found = dense_moments(pair, microbatch_size=4, batch_size=8)
        >>> print(found.mean, found.variance)
        2.0 1.0
    """
    n = len(hessians)
    if n < 2:
        raise ValueError(f"there are {n} Hessians, and a variance needs at least 2")
    p = len(hessians[0])
    mean = np.mean(hessians, axis=0, dtype=np.float64)
    terms = np.array([np.sum((h - mean) ** 2) for h in hessians]) / p
    variance = np.sum(terms) / (n - 1)
    rescale = microbatch_size / batch_size
    jackknife = np.nan
    if n > 2:  # the delete-one jackknife of a sample variance, in closed form
        spread = np.sum((terms - np.mean(terms)) ** 2)
        jackknife = np.sqrt(spread * n / (n - 1)) * rescale / (n - 2)
    return HessianMoments(
        mean=jnp.asarray(np.trace(mean) / p),
        square=jnp.asarray(np.sum(mean**2) / p - variance / n),
        variance=jnp.asarray(variance * rescale),
        probe_stderr=jnp.zeros(()),
        microbatch_stderr=jnp.asarray(jackknife),
    )
