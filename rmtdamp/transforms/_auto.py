"""The owners of a damping: `auto_damping` learns it, `set_damping` holds it.

An owner keeps the damping in its state and hands it to the transformation inside it as
the extra arguments `damping` and `damping_target`. There is one owner in a chain.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmtdamp._tree import accumulation_dtype, check_params, num_examples
from rmtdamp._types import Batch, LossFn, Params
from rmtdamp.damping import DampingRule, LearnedDamping, identity_target

from ._adam import Form, scale_by_adam_shrinkage
from ._learner import DampingLearner


class AutoDampingState(NamedTuple):
    """State of `auto_damping`."""

    count: jax.Array  # (), int32, steps taken
    learned: LearnedDamping  # scalars; changes when the damping is refreshed
    inner_state: Any  # of the transformation inside


class SetDampingState(NamedTuple):
    """State of `set_damping`."""

    count: jax.Array  # (), int32, steps taken
    damping: jax.Array  # (), delta that the last step used
    damping_target: jax.Array  # (), tau
    inner_state: Any  # of the transformation inside


def _is_owner(node) -> bool:
    return isinstance(node, AutoDampingState | SetDampingState)


def _owners(state) -> list:
    leaves = jax.tree.leaves(state, is_leaf=_is_owner)
    return [leaf for leaf in leaves if _is_owner(leaf)]


def _check_inside(inner_state) -> None:
    if _owners(inner_state):
        raise ValueError(
            "two owners of the damping in one chain: the transformation inside already "
            "holds one (auto_damping or set_damping); keep one of the two"
        )


def _check_no_outer_owner(extra_args) -> None:
    if "damping" in extra_args:
        raise ValueError(
            "two owners of the damping in one chain: this transformation owns it and "
            "was handed another from outside; keep one auto_damping or set_damping, "
            "and do not pass damping= to update"
        )


def _check_whole(params, name) -> None:
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise ValueError(
            f"{name} got params with holes, as inside optax.masked or "
            "optax.partition, where the loss cannot be evaluated: put the mask inside, "
            f"{name}(optax.masked(inner, mask), ...)"
        )


def _check_uses_damping(inner, updates, state, params, damping, extra_args) -> None:
    """Refuse an inner transformation whose result does not depend on the damping."""
    if not jax.tree.leaves(updates):
        return
    traced = jax.make_jaxpr(
        lambda d: inner.update(updates, state, params, damping=d, **extra_args)
    )(damping).jaxpr
    (argument,) = traced.invars
    if not any(argument is x for equation in traced.eqns for x in equation.invars):
        raise ValueError(
            "the transformation inside ignores `damping`, so setting or learning one "
            "would change nothing: take one that uses it (scale_by_adam_shrinkage, "
            "adam_shrinkage), or wrap an optax factory, "
            "with_damping(optax.adam)(learning_rate)"
        )


@functools.partial(jax.jit, static_argnames="batch_size")
def _refresh(learner, learned, step, params, batch, loss_args, batch_size):
    return learner.refresh(learned, step, params, batch, loss_args, batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _refresh_if(due, learner, learned, step, params, batch, loss_args, batch_size):
    learner.warn_of_slow_convolutions(params, batch, loss_args)
    return jax.lax.cond(
        due,
        lambda: learner.refresh(learned, step, params, batch, loss_args, batch_size),
        lambda: learned,
    )


def auto_damping(
    inner: optax.GradientTransformation,
    learner: DampingLearner | LossFn,
    *,
    every: int | None = 100,
) -> optax.GradientTransformationExtraArgs:
    """Learn the damping of any transformation that takes one, while training runs.

    Every `every` steps, the first included, the Hessian's moments are measured on the
    batch of the step and the damping follows them (`DampingLearner`); at each step the
    transformation inside is handed the damping in force. With `identity_target` this is
    the paper's learner: delta <- 0.7 delta + 0.3 (floor + P^-1 Tr Var(H)).

    `update(grads, state, params, batch=batch, loss_args=(), curvature_batch=None)`:

    - `params` whole (not masked) and `batch` are needed; `loss_args` are further
      arguments of the loss, traced and not split (batch statistics, keys);
    - `curvature_batch` is another sample to measure on; the noise meant is still that
      of `batch`.

    A measurement that cannot be used (not finite, or without a valid damping) leaves
    the damping as it was and is counted. In the state, for logging:
    `optax.tree.get(opt_state, name)` with "damping", "measured_variance",
    "last_refresh", "refresh_attempts", "refresh_rejections", "refresh_caps".

    When to measure by hand. `every=None` never measures in the step; call
    `refresh_damping` when it suits. Do so (a) for convolutional networks on a CPU,
    where XLA runs convolutions inside a conditional some thirty times slower, (b)
    inside `optax.MultiSteps` and under `vmap`, which turn the conditional into a
    selection and pay for a measurement at each step.

    Args:
        inner: a transformation whose `update` uses the extra argument `damping`:
            `scale_by_adam_shrinkage`, an optax factory through `with_damping`, or a
            chain with one of them.
        learner: a `DampingLearner`, or a loss function for one with the defaults.
        every: steps between refreshes, at least 1; None for never in the step.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: from `update`: params or batch missing, empty or unequal batch,
            params with holes, an inner transformation that ignores `damping`; from
            `init` or `update`: a second owner of the damping; `every` below 1.
        TypeError: params that are not real floats, or a loss that is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> learner = rmtdamp.DampingLearner(loss_fn, floor=1e-3)
        >>> tx = optax.chain(
        ...     optax.clip_by_global_norm(1.0),
        ...     rmtdamp.auto_damping(rmtdamp.scale_by_adam_shrinkage(), learner),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> batch = jax.random.normal(jax.random.key(0), (32, 4))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> grads = jax.grad(loss_fn)(params, batch)
        >>> updates, state = tx.update(grads, state, params, batch=batch)
        >>> variance = optax.tree.get(state, "measured_variance")
        >>> damping = optax.tree.get(state, "damping")
        >>> print(f"{damping - variance:.3f}")
        0.001

    References:
        Granziol and Baskerville, section 7: eq. 15, Algorithm 1, the averaging of
        section 7.1 (the first damping is floor + variance).
    """
    if not isinstance(learner, DampingLearner):
        learner = DampingLearner(learner)
    if isinstance(every, int) and every < 1:
        raise ValueError(f"every is {every}: take at least 1, or None for never")
    inner = optax.with_extra_args_support(inner)
    checked = False

    def init(params):
        _check_whole(params, "auto_damping")
        inner_state = inner.init(params)
        _check_inside(inner_state)
        return AutoDampingState(
            count=jnp.zeros((), jnp.int32),
            learned=learner.init(params),
            inner_state=inner_state,
        )

    def update(
        updates,
        state,
        params=None,
        *,
        batch=None,
        loss_args=(),
        curvature_batch=None,
        **extra_args,
    ):
        nonlocal checked
        _check_no_outer_owner(extra_args)
        if params is None:
            raise ValueError(
                "auto_damping needs params, where it measures the curvature: "
                "tx.update(grads, state, params, batch=batch)"
            )
        _check_whole(params, "auto_damping")
        learned = state.learned
        if every is not None and jax.tree.leaves(params):
            check_params(params)
            data = batch if curvature_batch is None else curvature_batch
            if data is None:
                raise ValueError(
                    "auto_damping needs the batch to measure the curvature on: "
                    "tx.update(grads, state, params, batch=batch), or every=None and "
                    "refresh_damping by hand"
                )
            size = num_examples(data, "curvature_batch" if batch is None else "batch")
            if batch is not None:
                size = num_examples(batch)
            arguments = (learner, learned, state.count, params, data, loss_args, size)
            if isinstance(every, int) and every == 1:
                learned = _refresh(*arguments)
            else:
                learned = _refresh_if(state.count % every == 0, *arguments)

        given = {"batch": batch, "curvature_batch": curvature_batch}
        extra_args |= {name: x for name, x in given.items() if x is not None}
        extra_args |= {"loss_args": loss_args, "damping_target": learned.damping_target}
        if not checked:
            _check_uses_damping(
                inner, updates, state.inner_state, params, learned.damping, extra_args
            )
            checked = True
        updates, inner_state = inner.update(
            updates, state.inner_state, params, damping=learned.damping, **extra_args
        )
        count = optax.safe_increment(state.count)
        return updates, AutoDampingState(count, learned, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def refresh_damping(
    opt_state: optax.OptState,
    learner: DampingLearner | LossFn,
    params: Params,
    batch: Batch,
    *,
    loss_args: tuple = (),
    curvature_batch: Batch | None = None,
) -> optax.OptState:
    """Measure and learn now: the by-hand twin of `auto_damping`'s refresh.

    One compiled call of its own, outside the training step. The `auto_damping` is found
    in any chain or wrapper (`optax.MultiSteps`, `optax.masked`, ...).

    Args:
        opt_state: the optimiser's state, with one `auto_damping` in it.
        learner: a `DampingLearner`, as a rule the one that `auto_damping` was given, or
            a loss function for one with the defaults. Make it once.
        params: pytree of real floating arrays.
        batch: the training batch.
        loss_args: further arguments of the loss.
        curvature_batch: another sample to measure on.

    Returns:
        `opt_state` with the new damping and its counters; all else is untouched.

    Raises:
        ValueError: none or several `auto_damping` in `opt_state`, or a bad batch.
        TypeError: params that are not real floats, or a loss that is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> learner = rmtdamp.DampingLearner(loss_fn, floor=1e-3)
        >>> adam = rmtdamp.scale_by_adam_shrinkage()
        >>> tx = rmtdamp.auto_damping(adam, learner, every=None)
        >>> batch = jax.random.normal(jax.random.key(0), (32, 4))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> state = rmtdamp.refresh_damping(state, learner, params, batch)
        >>> int(optax.tree.get(state, "refresh_attempts"))
        1
    """
    if not isinstance(learner, DampingLearner):
        learner = DampingLearner(learner)
    found = [x for x in _owners(opt_state) if isinstance(x, AutoDampingState)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} auto_damping states, and refresh_damping "
            "needs exactly one: wrap one transformation of the chain in auto_damping"
        )
    (state,) = found
    size = num_examples(batch)
    data = batch if curvature_batch is None else curvature_batch
    num_examples(data, "curvature_batch")
    learned = _refresh(
        learner, state.learned, state.count, params, data, loss_args, size
    )
    refreshed = state._replace(learned=learned)
    return jax.tree.map(
        lambda x: refreshed if x is state else x, opt_state, is_leaf=_is_owner
    )


def set_damping(
    inner: optax.GradientTransformation,
    damping: optax.ScalarOrSchedule,
    *,
    target: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Hold the damping of a transformation at a constant, or let it follow a schedule.

    The same seat as `auto_damping`, without a learner: the damping in force is in the
    state (`optax.tree.get(opt_state, "damping")`) and travels inward.

    Args:
        inner: a transformation whose `update` uses the extra argument `damping`.
        damping: delta, a number or a schedule of the step, in the unit of `inner`.
        target: tau, for transformations with a shrinkage form.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: a second owner of the damping, an inner transformation that ignores
            `damping`, or a negative number.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> warm = optax.linear_schedule(1.0, 1e-3, transition_steps=100)
        >>> tx = rmtdamp.set_damping(rmtdamp.adam_shrinkage(1e-3), warm)
        >>> params = jnp.zeros(2)
        >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
        >>> print(optax.tree.get(state, "damping"))
        1.0
    """
    if isinstance(damping, int | float) and damping < 0:
        raise ValueError(f"damping is {damping}, and must be at least 0")
    inner = optax.with_extra_args_support(inner)
    checked = False

    def at(count):
        return damping(count) if callable(damping) else damping

    def init(params):
        inner_state = inner.init(params)
        _check_inside(inner_state)
        dtype = accumulation_dtype(params)
        count = jnp.zeros((), jnp.int32)
        return SetDampingState(
            count=count,
            damping=jnp.asarray(at(count), dtype),
            damping_target=jnp.asarray(target, dtype),
            inner_state=inner_state,
        )

    def update(updates, state, params=None, **extra_args):
        nonlocal checked
        _check_no_outer_owner(extra_args)
        value = jnp.asarray(at(state.count)).astype(state.damping.dtype)
        extra_args["damping_target"] = state.damping_target
        if not checked:
            _check_uses_damping(
                inner, updates, state.inner_state, params, value, extra_args
            )
            checked = True
        updates, inner_state = inner.update(
            updates, state.inner_state, params, damping=value, **extra_args
        )
        return updates, SetDampingState(
            count=optax.safe_increment(state.count),
            damping=value,
            damping_target=state.damping_target,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


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
    weight_decay: jax.typing.ArrayLike = 0.0,
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
        auto_damping(
            scale_by_adam_shrinkage(b1, b2, form=form), learner, every=every
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
