r"""batch, gradient -> Ritz pairs of the batch Hessian -> a damped Newton step (eq. 9).

Lanczos' iteration gives m Ritz values lambda_i and orthonormal Ritz vectors phi_i, a
pytree like params with a leading axis m, cached in the state. Along them the gradient
is divided by eta (|lambda_i| + delta), elsewhere by delta. The gradient's part along
them is taken off in two passes: 1/delta would magnify what one leaves by rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmtdamp._tree import check_params, norm, num_examples
from rmtdamp._types import LossFn, Matvec
from rmtdamp.hessian import hessian_matvec
from rmtdamp.hessian._lanczos import BREAKDOWN, combine, project

from ._by_hand import check_every
from ._krylov import Cleaning, Krylov, RitzSubspace, Start, refresh_if
from ._owner import check_whole


class ScaleByLanczosState(NamedTuple):
    """State of `scale_by_lanczos`."""

    count: Any  # (), int32, steps taken
    damping_fallbacks: jax.Array  # (), int32, steps whose damping was not above 0
    subspace: RitzSubspace  # changes when it is refreshed


class LanczosTransformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation that knows how its subspace is measured."""

    krylov: Krylov


def remembering(tx, krylov: Krylov) -> LanczosTransformation:
    made = LanczosTransformation(tx.init, tx.update)
    made.krylov = krylov
    return made


@jax.jit
def _step(subspace: RitzSubspace, g, delta, divisor):
    """Eq. 9 for the leaves g; zero where there is no valid damping."""
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
    sharp = along / (divisor * (jnp.abs(subspace.cleaned_ritz_values) + delta))
    sharp = combine(jnp.where(usable, sharp, 0), basis)
    return [
        jnp.where(usable & outside, r / delta, 0) + s
        for r, s in zip(rest, sharp, strict=True)
    ]


def _check_positive(name, value):
    if isinstance(value, int | float | np.number) and not value > 0:
        way_out = "" if name != "damping" else ": outside the subspace it is divided by"
        raise ValueError(f"{name} is {value}, and must be above 0{way_out}")


def checked_data(params, batch, curvature_batch):
    if params is None:
        raise ValueError(
            "scale_by_lanczos needs params, where it measures the curvature: "
            "tx.update(grads, state, params, batch=batch)"
        )
    check_whole(params, "scale_by_lanczos")
    check_params(params)
    data = batch if curvature_batch is None else curvature_batch
    if data is None:
        raise ValueError(
            "scale_by_lanczos needs the batch to measure the curvature on: "
            "tx.update(grads, state, params, batch=batch), or every=None and "
            "refresh_lanczos by hand"
        )
    num_examples(data, "batch" if curvature_batch is None else "curvature_batch")
    return data


