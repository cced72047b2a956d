"""auto_adam: the one-liner."""

from typing import Any

import jax
import numpy as np
import optax

from rmtdamp._jax import is_traced
from rmtdamp._types import LossFn
from rmtdamp.damping import StabilityFloor

from ._adam import Form, scale_by_adam_shrinkage
from ._damping import auto_damping
from ._learner import DampingLearner
from ._optimiser import by_learning_rate


def auto_adam(
    learning_rate: optax.ScalarOrSchedule,
    learner: DampingLearner | LossFn,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    refresh_every: int | None = 100,
    form: Form = "damping",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with shrinkage whose damping is learned: the one-liner.

    `chain(auto_damping(scale_by_adam_shrinkage(...), learner), add_decayed_weights,
    scale_by_learning_rate)`. `update` needs `params` and `batch=batch`. Write the chain
    yourself for anything that has no argument here.

    For a loss function the rule is `rmtdamp.StabilityFloor.for_adam(b1)`, that of the
    preconditioned Hessian, four times what stability needs: nearly nothing at a small
    learning rate, and more reach to large ones. For eq. 15, the noise of the Hessian,
    hand over `DampingLearner(loss_fn)`.

    Args:
        learning_rate: alpha, a number or a schedule.
        learner: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss, or a
            `DampingLearner` of it with settings of your own. Under
            `optax.inject_hyperparams` hand over a learner: a function is taken for a
            schedule there.
        b1: decay of the first moment.
        b2: decay of the second moment.
        refresh_every: steps between measurements; None for `rmtdamp.refresh` by hand.
        form: "damping", "shrinkage", "length" or "avagrad".
        weight_decay: decoupled, multiplied by the learning rate, as in `optax.adamw`.
        mask: which params decay: a tree of bools or a function that makes one.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: a number out of its range, a stability floor for another momentum
            than this Adam's, a traced `b1` without a learner; see `auto_damping` for
            `update`.
        TypeError: `learner` is neither.

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
        Granziol and Baskerville, sections 7.3 and 8.
    """
    adam = scale_by_adam_shrinkage(b1, b2, form=form)
    if not isinstance(learner, DampingLearner):
        if is_traced(b1):
            raise ValueError(
                "b1 is traced, as under optax.inject_hyperparams, and the default rule "
                "needs its number: name 'b1' among static_args, or hand over a "
                "DampingLearner(loss_fn, rule=StabilityFloor.for_adam(0.9), floor=1e-8)"
            )
        rule = StabilityFloor.for_adam(float(np.asarray(b1)))
        learner = DampingLearner(learner, rule=rule, floor=1e-8)
    rule, known = learner.rule, isinstance(b1, int | float)
    floor = isinstance(rule, StabilityFloor)
    if floor and known and (rule.momentum, rule.averaged) != (b1, True):
        raise ValueError(
            f"rule is {rule!r}, and this Adam's momentum averages with b1 = {b1}: take "
            f"StabilityFloor.for_adam({b1}), or StabilityFloor(momentum={b1}, "
            "averaged=True)"
        )
    return optax.chain(
        auto_damping(
            adam, learner, refresh_every=refresh_every, learning_rate=learning_rate
        ),
        optax.add_decayed_weights(weight_decay, mask),
        by_learning_rate(learning_rate),
    )
