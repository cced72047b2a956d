"""Transformations that hold a damping: the one that learns it, the one that is told.

Each keeps the damping in its state and hands it to the transformation inside it, as the
extra arguments `damping` and `damping_target` of `update`. There is one in a chain.
"""

import contextlib
import dataclasses
import functools
import inspect
import warnings
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmtdamp._checks import check_every, check_range
from rmtdamp._jax import depends, is_traced
from rmtdamp._parts import Parts, spread_prefix
from rmtdamp._tree import accumulation_dtype, aligned, leaf_names, scale, vdot
from rmtdamp._types import LossFn
from rmtdamp.damping import (
    MEASURED,
    Evidence,
    LearnedDamping,
    StabilityFloor,
    decides_in_the_step,
    is_relative,
    needs_of,
    settle_probe,
)

from ._learner import DampingLearner
from ._measurer import Context, check_whole, refresh_in_step
from ._optimiser import check_damping, check_learning_rate, is_one
from ._ritz import RitzSubspace


class AutoDampingState(NamedTuple):
    """State of `auto_damping`.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> learner = rmtdamp.DampingLearner(
        ...     lambda w, batch: jnp.mean(batch @ w), floor=0.5
        ... )
        >>> tx = rmtdamp.auto_damping(rmtdamp.scale_by_adam_shrinkage(), learner)
        >>> state = tx.init(jnp.zeros(4))
        >>> print(state.count, state.measured.damping)
        0 0.5
    """

    count: Any  # (), int32, steps taken
    measured: LearnedDamping  # changes when the damping is refreshed
    inner_state: Any  # of the transformation inside
    previous_params: Any = None  # before the last step, for a rule that looks back


class SetDampingState(NamedTuple):
    """State of `set_damping`.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> tx = rmtdamp.set_damping(rmtdamp.scale_by_adam_shrinkage(), 0.5)
        >>> print(tx.init(jnp.zeros(4)).damping)
        0.5
    """

    count: Any  # (), int32, steps taken
    damping: Any  # delta that the last step used, () or a tree of them
    damping_target: jax.Array  # (), tau
    inner_state: Any  # of the transformation inside


_IGNORES = (
    "the transformation inside ignores `damping`, so setting or learning one would "
    "change nothing: take one that uses it (scale_by_adam_shrinkage, adam_shrinkage), "
    "or wrap an optax factory with an eps, with_damping(optax.adam)(learning_rate); "
    "one that divides by no curvature (sgd, lion) has no damping to learn. (A wrapper "
    "inside that drops extra arguments, as optax.MultiSteps, optax.lookahead and "
    "optax.contrib.sam do, hides it: put auto_damping in.)"
)


def _taking_damping(inner) -> optax.GradientTransformationExtraArgs:
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        name = getattr(inner, "__name__", type(inner).__name__)
        raise TypeError(
            f"inner is {name}, and no gradient transformation: a function that makes "
            "one is called with its arguments first, with_damping(optax.adam)(1e-3)"
        )
    # Asked of its signature: `_may_use` cannot trace every update.
    parameters = inspect.signature(inner.update).parameters.values()
    takes = any(x.name == "damping" or x.kind is x.VAR_KEYWORD for x in parameters)
    if takes and isinstance(inner, optax.GradientTransformationExtraArgs):
        return inner
    raise ValueError(_IGNORES)


