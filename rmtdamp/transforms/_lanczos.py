r"""batch, gradient -> Ritz pairs of the batch Hessian -> a damped Newton step (eq. 9).

Along the Ritz vectors phi_i, a pytree like params with a leading axis m, the gradient
is divided by eta (|lambda_i| + delta), elsewhere by delta. The gradient's part along
them is taken off in two passes: 1/delta would magnify what one leaves by rounding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmtdamp._basis import BREAKDOWN, combine, project
from rmtdamp._checks import check_every, check_range
from rmtdamp._tree import norm, size
from rmtdamp._types import LossFn

from ._measurer import check_whole, refresh_in_step
from ._optimiser import damping_in_force, optimiser
from ._ritz import RitzMeasurer, RitzSubspace


class ScaleByLanczosState(NamedTuple):
    """State of `scale_by_lanczos`.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> measurer = rmtdamp.RitzMeasurer(loss_fn, num_steps=2)
        >>> state = rmtdamp.scale_by_lanczos(measurer, damping=0.1).init(jnp.ones(4))
        >>> print(state.count, state.measured.ritz_values.shape)
        0 (2,)
    """

    count: Any  # (), int32, steps taken
    measured: RitzSubspace  # changes when it is refreshed
    damping_fallbacks: jax.Array  # (), int32, steps whose damping was not above 0


def _check_positive(damping) -> None:
    check_range(
        "damping",
        damping,
        lambda x: x > 0,
        "above 0: outside the subspace it is divided by",
    )


@functools.partial(jax.jit, static_argnames="power")
def _step(subspace: RitzSubspace, g, delta, divisor, power: int = -1):
    """Eq. 9 for the leaves g, or another power; zero where no damping is valid."""
    basis = jax.tree.leaves(subspace.ritz_vectors)
    along = project(basis, g)
    rest = jax.tree.map(jnp.subtract, g, combine(along, basis))
    again = project(basis, rest)
    rest = jax.tree.map(jnp.subtract, rest, combine(again, basis))
    along = along + again
    # A gradient within the subspace leaves rounding, which is not to be divided.
    outside = norm(rest) > BREAKDOWN * jnp.finfo(along.dtype).eps * norm(g)
    usable = delta > 0
    delta = jnp.where(usable, delta, 1)
    curvature = divisor * (jnp.abs(subspace.cleaned_ritz_values) + delta)
    sharp = along * curvature**power
    sharp = combine(jnp.where(usable, sharp, 0), basis)
    return [
        jnp.where(usable & outside, r * delta**power, 0) + s
        for r, s in zip(rest, sharp, strict=True)
    ]


def scale_by_lanczos(
    measurer: RitzMeasurer | LossFn,
    *,
    damping: optax.ScalarOrSchedule | None = None,
    sharp_divisor: jax.typing.ArrayLike = 1.0,
    refresh_every: int | None = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""A Newton step along the sharp directions of the batch Hessian (eq. 9).

    With g the gradient, lambda_i and phi_i the m Ritz pairs of the batch Hessian,
    eta = `sharp_divisor` and delta the damping,

        u = eta^-1 sum_i (phi_i . g) / (|lambda_i| + delta) phi_i + delta^-1 r,
        r = g - sum_i (phi_i . g) phi_i.

    This is (|H| + delta I)^-1 g where m = P and the eigenvalues are distinct, or where
    Lanczos' iteration starts at the gradient and m is the number of distinct ones. A
    random start sees the sharpest directions, and the rest moves at 1/delta: keep the
    learning rate over delta below 2 / |lambda| for the sharpest one left out (an
    eigenvalue counts once, however many directions it has). A start at the gradient
    leaves no rest in the step that measures: all of g is in the Krylov space, and the
    1/delta term is void.

    `update(grads, state, params, batch=batch, loss_args=(), curvature_batch=None)`, as
    in `auto_damping`. The subspace is measured in every `refresh_every`-th step, the
    first included, and kept, while the damping acts at once. With `refresh_every=None`
    it is measured by `rmtdamp.refresh` alone (before the first time, u = g / delta).

    In the state, for logging: "ritz_values", "cleaned_ritz_values", "ritz_vectors",
    "subspace_refreshes", "subspace_rejections" (refreshes that were not finite, after
    which the last good subspace stays), "damping_fallbacks" (steps whose damping was
    not above 0, taken with the constructor's, or not at all without one).

    Cost of a step: 8 m P FLOPs; of a refresh: see `RitzMeasurer`.

    Units: delta is added to a Hessian eigenvalue.

    Args:
        measurer: measures the subspace, or a loss function for a `RitzMeasurer` with
            the defaults.
        damping: delta > 0, a number or a schedule, for use without `auto_damping` and
            `set_damping`.
        sharp_divisor: eta > 0; above 1 it shortens the steps in sharp directions.
        refresh_every: steps between refreshes, at least 1; None for never in the step.

    Returns:
        A transformation whose `update` takes `damping`, a scalar, `relative_damping`,
        in units of the curvature's mean eigenvalue, and `curvature_power`, with which
        it is the product with a power of the damped curvature. Updates have the
        gradients' dtype; vectors are held in float32 or wider.

    Raises:
        ValueError: a number out of its range; from `update`: params or batch missing,
            params with holes, no damping.
        TypeError: params that are not real floats, or a loss that is not a scalar.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params**2) / 2
        >>> tx = rmtdamp.scale_by_lanczos(loss_fn, damping=1.0)
        >>> params, batch = jnp.ones(2), jnp.array([[4.0, 1.0]])
        >>> grads = jnp.array([4.0, 1.0])
        >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        >>> print([round(float(u), 3) for u in updates])
        [0.8, 0.5]
        >>> print([round(float(x), 3) for x in optax.tree.get(state, "ritz_values")])
        [1.0, 4.0]

    References:
        Granziol and Baskerville, eq. 9 and section 5; eq. 9 prints lambda_i, the
        experiments took |lambda_i|.
    """
    if not isinstance(measurer, RitzMeasurer):
        measurer = RitzMeasurer(measurer)
    _check_positive(damping)
    check_range("sharp_divisor", sharp_divisor, lambda x: x > 0, "above 0")
    check_every("refresh_every", refresh_every, or_never=True)
    own = damping

    def init(params):
        check_whole(params, "scale_by_lanczos")
        zero = lambda: jnp.zeros((), jnp.int32)
        return ScaleByLanczosState(zero(), measurer.init(params), zero())

    def update(
        updates,
        state,
        params=None,
        *,
        damping=None,
        relative_damping=None,
        curvature_power=None,
        **extra_args,
    ):
        leaves, treedef = jax.tree.flatten(updates)
        count = optax.safe_increment(state.count)
        if not leaves:
            return updates, state._replace(count=count)
        _check_positive(damping)
        product = curvature_power is not None
        subspace = refresh_in_step(
            "scale_by_lanczos",
            measurer,
            None if product else refresh_every,
            state,
            updates,
            params,
            **extra_args,
        )
        dtype = subspace.ritz_values.dtype
        in_force = lambda given: damping_in_force(
            "scale_by_lanczos", given, own, state.count, dtype
        )
        delta = in_force(damping)
        usable = delta > 0
        if relative_damping is not None:
            mean = jnp.sum(jnp.abs(subspace.cleaned_ritz_values)) / size(params)
            delta += jnp.asarray(relative_damping, dtype) * mean
            usable = delta > 0
        if own is not None:
            delta = jnp.where(usable, delta, in_force(None))
        new = _step(
            subspace,
            [x.astype(dtype) for x in leaves],
            delta,
            jnp.asarray(sharp_divisor).astype(dtype),
            curvature_power if product else -1,
        )
        new = [u.astype(x.dtype) for u, x in zip(new, leaves, strict=True)]
        if product:
            return jax.tree.unflatten(treedef, new), state
        fallbacks = state.damping_fallbacks + (~usable).astype(jnp.int32)
        state = ScaleByLanczosState(count, subspace, fallbacks)
        return jax.tree.unflatten(treedef, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def lanczos_newton(
    learning_rate: optax.ScalarOrSchedule,
    measurer: RitzMeasurer | LossFn,
    *,
    damping: optax.ScalarOrSchedule | None = None,
    sharp_divisor: jax.typing.ArrayLike = 1.0,
    refresh_every: int | None = 1,
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A Newton step along the sharp directions: the paper's LanczosOPT.

    `scale_by_lanczos`, a sum of past steps that decays by `momentum`, decoupled weight
    decay and the learning rate. The paper's has no momentum (`momentum=None`).

    Args:
        learning_rate: alpha, a number or a schedule.
        measurer: measures the subspace, or a loss function for a `RitzMeasurer` with
            the defaults.
        damping: delta > 0, a number or a schedule, in the unit of an eigenvalue.
        sharp_divisor: eta > 0.
        refresh_every: steps between refreshes; None: by `rmtdamp.refresh` alone.
        momentum: decay of the sum of past steps; None for none.
        nesterov: Nesterov momentum.
        weight_decay: decoupled, multiplied by the learning rate, as in `optax.adamw`.
        mask: which params decay: a tree of bools or a function that makes one.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: as `scale_by_lanczos`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(jnp.log(jnp.cosh(batch @ params - 1.0)))
        >>> measurer = rmtdamp.RitzMeasurer(loss_fn, num_steps=3, start="gradient")
        >>> tx = rmtdamp.lanczos_newton(1.0, measurer, damping=1e-3, momentum=None)
        >>> params, batch = jnp.zeros(3), jnp.diag(jnp.array([1.0, 2.0, 3.0]))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     grads = jax.grad(loss_fn)(params, batch)
        ...     updates, state = tx.update(grads, state, params, batch=batch)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{loss_fn(params, batch):.4f}")
        0.0000

    References:
        Granziol and Baskerville, section 5.
    """
    return optimiser(
        scale_by_lanczos(
            measurer,
            damping=damping,
            sharp_divisor=sharp_divisor,
            refresh_every=refresh_every,
        ),
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        mask=mask,
    )
