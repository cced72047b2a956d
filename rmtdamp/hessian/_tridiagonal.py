"""A Q = Q T + r e^T -> Ritz values, their shares of the start, and eigenpairs."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import combine, magnitude
from rmtdamp._types import Params

Which = Literal["LA", "SA", "LM"]


class EigenPairs(NamedTuple):
    """Eigenvalues in the order asked for, with vectors and residuals.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import eigsh
        >>> diagonal = jnp.array([1.0, -5.0, 3.0])
        >>> pairs = eigsh(lambda v: diagonal * v, diagonal, jax.random.key(0), k=3)
        >>> print([f"{x:.1f}" for x in pairs.leading(2, "LM").eigenvalues])
        ['-5.0', '3.0']
    """

    eigenvalues: jax.Array  # (k,), theta
    # Stacked, a pytree whose leaves have a leading axis k; of unit norm. The first is
    # jax.tree.map(lambda x: x[0], pairs.eigenvectors).
    eigenvectors: Params
    residuals: jax.Array  # (k,), ||A x - theta x||: an eigenvalue lies this near
    num_products: int  # products spent

    def leading(self, k: int, which: Which = "LA") -> "EigenPairs":
        """The first k of these pairs, ordered as in `eigsh`. Eager."""
        check_which(which)
        order = wanted_first(np.asarray(self.eigenvalues), which)[:k]
        return _take(self, order)._replace(num_products=self.num_products)


@jax.jit
def _take(pairs: EigenPairs, order) -> EigenPairs:
    kept = jax.tree.map(lambda x: x[order], pairs._replace(num_products=None))
    return kept._replace(num_products=0)


def check_which(which: str) -> None:
    """Refuse an unknown end of the spectrum.

    Raises:
        ValueError: `which` is none of SciPy's words for it that are known here.
    """
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which is {which!r}: choose from LA, SA, LM")


def wanted_first(values: Any, which: Which) -> Any:
    """The order that puts the largest, smallest or largest in magnitude first."""
    return {"LA": -values, "SA": values, "LM": -abs(values)}[which].argsort()


class Tridiagonal(NamedTuple):
    """What Lanczos' iteration gives: A Q = Q T + residual e_last^T.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import lanczos
        >>> found = lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 2)
        >>> values, shares = found.ritz()
        >>> print([f"{x:.1f}" for x in values], [f"{x:.1f}" for x in shares])
        ['1.0', '3.0'] ['0.5', '0.5']
    """

    diagonal: jax.Array  # (num_steps,), alpha; 0 after breakdown
    off_diagonal: jax.Array  # (num_steps - 1,), beta; 0 after breakdown
    basis: Params | None  # leading axis num_steps, rows of Q^T; 0 after breakdown
    residual: Params  # like params, what is left of the last product
    residual_norm: jax.Array  # ()
    num_steps: jax.Array  # (), int32, steps before breakdown

    def matrix(self) -> jax.Array:
        """T as a dense (num_steps, num_steps) array, zero after breakdown."""
        off = self.off_diagonal
        return jnp.diag(self.diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)

    def ritz(self) -> tuple[jax.Array, jax.Array]:
        """Ritz values, ascending, and the share of `start` in each Ritz vector.

        Returns:
            Two arrays (num_steps,). The shares are the weights of the Gauss quadrature
            and sum to 1. After breakdown the last Ritz value is repeated, with share 0:
            no value appears that is not one.
        """
        return ritz(self.diagonal, self.off_diagonal, self.num_steps)

    def eigenpairs(self, k: int, which: Which = "LA") -> EigenPairs:
        """Ritz pairs, each with its residual |beta_last s_last|.

        s_last is the last entry of an eigenvector of T.

        Args:
            k: how many, at most the steps asked of `lanczos`.
            which: "LA", "SA" or "LM", as in `eigsh`.

        Returns:
            `EigenPairs`. After breakdown there may be fewer than k: the rest are the
            last of them again, with a zero vector and an infinite residual.

        Raises:
            ValueError: k out of its range, an unknown `which`, or no basis.
        """
        check_which(which)
        num_steps = self.diagonal.shape[0]
        if not 1 <= k <= num_steps:
            raise ValueError(
                f"k is {k}, and the decomposition has {num_steps} steps: ask lanczos "
                "for at least k"
            )
        if self.basis is None:
            raise ValueError(
                "the decomposition has no basis, so it has no Ritz vectors: pass "
                "keep_basis=True to lanczos"
            )
        return _eigenpairs(self, k, which)._replace(num_products=num_steps)


def _decomposed(diagonal, off_diagonal, num_steps):
    """Eigenvalues of T, ascending, and its eigenvectors as columns."""
    # At a scale of one, for eigensolvers that square, and so that the padding can lie
    # above every Ritz value (3 by Gershgorin) and not far, and sorts to the end.
    unit = magnitude((diagonal, off_diagonal))
    steps = jnp.arange(diagonal.shape[0], dtype=jnp.int32)
    valid = steps < num_steps
    off = off_diagonal / unit
    matrix = jnp.diag(jnp.where(valid, diagonal / unit, 4))
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(off, 1) + jnp.diag(off, -1))
    values = unit * jnp.where(valid, values, values[num_steps - 1])
    return values, jnp.where(valid[None], vectors, 0)


@jax.jit
def ritz(diagonal, off_diagonal, num_steps) -> tuple[jax.Array, jax.Array]:
    """Ritz values and shares, as `Tridiagonal.ritz` says."""
    values, vectors = _decomposed(diagonal, off_diagonal, num_steps)
    return values, vectors[0] ** 2


@functools.partial(jax.jit, static_argnames=("k", "which"))
def _eigenpairs(found: Tridiagonal, k: int, which: Which) -> EigenPairs:
    values, vectors = _decomposed(found.diagonal, found.off_diagonal, found.num_steps)
    exists = jnp.any(vectors != 0, axis=0)
    # Padding stands last, whatever its value repeats.
    order = wanted_first(values, which)
    order = order[jnp.argsort(~exists[order], stable=True)][:k]
    rows, exists = vectors.T[order], exists[order]
    last = jnp.take(rows, found.num_steps - 1, axis=1)
    residuals = jnp.where(exists, jnp.abs(found.residual_norm * last), jnp.inf)
    return EigenPairs(values[order], combine(rows, found.basis), residuals, 0)
