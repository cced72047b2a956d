"""How far one step may go, judged by the curvature of the loss along it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmtdamp._checks import check_loss_args, check_mode, check_range
from rmtdamp._sharding import regrouped
from rmtdamp._tree import num_examples
from rmtdamp._types import Batch, LossFn, Mode, Params
from rmtdamp.hessian import quadratic_form

from ._measurer import training_loss, with_numbers


class TrustRegionState(NamedTuple):
    """State of what is kept within a `TrustRegion`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> from rmtdamp.kronecker import ModelFactors, make_blocks
        >>> params = {"w": jnp.zeros((2, 1))}
        >>> def criterion(outputs, targets):
        ...     return 0.5 * jnp.mean((outputs - targets) ** 2)
        >>> factors_fn = ModelFactors(
        ...     model_fn=lambda p, x, tape: tape.linear("dense", x, x @ p["w"]),
        ...     criterion=criterion,
        ...     blocks=make_blocks(params, {"dense": {"kernel": "w"}}),
        ... )
        >>> region = rmtdamp.TrustRegion(
        ...     lambda p, batch: criterion(batch[0] @ p["w"], batch[1])
        ... )
        >>> tx = rmtdamp.kfac(0.1, factors_fn, damping=1e-3, kl_clip=region)
        >>> print(optax.tree.get(tx.init(params), "shortened_steps"))
        0
    """

    num_steps: jax.Array  # (), int32, taken before
    shortened_steps: jax.Array  # (), int32, of which were longer than the region
    inner_state: Any


@with_numbers("radius")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustRegion:
    r"""A bound of what one step changes: |d^T H d| at most `radius`.

    d is the whole step that the params take, past steps and learning rate in it, weight
    decay apart, and H the Hessian of the loss that is trained, on one microbatch of the
    training batch. A longer step is cut to the share

        nu = min(1, sqrt(radius / |d^T H d|))

    of itself, and so is the sum of past steps that it came from: left as it was, it
    would make the following steps as long. For a cross-entropy d^T H d is about twice
    the KL divergence between the predictions before and after.

    A damping is what the curvature asks for that was measured last. A deep network
    without normalisation, which begins on a plateau, leaves it with curvature that
    grows a hundredfold within a few steps; this looks at the curvature of the step at
    hand. It costs a second derivative of a microbatch's loss in each step, of KFAC on
    an MLP and a CNN 5 to 12 % of its time.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss, that of
            training where it knows one (`rmtdamp.flax.curvature_loss`).
        radius: in the unit of the loss. 0.1 suits a cross-entropy in nats: networks
            with BatchNorm take steps of 0.02 to 0.2, and the steps that ruined one
            without it were above 0.3. Of another loss take a tenth of what it is at
            first.
        num_microbatches: that the training batch is cut into; one is looked at.
        mode: how the loss is differentiated, see `rmtdamp.hessian.quadratic_form`.

    Raises:
        ValueError: a number out of its range, or an unknown mode.
        TypeError: `loss_fn` is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> region = rmtdamp.TrustRegion(loss_fn, radius=0.5)
        >>> print(region.share(jnp.ones(2), jnp.zeros(2), 2 * jnp.eye(2)))
        0.25

    References:
        Schulman et al., Trust region policy optimization, 2015, bound the same
        quadratic form of a natural gradient's step, with the Fisher matrix for H; Wu et
        al., Scalable trust-region method for deep reinforcement learning using
        Kronecker-factored approximation, 2017, that of KFAC's own factors. These are
        measured some steps before, and do not see what this is for.
    """

    loss_fn: LossFn = dataclasses.field(kw_only=False)
    radius: Any = 0.1
    num_microbatches: int = 8
    mode: Mode = "forward-over-reverse"

    def __post_init__(self) -> None:
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn is {type(self.loss_fn).__name__}: hand over a function "
                "loss_fn(params, batch, *loss_args) that returns the mean loss"
            )
        check_range("radius", self.radius, lambda x: x > 0, "above 0")
        whole = lambda n: n >= 1 and n % 1 == 0
        bound = "a whole number of at least 1"
        check_range("num_microbatches", self.num_microbatches, whole, bound)
        check_mode(self.mode)

    def share(
        self, step: Params, params: Params, batch: Batch, loss_args: tuple = ()
    ) -> jax.Array:
        """Nu, the share of a step that stays within; 1 where d^T H d is NaN."""
        count = num_examples(batch)
        num = min(self.num_microbatches, count)
        part = jax.tree.map(
            lambda x: regrouped(x[: count - count % num], num)[:, 0], batch
        )
        length = quadratic_form(
            training_loss(self.loss_fn),
            params,
            part,
            step,
            loss_args=loss_args,
            precision=None,
            mode=self.mode,
        )
        length = jnp.abs(length)
        radius = jnp.asarray(self.radius, length.dtype)
        longer = length > radius
        return jnp.where(longer, jnp.sqrt(radius / jnp.where(longer, length, 1)), 1)


def within(
    region: TrustRegion,
    scaled: optax.GradientTransformation,
    momentum: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """`scaled`, then `momentum`, whose steps stay in the region at this rate.

    Returns:
        A gradient transformation, before the learning rate.
    """
    inner: Any = optax.chain(scaled, momentum)

    def init(params):
        zero = lambda: jnp.zeros((), jnp.int32)
        return TrustRegionState(zero(), zero(), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        new, after = inner.update(updates, state.inner_state, params, **extra_args)
        if "curvature_power" in extra_args:  # a product is asked for, not a step
            return new, state
        batch, loss_args = extra_args.get("batch"), extra_args.get("loss_args", ())
        if batch is None or params is None:
            raise ValueError(
                "a TrustRegion needs params and the batch of the step: "
                "tx.update(grads, state, params, batch=batch)"
            )
        check_loss_args(loss_args)
        alpha = learning_rate
        alpha = jnp.asarray(alpha(state.num_steps) if callable(alpha) else alpha)
        step = jax.tree.map(lambda u: alpha.astype(u.dtype) * u, new)
        share = region.share(step, params, batch, loss_args)
        shorten = lambda x: jax.tree.map(lambda u: u * share.astype(u.dtype), x)
        first, past = after
        state = TrustRegionState(
            state.num_steps + 1,
            state.shortened_steps + (share < 1).astype(jnp.int32),
            (first, shorten(past)),
        )
        return shorten(new), state

    return optax.GradientTransformationExtraArgs(init, update)
