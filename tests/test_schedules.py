"""Equations 12 and 16, as printed."""

import jax
import numpy as np
import optax
import pytest

from rmtdamp.schedules import linear_anneal_schedule, ramp_anneal_schedule


def equation_12(x, r):
    if x <= 0.5:
        return 1.0
    return 1 - (1 - r) * (x - 0.5) / 0.4 if x <= 0.9 else r


def equation_16(x, k, r):
    if x <= 0.1:
        return 1.0
    if x <= 0.3:
        return 1 + (k - 1) * (x - 0.1) / 0.2
    return k - (k - r) * (x - 0.3) / 0.6 if x <= 0.9 else r


@pytest.mark.parametrize("total", [7, 100])
def test_schedules_are_the_equations(total):
    linear = jax.jit(linear_anneal_schedule(0.3, total, 0.05))
    ramp = jax.jit(ramp_anneal_schedule(0.3, total, 4.0, 0.05))
    for t in range(total + 3):
        x = t / total
        np.testing.assert_allclose(linear(t), 0.3 * equation_12(x, 0.05), rtol=1e-5)
        np.testing.assert_allclose(ramp(t), 0.3 * equation_16(x, 4, 0.05), rtol=1e-5)


def test_schedules_drive_optax(standard_promotion):
    tx = optax.sgd(linear_anneal_schedule(0.5, 10))
    params = np.ones(2, np.float32)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates, -0.5)


def test_bad_numbers():
    with pytest.raises(ValueError, match="total_steps is 0, and must be at least 1"):
        linear_anneal_schedule(0.1, 0)
    with pytest.raises(ValueError, match="init_value is nan, and must be finite"):
        linear_anneal_schedule(float("nan"), 10)
    with pytest.raises(TypeError, match="init_value is the string 'a'"):
        ramp_anneal_schedule("a", 10)
