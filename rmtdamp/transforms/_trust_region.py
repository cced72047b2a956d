"""How far one step of any optimiser may go, judged by the curvature along it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmtdamp._checks import check_loss_args, check_mode, check_range
from rmtdamp._sharding import regrouped
from rmtdamp._tree import accumulation_dtype, num_examples
from rmtdamp._types import LossFn, Mode
from rmtdamp.hessian import quadratic_form

from ._measurer import check_whole, training_loss

# What optax's states call the momentum. Elsewhere than in these it is `trace` or `mu`.
MOMENTUM = {
    "EmaState": ("ema",),
    "ScaleByAdanState": ("m", "v"),
    "ScaleByAdemamixState": ("m1", "m2"),
    "ScaleBySimplifiedAdEMAMixState": ("m",),
    "ScaleBySM3State": ("nu",),  # whose mu is of squares
    "ScaleByRStdDevState": (),  # whose mu is subtracted from nu, for a variance
}


class TrustRegionState(NamedTuple):
    """State of `trust_region`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> tx = rmtdamp.trust_region(optax.adam(1e-3), loss_fn)
        >>> print(optax.tree.get(tx.init(jnp.zeros(2)), "clipped_steps"))
        0
    """

    clipped_steps: jax.Array  # (), int32, that were longer than the region
    step_curvature: jax.Array  # (), d^T H d of the last step, uncut; NaN before one
    inner_state: Any


def trust_region(
    inner: optax.GradientTransformation,
    loss_fn: LossFn,
    radius: jax.typing.ArrayLike = 0.1,
    *,
    num_microbatches: int = 8,
    mode: Mode = "forward-over-reverse",
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimiser, with a bound of what one of its steps changes.

    d is the step that the params would take: learning rate, past steps and weight decay
    in it. With H the Hessian of the loss that is trained, on one microbatch of the
    training batch, a step whose |d^T H d| is above `radius` is cut to the share

        nu = sqrt(radius / |d^T H d|)

    of itself, and so is the momentum that it came from: left as it was, it would make
    the following steps as long. For a cross-entropy d^T H d is about twice the KL
    divergence between the predictions before and after. So a learning rate that is too
    large is not lost: the curvature along its steps says how long they may be.

    A damping is what the curvature asked for when it was measured last. A deep network
    without normalisation leaves the plateau on which it begins with curvature that
    grows a hundredfold within a few steps; this looks at that of the step at hand. It
    costs a second derivative of a microbatch's loss in each step: of KFAC 5 to 14 % of
    the time of an MLP and a CNN, of Adam 11 to 28 % of an MLP's, less with more
    `num_microbatches`.

    Args:
        inner: an optimiser, its learning rate in it; `kfac(..., kl_clip=None)`, whose
            clip bounds each gradient's part of a step alone. Momentum is what its state
            calls `trace` or `mu`, and what optax calls otherwise in Adan, AdEMAMix, SM3
            and `optax.ema`. Where it has another name (Prodigy, MoMo) the step alone is
            cut, which takes a `radius` some times smaller.
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss, that of
            training where it knows one (`rmtdamp.flax.curvature_loss`).
        radius: in the unit of the loss. 0.1 suits a cross-entropy in nats: networks
            with BatchNorm take steps of 0.02 to 0.2, and the steps that ruined one
            without it were above 0.3. Of another loss take a twentieth of what it is at
            first.
        num_microbatches: that the training batch is cut into; one is looked at.
        mode: how the loss is differentiated, see `rmtdamp.hessian.quadratic_form`.

    Returns:
        A transformation whose `update` needs `params` and `batch=batch`, and hands both
        on with all other extra arguments. A step whose d^T H d is NaN is left alone. Of
        the last step d^T H d, before the cut, is "step_curvature" in the state: look at
        it where the loss falls well to choose a radius, some times as large.

    Raises:
        ValueError: a number out of its range, or an unknown mode; params with holes,
            as inside `optax.masked`; in `update`, no params or no batch.
        TypeError: `inner` is no transformation, or `loss_fn` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> tx = rmtdamp.trust_region(optax.sgd(10.0), loss_fn, num_microbatches=1)
        >>> params, batch = jnp.zeros(4), jnp.eye(4)
        >>> state = tx.init(params)
        >>> grads = jax.grad(loss_fn)(params, batch)
        >>> updates, state = tx.update(grads, state, params, batch=batch)
        >>> print(updates.round(3), state.clipped_steps)
        [0.224 0.224 0.224 0.224] 1

    References:
        Schulman et al., Trust region policy optimization, 2015, bound the same
        quadratic form of a natural gradient's step, with the Fisher matrix for H; Wu et
        al., Scalable trust-region method for deep reinforcement learning using
        Kronecker-factored approximation, 2017, that of KFAC's own factors. Those are
        measured some steps before, and do not see what this is for.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        name = getattr(inner, "__name__", type(inner).__name__)
        raise TypeError(
            f"inner is {name}, and no gradient transformation: "
            "trust_region(optax.adam(1e-3), loss_fn)"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is {type(loss_fn).__name__}: hand over a function "
            "loss_fn(params, batch, *loss_args) that returns the mean loss"
        )
    check_range("radius", radius, lambda x: x > 0, "above 0")
    if not isinstance(num_microbatches, int) or num_microbatches < 1:
        raise ValueError(
            f"num_microbatches is {num_microbatches}: take a whole number of at least "
            "1 (and name it in static_args of optax.inject_hyperparams: shapes depend "
            "on it)"
        )
    check_mode(mode)
    loss, steps = training_loss(loss_fn), optax.with_extra_args_support(inner)

    def init(params):
        check_whole(params, "trust_region")
        unknown = jnp.full((), jnp.nan, accumulation_dtype(params))
        return TrustRegionState(jnp.zeros((), jnp.int32), unknown, steps.init(params))

    def along(step, params, batch, loss_args):
        """d^T H d of a microbatch."""
        count = num_examples(batch)
        num = min(num_microbatches, count)
        microbatch = jax.tree.map(
            lambda x: regrouped(x[: count - count % num], num)[:, 0], batch
        )
        options = {"loss_args": loss_args, "precision": None, "mode": mode}
        return quadratic_form(loss, params, microbatch, step, **options)

    def update(updates, state, params=None, **extra_args):
        batch, loss_args = extra_args.get("batch"), extra_args.get("loss_args", ())
        is_product = "curvature_power" in extra_args  # of the preconditioner, no step
        if not is_product and (batch is None or params is None):
            raise ValueError(
                "trust_region needs params and the batch of the step: "
                "tx.update(grads, state, params, batch=batch)"
            )
        check_loss_args(loss_args)
        step, after = steps.update(updates, state.inner_state, params, **extra_args)
        if is_product:
            return step, state
        bent = along(step, params, batch, loss_args)
        bent = bent.astype(state.step_curvature.dtype)
        length, most = jnp.abs(bent), jnp.asarray(radius, bent.dtype)
        longer = length > most
        nu = jnp.where(longer, jnp.sqrt(most / jnp.where(longer, length, 1)), 1)
        cut = lambda tree: jax.tree.map(lambda x: x * nu.astype(x.dtype), tree)
        clipped = state.clipped_steps + longer.astype(jnp.int32)
        return cut(step), TrustRegionState(clipped, bent, _with_momentum(cut, after))

    return optax.GradientTransformationExtraArgs(init, update)


def _with_momentum(cut, state):
    """An optimiser's state with its momentum cut."""
    held = lambda x: [
        name
        for name in MOMENTUM.get(type(x).__name__, ("trace", "mu"))
        if name in getattr(x, "_fields", ())
    ]
    change = lambda x: x._replace(**{n: cut(getattr(x, n)) for n in held(x)})
    return jax.tree.map(
        lambda x: change(x) if held(x) else x, state, is_leaf=lambda x: bool(held(x))
    )
