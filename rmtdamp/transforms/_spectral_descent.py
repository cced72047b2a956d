r"""gradient -> its damped polar factor, a matrix at a time.

A matrix gradient G = U diag(s) V^T becomes U diag(s / (s + delta)) V^T: at delta = 0
the polar factor U V^T (spectral descent, the canonical step of Muon and Shampoo), at
large delta G / delta (SGD). It is Adam's g / (|g| + delta) with singular values in the
place of entries, and a leaf that is no matrix, as a diagonal one, gets that.

Every leaf is brought into the form (stack, rows, columns) and handled a matrix at a
time, in float32 or wider. Singular values are known up to rounding, max(rows, columns)
eps ||G||: no division is by less.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from rmtdamp._checks import check_choice, check_range
from rmtdamp._jax import matmul_precision
from rmtdamp._sharding import automatic, typed_like
from rmtdamp._tree import accumulation_dtype

from ._optimiser import check_damping, damping_in_force, optimiser

Method = Literal["newton_schulz", "svd"]


class ScaleBySpectralDescentState(NamedTuple):
    """State of `scale_by_spectral_descent`.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> print(rmtdamp.scale_by_spectral_descent().init(jnp.zeros((4, 3))).count)
        0
    """

    count: Any  # (), int32, steps taken


def dimension_numbers(numbers: Any, tree: Any) -> list[MuonDimensionNumbers | None]:
    """One `MuonDimensionNumbers` per leaf of `tree`, or None: not a matrix."""
    leaves = jax.tree.leaves(tree)
    if numbers is None:
        default = MuonDimensionNumbers()
        return [default if x.ndim == 2 and x.size else None for x in leaves]
    if callable(numbers):
        numbers = numbers(tree)
    found = []
    if leaves:
        is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
        # The numbers may be a prefix of the tree: one for all leaves below.
        repeat = lambda n, below: found.extend([n] * len(jax.tree.leaves(below)))
        jax.tree.map(repeat, numbers, tree, is_leaf=is_leaf)
    return [n if x.size else None for n, x in zip(found, leaves, strict=True)]


def _axes(given, ndim) -> tuple[int, ...]:
    return tuple(i % ndim for i in ((given,) if isinstance(given, int) else given))


def folded(x: jax.Array, numbers: MuonDimensionNumbers):
    """`x` as (stack, rows, columns), and the function that leads back.

    Returns:
        The stack of matrices, and its inverse map.

    Raises:
        ValueError: axes that are out of range, overlap or are none.
    """
    ndim = x.ndim
    given = (numbers.reduction_axis, numbers.output_axis)
    flat = [i for axes in given for i in ((axes,) if isinstance(axes, int) else axes)]
    rows, columns = (_axes(axes, ndim or 1) for axes in given)
    inside = all(-ndim <= i < ndim for i in flat)
    if not (rows and columns and inside and len({*rows, *columns}) == len(flat)):
        raise ValueError(
            f"{numbers} do not make a matrix of an array of shape {x.shape}: name "
            "different axes for its rows (reduction_axis) and columns (output_axis), "
            "or None for a leaf that is no matrix"
        )
    stack = tuple(i for i in range(ndim) if i not in {*rows, *columns})
    order = (*stack, *rows, *columns)
    shape = tuple(x.shape[i] for i in order)
    sizes = [math.prod(x.shape[i] for i in axes) for axes in (stack, rows, columns)]
    inverse = tuple(int(i) for i in np.argsort(order))
    back = lambda y: jnp.transpose(jnp.reshape(y, shape), inverse)
    return jnp.reshape(jnp.transpose(x, order), sizes), back


def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """X / y, and 0 for 0 / 0."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _by_svd(g, damping):
    u, s, vt = jnp.linalg.svd(g, full_matrices=False)
    rounding = max(g.shape) * jnp.finfo(g.dtype).eps * s[0]
    return (u * ratio(s, jnp.maximum(s, rounding) + damping)[None, :]) @ vt