def _init_inside(inner, params, needed=frozenset(), argument="damping"):
    """The state of `inner`, which must use a damping and hold none."""
    state = inner.init(params)
    holds = lambda node: isinstance(node, AutoDampingState | SetDampingState)
    if any(map(holds, jax.tree.leaves(state, is_leaf=holds))):
        raise ValueError(
            "two transformations of one chain hold a damping: the one inside already "
            "does (auto_damping or set_damping); keep one of the two"
        )
    if argument == "relative_damping" and not _may_use(
        _traced(argument, inner, state, params), params
    ):
        raise ValueError(
            "the rule gives a damping relative to the mean of the preconditioner's "
            "eigenvalues, and the transformation inside does not take one: take "
            "scale_by_adam_shrinkage, scale_by_kfac, scale_by_lanczos, or another rule"
        )
    traced = _traced("damping", inner, state, params)
    if not _may_use(traced, params):
        raise ValueError(_IGNORES)
    if needed & MEASURED and (still := _unmoved(traced, params)):
        warnings.warn(
            f"the transformation inside never moves {still}, whose curvature decides "
            "on the damping of all: leave what is frozen out of params, and hand it to "
            "the loss through loss_args (wrt= in rmtdamp.flax)",
            stacklevel=3,
        )
    if "effective_eigenvalue" in needed and not _gives_products(inner, state, params):
        raise ValueError(
            "the rule looks at the curvature that the preconditioner leaves, and the "
            "transformation inside does not give its product: take "
            "scale_by_adam_shrinkage, scale_by_kfac, scale_by_lanczos or an optimiser "
            "made of them, or StabilityFloor without `preconditioned`"
        )
    return state


def _traced(argument, inner, state, params):
    """The jaxpr of an update of `inner`, of an extra argument before all others.

    Returns:
        It, its outputs beginning with the updates; None where it cannot be traced.
    """

    def update(value, *rest, **given):
        given |= {"damping": jnp.ones(()), "damping_target": jnp.ones(())}
        return inner.update(*rest, **given | {argument: value})

    # A product of the preconditioner needs no batch where a step does.
    for given in ({}, {"curvature_power": -1}):
        with contextlib.suppress(Exception):  # more arguments, or placeholders
            traced = jax.make_jaxpr(functools.partial(update, **given))
            return traced(jnp.zeros(()), params, state, params).jaxpr
    return None


def _may_use(traced, params) -> bool:
    """False if an update is known not to depend on its extra argument."""
    if traced is None or not traced.outvars or not jax.tree.leaves(params):
        return True
    value = traced.invars[0]
    return any(value is x for equation in traced.eqns for x in equation.invars)


def _unmoved(traced, params) -> str:
    """The leaves whose updates are known to be constants, in words; or nothing."""
    if traced is None:
        return ""
    # The state comes after the updates.
    follows = zip(leaf_names(params), depends(traced, traced.invars), strict=False)
    still = [name for name, moves in follows if not moves]
    more = f" and {len(still) - 2} more" if len(still) > 2 else ""
    return ", ".join(still[:2]) + more


def _gives_products(inner, state, params) -> bool:
    """False if an update of `inner` is known not to depend on `curvature_power`."""

    def traced(**given):
        update = lambda x: inner.update(params, state, params, damping=x, **given)
        return jax.make_jaxpr(update)(jnp.ones(()))

    try:
        product = traced(curvature_power=1)
    except Exception:  # `init` with placeholders
        return True
    try:
        return str(product) != str(traced())
    except Exception:  # a step needs a batch, and a product does not
        return True


def _solver(inner, state, params, **damping):
    """D^-1 of the transformation inside, a function of a tree like params.

    Whatever else stands in a chain adds to the update or multiplies it (momentum, a
    clip, weight decay, the learning rate): the derivative at zero leaves the factor,
    and the power 0 has nothing but it.

    Returns:
        The function.
    """

    def powered(power, vector):
        step = lambda x: inner.update(
            x, state, params, curvature_power=power, **damping
        )[0]
        vector = aligned(vector, params)
        zeros = jax.tree.map(jnp.zeros_like, vector)
        found = jax.jvp(step, (zeros,), (vector,))[1]
        return jax.tree.map(lambda x: x.astype(accumulation_dtype(params)), found)

    def solve(vector):
        factor = vdot(vector, powered(0, vector)) / vdot(vector, vector)
        return scale(1 / factor, powered(-1, vector))

    return solve


