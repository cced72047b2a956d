"""The learning-rate schedules of the paper's experiments, as optax schedules.

Both are piecewise linear in t / T, with t the step and T the total. The authors step
them once an epoch; here they move with the step, which is the same line.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ._checks import check_range

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def _piecewise_linear(init_value, total_steps, fractions, factors) -> Schedule:
    check_range("total_steps", total_steps, lambda n: n >= 1, "at least 1")
    check_range("init_value", init_value, math.isfinite, "finite")

    def schedule(count):
        progress = jnp.asarray(count, jnp.float32) / total_steps
        factor = jnp.interp(
            progress, jnp.array(fractions, jnp.float32), jnp.array(factors, jnp.float32)
        )
        return init_value * factor

    return schedule


def linear_anneal_schedule(
    init_value: float, total_steps: int, end_factor: float = 0.01
) -> Schedule:
    """Eq. 12: constant for half of the run, then linear down to `end_factor` at 90 %.

    Args:
        init_value: alpha_0.
        total_steps: T, the steps of the whole run.
        end_factor: r, the last rate over the first.

    Returns:
        A function of the step.

    Raises:
        ValueError: fewer than one step in total, or a rate that is not finite.
        TypeError: a string for a number.

    Example:
        >>> from rmtdamp.schedules import linear_anneal_schedule
        >>> rate = linear_anneal_schedule(1.0, 100)
        >>> [round(float(rate(t)), 3) for t in (0, 50, 70, 90, 100)]
        [1.0, 1.0, 0.505, 0.01, 0.01]

    References:
        Granziol and Baskerville, eq. 12.
    """
    return _piecewise_linear(init_value, total_steps, [0.5, 0.9], [1.0, end_factor])


def ramp_anneal_schedule(
    init_value: float,
    total_steps: int,
    peak_factor: float = 5.0,
    end_factor: float = 0.01,
) -> Schedule:
    """Eq. 16: up to `peak_factor` between 10 % and 30 %, then down to `end_factor`.

    Made for auto-damped Adam, whose damping can be harsh (section 7.3).

    Args:
        init_value: alpha_0.
        total_steps: T, the steps of the whole run.
        peak_factor: kappa, the largest rate over the first.
        end_factor: r, the last rate over the first. The text says 0.01; the authors'
            runs ended at 0.1.

    Returns:
        A function of the step.

    Raises:
        ValueError: fewer than one step in total, or a rate that is not finite.
        TypeError: a string for a number.

    Example:
        >>> from rmtdamp.schedules import ramp_anneal_schedule
        >>> rate = ramp_anneal_schedule(1.0, 100)
        >>> [round(float(rate(t)), 2) for t in (0, 10, 20, 30, 60, 90, 100)]
        [1.0, 1.0, 3.0, 5.0, 2.5, 0.01, 0.01]

    References:
        Granziol and Baskerville, eq. 16.
    """
    return _piecewise_linear(
        init_value, total_steps, [0.1, 0.3, 0.9], [1.0, peak_factor, end_factor]
    )
