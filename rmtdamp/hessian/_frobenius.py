"""matvec -> the Frobenius norm, from the lengths of products with random vectors."""

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import draw, magnitude, normalised
from rmtdamp._jax import is_traced
from rmtdamp._tree import check_params, rademacher
from rmtdamp._types import Key, Matvec, Params

from ._apply import multiply
from ._trace import Estimate


def frobenius_norm(
    matvec: Matvec, like: Params, key: Key, *, num_probes: int
) -> Estimate:
    r"""||A||_F = (sum_ij A_ij^2)^1/2, from `num_probes` = n products.

    For a random sign vector v, E ||A v||^2 = Tr A^T A = ||A||_F^2, for symmetric A the
    sum of its squared eigenvalues. The value is the root of the mean over n probes, and
    its standard error that of the mean over twice the value (delta method). The square
    is unbiased; the root is low by about stderr^2 / (2 value).

    Cost: n products. Memory: two vectors like `like`.

    Args:
        matvec: v -> A v, from `hessian_matvec` or any function of pytrees. A plain
            function is compiled once per function object.
        like: pytree of real floating arrays, for structure, shapes and dtypes.
        key: a key of `jax.random` for the probes.
        num_probes: n, the products to spend, at least 1.

    Returns:
        `Estimate(value, stderr)`, scalars in float32 or the dtype of `like` if wider,
        in the unit of an eigenvalue; stderr is NaN with one probe.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: fewer than one probe.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import frobenius_norm
        >>> diagonal = jnp.array([3.0, 0.0, 4.0])
        >>> matvec = lambda v: diagonal * v
        >>> frobenius_norm(matvec, diagonal, jax.random.key(0), num_probes=2).value
        Array(5., dtype=float32)

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989,
        applied to A^T A.
    """
    check_params(like)
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}, and at least 1 is needed")

    length = lambda i: _length(multiply(matvec, like, _probe(key, i, like)))
    if is_traced(matvec, like, key):
        lengths = jax.lax.map(length, jnp.arange(num_probes))
    else:
        lengths = jnp.stack([length(np.int32(i)) for i in range(num_probes)])
    return _estimate(lengths)


def _probe(key, i, like):
    return draw(key, like, rademacher, i)


@jax.jit
def _length(vector):
    return normalised(vector)[1]


@jax.jit
def _estimate(lengths) -> Estimate:
    unit, count = magnitude(lengths), len(lengths)
    squares = (lengths / unit) ** 2
    value = jnp.sqrt(jnp.mean(squares))
    if count == 1:
        return Estimate(unit * value, jnp.full_like(value, jnp.nan))
    spread = jnp.std(squares, ddof=1) / count**0.5
    positive = value > 0
    stderr = jnp.where(positive, spread / (2 * jnp.where(positive, value, 1)), 0)
    return Estimate(unit * value, unit * stderr)
