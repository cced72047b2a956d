"""A door for Flax users: nnx models with state, linen's TrainState. Needs Flax.

Curvature is measured in evaluation mode, at the statistics of the moment: BatchNorm on
its running averages and Dropout off make the loss a mean over independent examples.
What changes during training (running averages, keys) goes through `loss_args`, traced
and fresh at each step; a closure would freeze it silently at its first value.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from flax.training import train_state

from rmtdamp import transforms
from rmtdamp._types import Batch, LossFn
from rmtdamp.transforms import DampingLearner


def curvature_loss(
    model: nnx.Module, loss: Callable[[Any, Batch], jax.Array]
) -> LossFn:
    """The loss of an nnx model, in the form that measures curvature.

    Args:
        model: an nnx module; only its structure is used, and it is left as it is.
        loss: `loss(model, batch) -> scalar`, the mean loss, as for `nnx.grad`.

    Returns:
        `loss_fn(params, batch, state)`, the loss of an evaluation-mode copy of the
        model with the given `nnx.Param`s and other state. Make it once.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import rmtdamp, rmtdamp.flax
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.dense = nnx.Linear(4, 3, rngs=rngs)
        ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
        ...
        ...     def __call__(self, x):
        ...         return self.dropout(self.dense(x))
        >>> def loss(model, batch):
        ...     return jnp.mean(model(batch) ** 2)
        >>> model = Model(nnx.Rngs(0))
        >>> loss_fn = rmtdamp.flax.curvature_loss(model, loss)
        >>> tx = rmtdamp.auto_adam(1e-3, loss_fn)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> @nnx.jit
        ... def step(model, optimizer, batch):
        ...     grads = nnx.grad(loss)(model, batch)
        ...     state = rmtdamp.flax.loss_args(model)
        ...     optimizer.update(model, grads, batch=batch, loss_args=state)
        >>> step(model, optimizer, jnp.ones((16, 4)))
        >>> int(optax.tree.get(optimizer.opt_state, "refresh_attempts")[...])
        1
    """
    copy = nnx.merge(*nnx.split(model), copy=True)
    copy.eval()
    graphdef, _, _ = nnx.split(copy, nnx.Param, ...)

    def loss_fn(params, batch, *state):
        if len(state) != 1:
            raise ValueError(
                f"a curvature_loss takes the model's state, got {len(state)} further "
                "arguments: pass loss_args=rmtdamp.flax.loss_args(model) to the update"
            )
        (state,) = state
        return loss(nnx.merge(graphdef, params, state, copy=True), batch)

    return loss_fn


def loss_args(model: nnx.Module) -> tuple[nnx.State]:
    """The `loss_args` of `curvature_loss`: all state of the model but its params.

    Call it in the training step, so that the state is that of the moment.

    Args:
        model: the nnx module in training.

    Returns:
        A tuple with one element, the state without `nnx.Param`.
    """
    return (nnx.state(model, nnx.Not(nnx.Param)),)


def refresh_damping(
    optimizer: nnx.Optimizer,
    learner: DampingLearner | LossFn,
    model: nnx.Module,
    batch: Batch,
    *,
    curvature_batch: Batch | None = None,
) -> None:
    """`rmtdamp.refresh_damping` for an `nnx.Optimizer`, updated in place.

    For convolutional networks on a CPU and whenever the refresh is wanted outside the
    step (`auto_damping(..., every=None)`).

    Args:
        optimizer: the optimizer, with one `auto_damping` in its transformation.
        learner: a `DampingLearner` over a `curvature_loss`, or that loss. Make it once.
        model: the model in training.
        batch: the training batch.
        curvature_batch: another sample to measure on.

    Raises:
        ValueError: none or several `auto_damping` in the optimizer, or a bad batch.
        TypeError: a loss that is not a scalar.
    """
    refreshed = transforms.refresh_damping(
        nnx.as_pure(optimizer.opt_state),
        learner,
        nnx.as_pure(nnx.state(model, nnx.Param)),
        batch,
        loss_args=nnx.as_pure(loss_args(model)),
        curvature_batch=curvature_batch,
    )
    nnx.update(optimizer.opt_state, nnx.state(refreshed))


class TrainState(train_state.TrainState):
    """Linen's TrainState, whose `apply_gradients` hands extra arguments to optax.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import flax.linen as nn
        >>> import rmtdamp, rmtdamp.flax
        >>> model = nn.Dense(1)
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(model.apply({"params": params}, batch) ** 2)
        >>> batch = jnp.ones((16, 4))
        >>> state = rmtdamp.flax.TrainState.create(
        ...     apply_fn=model.apply,
        ...     params=model.init(jax.random.key(0), batch)["params"],
        ...     tx=rmtdamp.auto_adam(1e-3, loss_fn),
        ... )
        >>> @jax.jit
        ... def step(state, batch):
        ...     grads = jax.grad(loss_fn)(state.params, batch)
        ...     return state.apply_gradients(grads=grads, extra_args={"batch": batch})
        >>> state = step(state, batch)
        >>> int(optax.tree.get(state.opt_state, "refresh_attempts"))
        1
    """

    def apply_gradients(self, *, grads, extra_args=None, **kwargs):
        """One optimiser step.

        Args:
            grads: gradients, a pytree like `params`.
            extra_args: mapping of extra arguments for the transformation's `update`
                (`batch`, `loss_args`, `value`, ...).
            **kwargs: fields of the state to replace, such as batch statistics.

        Returns:
            The state after the step.
        """
        tx = optax.with_extra_args_support(self.tx)
        # The step itself, fp8 scales that are overwritten and all, stays Flax's: it is
        # handed a transformation that knows the extra arguments.
        update = functools.partial(tx.update, **(extra_args or {}))
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        after = train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs)
        return after.replace(tx=self.tx)
