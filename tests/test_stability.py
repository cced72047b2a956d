"""Stable learning rates, the curvature ratio, and the eigenvalue that they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmtdamp.hessian import hessian_matvec, largest_eigenvalue
from rmtdamp.stability import (
    curvature_ratio,
    stable_learning_rate,
    stable_learning_rate_bound,
)


def test_curvature_ratio_limits():
    curvature = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([[5.0]])}
    np.testing.assert_allclose(curvature_ratio(curvature, 0.5), 5.5 / 0.5)
    np.testing.assert_allclose(curvature_ratio(curvature, 1e9), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("momentum", "averaged"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)]
)
def test_stable_learning_rate_is_where_a_quadratic_begins_to_diverge(
    momentum, averaged
):
    """Spectral radius of the recursion: below 1 under the bound, above 1 over it."""
    eigenvalue = 3.0
    bound = float(
        stable_learning_rate(eigenvalue, momentum=momentum, averaged=averaged)
    )

    def radius(rate):
        gain = (1 - momentum) if averaged else 1.0
        # (x, trace) -> (x - rate * trace', trace' = momentum trace + gain lambda x)
        recursion = np.array(
            [
                [1 - rate * gain * eigenvalue, -rate * momentum],
                [gain * eigenvalue, momentum],
            ]
        )
        return np.abs(np.linalg.eigvals(recursion)).max()

    assert radius(0.999 * bound) < 1
    assert radius(1.001 * bound) > 1


def test_no_positive_curvature_means_no_bound():
    assert stable_learning_rate(-1.0) == jnp.inf


@pytest.mark.slow
def test_equation_19_bounds_the_stable_rate_from_above():
    key, other = jax.random.split(jax.random.key(0))
    factor = jax.random.normal(key, (12, 12), jnp.float64)
    hessian = factor @ factor.T
    preconditioner = 0.1 + jnp.abs(jax.random.normal(other, (12,), jnp.float64))
    found = largest_eigenvalue(
        lambda v: hessian @ v,
        preconditioner,
        jax.random.key(1),
        num_steps=2000,
        preconditioner=preconditioner,
    )
    root = 1 / jnp.sqrt(preconditioner)
    exact = jnp.linalg.eigvalsh(root[:, None] * hessian * root[None])[-1]
    np.testing.assert_allclose(found.value, exact, rtol=1e-8)
    bound = stable_learning_rate_bound(jnp.diag(hessian), preconditioner)
    assert bound >= stable_learning_rate(found.value)


def test_stable_rate_is_that_of_a_number():
    with pytest.raises(TypeError, match=r"hand over its number, .*\.value"):
        stable_learning_rate((4.0, 0.1, None))  # pyright: ignore[reportArgumentType]


def test_stable_rate_rejects_bad_momentum():
    with pytest.raises(ValueError, match=r"momentum is 1.0, and must lie in \[0, 1\)"):
        stable_learning_rate(1.0, momentum=1.0)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("spectrum", [(-9.0, 1.0, 4.0), (9.0, 1.0, -4.0)])
def test_largest_eigenvalue_is_the_algebraic_one(spectrum, traced):
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (3, 3), jnp.float64))[0]
    matrix = basis @ jnp.diag(jnp.array(spectrum)) @ basis.T

    def loss(x, batch):
        return 0.5 * jnp.mean(batch) * x @ matrix @ x

    def find(x):
        matvec = hessian_matvec(loss, x, jnp.ones(2))
        return largest_eigenvalue(matvec, x, jax.random.key(1), num_steps=200)

    found = (jax.jit(find) if traced else find)(jnp.ones(3))
    np.testing.assert_allclose(found.value, max(spectrum), rtol=1e-10)
    # The defining relation, and the residual that reports on it.
    defect = matrix @ found.vector - found.value * found.vector
    np.testing.assert_allclose(jnp.linalg.norm(defect), found.residual, atol=1e-10)


@pytest.mark.parametrize(
    ("diagonal", "expected"),
    [
        ([0.0, 0.0], 0.0),
        ([-3.0, -3.0], -3.0),
        ([-3.0], -3.0),
        ([1e-30, 3e-30, 2e-30], 3e-30),
    ],
)
def test_largest_eigenvalue_of_degenerate_matrices(diagonal, expected):
    diagonal = jnp.array(diagonal, jnp.float32)
    found = largest_eigenvalue(lambda v: diagonal * v, diagonal, jax.random.key(0))
    np.testing.assert_allclose(found.value, expected, rtol=1e-4)


def test_nan_curvature_bounds_nothing_silently():
    assert jnp.isnan(stable_learning_rate(jnp.nan))


def test_largest_eigenvalue_rejects_one_step():
    with pytest.raises(ValueError, match="num_steps is 1, and at least 2"):
        largest_eigenvalue(lambda v: v, jnp.ones(2), jax.random.key(0), num_steps=1)
