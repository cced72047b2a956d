"""For Flax users: nnx models with state, linen's TrainState. Needs Flax.

Curvature is measured in evaluation mode, at the statistics of the moment: BatchNorm on
its running averages and Dropout off make the loss a mean over independent examples.
What bounds a step is measured at the batch's own statistics, see `curvature_loss`. What
changes during training (running averages, keys) goes through `loss_args`, traced and
fresh at each step; a closure would freeze it silently at its first value.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from flax.training import train_state

import rmtdamp
from rmtdamp._types import Batch, LossFn, Params
from rmtdamp.transforms import Measurer


def state_of(rest: nnx.State, given: tuple, who: str) -> Any:
    """The state that a copy of the model is made with.

    Args:
        rest: what the model holds but for its params, as it was at construction.
        given: the `loss_args` handed over.
        who: asks for it, for the message.

    Returns:
        The one given; `rest` where it is empty and none was given.

    Raises:
        ValueError: there is state, and none or too much was given.
    """
    if len(given) == 1 and isinstance(given[0], tuple):
        raise ValueError(
            f"{who} of an nnx model got a tuple for its state: "
            "rmtdamp.flax.loss_args(model) is the whole tuple, "
            "loss_args=rmtdamp.flax.loss_args(model)"
        )
    if len(given) == 1:
        return given[0]
    if not given and not jax.tree.leaves(rest):
        return rest
    raise ValueError(
        f"{who} of an nnx model takes the state of the moment (batch statistics, keys) "
        f"as one further argument, and got {len(given)}: pass "
        "loss_args=rmtdamp.flax.loss_args(model)"
    )


def evaluated(model: nnx.Module, who: str) -> nnx.Module:
    """A copy of the model, in evaluation mode."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{who} got a {type(model).__name__} for its model: hand over the nnx "
            "module first, then the loss"
        )
    copy = nnx.merge(*nnx.split(model), copy=True)
    copy.eval()
    return copy


def curvature_loss(
    model: nnx.Module,
    model_loss: Callable[[Any, Batch], jax.Array],
    *,
    wrt: Any = nnx.Param,
    batch_statistics: bool | None = None,
) -> LossFn:
    """The loss of an nnx model, in the form that measures curvature.

    A noise needs a mean over independent examples, and so BatchNorm on its running
    averages. How far a step may go is a question to the loss whose gradient is taken,
    and there BatchNorm normalises by the batch: the eigenvalue of `StabilityFloor`,
    `auto_adam` and `LargestFraction` and the ratio of `LevenbergMarquardt` are of that
    loss, which a `DampingLearner` finds in the attribute `in_training`. On a VGG-16 of
    width 1/8 lambda_max was 5 to 270 times larger with running averages, and KFAC's
    floor as much too high.

    Args:
        model: an nnx module; only its structure is used, and it is left as it is.
        model_loss: `model_loss(model, batch) -> scalar`, the mean loss, as for
            `nnx.grad`.
        wrt: which variables are trained, a filter as in `nnx.Optimizer(model, tx,
            wrt=wrt)`: `nnx.LoRAParam` alone, say.
        batch_statistics: whether BatchNorm normalises by the batch at hand, as in
            training (Dropout stays off), or by its running averages, for whatever is
            measured; None, each where it belongs. True is not for rules that take
            moments: a part of a batch has another loss then, which `check_loss`
            refuses.

    Returns:
        `loss_fn(params, batch, state)`, the loss of an evaluation-mode copy of the
        model with the given params, those of `wrt`, and other state; without `state`
        for a model that has no other. Make it once. It raises a ValueError for params
        and state that together are not the model. Under None it has the attribute
        `in_training` where a BatchNorm of the model, as it is now, normalises by the
        batch: the same loss with all of them as they are now.

    Raises:
        TypeError: `model` is no nnx module.

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
        >>> def model_loss(model, batch):
        ...     return jnp.mean(model(batch) ** 2)
        >>> model = Model(nnx.Rngs(0))
        >>> loss_fn = rmtdamp.flax.curvature_loss(model, model_loss)
        >>> tx = rmtdamp.auto_adam(1e-3, loss_fn)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> @nnx.jit
        ... def step(model, optimizer, batch):
        ...     grads = nnx.grad(model_loss)(model, batch)
        ...     state = rmtdamp.flax.loss_args(model)
        ...     optimizer.update(model, grads, batch=batch, loss_args=state)
        >>> step(model, optimizer, jnp.ones((16, 4)))
        >>> int(optax.tree.get(optimizer.opt_state, "refresh_attempts")[...])
        1
    """
    copy = evaluated(model, "curvature_loss")
    if batch_statistics:
        copy.set_attributes(use_running_average=False, raise_if_not_found=False)
    loss_fn = _loss_of(copy, model_loss, wrt)
    if batch_statistics is None:
        as_it_is = nnx.merge(*nnx.split(model), copy=True)
        as_it_is.set_attributes(deterministic=True, raise_if_not_found=False)
        if nnx.graphdef(as_it_is) != nnx.graphdef(copy):
            vars(loss_fn)["in_training"] = _loss_of(as_it_is, model_loss, wrt)
    return loss_fn


