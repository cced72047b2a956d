"""auto_adam: the one-liner."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from rmtdamp._types import LossFn, Params
from rmtdamp.damping import DampingRule, identity_target

from ._adam import Form, scale_by_adam_shrinkage
from ._auto import auto_damping
from ._learner import DampingLearner


def auto_adam(
    learning_rate: optax.ScalarOrSchedule,
    loss_fn: LossFn,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    every: int | None = 100,
    floor: jax.typing.ArrayLike = 1e-4,
    decay: jax.typing.ArrayLike = 0.7,
    rule: DampingRule = identity_target,
    num_microbatches: int = 8,
    num_probes: int = 1,
    max_damping: jax.typing.ArrayLike = 1.0,
    seed: jax.typing.ArrayLike = 0,
    form: Form = "damping",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with shrinkage whose damping is learned: the one-liner.

    `chain(auto_damping(scale_by_adam_shrinkage(...), DampingLearner(...)),
    add_decayed_weights, scale_by_learning_rate)`. `update` needs `params` and
    `batch=batch`. Write the chain yourself for anything that has no argument here.

    Args:
        learning_rate: alpha, a number or a schedule.
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss.
        b1: decay of the first moment.
        b2: decay of the second moment.
        every: steps between refreshes; None: by `refresh_damping` alone, for which
            `DampingLearner(loss_fn, ...)` takes the learner's arguments.
        floor: damping before the first measurement, and added to each.
        decay: weight of the past in the averages.
        rule: `identity_target`, `scaled_identity_target`, or your own.
        num_microbatches: microbatches that a batch is cut into.
        num_probes: probes to average in a refresh.
        max_damping: upper bound of the damping.
        seed: of the probes.
        form: "damping" or "shrinkage".
        weight_decay: decoupled, multiplied by the learning rate, as in `optax.adamw`.
        mask: which params decay: a tree of bools or a function that makes one.

    Returns:
        A gradient transformation. Under `optax.inject_hyperparams` name `loss_fn`,
        `rule`, `num_microbatches` and `num_probes` in `static_args`.

    Raises:
        ValueError: a number out of its range; see `auto_damping` for `update`.
        TypeError: `loss_fn` or `rule` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> tx = rmtdamp.auto_adam(1e-2, loss_fn)
        >>> params, batch = jnp.zeros(4), jnp.eye(4)
        >>> state = tx.init(params)
        >>> grads = jax.grad(loss_fn)(params, batch)
        >>> updates, state = tx.update(grads, state, params, batch=batch)

    References:
        Granziol and Baskerville, section 7.3.
    """
    learner = DampingLearner(
        loss_fn,
        floor=floor,
        decay=decay,
        rule=rule,
        num_microbatches=num_microbatches,
        num_probes=num_probes,
        max_damping=max_damping,
        seed=seed,
    )
    return optax.chain(
        auto_damping(scale_by_adam_shrinkage(b1, b2, form=form), learner, every=every),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