def _in_force(learned, relative: bool, parts: Parts, like) -> dict[str, Any]:
    """What travels inward: scalars, or with labels a scalar for each leaf."""
    found = {"damping": learned.damping, "damping_target": learned.damping_target}
    found |= {"relative_damping": learned.relative_damping} if relative else {}
    if parts.names is None:
        return found
    return {name: parts.spread(value, like) for name, value in found.items()}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["learner", "inner_state"],
    meta_fields=["inner", "relative"],
)
@dataclasses.dataclass(frozen=True)
class _Settling:
    """A learner whose power iteration is finished by the transformation inside."""

    state_type: ClassVar[type] = LearnedDamping

    learner: DampingLearner
    inner_state: Any
    inner: optax.GradientTransformationExtraArgs
    relative: bool

    def init(self, params) -> LearnedDamping:
        return self.learner.init(params)

    def settle(self, learned: LearnedDamping, params) -> LearnedDamping:
        parts = self.learner.parts(params)
        given = _in_force(learned, self.relative, parts, params)
        solve = _solver(self.inner, self.inner_state, params, **given)
        return settle_probe(learned, solve, parts)

    def refresh(self, measured: LearnedDamping, context: Context) -> LearnedDamping:
        learned = self.learner.refresh(measured, context)
        return self.settle(learned, context.params)


def _check_not_handed_in(extra_args) -> None:
    if "damping" in extra_args:
        raise ValueError(
            "two transformations of one chain hold a damping: this one does and was "
            "handed another from outside; keep one auto_damping or set_damping, and do "
            "not pass damping= to update"
        )


def _seen_inside(inner_state) -> jax.Array | float:
    """The largest eigenvalue that a Ritz subspace inside saw a step ago, or NaN."""
    is_subspace = lambda node: isinstance(node, RitzSubspace)
    nodes = jax.tree.leaves(inner_state, is_leaf=is_subspace)
    seen = [node.max_eigenvalue for node in filter(is_subspace, nodes)]
    return functools.reduce(jnp.fmax, seen, jnp.nan)


def _known_in_step(
    rule, parts, count, updates, own: Any, learning_rate: Any
) -> Evidence:
    """What a step shows to a rule."""
    known, needed = Evidence(), needs_of(rule)
    if "gradient_norm" in needed:
        known = known._replace(gradient_norm=jnp.sqrt(parts.vdot(updates, updates)))
    if "learning_rate" in needed:
        rate = own if learning_rate is None else learning_rate
        if rate is None:
            raise ValueError(
                "the rule needs the learning rate: hand the optimiser's number or "
                "schedule to auto_damping(..., learning_rate=...), or its value to "
                "update(..., learning_rate=...)"
            )
        if callable(rate):
            ahead = getattr(rule, "steps_ahead", 0)
            now, later = (jnp.asarray(rate(count + k)) for k in (0, ahead))
            # Past the end of a run a schedule may be NaN.
            rate = jnp.fmax(now, later) if ahead else now
        known = known._replace(learning_rate=rate)
    return known


