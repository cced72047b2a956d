"""Measurements that training repeats: in the step, or by hand between steps.

    measurer, params            ->  what is known before any measurement
    measurer, known, context    ->  what is known after one

A measurer knows how to measure and holds no state: what it finds is a tree of arrays,
kept by the transformation that uses it in a field `measured`, beside the `count` of its
steps. That is all it takes for a measurement to run behind a conditional in the
training step (`refresh_in_step`) and by hand between steps, in any chain (`refresh`).
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmtdamp._checks import check_loss_args
from rmtdamp._jax import is_traced
from rmtdamp._sharding import in_unchecked_shards, varies
from rmtdamp._tree import check_params, num_examples
from rmtdamp._types import Batch, LossFn, Params

T = TypeVar("T")


def with_numbers(*names: str) -> Callable[[type[T]], type[T]]:
    """A decorator that makes a dataclass a pytree.

    Args:
        *names: the fields that hold numbers: its leaves, which may be traced. All other
            fields are static.

    Returns:
        The decorator.

    Example:
        >>> import dataclasses
        >>> import jax
        >>> from rmtdamp.transforms import with_numbers
        >>> @with_numbers("scale")
        ... @dataclasses.dataclass(frozen=True)
        ... class Settings:
        ...     scale: float
        ...     mode: str = "mean"
        >>> jax.tree.leaves(Settings(2.0))
        [2.0]
    """

    def register(cls: Any) -> Any:
        rest = [f.name for f in dataclasses.fields(cls) if f.name not in names]
        return jax.tree_util.register_dataclass(cls, list(names), rest)

    return register


class Context(NamedTuple):
    """What a training step shows to a measurer.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.transforms import Context
        >>> context = Context(
        ...     step=0, params=jnp.ones(2), batch=jnp.eye(2), batch_size=2
        ... )
        >>> context.loss_args
        ()
    """

    step: Any  # (), int32, steps taken before this one
    params: Params
    batch: Batch  # what to measure on
    batch_size: Any  # examples of the training batch, whose noise is meant
    loss_args: tuple[Any, ...] = ()  # further arguments of the loss
    grads: Params | None = None  # the updates that come in; None by hand without them
    previous_params: Params | None = None  # before the last step, where they are kept


def training_loss(loss_fn: LossFn) -> LossFn:
    """The loss whose gradient the optimiser takes, as far as the measured one knows it.

    With BatchNorm that is another one; see `rmtdamp.flax.curvature_loss`.

    Returns:
        The attribute `in_training`, or without it the loss itself.
    """
    return getattr(loss_fn, "in_training", loss_fn)


class Measurer(Protocol):
    """Knows how to measure: a frozen dataclass, and a pytree whose leaves are numbers.

    `jax.tree_util.register_static` makes a pytree of it, `with_numbers` one whose
    numbers may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> from rmtdamp.transforms import Measurer
        >>> def state_of(measurer: Measurer, params):
        ...     return type(measurer.init(params)).__name__
        >>> learner = rmtdamp.DampingLearner(
        ...     lambda params, batch: jnp.mean(batch @ params)
        ... )
        >>> state_of(learner, jnp.ones(2))
        'LearnedDamping'
    """

    state_type: ClassVar[type]  # of what `init` and `refresh` return, its own alone

    def init(self, params: Params) -> Any:
        """What is known before any measurement: arrays, of the shapes that stay."""
        ...

    def refresh(self, measured: Any, context: Context) -> Any:
        """What is known after a measurement; traced in the step, eager by hand.

        What cannot be used (not finite) is counted in the state and changes nothing
        else: values cannot raise in a compiled step.
        """
        ...


def is_due(
    count: jax.typing.ArrayLike, refresh_every: jax.typing.ArrayLike
) -> jax.Array:
    """When to measure: whether a period of `refresh_every` steps begins at `count`.

    In the first half of the first, also at 1, 2, 4, 8, ...: curvature changes most in
    the first steps of a training run, and what was measured at step 0 says little at
    step 60. The transformations measure so in their step; a loop that calls
    `rmtdamp.refresh` by hand should, too.

    Args:
        count: int32, steps taken before.
        refresh_every: steps between measurements, at least 1.

    Returns:
        A bool.

    Example:
        >>> from rmtdamp.transforms import is_due
        >>> [step for step in range(30) if is_due(step, 10)]
        [0, 1, 2, 4, 10, 20]
    """
    count = jnp.asarray(count)
    # Under inject_hyperparams it is an array, of a floating dtype at that.
    every = jnp.asarray(refresh_every).astype(count.dtype)
    power_of_two = (count & (count - 1)) == 0
    return (count % every == 0) | (power_of_two & (2 * count < every))


def check_whole(params: Params, name: str) -> None:
    """Refuse params with the holes that a mask leaves, and those without a Hessian.

    Raises:
        ValueError: there is a hole, or arrays without an element.
        TypeError: an array is not of a real floating dtype.
    """
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise ValueError(
            f"{name} got params with holes, as inside optax.masked or optax.partition, "
            "where the loss cannot be evaluated: put the mask inside, as in "
            "auto_damping(optax.masked(inner, mask), ...); KFAC and Lanczos-Newton, "
            "which have nothing inside, take the part that they train for their params "
            "and the rest through loss_args (wrt= in rmtdamp.flax), with an optimiser "
            "of its own for the rest"
        )
    leaves = jax.tree.leaves(params)
    # Optax has optimisers of nothing, and calls `init` with placeholders.
    if leaves and all(hasattr(x, "dtype") for x in leaves):
        check_params(params)


def _context(
    name, way_out, state, params, batch, *, loss_args, curvature_batch, grads
) -> Context:
    """The context of a measurement, out of what a user handed over."""
    if params is None:
        raise ValueError(
            f"{name} needs params, where it measures the curvature: "
            "tx.update(grads, state, params, batch=batch)"
        )
    check_whole(params, name)
    check_params(params)
    check_loss_args(loss_args)
    if in_unchecked_shards(params, batch, grads):
        warnings.warn(
            f"{name} is inside pmap or shard_map(check_vma=False), where each device "
            "measures its own shard, a pmean in the loss or not, and replicas drift "
            "apart: take jit with shardings, or shard_map as it comes, "
            "check_vma=True, with a pmean in the loss",
            stacklevel=3,
        )
    data = batch if curvature_batch is None else curvature_batch
    if data is None:
        raise ValueError(
            f"{name} needs the batch to measure the curvature on: "
            f"tx.update(grads, state, params, batch=batch), or {way_out} (the way out "
            "where a wrapper drops extra arguments, as optax.lookahead and "
            "optax.contrib.sam do)"
        )
    num_examples(data, "batch" if curvature_batch is None else "curvature_batch")
    size = num_examples(data if batch is None else batch)
    before = getattr(state, "previous_params", None)
    return Context(state.count, params, data, size, tuple(loss_args), grads, before)


@jax.jit
def _refresh(measurer, measured, context):
    return _looked_at(measurer, measured, context, within=False)()


@jax.jit
def _refresh_if(due, measurer, measured, context):
    try:
        refresh = _looked_at(measurer, measured, context, within=True)
        return jax.lax.cond(due, refresh, lambda: measured)
    except TypeError as error:
        if "cond" not in str(error) or not varies(context.batch):
            raise
        raise TypeError(
            "inside shard_map each device would hold a measurement of its own shard, "
            "and the state is to be one: average the loss that is measured over the "
            "mesh's axis, jax.lax.pmean(loss, axis_name), or take jit with shardings"
        ) from error


def _looked_at(measurer, measured, context, *, within: bool) -> Callable:
    """`measurer.refresh`, after a warning where XLA on a CPU would run it slowly."""
    refresh = lambda: measurer.refresh(measured, context)
    if jax.default_backend() != "cpu":
        return refresh
    # Traced once, looked at, and put to use as it is.
    jaxpr, shape = jax.make_jaxpr(refresh, return_shape=True)()
    if _convolves_in_control_flow(jaxpr.jaxpr, within):
        whose = getattr(measurer, "learner", measurer)  # the user's own
        warnings.warn(
            f"{type(whose).__name__} measures a model with convolutions, which XLA "
            "on a CPU runs some thirty times slower inside the conditional or loop of "
            "a training step: pass refresh_every=None and call rmtdamp.refresh between "
            "steps (on a GPU or TPU this does not matter)",
            stacklevel=2,
        )
    # Imported here, for it imports Pallas, which takes a twentieth of a second.
    from jax.extend.core import jaxpr_as_fun

    run = jaxpr_as_fun(jaxpr)
    return lambda: jax.tree.unflatten(jax.tree.structure(shape), run())


def _convolves_in_control_flow(jaxpr, within: bool) -> bool:
    """Whether a convolution stands in a loop or conditional, or `within` is true."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated" and within:
            return True
        below = within or name in ("cond", "scan", "while")
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and _convolves_in_control_flow(inner, below):
                return True
    return False