def _loss_of(copy, model_loss, wrt) -> LossFn:
    """The loss as a function of params, batch and state, in the modes of the copy."""
    graphdef, trained, rest = nnx.split(copy, wrt, ...)
    count = lambda *trees: len(jax.tree.leaves(trees))
    total = count(trained, rest)

    def loss_fn(params: Params, batch: Batch, *state):
        state = state_of(rest, state, "the curvature_loss")
        if count(params, state) != total:
            raise ValueError(
                f"a model of {total} arrays got {count(params)} as params and "
                f"{count(state)} as state: give curvature_loss, loss_args and "
                "nnx.Optimizer the same wrt"
            )
        return model_loss(nnx.merge(graphdef, params, state, copy=True), batch)

    return loss_fn


def loss_args(model: nnx.Module, *, wrt: Any = nnx.Param) -> tuple[Any]:
    """The `loss_args` of `curvature_loss`: all state of the model but its params.

    Call it in the training step, so that the state is that of the moment.

    Args:
        model: the nnx module in training.
        wrt: which variables are trained, as for `curvature_loss`.

    Returns:
        A tuple with one element, the state without them.

    Example:
        >>> from flax import nnx
        >>> from rmtdamp.flax import loss_args
        >>> (state,) = loss_args(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> sorted(state)
        ['mean', 'var']
    """
    return (nnx.state(model, nnx.Not(wrt)),)


def refresh(
    optimizer: "nnx.Optimizer[Any]",
    measurer: Measurer,
    model: nnx.Module,
    batch: Batch,
    *,
    curvature_batch: Batch | None = None,
) -> None:
    """`rmtdamp.refresh` for an `nnx.Optimizer`, updated in place.

    For convolutional networks on a CPU and whenever the measurement is wanted outside
    the step (`refresh_every=None`). The loss gets the model's state of the moment.

    Args:
        optimizer: the optimizer, with one transformation that uses the measurer.
        measurer: the one that the transformation was given: a `DampingLearner` over a
            `curvature_loss`, a `KroneckerMeasurer` of `nnx_factors`, a `RitzMeasurer`.
        model: the model in training.
        batch: the training batch.
        curvature_batch: another sample to measure on.

    Raises:
        ValueError: none or several such states in the optimizer, or a bad batch.
        TypeError: `measurer` is none, a loss that is not a scalar.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import rmtdamp, rmtdamp.flax
        >>> def model_loss(model, batch):
        ...     return jnp.mean((model(batch) - 1.0) ** 2)
        >>> model, batch = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.ones((16, 3))
        >>> loss_fn = rmtdamp.flax.curvature_loss(model, model_loss)
        >>> learner = rmtdamp.DampingLearner(loss_fn)
        >>> tx = rmtdamp.auto_adam(1e-2, learner, refresh_every=None)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> rmtdamp.flax.refresh(optimizer, learner, model, batch)
        >>> print(optax.tree.get(nnx.as_pure(optimizer.opt_state), "refresh_attempts"))
        1
    """
    refreshed = rmtdamp.refresh(
        nnx.as_pure(optimizer.opt_state),
        measurer,
        nnx.as_pure(nnx.state(model, optimizer.wrt)),
        batch,
        loss_args=nnx.as_pure(loss_args(model, wrt=optimizer.wrt)),
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

    def apply_gradients(
        self, *, grads: Any, extra_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """One optimiser step.

        Args:
            grads: gradients, a pytree like `params`.
            extra_args: mapping of extra arguments for the transformation's `update`
                (`batch`, `loss_args`, `value`, ...).
            **kwargs: fields of the state to replace, such as batch statistics.

        Returns:
            The state after the step.
        """
        # The step itself, fp8 scales that are overwritten and all, stays Flax's: it is
        # handed a transformation that knows the extra arguments.
        update = functools.partial(_update_of(self.tx), **(extra_args or {}))
        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        after = train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs)
        return after.replace(tx=self.tx)


def _update_of(tx) -> Callable:
    """The update of a transformation; it takes extra arguments, used or not."""
    # What optax.MultiSteps makes is no GradientTransformationExtraArgs, and takes them.
    kinds = {p.kind for p in inspect.signature(tx.update).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return tx.update
    return optax.with_extra_args_support(tx).update
