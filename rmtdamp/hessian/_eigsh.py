"""matvec -> extreme eigenpairs, by thick-restart Lanczos.

A Krylov basis of `basis_size` vectors is built with reorthogonalisation in two passes,
its wanted Ritz vectors are kept, and it is built up again from them (Wu and Simon): the
memory is that of one basis however many products are spent. The projected matrix is
taken from the projections themselves, which covers the arrow that a restart leaves.

When the Krylov space is exhausted the next vector is a random one orthogonal to the
basis, so that multiple eigenvalues come out as often as they occur.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._tree import check_params, norm, random_like, scale, size
from rmtdamp._types import Key, Matvec, Params

from ._apply import is_traced, product, widened
from ._lanczos import (
    BREAKDOWN,
    EigenPairs,
    Which,
    check_which,
    combine,
    project,
    wanted_first,
)


class _Carry(NamedTuple):
    basis: Params  # leading axis basis_size + 1
    matrix: jax.Array  # (basis_size, basis_size), upper triangle of Q^T A Q
    beta: jax.Array  # (), norm of what the last step left


def _orthogonal(basis, vector):
    """`vector` less its part in the basis, in two passes, and the projections."""
    first = project(basis, vector)
    vector = jax.tree.map(jnp.subtract, vector, combine(first, basis))
    second = project(basis, vector)
    vector = jax.tree.map(jnp.subtract, vector, combine(second, basis))
    return vector, first + second


_row = jax.jit(lambda basis, j: jax.tree.map(lambda q: q[j], basis))


@functools.partial(jax.jit, donate_argnums=0)
def _step(carry: _Carry, product: Params, j, key) -> _Carry:
    basis = carry.basis
    length = norm(product)
    rest, projections = _orthogonal(basis, product)
    beta = norm(rest)
    alive = beta > BREAKDOWN * jnp.finfo(beta.dtype).eps * length

    def restart():
        draw = random_like(key, jax.tree.map(lambda q: q[0], basis), jax.random.normal)
        return _orthogonal(basis, draw)[0]

    rest = jax.lax.cond(alive, lambda: rest, restart)
    following = scale(1 / norm(rest), rest)
    return _Carry(
        basis=jax.tree.map(lambda q, x: q.at[j + 1].set(x), basis, following),
        matrix=carry.matrix.at[:, j].set(projections[:-1]),
        beta=jnp.where(alive, beta, 0),
    )


@functools.partial(jax.jit, static_argnames=("which",))
def _ritz(matrix, beta, which: Which):
    """Ritz values and coefficient rows, the wanted ones first, and their residuals."""
    # Column j was made when only the basis up to j stood: its lower part is missing.
    values, vectors = jnp.linalg.eigh(jnp.triu(matrix) + jnp.triu(matrix, 1).T)
    order = wanted_first(values, which)
    values, rows = values[order], vectors.T[order]
    # What rounding alone leaves; the recursion's own figure can fall below it.
    floor = jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return values, rows, jnp.maximum(beta * jnp.abs(rows[:, -1]), floor)


@functools.partial(jax.jit, static_argnames="keep", donate_argnums=0)
def _restart(carry: _Carry, values, rows, keep: int) -> _Carry:
    """The first `keep` Ritz vectors, then the vector that the last step left."""

    def leaf(q):
        kept = jnp.tensordot(rows[:keep], q[:-1], axes=1, precision="highest")
        empty = jnp.zeros_like(q).at[:keep].set(kept)
        return empty.at[keep].set(q[-1])

    index = jnp.arange(keep)
    matrix = jnp.zeros_like(carry.matrix).at[index, index].set(values[:keep])
    return carry._replace(basis=jax.tree.map(leaf, carry.basis), matrix=matrix)


def eigsh(
    matvec: Matvec,
    like: Params,
    key: Key,
    *,
    k: int = 6,
    which: Which = "LA",
    tol: float | None = None,
    max_products: int | None = None,
    basis_size: int | None = None,
) -> EigenPairs:
    r"""A few eigenpairs of a symmetric matrix, with their residuals. Eager.

    Stops when the residual of each of the k pairs is below `tol` times the largest
    magnitude of a Ritz value, or when the products are spent: look at `residuals`,
    each of which bounds the distance to an eigenvalue of A.

    Cost: products, and 8 basis_size P FLOPs for each. Memory: basis_size + 1 vectors
    like `like`, twice that for a moment at a restart.

    Args:
        matvec: v -> A v with A symmetric, from `hessian_matvec` or any function of
            pytrees; a plain function is compiled once per function object.
        like: pytree of P real floating numbers, for structure, shapes and dtypes.
        key: a key of `jax.random` for the starting vector.
        k: number of eigenpairs, at most P.
        which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, as
            in SciPy; in that order.
        tol: relative residual asked for; default: 1e-4 in float32, 1e-8 in float64.
        max_products: budget; default 50 * basis_size.
        basis_size: vectors in the basis; default max(2 k + 1, 20), at most P.

    Returns:
        `EigenPairs(eigenvalues, eigenvectors, residuals, num_products)`.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: k outside 1 to P, a basis of fewer than k + 2 vectors (or P), a
            budget below the basis, an unknown `which`, or a call inside traced code.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import eigsh
        >>> diagonal = jnp.arange(100.0)
        >>> found = eigsh(lambda v: diagonal * v, diagonal, jax.random.key(0), k=2)
        >>> [round(float(x), 2) for x in found.eigenvalues]
        [99.0, 98.0]

    References:
        Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue
        problems, 2000, algorithm 3.
    """
    check_params(like)
    p = size(like)
    check_which(which)
    if not 1 <= k <= p:
        raise ValueError(f"k is {k}, and must lie between 1 and the {p} parameters")
    m = min(p, max(2 * k + 1, 20)) if basis_size is None else basis_size
    if not min(k + 2, p) <= m <= p:
        raise ValueError(
            f"basis_size is {m}, and must lie between {min(k + 2, p)} (k + 2, or P) "
            f"and the {p} parameters"
        )
    budget = 50 * m if max_products is None else max_products
    if budget < m:
        raise ValueError(
            f"max_products is {budget}, and filling a basis of {m} vectors takes {m}: "
            "raise it, or lower basis_size"
        )
    if is_traced(matvec, like, key):
        raise ValueError(
            "eigsh decides by its residuals when to stop, so it cannot be traced: call "
            "it outside jit, or take lanczos, which can"
        )
    start_key = jax.random.fold_in(key, 0)
    start = widened(random_like(start_key, like, jax.random.normal))
    start = scale(1 / norm(start), start)
    dtype = norm(start).dtype
    relative = (1e-4 if dtype == jnp.float32 else 1e-8) if tol is None else tol
    carry = _Carry(
        basis=jax.tree.map(
            lambda x: jnp.zeros((m + 1, *x.shape), x.dtype).at[0].set(x), start
        ),
        matrix=jnp.zeros((m, m), dtype),
        beta=jnp.zeros((), dtype),
    )
    spent, first = 0, 0
    while True:
        for j in range(first, m):
            index = jnp.int32(j)
            found = product(matvec, like, _row(carry.basis, index))
            carry = _step(carry, found, index, jax.random.fold_in(key, spent + 1))
            spent += 1
        values, rows, residuals = _ritz(carry.matrix, carry.beta, which)
        done = bool(jnp.all(residuals[:k] <= relative * jnp.max(jnp.abs(values))))
        # The kept vectors: the wanted ones and, to speed them up, the next half.
        first = min(k + (m - k) // 2, m - 1)
        if done or spent + m - first > budget:
            break
        carry = _restart(carry, values, rows, first)
    vectors = combine(rows[:k], jax.tree.map(lambda q: q[:-1], carry.basis))
    return EigenPairs(values[:k], vectors, residuals[:k], spent)
