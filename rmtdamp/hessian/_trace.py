"""matvec -> trace and diagonal, each with its standard error.

Hutch++ and XTrace first capture the large eigenvalues in an orthonormal basis, grown
vector by vector: Gram-Schmidt done twice keeps directions down to the rounding of the
products, where a Gram matrix would square the condition number, and drops the rest.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import (
    draw,
    magnitude,
    orthogonalise,
    pack,
    project,
    row,
    store,
    unpack,
    zeros,
)
from rmtdamp._jax import is_traced
from rmtdamp._tree import (
    accumulation_dtype,
    aligned,
    check_params,
    norm,
    rademacher,
    scale,
    size,
    vdot,
)
from rmtdamp._types import Key, Matvec, Params

from ._apply import multiply

_ALL = ("hutchinson", "hutch++", "xtrace")


class Estimate(NamedTuple):
    """A random estimate and the standard error that its probes, not rounding, make.

    Example:
        >>> from rmtdamp.hessian import Estimate
        >>> found = Estimate(value=3.0, stderr=0.5)
        >>> print(f"{found.value} ± {found.stderr}")
        3.0 ± 0.5
    """

    value: Params  # (), or a pytree of the shapes of params
    stderr: Params  # like value; NaN where it cannot be known


@jax.jit
def _rounded(vector, like):
    return pack(aligned(unpack(vector, like), like), like)


def _random(key, i, like, sampler) -> list:
    """Random vector i, packed: folding in lets it be drawn again rather than kept."""
    # Drawn in float32 at least, for eight random bits do not make a normal number, and
    # rounded as the product will round it.
    return _rounded(draw(key, like, sampler, i), like)


_row, _store = jax.jit(row), jax.jit(store, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("width", "diagonal"))
def _begin(like, width: int, diagonal: bool):
    """Empty basis and R of a sketch; three zeros to add to."""
    dtype, vector = accumulation_dtype(like), jax.eval_shape(pack, like, like)
    # Made anew for each use, for their buffers are donated.
    zero = lambda: zeros(vector) if diagonal else jnp.zeros((), dtype)
    sketch = zeros(vector, width), jnp.zeros((width, width), dtype)
    return sketch, (zero(), zero(), zero())


@functools.partial(jax.jit, donate_argnums=0)
def _extend(carry, i, vector):
    """Row i of the basis Q and column i of R from y_i, so that y_i = Q r_i."""
    basis, r = carry
    unit = magnitude(vector)
    vector = scale(1 / unit, vector)
    rest, coefficients = orthogonalise(basis, vector)
    height = norm(rest)
    # What is left of a dependent vector is rounding, of any direction: leave a zero.
    kept = height > 4 * jnp.finfo(r.dtype).eps * norm(vector)
    rest = jax.tree.map(lambda a: jnp.where(kept, a / height, 0), rest)
    column = unit * coefficients.at[i].set(jnp.where(kept, height, 0))
    return store(basis, i, rest), r.at[:, i].set(column)


def _loop(step, carry, count, traced):
    """Carry <- step(carry, i): from Python if nothing is traced, else in the graph."""
    # XLA:CPU runs convolutions inside a loop some thirty times slower.
    if traced and count:
        return jax.lax.fori_loop(0, count, lambda i, carry: step(carry, i), carry)
    for i in range(count):
        carry = step(carry, np.int32(i))
    return carry


def _sketch(matvec, like, key, sketch, width, traced):
    """Q and R of A Omega for normal Omega, Q a block of `width` rows."""
    # Sign vectors may be dependent on the few coordinates that matter, normal ones not.
    image = lambda i: multiply(matvec, like, _random(key, i, like, jax.random.normal))
    extend = lambda carry, i: _extend(carry, i, image(i))
    return _loop(extend, sketch, width, traced)


@functools.partial(jax.jit, static_argnames="diagonal", donate_argnums=0)
def _add_exact(exact, basis, unit, image, diagonal):
    """Add what basis vector q and A q say of P A + A P - P A P, P = Q Q^T."""
    if not diagonal:
        return exact + vdot(unit, image)
    rest, _ = orthogonalise(basis, image, 1)
    add = lambda e, q, a, b: e + q * (a + b)
    return jax.tree.map(add, exact, unit, image, rest)


@jax.jit
def _outside(basis, vector):
    """(I - P) v."""
    return orthogonalise(basis, vector, 1)[0]


@functools.partial(jax.jit, static_argnames="diagonal", donate_argnums=0)
def _add_sample(carry, i, basis, probe, rest, image, diagonal):
    """Mean and root of summed squared deviations of the samples (Welford)."""
    mean, total = carry
    if diagonal:
        image = image if basis is None else orthogonalise(basis, image, 1)[0]
        sample = jax.tree.map(jnp.multiply, probe, image)
    else:
        sample = vdot(rest, image)
    step = jax.tree.map(jnp.subtract, sample, mean)
    last = 1 / (jnp.asarray(i, accumulation_dtype(mean)) + 1)
    mean = jax.tree.map(lambda mu, d: mu + d * last, mean, step)
    # A root, lest the squares leave the range of the dtype.
    weight = jnp.sqrt(1 - last)
    return mean, jax.tree.map(lambda t, d: jnp.hypot(t, d * weight), total, step)


@functools.partial(jax.jit, static_argnames=("count", "diagonal"))
def _finish(exact, mean, total, like, count, diagonal) -> Estimate:
    value = jax.tree.map(jnp.add, exact, mean)
    weight = (count * (count - 1)) ** -0.5 if count > 1 else jnp.nan
    stderr = jax.tree.map(lambda t: t * weight, total)
    if not diagonal:
        return Estimate(value, stderr)
    wide = lambda y, x: y.astype(accumulation_dtype(x))
    found = (jax.tree.map(wide, unpack(part, like), like) for part in (value, stderr))
    return Estimate(*found)


def _deflated(matvec, like, key, num_probes, width, diagonal, traced):
    """Exact on a basis of `width` vectors, if any, and Hutchinson on the rest."""
    first, second = jax.random.split(key)
    sketch, (exact, mean, total) = _begin(like, width, diagonal)
    basis = None
    if width:
        basis, _ = _sketch(matvec, like, first, sketch, width, traced)

    def add_exact(exact, i):
        unit = _row(basis, i)
        image = multiply(matvec, like, unit)
        return _add_exact(exact, basis, unit, image, diagonal)

    def add_sample(carry, i):
        probe = _random(second, i, like, rademacher)
        rest = probe if basis is None else _outside(basis, probe)
        image = multiply(matvec, like, rest)
        return _add_sample(carry, i, basis, probe, rest, image, diagonal)

    exact = _loop(add_exact, exact, width, traced)
    count = num_probes - 2 * width
    mean, total = _loop(add_sample, (mean, total), count, traced)
    return _finish(exact, mean, total, like, count, diagonal)


@jax.jit
def _coefficients(basis, images, key, i, like):
    """Q^T w, (A Q)^T w and ||w||^2 of normal test vector w."""
    test = _random(key, i, like, jax.random.normal)
    return project(basis, test), project(images, test), vdot(test, test)


@functools.partial(jax.jit, static_argnames="dimension")
def _leave_one_out(r, w, t, h, squares, dimension):
    """The mean over i of the estimates without vector i: the formulas of `trace`."""
    kept = jnp.diagonal(r) > 0
    full = jnp.all(kept)
    # Column i of R^-T is what the others lack: nothing once a vector was dropped, for
    # then the normal vectors span the range of H, with or without any one of them.
    filled, eye = r / magnitude(r), jnp.eye(len(r), dtype=r.dtype)
    filled = filled + jnp.diag((~kept).astype(r.dtype))
    s = jax.scipy.linalg.solve_triangular(filled, eye, trans=1)
    s = jnp.where(full, s / jnp.linalg.norm(s, axis=0)[None], 0)
    matmul = functools.partial(jnp.matmul, precision="highest")
    dot = lambda a, b: jnp.sum(a * b, axis=0)
    x = w - s * dot(s, w)[None]
    residual = dot(s, r) * dot(s, w) - dot(t, x) + dot(x, matmul(h, x))
    # The normal vector's part off the basis, brought to its expected length.
    remaining = squares - dot(x, x)
    rest = float(dimension) - (jnp.sum(kept) - jnp.where(full, 1, 0)).astype(r.dtype)
    residual = residual * rest / jnp.where(remaining > 0, remaining, 1)
    found = jnp.trace(h) - dot(s, matmul(h, s)) + residual
    unit = magnitude(found)
    spread = unit * jnp.std(found / unit, ddof=1)
    return Estimate(jnp.mean(found), spread / len(found) ** 0.5)


def _xtrace(matvec, like, key, width, traced):
    first, _ = jax.random.split(key)
    sketch, _ = _begin(like, width, False)
    basis, r = _sketch(matvec, like, first, sketch, width, traced)

    def image(carry, i):
        found = multiply(matvec, like, _row(basis, i))
        return _store_image(carry, i, basis, found)

    def coefficients(carry, i):
        return _store(carry, i, _coefficients(basis, images, first, i, like))

    images, h = _loop(image, _begin(like, width, False)[0], width, traced)
    carry = (jnp.zeros_like(r), jnp.zeros_like(r), jnp.zeros_like(r[0]))
    w, t, squares = _loop(coefficients, carry, width, traced)
    return _leave_one_out(r, w.T, t.T, h.T, squares, size(like))


@functools.partial(jax.jit, donate_argnums=0)
def _store_image(carry, i, basis, image):
    return store(carry, i, (image, project(basis, image)))


def _prepare(matvec, like, key, num_probes, method, methods):
    """Check the arguments, and return the sketch's width and what is traced."""
    check_params(like)
    if method not in methods:
        raise ValueError(f"method is {method!r}: choose from {', '.join(methods)}")
    parts = {"hutchinson": 1, "hutch++": 3, "xtrace": 2}[method]
    problem = f"num_probes is {num_probes}, and {method!r} needs "
    if num_probes < parts:
        raise ValueError(f"{problem}at least {parts}")
    if method == "xtrace" and num_probes % 2:
        raise ValueError(f"{problem}an even number: take {num_probes + 1}")
    width = num_probes // parts if parts > 1 else 0
    if width > size(like):
        raise ValueError(
            f"{problem}a sketch of {width} vectors, more than the {size(like)} elements"
            " of `like`: take fewer, or multiply with the unit vectors, which is exact"
        )
    return width, is_traced(matvec, like, key)