def refresh_in_step(
    name: str,
    measurer: Measurer,
    refresh_every: int | None,
    state: Any,
    updates: Params,
    params: Params | None,
    /,  # extra arguments of other transformations may have any name
    *,
    batch: Batch | None = None,
    loss_args: tuple[Any, ...] = (),
    curvature_batch: Batch | None = None,
    **extra_args: Any,
) -> Any:
    """What is known in this step: measured anew in every `refresh_every`-th one.

    For the `update` of a transformation whose state has the fields `count` and
    `measured`; hand its extra arguments on.

    Args:
        name: of the transformation, for messages.
        measurer: what measures.
        refresh_every: steps between measurements, the first step included, and early
            on steps 1, 2, 4, ... (`is_due`); None for never in the step.
        state: of the transformation.
        updates: that come in.
        params: pytree of real floating arrays.
        batch: the training batch.
        loss_args: further arguments of the loss.
        curvature_batch: another sample to measure on.
        **extra_args: of the step, for others.

    Returns:
        The new `measured`.

    Raises:
        ValueError: params or batch missing, params with holes, a bad batch.
        TypeError: params that are not real floats, `loss_args` that are no tuple.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import rmtdamp
        >>> from rmtdamp.transforms import AutoDampingState, refresh_in_step
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> params, batch = jnp.ones(2), jnp.eye(2)
        >>> learner = rmtdamp.DampingLearner(loss_fn)
        >>> tx = rmtdamp.auto_damping(rmtdamp.scale_by_adam_shrinkage(), learner)
        >>> grads = jax.grad(loss_fn)(params, batch)
        >>> at = learner, 100, tx.init(params), grads, params
        >>> print(refresh_in_step("mine", *at, batch=batch).refresh_attempts)
        1
    """
    del extra_args
    if refresh_every is None or not jax.tree.leaves(updates):
        return state.measured
    context = _context(
        name,
        "refresh_every=None and rmtdamp.refresh by hand",
        state,
        params,
        batch,
        loss_args=loss_args,
        curvature_batch=curvature_batch,
        grads=updates,
    )
    if isinstance(refresh_every, int) and refresh_every == 1:
        return _refresh(measurer, state.measured, context)
    due = is_due(state.count, refresh_every)
    return _refresh_if(due, measurer, state.measured, context)