def _by_newton_schulz(g, damping, steps):
    if g.shape[0] < g.shape[1]:
        return _by_newton_schulz(g.T, damping, steps).T
    # In units in which neither squares nor the damping over- or underflow.
    largest = jnp.max(jnp.abs(g))
    unit = jnp.maximum(largest, damping)
    start, g, damping = ratio(g, largest), ratio(g, unit), ratio(damping, unit)
    length = jnp.linalg.norm(start)
    polar = jax.lax.fori_loop(
        0, steps, lambda _, x: 1.5 * x - 0.5 * x @ (x.T @ x), ratio(start, length)
    )
    length *= ratio(largest, unit)  # now of G
    root = polar.T @ g  # (G^T G)^1/2
    root = (root + root.T) / 2
    # A singular value grows by 3/2 a step until it is near 1: below this share of the
    # norm it has not arrived, and dividing by it needs a damping as large.
    reach = jnp.asarray(1.5 ** (6.0 - steps)).astype(g.dtype)
    reach = jnp.maximum(reach, max(g.shape) * jnp.finfo(g.dtype).eps)
    raised = jnp.maximum(damping, reach * length)
    # What the raised damping takes too much is given back along P: at damping 0, P.
    numerator = g + (raised - damping) * polar
    eye = jnp.eye(g.shape[1], dtype=g.dtype)
    raised = jnp.where(raised > 0, raised, 1)  # a zero gradient
    return jnp.linalg.solve(root + raised * eye, numerator.T).T