def auto_damping(
    inner: optax.GradientTransformation,
    learner: DampingLearner | LossFn,
    *,
    refresh_every: int | None = 100,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Learn the damping of any transformation that takes one, while training runs.

    Every `refresh_every` steps, the first included, the Hessian's moments are measured
    on the batch of the step and the damping follows them (`DampingLearner`); so it does
    at steps 1, 2, 4, ... below half of `refresh_every`, where curvature changes most.
    At each step the transformation inside is handed the damping in force. With
    `identity_target` this is the paper's learner: delta <- 0.7 delta + 0.3 (floor +
    P^-1 Tr Var(H)).

    `update(grads, state, params, batch=batch, loss_args=(), curvature_batch=None)`:

    - `params` whole (not masked) and `batch` are needed; `loss_args` are further
      arguments of the loss, traced and not split (batch statistics, keys);
    - `curvature_batch` is another sample to measure on; the noise meant is still that
      of `batch`.

    A measurement that cannot be used (not finite, far from all before it, or without a
    valid damping) leaves the damping as it was and is counted. In the state, for
    logging: `optax.tree.get(opt_state, name)` with "damping", "relative_damping",
    "measured_variance", "max_eigenvalue", "effective_eigenvalue", "last_refresh",
    "refresh_attempts", "refresh_rejections", "refresh_caps", "loss_mismatches",
    "power_failures"; `rmtdamp.check_state(opt_state)` says in words what is wrong.

    A rule that needs the learning rate or the gradient decides anew in each step, on
    what was last measured; all others decide when something is measured. Around
    Lanczos-Newton, whose Ritz values of the step before are below lambda_max and new,
    the largest |Ritz value| goes before a smaller "max_eigenvalue" held since the last
    measurement (not with `labels`).

    When to measure by hand. `refresh_every=None` never measures in the step; call
    `rmtdamp.refresh` when it suits. Do so (a) for convolutional networks on a CPU,
    where XLA runs convolutions inside a conditional some thirty times slower, (b)
    inside `optax.MultiSteps` and under `vmap`, which turn the conditional into a
    selection and pay for a measurement at each step, (c) inside wrappers that drop
    extra arguments, such as `optax.lookahead` and `optax.contrib.sam`.

    Args:
        inner: a transformation whose `update` uses the extra argument `damping`:
            `scale_by_adam_shrinkage`, an optax factory through `with_damping`, or a
            chain with one of them.
        learner: a `DampingLearner`, or a loss function for one with the defaults.
        refresh_every: steps between measurements, at least 1, after the early ones;
            None for never in the step.
        learning_rate: alpha, a number or a schedule of the step, for a rule that needs
            it, such as `rmtdamp.damping.StabilityFloor`: that of the optimiser. It can
            be handed to `update` as an extra argument, too, which goes before this one;
            a rule that looks ahead in a schedule (`steps_ahead`) cannot do so then.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: `refresh_every` below 1, a negative learning rate, an inner
            transformation that ignores `damping`; from `init`: one that holds one
            itself, params with holes, a stability floor that does not know of the
            momentum inside; from `update`: params or batch missing, a bad batch, a
            `damping` from outside, no learning rate where the rule needs one.
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
    check_every("refresh_every", refresh_every, or_never=True)
    check_learning_rate(learning_rate)
    inner = _taking_damping(inner)
    needed, relative = needs_of(learner.rule), is_relative(learner.rule)
    own = learning_rate
    # A copy: a step may donate params and state, which must not be one buffer.
    remembered = lambda params: (
        jax.tree.map(jnp.copy, params) if "reduction_ratio" in needed else None
    )

    def init(params):
        check_whole(params, "auto_damping")
        inner_state = _init_inside(
            inner, params, needed, "relative_damping" if relative else "damping"
        )
        _check_momentum(learner.rule, inner_state)
        return AutoDampingState(
            count=jnp.zeros((), jnp.int32),
            measured=learner.init(params),
            inner_state=inner_state,
            previous_params=remembered(params),
        )

    def update(
        updates,
        state,
        params=None,
        *,
        learning_rate=None,
        **extra_args,
    ):
        _check_not_handed_in(extra_args)
        learned, parts = state.measured, learner.parts(updates)
        if needed & MEASURED:
            settling = None
            if "effective_eigenvalue" in needed:
                settling = _Settling(learner, state.inner_state, inner, relative)
            learned = refresh_in_step(
                "auto_damping",
                settling or learner,
                refresh_every,
                state,
                updates,
                params,
                **extra_args,
            )
            if settling and refresh_every is None:  # measured by hand
                learned = settling.settle(learned, params)
        if decides_in_the_step(learner.rule):
            known = _known_in_step(
                learner.rule, parts, state.count, updates, own, learning_rate
            )
            if "max_eigenvalue" in needed and learner.labels is None:
                known = known._replace(max_eigenvalue=_seen_inside(state.inner_state))
            first = learned.last_refresh if needed & MEASURED else 0
            learned = learner.decide(learned, known, state.count == first)
        updates, inner_state = inner.update(
            updates,
            state.inner_state,
            params,
            **_in_force(learned, relative, parts, updates),
            **extra_args,
        )
        count = optax.safe_increment(state.count)
        before = remembered(params)
        return updates, AutoDampingState(count, learned, inner_state, before)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_momentum(rule, inner_state) -> None:
    """Refuse a floor for a shorter step than a sum of past steps makes."""
    is_sum = lambda node: isinstance(node, optax.TraceState)
    nodes = jax.tree.leaves(inner_state, is_leaf=is_sum)
    if not isinstance(rule, StabilityFloor) or is_traced(rule.momentum):
        return
    if (rule.averaged or rule.momentum == 0) and any(map(is_sum, nodes)):
        raise ValueError(
            f"rule is {rule!r}, and the transformation sums past steps (optax.trace), "
            "which takes more damping: hand over the momentum of that sum, "
            "StabilityFloor(momentum=...) or StabilityFloor.for_lanczos(momentum=...)"
        )


