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
from rmtdamp.damping import damping_weight, initial_damping, learn_damping
from rmtdamp.hessian import HessianMoments, moments

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


@pytest.mark.slow
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
    options = {"floor": 0.1, "decay": 0.7, "min_shrinkage": 1e-3} | change
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


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
def test_the_bound_means_the_same_at_any_scale(c):
    """beta >= 1/5 is delta <= 4 tau, whatever the scale of the loss."""
    before = initial_damping(0.1, jnp.float32)
    no_signal = 0.5 * c, 0.25 * c**2, 1.0 * c**2
    options = {"rule": scaled_identity_target, "floor": 0.0, "min_shrinkage": 0.2}
    after = learn(before, *no_signal, **options)
    np.testing.assert_allclose(after.damping, 4 * 0.5 * c, rtol=1e-6)
    np.testing.assert_allclose(
        shrinkage_from_damping(after.damping, after.damping_target), 0.2, rtol=1e-6
    )
    assert after.refresh_caps == 1
    assert after.refresh_rejections == 0


BLOW_UP = 9e6  # as it happened, among measurements of 3e-4


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("factor", [BLOW_UP, 1 / BLOW_UP])
def test_a_blow_up_is_forgotten_at_the_second_measurement_after_it(length, factor):
    learned = initial_damping(0.0, jnp.float32)
    step = lambda learned, m: learn(learned, 0.0, 1.0, m, floor=0.0)
    for _ in range(4):
        learned = step(learned, 3e-4)
    before = learned.damping
    for _ in range(length):
        learned = step(learned, 3e-4 * factor)
    if length == 1:
        assert learned.damping == before  # one alone is not believed
    learned = step(step(learned, 3e-4), 3e-4)
    np.testing.assert_allclose(learned.damping, 3e-4, rtol=1e-6)
    # refused: the first of the blow-up, and the first after it if that was believed
    assert learned.refresh_rejections == (1 if length == 1 else 2)


def test_a_lasting_change_is_followed_at_the_second_measurement():
    learned = initial_damping(0.0, jnp.float32)
    seen = [1e-3, 1e-3, 2e-2, 3e-2, 3e-2]
    dampings = []
    for m in seen:
        learned = learn(learned, 0.0, 1.0, m, floor=0.0)
        dampings.append(float(learned.damping))
    np.testing.assert_allclose(dampings[:4], [1e-3, 1e-3, 1e-3, 3e-2], rtol=1e-6)


@pytest.mark.slow
@hypothesis.given(
    st.lists(st.floats(0.2, 5.0), min_size=1, max_size=8), st.floats(1e-6, 1e6)
)
def test_what_scatters_is_averaged_and_never_refused(scatter, scale):
    """Within a factor of ten of their average measurements are the plain recursion."""
    learned, expected = initial_damping(0.0, jnp.float32), None
    for x in scatter:
        m = scale * x
        if expected is not None and not 0.11 < m / expected < 9:
            return
        learned = learn(learned, 0.0, 0.0, m, floor=0.0, min_shrinkage=1e-12)
        expected = m if expected is None else 0.7 * expected + 0.3 * m
        np.testing.assert_allclose(learned.average_variance, expected, rtol=1e-5)
    assert learned.refresh_rejections == 0


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