def scale_by_spectral_descent(
    *,
    damping: optax.ScalarOrSchedule = 1e-8,
    method: Method = "newton_schulz",
    num_iterations: jax.typing.ArrayLike = 30,
    weight_dimension_numbers: Any = None,
    precision: str | None = "highest",
) -> optax.GradientTransformationExtraArgs:
    r"""The damped polar factor of each matrix gradient.

    With G = U diag(s) V^T the gradient of a matrix and delta the damping,

        u = U diag(s / (s + delta)) V^T = G ((G^T G)^1/2 + delta I)^-1,

    and of any other leaf, entry by entry, u = g / (|g| + delta). As delta falls to 0
    this is spectral descent (of a singular G: on its range), as it grows, SGD over
    delta. There is no momentum here: put `optax.ema` before it, as `spectral_descent`
    does.

    method="svd" does that. method="newton_schulz" needs matrix products and one linear
    system of the smaller side, which accelerators prefer. The polar factor P is the
    limit of X <- 1.5 X - 0.5 X X^T X from G / ||G||_F (Muon's quintic does not converge
    to it), (G^T G)^1/2 the symmetric part of P^T G, and the smaller side is inverted.
    Singular values below r ||G||_F, r = 1.5^(6 - num_iterations) (6e-5 at 30 of them),
    have not converged and stay damped at that level. The methods agree to
    (r ||G||_F / delta)^2, and at any damping on singular values well above r ||G||_F.

    Units: delta is added to a singular value of the gradient, which grows with the
    matrix: for the same entries, about with the square root of its longer side.

    Args:
        damping: delta, a number or a schedule of the step, for use without
            `auto_damping` and `set_damping`.
        method: "newton_schulz" or "svd".
        num_iterations: steps of the iteration, each two matrix products.
        weight_dimension_numbers: which axes make a matrix, as in `optax.contrib.muon`:
            a tree (or prefix) of `optax.contrib.MuonDimensionNumbers`, or a function of
            the params that gives one; axes named by neither are a stack of matrices,
            None is a leaf that is none. A convolution's HWIO kernel is
            `MuonDimensionNumbers((0, 1, 2), 3)`. Default: leaves of two axes are
            matrices, no other leaf is.
        precision: matmul precision; None leaves the global setting.

    Returns:
        A transformation whose `update` takes `damping`, a scalar. Updates have the
        gradients' dtype; the work is done in float32 or wider.

    Raises:
        ValueError: a negative damping, an unknown `method`, fewer than one step, or
            (from `update`) axes that do not make a matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> tx = rmtdamp.scale_by_spectral_descent(damping=1.0)
        >>> grads = jnp.diag(jnp.array([1.0, 3.0]))
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> [round(float(u), 3) for u in jnp.diag(updates)]
        [0.5, 0.75]

    References:
        Higham, Functions of matrices, 2008, section 8.3 (the iteration). Jordan et
        al., Muon, 2024: we let the iteration converge, and damp it.
    """
    check_damping(damping)
    check_choice("method", method, get_args(Method))
    check_range("num_iterations", num_iterations, lambda n: n >= 1, "at least 1")
    own = damping

    def init(params):
        del params
        return ScaleBySpectralDescentState(jnp.zeros((), jnp.int32))

    def one(g, delta):
        return _by_svd(g, delta) if method == "svd" else newton_schulz(g, delta)

    def newton_schulz(g, delta):
        return _by_newton_schulz(g, delta, num_iterations)

    def update(updates, state, params=None, *, damping=None, **extra_args):
        del params, extra_args
        out = lambda: typed_like((updates, state))
        return automatic(step, out, updates, state, damping)

    def step(updates, state, damping):
        dtype = accumulation_dtype(updates)
        delta = damping_in_force(
            "scale_by_spectral_descent", damping, own, state.count, dtype
        )
        leaves, treedef = jax.tree.flatten(updates)
        new = []
        for leaf, numbers in zip(
            leaves, dimension_numbers(weight_dimension_numbers, updates), strict=True
        ):
            g = leaf.astype(dtype)
            if numbers is None:
                u = ratio(g, jnp.abs(g) + delta)
            else:
                stack, back = folded(g, numbers)
                with matmul_precision(precision):
                    u = back(jax.vmap(one, in_axes=(0, None))(stack, delta))
            new.append(u.astype(leaf.dtype))
        count = optax.safe_increment(state.count)
        return jax.tree.unflatten(treedef, new), ScaleBySpectralDescentState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def spectral_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: optax.ScalarOrSchedule = 1e-8,
    method: Method = "newton_schulz",
    num_iterations: jax.typing.ArrayLike = 30,
    weight_dimension_numbers: Any = None,
    precision: str | None = "highest",
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Spectral descent with momentum and a damping: Muon's step, converged and damped.

    An average of gradients, bias-corrected, which keeps the gradient's scale and so the
    damping's unit, then `scale_by_spectral_descent`, decoupled weight decay and the
    learning rate. All leaves take part; to leave some to another optimiser take
    `optax.partition`, with `auto_damping` inside.

    Args:
        learning_rate: alpha, a number or a schedule.
        damping: delta, a number or a schedule, in the unit of a singular value of the
            averaged gradient.
        method: "newton_schulz" or "svd".
        num_iterations: of Newton and Schulz.
        weight_dimension_numbers: which axes make a matrix.
        precision: matmul precision.
        momentum: decay of the average of gradients (Muon's default is 0.95); None for
            none. The factor of a matrix does not depend on its length, so that the
            average has to be of gradients, not of steps as in the other optimisers.
        nesterov: Nesterov momentum.
        weight_decay: decoupled, multiplied by the learning rate, as in `optax.adamw`.
        mask: which params decay: a tree of bools or a function that makes one.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: as `scale_by_spectral_descent`.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> tx = rmtdamp.set_damping(rmtdamp.spectral_descent(1e-2), 1e-3)
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
        >>> updates, state = tx.update(params, tx.init(params), params)

    References:
        Jordan et al., Muon, 2024. Carlson et al., Preconditioned spectral descent for
        deep learning, 2015.
    """
    scaled = scale_by_spectral_descent(
        damping=damping,
        method=method,
        num_iterations=num_iterations,
        weight_dimension_numbers=weight_dimension_numbers,
        precision=precision,
    )
    if momentum is not None:
        scaled = optax.chain(_average(momentum, nesterov), scaled)
    return optimiser(
        scaled,
        learning_rate,
        momentum=None,
        nesterov=False,
        weight_decay=weight_decay,
        mask=mask,
    )


def _average(decay, nesterov) -> optax.GradientTransformation:
    """The average of gradients; with Nesterov's, the gradient of now counts twice."""
    ema = optax.ema(decay)
    if not nesterov:
        return ema

    def update(updates, state, params=None):
        average, state = ema.update(updates, state, params)
        mix = lambda m, g: (decay * m + (1 - decay) * g).astype(g.dtype)
        return jax.tree.map(mix, average, updates), state

    return optax.GradientTransformation(ema.init, update)
