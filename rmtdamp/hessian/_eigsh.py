"""matvec -> extreme eigenpairs, by thick-restart Lanczos.

A Krylov basis of `basis_size` vectors is built with reorthogonalisation in two passes,
its wanted Ritz vectors are kept, and it is built up again from them (Wu and Simon): the
memory is that of one basis however many products are spent. The projected matrix is
taken from the projections themselves, which covers the arrow that a restart leaves.

When the Krylov space is exhausted the next vector is made of a random one, orthogonal
to the basis, so that multiple eigenvalues come out as often as they occur.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import (
    BREAKDOWN,
    combine,
    draw,
    magnitude,
    orthogonalise,
    store,
    unpack,
    zeros,
)
from rmtdamp._checks import check_range
from rmtdamp._jax import is_traced
from rmtdamp._sharding import automatic, typed_like
from rmtdamp._tree import check_params, norm, scale, scattered, size
from rmtdamp._types import Key, Matvec, Params

from ._apply import multiply
from ._tridiagonal import EigenPairs, Which, check_which, wanted_first


class _Carry(NamedTuple):
    basis: list  # leading axis basis_size + 1
    matrix: jax.Array  # (basis_size, basis_size), upper triangle of Q^T A Q
    beta: jax.Array  # (), norm of what the last step left


@functools.partial(jax.jit, static_argnames="m")
def _begin(start, m: int) -> tuple[_Carry, list]:
    length = norm(start)
    start = scale(1 / length, start)
    basis = store(zeros(start, m + 1), 0, start)
    matrix = jnp.zeros((m, m), length.dtype)
    return _Carry(basis, matrix, jnp.zeros_like(length)), start


class _Attempt(NamedTuple):
    tries: jax.Array  # (), 1 where the product was taken, more for a random vector
    rest: list  # what it has beside the basis
    length: jax.Array  # (), of the rest
    alive: jax.Array  # (), whether that is more than rounding
    column: jax.Array  # (basis_size + 1,), the product's part along the basis


@functools.partial(jax.jit, donate_argnums=0)
def _step(carry: _Carry, product, spare, j, number) -> tuple[_Carry, list]:
    """Column j of the matrix, and the next vector, from A q_j."""
    unit = magnitude(product)
    product = scale(1 / unit, product)
    # Shifts of a random vector are as good as new ones. One may have been used before.
    roll = lambda x, n: jnp.roll(x, n, axis=int(np.argmax(x.shape))) if x.ndim else x
    rolled = lambda x, n: automatic(roll, lambda: typed_like(x), x, n)
    shift = lambda n: jax.tree.map(lambda x: rolled(x, number + n), spare)

    def attempt(last: _Attempt) -> _Attempt:
        first = last.tries == 0
        vector = jax.lax.cond(first, lambda _: product, shift, last.tries)
        rest, along = orthogonalise(carry.basis, vector)
        length = norm(rest)
        whole = jnp.hypot(jnp.linalg.norm(along), length)
        return _Attempt(
            tries=last.tries + 1,
            rest=rest,
            length=length,
            alive=length > BREAKDOWN * jnp.finfo(length.dtype).eps * whole,
            column=jnp.where(first, along, last.column),
        )

    # A loop, lest the work on the basis be compiled twice.
    column = jnp.zeros(len(carry.matrix) + 1, unit.dtype)
    found = _Attempt(jnp.int32(0), product, unit, jnp.bool(False), column)
    again = lambda x: ~x.alive & (x.tries < 4)
    found = jax.lax.while_loop(again, attempt, found)
    following = scale(1 / found.length, found.rest)
    return _Carry(
        basis=store(carry.basis, j + 1, following),
        matrix=carry.matrix.at[:, j].set(unit * found.column[:-1]),
        beta=jnp.where(found.tries == 1, unit * found.length, 0),
    ), following


def _ritz(carry: _Carry, which: Which):
    """Ritz values and coefficient rows, the wanted ones first, and their residuals."""
    # On the host, which has to look anyway, and in float64: nothing to compile.
    matrix = np.asarray(carry.matrix, np.float64)
    if not np.all(np.isfinite(matrix)):
        nothing = np.full_like(matrix, np.nan)
        return nothing[0], nothing, nothing[0]
    eps = float(jnp.finfo(carry.matrix.dtype).eps)
    # Column j was made when only the basis up to j stood: its lower part is missing.
    values, vectors = np.linalg.eigh(np.triu(matrix) + np.triu(matrix, 1).T)
    order = wanted_first(values, which)
    values, rows = values[order], vectors.T[order]
    # What rounding alone leaves; the recursion's own figure can fall below it.
    floor = eps * np.max(np.abs(values))
    return values, rows, np.maximum(float(carry.beta) * np.abs(rows[:, -1]), floor)


@functools.partial(jax.jit, donate_argnums=0)
def _restart(carry: _Carry, coefficients, values, keep) -> tuple[_Carry, list]:
    """The kept Ritz vectors, then the vector that the last step left."""
    basis = combine(coefficients, carry.basis)
    last = jax.tree.map(lambda q: q[-1], carry.basis)
    matrix = jnp.diag(values)
    return _Carry(store(basis, keep, last), matrix, carry.beta), last


@jax.jit
def _ritz_vectors(rows, basis, like: Params) -> Params:
    vectors = combine(rows, jax.tree.map(lambda q: q[:-1], basis))
    return unpack(vectors, like)


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
        tol: relative residual asked for; default: 1e-4 in float32, 1e-8 in float64. No
            less than rounding can be had: 0, as in SciPy, is the dtype's epsilon.
        max_products: budget; default 50 * basis_size.
        basis_size: vectors in the basis; default max(2 k + 1, 20), at most P.

    Returns:
        `EigenPairs(eigenvalues, eigenvectors, residuals, num_products)`.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: k outside 1 to P, a basis of fewer than k + 2 vectors (or P), a
            budget below the basis, a negative `tol`, an unknown `which`, or a call
            inside traced code.

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
    check_range("tol", tol, lambda x: x >= 0, "at least 0, a relative residual")
    traced = (
        "eigsh decides by its residuals when to stop, so it cannot be traced: call it "
        "outside jit, or take lanczos, which can"
    )
    if is_traced(matvec, like, key):
        raise ValueError(traced)
    start = draw(key, like, scattered)
    carry, vector = _begin(start, m)
    dtype = carry.matrix.dtype
    relative = (1e-4 if dtype == jnp.float32 else 1e-8) if tol is None else tol
    relative = max(relative, float(jnp.finfo(dtype).eps))
    spent, first = 0, 0
    while True:
        for j in range(first, m):
            found = multiply(matvec, like, vector)
            if is_traced(found):  # by what a plain function closes over
                raise ValueError(traced)
            spent += 1
            carry, vector = _step(carry, found, start, np.int32(j), np.int32(spent))
        values, rows, residuals = _ritz(carry, which)
        # A basis of the whole space leaves nothing to restart from, and what is not
        # finite will not get any better either.
        left = np.any(residuals[:k] > relative * np.max(np.abs(values)))
        done = m == p or not left
        # The kept vectors: the wanted ones and, to speed them up, the next half.
        first = min(k + (m - k) // 2, m - 1)
        if done or spent + m - first > budget:
            break
        # One program, however many are kept.
        coefficients = np.zeros((m + 1, m + 1), dtype)
        coefficients[:first, :-1] = rows[:first]
        kept = np.where(np.arange(m) < first, values, 0).astype(dtype)
        carry, vector = _restart(carry, coefficients, kept, np.int32(first))
    return EigenPairs(
        jnp.asarray(values[:k], dtype),
        _ritz_vectors(rows[:k].astype(dtype), carry.basis, like),
        jnp.asarray(residuals[:k], dtype),
        spent,
    )