def scale_by_lanczos(
    loss_fn: LossFn,
    *,
    num_steps: int,
    damping: optax.ScalarOrSchedule,
    sharp_divisor: jax.typing.ArrayLike = 1.0,
    every: int | None = 1,
    start: Start = "random",
    matvec_fn: Callable[..., Matvec] = hessian_matvec,
    cleaning: Cleaning | None = None,
    variance: jax.typing.ArrayLike | None = None,
    seed: jax.typing.ArrayLike = 0,
    precision: str | None = "highest",
) -> LanczosTransformation:
    r"""A Newton step along the sharp directions of the batch Hessian (eq. 9).

    With g the gradient, lambda_i and phi_i the m = `num_steps` Ritz pairs of the batch
    Hessian, eta = `sharp_divisor` and delta the damping,

        u = eta^-1 sum_i (phi_i . g) / (|lambda_i| + delta) phi_i + delta^-1 r,
        r = g - sum_i (phi_i . g) phi_i.

    This is (|H| + delta I)^-1 g where m = P and the eigenvalues are distinct, or where
    `start` is the gradient and m the number of distinct ones. A random start sees the
    sharpest directions, and the rest moves at 1/delta: keep the learning rate over
    delta below 2 / |lambda| for the sharpest one left out (an eigenvalue counts once,
    however many directions it has). A start at the gradient leaves no rest in the step
    that measures: all of g is in the Krylov space, and the 1/delta term is void.

    `update(grads, state, params, batch=batch, loss_args=(), curvature_batch=None)`, as
    in `auto_damping`. The subspace is measured in every `every`-th step, the first
    included, and cached, while the damping acts at once. With `every=None` it is
    measured by `refresh_lanczos` alone (before the first time, u = g / delta): on a CPU
    for convolutional networks, inside `optax.MultiSteps` and under `vmap`.

    In the state, for logging: "ritz_values", "cleaned_ritz_values", "ritz_vectors",
    "subspace_refreshes", "subspace_rejections" (refreshes that were not finite, after
    which the last good subspace stays), "damping_fallbacks" (steps whose damping was
    not above 0, taken with the constructor's).

    Cleaning. "rotationally_invariant" replaces each Ritz value by the best guess of the
    true curvature along its vector, `rmtdamp.rmt.rotationally_invariant_shrinkage` with
    the Ritz values and the start's shares as quadrature. Its noise s^2 is `variance`,
    or what `moments` measures on the same data at each refresh (8 microbatches, one
    probe). For m well below P: as m nears P, one start's shares become too noisy a
    quadrature. And real Hessian noise is not Wigner; see `rmtdamp.rmt`.

    Cost: a refresh is a gradient and m products of about two gradients' FLOPs, and
    8 m^2 P more; a step is 8 m P. Memory: m vectors, three times that at a refresh.

    Units: delta is added to a Hessian eigenvalue.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss; static,
            so define it once.
        num_steps: m, Lanczos steps; more than P are cut to P.
        damping: delta > 0, a number or a schedule, for use without an owner.
        sharp_divisor: eta > 0; above 1 it shortens the steps in sharp directions.
        every: steps between refreshes, at least 1; None for never in the step.
        start: of Lanczos' iteration: "random" (Gaussian), "gradient" (the updates that
            come in), or a function (key, updates) -> a pytree like params. What is zero
            or not finite is replaced by a random one.
        matvec_fn: another matrix in place of the Hessian, `matvec_fn(loss_fn, params,
            batch, loss_args=, precision=)`: `functools.partial(ggn_matvec, model_fn)`
            with `loss_fn(outputs, targets)` for the Gauss-Newton matrix.
        cleaning: None or "rotationally_invariant", which needs a random start.
        variance: s^2 for the cleaning, in squared eigenvalues, for the noise of the
            data's Hessian; default: measured.
        seed: of the random start, which is a function of the seed and the refresh's
            number: the same on every device and after a restart.
        precision: matmul precision of the products; None leaves the global setting.

    Returns:
        A transformation whose `update` takes `damping`, a scalar. Updates have the
        gradients' dtype; vectors are held in float32 or wider.

    Raises:
        ValueError: a number out of its range, an unknown option, a cleaning without
            what it needs; from `update`: params or batch missing, params with holes.
        TypeError: params that are not real floats, or a loss that is not a scalar.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params**2) / 2
        >>> tx = rmtdamp.scale_by_lanczos(loss_fn, num_steps=2, damping=1.0)
        >>> params, batch = jnp.ones(2), jnp.array([[4.0, 1.0]])
        >>> grads = jnp.array([4.0, 1.0])
        >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        >>> print([round(float(u), 3) for u in updates])
        [0.8, 0.5]
        >>> print([round(float(x), 3) for x in optax.tree.get(state, "ritz_values")])
        [1.0, 4.0]

    References:
        Granziol and Baskerville, eq. 9 and section 5; eq. 9 prints lambda_i, the
        experiments took |lambda_i|. Bun, Allez, Bouchaud and Potters, 2016 (cleaning).
    """
    for name, value in {"damping": damping, "sharp_divisor": sharp_divisor}.items():
        _check_positive(name, value)
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(
            f"num_steps is {num_steps}: take a whole number of at least 1 (and name it "
            "in static_args of optax.inject_hyperparams: shapes depend on it)"
        )
    check_every("every", every, or_never=True)
    if not callable(start) and start not in ("random", "gradient"):
        raise ValueError(
            f"start is {start!r}: choose 'random', 'gradient' or a function of a key "
            "and the updates"
        )
    if cleaning not in (None, "rotationally_invariant"):
        raise ValueError(
            f"cleaning is {cleaning!r}: choose None or 'rotationally_invariant'"
        )
    if cleaning is not None and start != "random":
        raise ValueError(
            f"cleaning needs the spectrum as a random start sees it, and start is "
            f"{start!r}: choose start='random'"
        )
    if cleaning is not None and variance is None and matvec_fn is not hessian_matvec:
        raise ValueError(
            "cleaning measures the noise of the Hessian, and matvec_fn is another "
            "matrix: pass the variance of its noise"
        )
    krylov = Krylov(
        loss_fn=loss_fn,
        num_steps=num_steps,
        start=start,
        matvec_fn=matvec_fn,
        cleaning=cleaning,
        variance=variance,
        seed=seed,
        precision=precision,
    )
    constructed = damping

    def init(params):
        check_whole(params, "scale_by_lanczos")
        zero = lambda: jnp.zeros((), jnp.int32)
        return ScaleByLanczosState(zero(), zero(), krylov.init(params))

    def update(
        updates,
        state,
        params=None,
        *,
        damping=None,
        batch=None,
        loss_args=(),
        curvature_batch=None,
        **extra_args,
    ):
        del extra_args
        leaves, treedef = jax.tree.flatten(updates)
        count = optax.safe_increment(state.count)
        if not leaves:
            return updates, state._replace(count=count)
        _check_positive("damping", damping)
        subspace = state.subspace
        if every is not None:
            data = checked_data(params, batch, curvature_batch)
            always = isinstance(every, int) and every == 1
            due = None if always else state.count % every == 0
            subspace = refresh_if(
                due, krylov, subspace, params, data, loss_args, updates
            )
        dtype = subspace.ritz_values.dtype
        own = constructed(state.count) if callable(constructed) else constructed
        own = jnp.asarray(own).astype(dtype)
        given = own if damping is None else jnp.asarray(damping).astype(dtype)
        new = _step(
            subspace,
            [x.astype(dtype) for x in leaves],
            jnp.where(given > 0, given, own),
            jnp.asarray(sharp_divisor).astype(dtype),
        )
        new = [u.astype(x.dtype) for u, x in zip(new, leaves, strict=True)]
        fallbacks = state.damping_fallbacks + (~(given > 0)).astype(jnp.int32)
        state = ScaleByLanczosState(count, fallbacks, subspace)
        return jax.tree.unflatten(treedef, new), state

    return remembering(optax.GradientTransformationExtraArgs(init, update), krylov)