def trace(
    matvec: Matvec,
    like: Params,
    key: Key,
    *,
    num_probes: int,
    method: str = "hutchinson",
) -> Estimate:
    r"""The trace of a symmetric H from `num_probes` = n products with it, unbiased.

    - "hutchinson": the mean of v^T H v over n Rademacher vectors v; its variance is
      2 (||H||_F^2 - sum_i H_ii^2) / n.
    - "hutch++": with Q an orthonormal basis of H S for k = floor(n/3) normal vectors S,
      Tr(Q^T H Q) plus the mean of v^T (I - Q Q^T) H (I - Q Q^T) v over n - 2k
      Rademacher vectors. Exact if the rank of H is at most k.
    - "xtrace": m = n/2 normal test vectors w_i both span the basis and probe the rest.
      With P_i the projector onto the span of H w_j, j != i, the mean of
      t_i = Tr(P_i H P_i) + c_i w_i^T (I - P_i) H (I - P_i) w_i, where
      c_i = rank(I - P_i) / ||(I - P_i) w_i||^2. Exact if the rank of H is below m.

    The standard error is the samples' standard deviation over the root of their number:
    the values of v^T H v, those on the rest, the m values t_i. It is NaN with one. The
    t_i share their test vectors, so that of "xtrace" is a guide: on a matrix all bulk,
    95 % t-intervals from 100 products held the truth 95 %, 95 % and 88 % of the time.

    Cost: n products, and some eight passes over the basis for each of its vectors.
    Memory: a few vectors, and k more for "hutch++", 2m for "xtrace", float32 or wider.
    A few dominant eigenvalues favour "xtrace", a dominant bulk "hutchinson".

    Args:
        matvec: v -> H v for a symmetric H, from `hessian_matvec` or any function of
            pytrees. A plain function is compiled once per function object.
        like: pytree of real floating arrays, for structure, shapes and dtypes.
        key: a key of `jax.random` for the probes.
        num_probes: n, the products to spend; even for "xtrace", from 3 for "hutch++".
        method: "hutchinson", "hutch++" or "xtrace".

    Returns:
        `Estimate(value, stderr)`, scalars in float32 or the dtype of `like` if wider.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: an unknown method, or a `num_probes` it has no use for: none, odd
            for "xtrace", or with k or m above the number of elements of `like`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import trace
        >>> u = jnp.arange(5.0)
        >>> matvec = lambda v: u * jnp.dot(u, v)
        >>> found = trace(matvec, u, jax.random.key(0), num_probes=4, method="xtrace")
        >>> print(f"{found.value:.3f}")
        30.000

    References:
        Meyer, Musco, Musco and Woodruff, Hutch++ (2021), Algorithm 1, but S is normal.
        Epperly, Tropp and Webber, XTrace (2024), Algorithm 1.2; c_i is from Epperly,
        Make the most of what you have (2025), section 13.1.
    """
    width, traced = _prepare(matvec, like, key, num_probes, method, _ALL)
    if method == "xtrace":
        return _xtrace(matvec, like, key, width, traced)
    return _deflated(matvec, like, key, num_probes, width, False, traced)


