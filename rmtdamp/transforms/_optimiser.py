"""What every optimiser does around its `scale_by_...`: a damping in, a step out."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rmtdamp._checks import check_decays, check_range


def by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, which takes any number.

    Returns:
        The transformation.

    Raises:
        ValueError: a Python number below 0, or NaN, or an array with axes.
        TypeError: a string.
    """
    check_learning_rate(learning_rate)
    return optax.scale_by_learning_rate(learning_rate)


def check_learning_rate(learning_rate: Any) -> None:
    """Refuse a negative Python number, and an array that is none.

    Raises:
        ValueError: `learning_rate` is one, or NaN, or has axes.
    """
    check_range("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
    if shape := getattr(learning_rate, "shape", ()):
        raise ValueError(
            f"learning_rate has shape {shape}, and must be one number or a schedule"
        )


def check_damping(damping: Any) -> None:
    """Refuse a negative Python number.

    Raises:
        ValueError: `damping` is one.
    """
    check_range("damping", damping, lambda x: x >= 0, "at least 0")


def damping_in_force(
    name: str, given: Any, own: optax.ScalarOrSchedule | None, count: Any, dtype
) -> jax.Array:
    """The damping handed in from outside, or the constructor's number or schedule.

    A schedule that falls below 0 counts as 0.

    Returns:
        A scalar of `dtype`.

    Raises:
        ValueError: neither is there, or a negative number.
    """
    check_damping(given)
    check_one(name, given)
    if given is None:
        given = jnp.maximum(own(count), 0) if callable(own) else own
    if given is None:
        raise ValueError(
            f"{name} needs a damping: damping=... in its constructor, set_damping or "
            "auto_damping around it"
        )
    return jnp.asarray(given).astype(dtype)


def is_one(damping: Any) -> bool:
    """Whether a damping is one for all leaves, and no tree with one for each."""
    return damping is None or jax.tree_util.all_leaves([damping])


def check_one(name: str, damping: Any) -> None:
    """Refuse a damping for each leaf where there can be one alone.

    Raises:
        ValueError: `damping` is a tree.
    """
    if not is_one(damping):
        raise ValueError(
            f"{name} takes one damping and was handed a tree, a damping for each leaf: "
            "give it one (a learner without labels, a single number), or take "
            "scale_by_adam_shrinkage or scale_by_kfac"
        )


def optimiser(
    scaled: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: jax.typing.ArrayLike | None,
    nesterov: bool,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scaled`, heavy-ball momentum, decoupled weight decay, the learning rate.

    The decay comes after the momentum, so that weights shrink by learning rate times
    decay in each step and no faster.

    Returns:
        Their chain.

    Raises:
        ValueError: a Python number out of its range.
    """
    check_decays(momentum=momentum)
    check_range("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
    # A number that is injected may change later, a Python 0 stays one. A decay asks for
    # params, which a transformation without it does without.
    is_zero = lambda x: isinstance(x, int | float) and x == 0
    momentum, decays = (
        None if is_zero(momentum) else momentum,
        not is_zero(weight_decay),
    )
    return optax.chain(
        scaled,
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity(),
        by_learning_rate(learning_rate),
    )