def _is_variable(node) -> bool:
    """Whether this is one of the variables in which Flax's nnx keeps each array."""
    return hasattr(node, "get_raw_value")


def _variables(tree) -> set[type]:
    """Their types; those of an `nnx.Optimizer`'s state are its own."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_variable)
    return set(map(type, filter(_is_variable, leaves)))


def refresh(
    opt_state: optax.OptState,
    measurer: Measurer,
    params: Params,
    batch: Batch,
    *,
    grads: Params | None = None,
    loss_args: tuple[Any, ...] = (),
    curvature_batch: Batch | None = None,
) -> optax.OptState:
    """Measure now: by hand, between training steps.

    Does what the training step does every `refresh_every` steps, for transformations
    with `refresh_every=None`: for convolutional networks on a CPU, where XLA runs
    convolutions inside a conditional some thirty times slower, and inside
    `optax.MultiSteps` and under `vmap`, which pay for a conditional measurement at each
    step. The measurement is driven from Python, one compiled call a microbatch or
    product, so that it compiles in the time of one. `rmtdamp.transforms.is_due` says
    when a step would measure, early on more often.

    A rule that reads the learning rate or the gradient decides in the step: after
    `refresh` the state holds the new measurement and still the damping before it, and
    the next `update` brings the new one.

    Args:
        opt_state: the optimiser's state, any chain or wrapper (`optax.MultiSteps`,
            `optax.masked`, ...) with one transformation in it that uses the measurer.
        measurer: the one that the transformation was given: a `DampingLearner`, a
            `KroneckerMeasurer`, a `RitzMeasurer`, or your own. Make it once.
        params: pytree of real floating arrays.
        batch: the training batch.
        grads: the gradient, for a measurer that begins at it.
        loss_args: further arguments of the loss.
        curvature_batch: another sample to measure on; the noise meant is still that of
            `batch`.

    Returns:
        `opt_state` with what was measured; all else is untouched.

    Raises:
        TypeError: `measurer` is none, `opt_state` is that of an `nnx.Optimizer`, params
            that are not real floats, `loss_args` that are no tuple.
        ValueError: none or several of its states in `opt_state`, one of a learner that
            measures something else, or a bad batch.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> learner = rmtdamp.DampingLearner(loss_fn, floor=1e-3)
        >>> tx = rmtdamp.auto_adam(1e-2, learner, refresh_every=None)
        >>> batch = jax.random.normal(jax.random.key(0), (32, 4))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> state = rmtdamp.refresh(state, learner, params, batch)
        >>> int(optax.tree.get(state, "refresh_attempts"))
        1
    """
    if not hasattr(measurer, "state_type"):
        raise TypeError(
            f"measurer is of type {type(measurer).__name__}: hand over what measures, "
            "with all its settings, as the transformation was given it (for a loss "
            "function, rmtdamp.DampingLearner(loss_fn))"
        )
    if _variables(opt_state) - _variables(params):
        raise TypeError(
            "opt_state is that of an nnx.Optimizer, whose arrays are variables: call "
            "rmtdamp.flax.refresh(optimizer, measurer, model, batch)"
        )
    kind = measurer.state_type
    uses = lambda node: isinstance(getattr(node, "measured", None), kind)
    found = list(filter(uses, jax.tree.leaves(opt_state, is_leaf=uses)))
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of a {type(measurer).__name__}, and "
            "refresh needs exactly one: put one transformation that uses it into the "
            "chain"
        )
    (state,) = found
    context = _context(
        "refresh",
        "hand it to refresh",
        state,
        params,
        batch,
        loss_args=loss_args,
        curvature_batch=curvature_batch,
        grads=grads,
    )
    measured = measurer.refresh(state.measured, context)
    if not is_traced(measured):
        _warn(measured)
    new = state._replace(measured=measured)
    is_state = lambda node: node is state
    return jax.tree.map(lambda x: new if x is state else x, opt_state, is_leaf=is_state)


def _warn(state) -> None:
    # The words never change, so that Python shows a warning once.
    for problem in getattr(state, "problems", list)():
        warnings.warn(f"rmtdamp: {problem}", stacklevel=3)


def check_state(opt_state: optax.OptState) -> None:
    """Warn about what the measurements of a run say is wrong with it. Eager.

    Values cannot raise in a compiled step, so they are counted in its state: losses
    that are no mean over the batch, measurements most or all of which failed, a
    damping that sits on its bound, steps without the measurement by hand that they wait
    for. This puts the counters into words, and tells of NaN in what the optimiser
    keeps. `refresh` does the former by itself; call it after the first measurement of a
    compiled step, and when a run looks odd.

    Args:
        opt_state: the optimiser's state, any chain or wrapper, `nnx.Optimizer`'s too,
            or that of many runs under `vmap`.

    Raises:
        ValueError: nothing in it is measured.

    Example:
        >>> import jax.numpy as jnp, warnings
        >>> import rmtdamp
        >>> learner = rmtdamp.DampingLearner(lambda w, x: jnp.sum((x @ w) ** 2))
        >>> tx = rmtdamp.auto_adam(1e-2, learner)
        >>> params, batch = jnp.ones(4), jnp.eye(4)
        >>> _, state = tx.update(params, tx.init(params), params, batch=batch)
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     rmtdamp.check_state(state)
        >>> print(str(caught[0].message)[:50])
        rmtdamp: the loss of a batch is not the mean of it
    """
    given = opt_state
    bare = lambda x: x.get_raw_value() if _is_variable(x) else x
    opt_state = jax.tree.map(bare, opt_state, is_leaf=_is_variable)
    nodes = []
    jax.tree.leaves(opt_state, is_leaf=lambda node: nodes.append(node) or False)
    if not any(hasattr(node, "measured") for node in nodes):
        raise ValueError(
            f"opt_state, a {type(given).__name__}, holds nothing that is measured: "
            "hand over the state of an optimiser that measures (auto_adam, "
            "auto_damping, kfac, lanczos_newton), what its init and update return"
        )
    for node in nodes:
        _warn(node)
        measured = getattr(node, "measured", None)
        waits = getattr(measured, "waits", None)
        if waits is not None and np.any(waits & (node.count > 0)):
            warnings.warn(
                "rmtdamp: steps were taken and nothing was measured: with "
                "refresh_every=None call rmtdamp.refresh(opt_state, measurer, params, "
                "batch) between steps, the first time before the first step",
                stacklevel=2,
            )
    # What is measured is NaN before its first measurement, and never after.
    own = lambda node: hasattr(node, "problems")
    rest = [x for x in jax.tree.leaves(opt_state, is_leaf=own) if not own(x)]
    is_float = lambda x: jnp.issubdtype(getattr(x, "dtype", int), jnp.inexact)
    if _any_nan(list(filter(is_float, rest))):
        warnings.warn(
            "rmtdamp: the optimiser's state holds NaN, so a gradient was not finite, "
            "and no step since was: look at the loss, the data and the learning rate; "
            "optax.apply_if_finite around the optimiser leaves out such a step",
            stacklevel=2,
        )


@jax.jit
def _any_nan(leaves) -> jax.Array:
    return jnp.any(jnp.stack([False, *(jnp.any(jnp.isnan(x)) for x in leaves)]))