def diagonal(
    matvec: Matvec,
    like: Params,
    key: Key,
    *,
    num_probes: int,
    method: str = "hutchinson",
) -> Estimate:
    r"""The diagonal of a symmetric H from `num_probes` = n products, unbiased.

    - "hutchinson": the mean of v * (H v) over n Rademacher vectors v; the variance of
      element i is (sum_j H_ij^2 - H_ii^2) / n.
    - "hutch++": with P = Q Q^T as in `trace`, the diagonal of P H + H P - P H P, which
      H Q gives exactly, plus the mean of v * ((I - P) H (I - P) v). Exact if the rank
      of H is at most floor(n/3).

    Elements are dependent: they sum to the `trace` of the same key and method, but
    their standard errors do not give its. Cost and memory are those of `trace`.

    Args:
        matvec: v -> H v for a symmetric H, as in `trace`.
        like: pytree of real floating arrays, for structure, shapes and dtypes.
        key: a key of `jax.random` for the probes.
        num_probes: n, the number of products, at least 3 for "hutch++".
        method: "hutchinson" or "hutch++".

    Returns:
        `Estimate(value, stderr)`, pytrees like `like` but no leaf narrower than
        float32; `stderr` from each element's sample variance, NaN with one sample.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: an unknown method, or a `num_probes` that it has no use for.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import diagonal
        >>> scales = jnp.array([-4.0, 1.0, 3.0])
        >>> matvec = lambda v: scales * v
        >>> diagonal(matvec, scales, jax.random.key(0), num_probes=1).value
        Array([-4.,  1.,  3.], dtype=float32)

    References:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix (2007).
        Deflation, on one side: Baston and Nakatsukasa, Stochastic diagonal estimation
        (2022); on both, as here, it is that of Hutch++.
    """
    width, traced = _prepare(matvec, like, key, num_probes, method, _ALL[:2])
    return _deflated(matvec, like, key, num_probes, width, True, traced)