def set_damping(
    inner: optax.GradientTransformation,
    damping: optax.ScalarOrSchedule,
    *,
    target: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Hold the damping of a transformation at a constant, or let it follow a schedule.

    `auto_damping` without a learner: the damping in force is in the state
    (`optax.tree.get(opt_state, "damping")`) and travels inward.

    Args:
        inner: a transformation whose `update` uses the extra argument `damping`.
        damping: delta, a number or a schedule of the step, in the unit of `inner`. For
            Adam and KFAC also a tree of numbers like params, or a prefix of one, a
            damping for each layer; a schedule may return one.
        target: tau, for transformations with a shrinkage form.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: a negative number, a target that is not above 0, a tree that is no
            prefix of params, an inner transformation that ignores `damping` or holds
            one itself, a `damping` from outside.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import rmtdamp
        >>> schedule = optax.linear_schedule(1e-2, 1e-3, transition_steps=1000)
        >>> tx = rmtdamp.set_damping(rmtdamp.adam_shrinkage(1e-3), schedule)
        >>> params = jnp.ones(2)
        >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
        >>> print(f"{optax.tree.get(state, 'damping'):.2f}")
        0.01
    """
    for number in jax.tree.leaves(damping):
        check_damping(number)
    check_range("target", target, lambda x: x > 0, "above 0")
    inner = _taking_damping(inner)

    def at(count):
        # A damping below 0 is none: a schedule's counts as 0.
        value = lambda x: (
            jax.tree.map(lambda y: jnp.maximum(y, 0), x(count)) if callable(x) else x
        )
        return jax.tree.map(value, damping)

    def init(params):
        dtype = accumulation_dtype(params)
        count = jnp.zeros((), jnp.int32)
        first = at(count)
        spread_prefix("damping", first, params)  # raises if it is no prefix
        return SetDampingState(
            count=count,
            # Copies: a step that donates its state must not delete the arguments.
            damping=jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), first),
            damping_target=jnp.array(target, dtype, copy=True),
            inner_state=_init_inside(inner, params),
        )

    def update(updates, state, params=None, **extra_args):
        _check_not_handed_in(extra_args)
        like = lambda new, old: jnp.asarray(new).astype(old.dtype)
        value = jax.tree.map(like, at(state.count), state.damping)
        given, target = value, state.damping_target
        if not is_one(value):
            given = spread_prefix("damping", value, updates)
            target = jax.tree.map(lambda _: state.damping_target, given)
        updates, inner_state = inner.update(
            updates,
            state.inner_state,
            params,
            damping=given,
            damping_target=target,
            **extra_args,
        )
        return updates, SetDampingState(
            count=optax.safe_increment(state.count),
            damping=value,
            damping_target=state.damping_target,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
