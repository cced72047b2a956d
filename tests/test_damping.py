"""The algebra, the rules against closed forms, and the learner's arithmetic."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import quadratic_loss

from rmtdamp import (
    Shrinkage,
    damping_from_shrinkage,
    identity_target,
    scaled_identity_target,
    shrinkage_from_damping,
)
from rmtdamp.damping import (
    curvature_ratio,
    damping_weight,
    initial_damping,
    learn_damping,
    stable_learning_rate,
    stable_learning_rate_bound,
)
from rmtdamp.hessian import HessianMoments, hessian_matvec, largest_eigenvalue, moments

positive = st.floats(1e-12, 1e6)


@hypothesis.given(damping=st.floats(0, 1e6), target=positive)
def test_shrinkage_and_back(damping, target):
    beta = shrinkage_from_damping(damping, target)
    assert 0 < beta <= 1
    np.testing.assert_allclose(beta + damping_weight(damping, target), 1, rtol=1e-12)
    # What beta rounds away near 1 is at most an ulp of 1, in units of the target.
    np.testing.assert_allclose(
        damping_from_shrinkage(beta, target), damping, rtol=1e-9, atol=3e-16 * target
    )


@hypothesis.given(damping=st.floats(0, 1e3), curvature=positive, target=positive)
def test_equation_13(damping, curvature, target):
    """1 / (s + delta) = beta / (beta s + (1 - beta) tau)."""
    beta = shrinkage_from_damping(damping, target)
    shrunk = beta * curvature + damping_weight(damping, target) * target
    np.testing.assert_allclose(1 / (curvature + damping), beta / shrunk, rtol=1e-9)


def test_damping_weight_keeps_a_small_damping_in_float32():
    damping = jnp.float32(1e-9)
    assert 1 - shrinkage_from_damping(damping) == 0
    np.testing.assert_allclose(damping_weight(damping), 1e-9, rtol=1e-6)


@hypothesis.given(a=positive, b=positive)
def test_identity_target_is_monotone_in_the_variance(a, b):
    of = lambda m: identity_target(HessianMoments(0.1, 1.0, m)).damping
    assert (of(a) < of(b)) == (a < b)


@hypothesis.given(
    c=st.floats(1e-2, 1e2), nu=st.floats(0.1, 1), d2=st.floats(0.1, 1), m=positive
)
def test_scaled_identity_target_is_scale_equivariant(c, nu, d2, m):
    rule = scaled_identity_target(HessianMoments(nu, nu**2 + d2, m))
    scaled = scaled_identity_target(
        HessianMoments(c * nu, c**2 * (nu**2 + d2), c**2 * m)
    )
    np.testing.assert_allclose(scaled.damping, c * rule.damping, rtol=1e-6)
    np.testing.assert_allclose(scaled.intensity, rule.intensity, rtol=1e-6)


def test_scaled_identity_target_where_no_damping_makes_sense():
    of = lambda nu, square: scaled_identity_target(HessianMoments(nu, square, 1.0))
    assert of(0.5, 0.25).damping == jnp.inf
    assert of(0.5, 0.1).damping == jnp.inf
    assert jnp.isnan(of(0.0, 1.0).damping)
    assert jnp.isnan(of(-0.5, 1.0).damping)


def wigner_plus_low_rank(key, p, noise, mean):
    """H_true = mean I plus two outliers; X Wigner with P^-1 Tr X^2 -> noise^2."""
    draw = jax.random.normal(key, (p, p), jnp.float64)
    wigner = noise * (draw + draw.T) / (2 * p) ** 0.5
    true = mean * jnp.eye(p).at[0, 0].add(5.0 / mean).at[1, 1].add(3.0 / mean)
    return true, wigner


@pytest.mark.parametrize(
    ("rule", "target", "mean"),
    [(identity_target, 1.0, 1e-3), (scaled_identity_target, None, 0.05)],
)
def test_rules_minimise_the_error_they_are_derived_from(rule, target, mean):
    """||beta H + (1 - beta) tau I - H_true||_F over a grid of beta: the rule's beta,
    from the true moments, is the minimiser (eq. 15 to leading order in the rank)."""
    p, noise = 400, 0.3
    true, wigner = wigner_plus_low_rank(jax.random.key(0), p, noise, mean)
    nu = jnp.trace(true) / p
    decision = rule(HessianMoments(nu, jnp.sum(true**2) / p, noise**2))
    tau = nu if target is None else target
    np.testing.assert_allclose(decision.target, tau)

    def error(beta):
        shrunk = beta * (true + wigner) + (1 - beta) * tau * jnp.eye(p)
        return jnp.sum((shrunk - true) ** 2) / p

    grid = jnp.linspace(0, 1, 2001)
    best = grid[jnp.argmin(jax.lax.map(error, grid))]
    exact_denominator = jnp.sum((true - tau * jnp.eye(p)) ** 2) / p
    closed_form = exact_denominator / (exact_denominator + noise**2)
    # Finite P moves the empirical optimum by O(1/P); eq. 15 drops its denominator.
    np.testing.assert_allclose(best, closed_form, atol=0.01)
    if target is None:
        np.testing.assert_allclose(decision.intensity, closed_form, rtol=1e-6)
    else:
        np.testing.assert_allclose(
            decision.damping, noise**2, rtol=1e-12
        )  # eq. 15 itself
        np.testing.assert_allclose(
            decision.intensity, closed_form, atol=noise**2 * abs(exact_denominator - 1)
        )


def test_rules_from_measured_moments_of_wigner_noise():
    """Batches of H_true + X_i: measured moments lead to the closed-form dampings."""
    p, count, noise, mean = 200, 64, 2.0, 0.5
    true, _ = wigner_plus_low_rank(jax.random.key(0), p, noise, mean)
    draws = jax.vmap(lambda k: wigner_plus_low_rank(k, p, noise, mean)[1])(
        jax.random.split(jax.random.key(1), count)
    )
    measured = moments(
        quadratic_loss,
        jnp.ones(p),
        true[None] + draws,
        jax.random.key(2),
        num_probes=64,
    )
    # P^-1 Tr E[X^2] / B: off-diagonal variance s^2/p, twice that on the diagonal.
    variance = noise**2 * (p + 1) / p / count
    nu = jnp.trace(true) / p
    d2 = jnp.sum((true - nu * jnp.eye(p)) ** 2) / p
    np.testing.assert_allclose(
        identity_target(measured).damping,
        variance,
        atol=4 * measured.variance_stderr,
    )
    np.testing.assert_allclose(
        scaled_identity_target(measured).damping, nu * variance / d2, rtol=0.15
    )


def learn(learned, *measured, step=0, rule=identity_target, **change):
    options = {"floor": 0.1, "decay": 0.7, "max_damping": 10.0} | change
    return learn_damping(
        learned,
        HessianMoments(*map(jnp.float32, measured)),
        jnp.int32(step),
        rule=rule,
        **options,
    )


def test_learner_is_the_authors_recursion_for_equation_15():
    learned = initial_damping(0.1, jnp.float32)
    assert learned.damping == jnp.float32(0.1)
    expected = None
    for step, variance in enumerate([0.5, 0.2, 0.9, 0.4]):
        learned = learn(learned, 0.0, 1.0, variance, step=step)
        new = 0.1 + variance
        expected = new if expected is None else 0.7 * expected + 0.3 * new
        np.testing.assert_allclose(learned.damping, expected, rtol=1e-6)
        np.testing.assert_allclose(learned.measured_variance, variance, rtol=1e-6)
        assert learned.last_refresh == step
    assert learned.refresh_attempts == 4
    assert learned.refresh_rejections == 0


def test_learner_averages_moments_before_it_forms_the_ratio():
    learned = initial_damping(0.0, jnp.float32)
    seen = [(0.2, 0.5, 0.3), (0.4, 1.0, 0.1)]
    for row in seen:
        learned = learn(learned, *row, rule=scaled_identity_target, floor=0.0)
    average = lambda a, b: 0.7 * a + 0.3 * b
    nu, m = average(0.2, 0.4), average(0.3, 0.1)
    d2 = average(0.5 - 0.2**2, 1.0 - 0.4**2)
    np.testing.assert_allclose(learned.damping, nu * m / d2, rtol=1e-5)
    np.testing.assert_allclose(learned.damping_target, nu, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_non_finite_measurements_are_rejected_and_counted(bad, where):
    before = learn(initial_damping(0.1, jnp.float32), 0.0, 1.0, 0.5)
    measured = [0.0, 1.0, 0.5]
    measured[where] = bad
    after = learn(before, *measured, step=7)
    assert after.refresh_rejections == 1
    assert after.refresh_attempts == 2
    assert after.last_refresh == 7
    for name in ("damping", "damping_target", "average_mean", "average_variance"):
        assert getattr(after, name) == getattr(before, name)
    # and the next good one goes on as if nothing had happened
    chex.assert_trees_all_close(
        learn(after, 0.0, 1.0, 0.2).damping, learn(before, 0.0, 1.0, 0.2).damping
    )


def test_negative_mean_eigenvalue_is_rejected_by_the_scaled_rule():
    before = initial_damping(0.1, jnp.float32)
    after = learn(before, -0.5, 1.0, 0.5, rule=scaled_identity_target)
    assert after.refresh_rejections == 1
    assert after.damping == before.damping


def test_cap_is_met_and_counted():
    before = initial_damping(0.1, jnp.float32)
    no_signal = learn(before, 0.5, 0.25, 1.0, rule=scaled_identity_target)
    for after in (no_signal, learn(before, 0.0, 1.0, 99.0)):
        assert after.damping == 10.0
        assert after.refresh_caps == 1
        assert after.refresh_rejections == 0


def test_a_rule_of_ones_own():
    rule = lambda moments: Shrinkage(jnp.sqrt(moments.variance), 2.0)
    after = learn(
        initial_damping(0.0, jnp.float32), 0.0, 1.0, 4.0, rule=rule, floor=0.0
    )
    assert after.damping == 2.0
    assert after.damping_target == 2.0


def test_a_rule_must_return_a_shrinkage():
    with pytest.raises(TypeError, match=r"rule returned a Array.*Shrinkage"):
        learn(
            initial_damping(0.0, jnp.float32),
            0.0,
            1.0,
            4.0,
            rule=lambda m: m.variance,
        )


def test_learner_keeps_dtypes_and_compiles():
    learned = initial_damping(0.1, jnp.float32)
    after = jax.jit(learn)(learned, 0.0, 1.0, 0.5)
    chex.assert_trees_all_equal_shapes_and_dtypes(learned, after)


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
