"""matvec, start -> an orthonormal basis Q and a tridiagonal T, A Q = Q T + r e^T.

Called eagerly, the steps are driven from Python, one compiled call each and nothing
waits for the device; traced, they are a loop in the graph. (XLA on a CPU runs
convolutions inside a loop some thirty times slower.)

Breakdown. When the Krylov space is exhausted, what is left of a product is rounding,
and normalising it would invent eigenvalues. So beta_i is none where it is a small
multiple of the machine's epsilon times the product's norm: as computed, for in the tail
of a decaying spectrum a product may be rounding altogether, and far more than the
(alpha_i^2 + beta_{i-1}^2 + beta_i^2)^1/2 that it is in exact arithmetic. From there on
vectors, alpha and beta are zero: shapes stay, no step is wrong, no host has to look.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import (
    BREAKDOWN,
    magnitude,
    orthogonalise,
    pack,
    store,
    unpack,
    zeros,
)
from rmtdamp._jax import is_traced
from rmtdamp._tree import aligned, check_params, norm, random_like, scale, size, vdot
from rmtdamp._types import Key, Matvec, Params

from ._apply import multiply
from ._tridiagonal import Tridiagonal

Reorthogonalization = Literal["none", "full", "twice"]
_PASSES = {"none": 0, "full": 1, "twice": 2}


class _Entries(NamedTuple):
    last_beta: jax.Array  # ()
    alphas: jax.Array  # (num_steps,)
    betas: jax.Array  # (num_steps,)
    num_steps: jax.Array  # (), int32


def _orthogonal(basis, rest, length, measure, passes: int):
    """The part of `rest` outside the span, and its norm; one pass becomes two at need.

    What a pass leaves within the span is the basis' own error times what it took off.
    Where that is more than what is left, as in the tail of a spectrum that decays to
    rounding, the error would grow at each step, by as much (Kahan and Parlett).

    Returns:
        That part, and its length as `measure` has it; `length` is that of `rest`.
    """
    once, _ = orthogonalise(basis, rest, passes)
    left = measure(once)
    if passes > 1:
        return once, left

    def again():
        twice, _ = orthogonalise(basis, once, 1)
        return twice, measure(twice)

    return jax.lax.cond(left < length / 2, again, lambda: (once, left))


def _step(basis, previous, vector, product, entries: _Entries, i, passes: int):
    """q_{i+1}, or 0 after breakdown, from q_{i-1}, q_i and A q_i."""
    alpha, last_beta = vdot(vector, product), entries.last_beta
    # What is left is no larger than twice the product.
    unit = magnitude(product)
    rest = jax.tree.map(
        lambda y, q, p: y - alpha * q - last_beta * p, product, vector, previous
    )
    measure = lambda x: unit * norm(scale(1 / unit, x))
    beta = measure(rest)
    whole = jnp.hypot(jnp.hypot(alpha, last_beta), beta)
    if passes:
        rest, beta = _orthogonal(basis, rest, beta, measure, passes)
    alive = beta > BREAKDOWN * jnp.finfo(beta.dtype).eps * whole
    beta = jnp.where(alive, beta, 0)
    started = (i == 0) | (last_beta > 0)
    following = scale(jnp.where(alive, 1 / jnp.where(alive, beta, 1), 0), rest)
    if basis is not None:
        # After the basis was read: XLA:CPU is ten times slower the other way round.
        put = lambda q, x: q.at[i + 1].set(x, mode="drop")
        basis = jax.tree.map(put, basis, following)
    entries = _Entries(
        last_beta=beta,
        alphas=entries.alphas.at[i].set(alpha),
        betas=entries.betas.at[i].set(beta),
        num_steps=entries.num_steps + started.astype(jnp.int32),
    )
    return basis, following, entries


# Of the vectors q_{i-1} alone is donated, and becomes q_{i+1}: a product may be the
# very buffer of the q_i that it was made from.
_compiled_step = jax.jit(_step, static_argnames="passes", donate_argnums=(0, 1))


def lanczos(
    matvec: Matvec,
    start: Params,
    num_steps: int,
    *,
    reorthogonalization: Reorthogonalization = "full",
    keep_basis: bool | None = None,
) -> Tridiagonal:
    r"""Lanczos' iteration from a given vector.

    Builds q_1 = start / ||start||, q_2, ... with A Q = Q T + r e_last^T, Q orthonormal
    and T symmetric tridiagonal. The eigenvalues of T (Ritz values) approach the outer
    eigenvalues of A first; with their first components they are a Gauss quadrature of
    the spectrum as `start` sees it.

    In floating point Q loses its orthogonality once a Ritz value has converged, and
    copies of it appear. "full" subtracts, at each step, what is left along the earlier
    vectors, and once more where that was more than half; "twice" does so twice in every
    step; "none" keeps the three-term recursion, which is enough for a spectral density.

    Cost: `num_steps` products, and 4 (8 for "twice") num_steps^2 P FLOPs. Memory: four
    vectors like `start`, and `num_steps` more for the basis.

    Args:
        matvec: v -> A v with A symmetric, from `hessian_matvec` or any function of
            pytrees; a plain function is compiled once per function object.
        start: pytree of real floating arrays, any length but zero; products are made
            in its dtypes, all else in float32 or wider.
        num_steps: size of T, at most P.
        reorthogonalization: "none", "full" or "twice".
        keep_basis: whether to return Q; default: as `reorthogonalization` needs it.

    Returns:
        `Tridiagonal`; after breakdown (the Krylov space is exhausted) its entries are
        zero and `num_steps` says how many are not.

    Raises:
        TypeError: `start` holds anything but real floating arrays.
        ValueError: fewer than one step or more than P, an unknown
            `reorthogonalization`, or (eagerly) a start that is zero or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import lanczos
        >>> diagonal = jnp.array([1.0, 2.0, 5.0])
        >>> found = lanczos(lambda v: diagonal * v, jnp.ones(3), 3)
        >>> [round(float(x), 4) for x in found.ritz()[0]]
        [1.0, 2.0, 5.0]

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, sections 10.1 and 10.3.
    """
    check_params(start)
    passes = check_options(num_steps, size(start), reorthogonalization)
    keep = passes > 0 if keep_basis is None else keep_basis or passes > 0
    found = iterate(matvec, start, _packed(start), num_steps, passes, keep)
    return _finish(*found, start)


@jax.jit
def _packed(start: Params) -> list:
    return pack(start, start)


@functools.partial(jax.jit, static_argnames=("num_steps", "keep"))
def _begin(start: list, num_steps: int, keep: bool):
    """The state before the first step, and the norm of `start`."""
    unit = magnitude(start)
    first = scale(1 / unit, start)
    length = norm(first)
    first = scale(1 / length, first)
    basis = store(zeros(first, num_steps), 0, first) if keep else None
    entries = _Entries(
        last_beta=jnp.zeros_like(length),
        alphas=jnp.zeros(num_steps, length.dtype),
        betas=jnp.zeros(num_steps, length.dtype),
        num_steps=jnp.zeros((), jnp.int32),
    )
    return (basis, zeros(first), first, entries), unit * length


def iterate(
    matvec: Matvec, like: Params, start: list, num_steps: int, passes=0, keep=False
):
    """Basis, vector after the last and entries of T, from a packed `start`."""
    state, length = _begin(start, num_steps, keep)
    if not is_traced(length) and not (0 < float(length) < float("inf")):
        raise ValueError(
            f"start has norm {float(length)}: Lanczos' iteration needs a finite vector "
            "other than zero; a random one will do"
        )
    traced = is_traced(matvec, start)
    step = _step if traced else _compiled_step

    def take(i, state):
        basis, previous, vector, entries = state
        del state  # a vector that is no longer needed must not be held
        found = multiply(matvec, like, vector)
        basis, following, entries = step(
            basis, previous, vector, found, entries, i, passes=passes
        )
        return basis, vector, following, entries

    if traced:
        state = jax.lax.fori_loop(0, num_steps, take, state)
    else:
        for i in range(num_steps):
            state = take(np.int32(i), state)
    basis, _, vector, entries = state
    return basis, vector, entries


@jax.jit
def _finish(basis, vector, entries: _Entries, like: Params) -> Tridiagonal:
    return Tridiagonal(
        diagonal=entries.alphas,
        off_diagonal=entries.betas[:-1],
        basis=None if basis is None else unpack(basis, like),
        residual=unpack(scale(entries.last_beta, vector), like),
        residual_norm=entries.last_beta,
        num_steps=entries.num_steps,
    )


def check_options(num_steps: int, p: int, reorthogonalization: str) -> int:
    """How often to reorthogonalise; refuses a Krylov space that cannot be."""
    if reorthogonalization not in _PASSES:
        raise ValueError(
            f"reorthogonalization is {reorthogonalization!r}: choose from "
            f"{', '.join(_PASSES)}"
        )
    if not 1 <= num_steps <= p:
        raise ValueError(
            f"num_steps is {num_steps}, and must lie between 1 and the {p} parameters"
        )
    return _PASSES[reorthogonalization]


def check_symmetric(
    matvec: Matvec, like: Params, key: Key, *, rtol: float = 1e-3
) -> None:
    """Raise if x^T (A y) and y^T (A x) differ for two random vectors. Eager.

    Lanczos' iteration, `eigsh` and `spectral_density` assume a symmetric matrix and
    cannot see that it is not; two products show it.

    Args:
        matvec: the product to be checked.
        like: pytree of real floating arrays, for structure, shapes and dtypes.
        key: a key of `jax.random`.
        rtol: allowed difference, relative to ||x|| ||A y||.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: the matrix is not symmetric, or not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import check_symmetric
        >>> matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> check_symmetric(lambda v: matrix @ v, jnp.zeros(2), jax.random.key(0))
        Traceback (most recent call last):
            ...
        ValueError: the matvec is not symmetric: ...
    """
    check_params(like)
    first, second = jax.random.split(key)
    x = random_like(first, like, jax.random.normal)
    y = random_like(second, like, jax.random.normal)
    product_x, product_y = aligned(matvec(x), like), aligned(matvec(y), like)
    left, right = float(vdot(x, product_y)), float(vdot(y, product_x))
    bound = rtol * float(norm(x) * norm(product_y))
    if not math.isfinite(left + right + bound):
        raise ValueError(
            f"the matvec is not finite: x^T A y = {left} and y^T A x = {right} for two "
            "random vectors; look at the loss, the data and the params"
        )
    if not abs(left - right) <= bound:
        raise ValueError(
            f"the matvec is not symmetric: x^T A y = {left:.6g} and y^T A x = "
            f"{right:.6g} for two random vectors, a difference above {bound:.2g}; "
            "Lanczos' iteration needs a symmetric matrix"
        )
