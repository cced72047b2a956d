"""The owners of a damping: what they share, and the one that holds it.

An owner keeps the damping in its state and hands it to the transformation inside it as
the extra arguments `damping` and `damping_target`. There is one owner in a chain.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmtdamp._tree import accumulation_dtype
from rmtdamp.damping import LearnedDamping


class AutoDampingState(NamedTuple):
    """State of `auto_damping`."""

    count: Any  # (), int32, steps taken
    learned: LearnedDamping  # scalars; changes when the damping is refreshed
    inner_state: Any  # of the transformation inside


class SetDampingState(NamedTuple):
    """State of `set_damping`."""

    count: Any  # (), int32, steps taken
    damping: jax.Array  # (), delta that the last step used
    damping_target: jax.Array  # (), tau
    inner_state: Any  # of the transformation inside


def is_owner(node) -> bool:
    return isinstance(node, AutoDampingState | SetDampingState)


def owners(state) -> list:
    leaves = jax.tree.leaves(state, is_leaf=is_owner)
    return [leaf for leaf in leaves if is_owner(leaf)]


def check_inside(inner_state) -> None:
    if owners(inner_state):
        raise ValueError(
            "two owners of the damping in one chain: the transformation inside already "
            "holds one (auto_damping or set_damping); keep one of the two"
        )


def check_no_outer_owner(extra_args) -> None:
    if "damping" in extra_args:
        raise ValueError(
            "two owners of the damping in one chain: this transformation owns it and "
            "was handed another from outside; keep one auto_damping or set_damping, "
            "and do not pass damping= to update"
        )


def check_whole(params, name) -> None:
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise ValueError(
            f"{name} got params with holes, as inside optax.masked or "
            "optax.partition, where the loss cannot be evaluated: put the mask inside, "
            f"{name}(optax.masked(inner, mask), ...)"
        )


def check_uses_damping(inner, updates, state, params, damping, extra_args) -> None:
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
            "with_damping(optax.adam)(learning_rate). (A wrapper inside that drops "
            "extra arguments, as optax.MultiSteps does, hides it: put the owner in.)"
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
    if isinstance(damping, int | float | np.number) and damping < 0:
        raise ValueError(f"damping is {damping}, and must be at least 0")
    inner = optax.with_extra_args_support(inner)
    checked = False

    def at(count):
        return damping(count) if callable(damping) else damping

    def init(params):
        inner_state = inner.init(params)
        check_inside(inner_state)
        dtype = accumulation_dtype(params)
        count = jnp.zeros((), jnp.int32)
        return SetDampingState(
            count=count,
            # Copies: a step that donates its state must not delete the arguments.
            damping=jnp.array(at(count), dtype, copy=True),
            damping_target=jnp.array(target, dtype, copy=True),
            inner_state=inner_state,
        )

    def update(updates, state, params=None, **extra_args):
        nonlocal checked
        check_no_outer_owner(extra_args)
        value = jnp.asarray(at(state.count)).astype(state.damping.dtype)
        extra_args["damping_target"] = state.damping_target
        if not checked:
            check_uses_damping(
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
