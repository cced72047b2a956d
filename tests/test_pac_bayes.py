"""The PAC-Bayes bound against closed forms, SciPy and dense Gaussians."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from rmtdamp.kronecker import KroneckerFactors, eigenbasis, make_blocks, to_matrix
from rmtdamp.pac_bayes import best_gaussian, draw, error_bound, gaussian_kl, kl_inverse


def kl(q, p):
    return scipy.special.rel_entr(q, p) + scipy.special.rel_entr(1 - q, 1 - p)


def test_kl_inverse_has_closed_forms_at_the_ends():
    bounds = jnp.array([0.0, 0.1, 3.0])
    np.testing.assert_allclose(kl_inverse(0.0, bounds), 1 - np.exp(-bounds), atol=2e-12)
    np.testing.assert_allclose(kl_inverse(jnp.array([0.3, 1.0]), 0.0), [0.3, 1.0])
    assert kl_inverse(1.0, 0.2) == 1


@pytest.mark.parametrize("rate", [1e-4, 0.03, 0.5, 0.95])
def test_kl_inverse_is_the_root_of_kl_rounded_up(rate):
    bounds = np.array([1e-5, 1e-2, 0.3, 1.0])
    found = np.asarray(kl_inverse(rate, jnp.asarray(bounds)))
    for p, bound in zip(found, bounds, strict=True):
        root = scipy.optimize.brentq(
            lambda p, bound=bound: kl(rate, p) - bound, rate, 1 - 1e-15, xtol=1e-14
        )
        assert 0 <= p - root < 4e-12  # 40 halvings


def test_kl_inverse_in_float32_is_no_smaller():
    with jax.enable_x64(False):
        single = kl_inverse(0.03, 0.05)
        assert single.dtype == jnp.float32
    assert single == pytest.approx(float(kl_inverse(0.03, 0.05)), rel=1e-5)


def test_gaussian_kl_is_that_of_dense_gaussians():
    rng = np.random.default_rng(0)
    s, scale = rng.uniform(0.1, 2.0, 5), 0.7
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    moved, dense = rng.normal(size=5), basis @ np.diag(s) @ basis.T
    precision = np.eye(5) / scale
    expected = np.trace(precision @ dense) + moved @ precision @ moved - 5
    expected += 5 * math.log(scale) - np.linalg.slogdet(dense)[1]
    tree = {"a": jnp.asarray(s[:2]), "b": jnp.asarray(s[2:])[None]}
    found = gaussian_kl(tree, scale, moved @ moved)
    assert found == pytest.approx(expected / 2)


H = np.array([0.0, 0.01, 0.4, 3.0])
FAR, N = 0.3, 50.0


def objective(s, scale, h=H):
    """Tr(H S) / 2 + KL / n."""
    divergence = gaussian_kl(jnp.asarray(s), scale, FAR)
    return 0.5 * float(np.sum(h * s)) + float(divergence) / N


def test_variances_minimise_the_quadratic_model():
    found = best_gaussian(jnp.asarray(H), FAR, N, [0.2])
    best = scipy.optimize.minimize(
        lambda x: objective(np.exp(x), 0.2), np.zeros(4), tol=1e-12
    )
    np.testing.assert_allclose(found.variances, np.exp(best.x), rtol=1e-4)
    assert found.kl == pytest.approx(gaussian_kl(found.variances, 0.2, FAR))


def test_prior_variance_is_the_best_of_the_grid():
    grid = np.logspace(-3, 2, 21)
    found = best_gaussian(jnp.asarray(H), FAR, N, grid)
    values = [objective(1 / (N * H + 1 / scale), scale) for scale in grid]
    assert found.prior_variance == grid[np.argmin(values)]
    assert 0 < np.argmin(values) < 20
    # The closed form that it is chosen by.
    for scale, value in zip(grid, values, strict=True):
        closed = (FAR / scale + np.sum(np.log1p(N * scale * H))) / 2
        assert value * N == pytest.approx(closed)


def test_no_isotropic_posterior_does_better():
    flat = np.full_like(H, H.mean())
    of = lambda h: best_gaussian(jnp.asarray(h), FAR, N, np.logspace(-3, 2, 21))
    ours, theirs = of(H), of(flat)
    value = lambda x: objective(np.asarray(x.variances), float(x.prior_variance))
    assert value(ours) < value(theirs)
    negative = best_gaussian(jnp.array([-1.0, 2.0]), FAR, N, [0.2])
    np.testing.assert_allclose(negative.variances, [0.2, 1 / (2 * N + 5)])


def test_networks_are_drawn_from_the_posterior():
    """The covariance of a layer, kernel and bias, against the dense one."""
    params = {
        "b": jnp.ones(2),
        "w": jnp.arange(4.0).reshape(2, 2),
        "scale": jnp.ones(3),
    }
    blocks = make_blocks(params, {"layer": {"kernel": "w", "bias": "b"}})[:1]
    keys = jax.random.split(jax.random.key(1), 4)
    a, g = (jax.random.normal(k, (1, n, n)) for k, n in zip(keys, (3, 2), strict=False))
    basis = eigenbasis(KroneckerFactors(a @ a.mT, g @ g.mT))
    variances = jax.random.uniform(keys[2], (1, 3, 2))
    count = 20_000
    one = lambda key: draw(key, params, blocks, [basis], [variances])
    drawn = jax.jit(jax.vmap(one))(jax.random.split(keys[3], count))
    np.testing.assert_array_equal(drawn["scale"], np.ones((count, 3)))
    layer = lambda tree: to_matrix(blocks[0], [tree["w"], tree["b"]])[0]
    noise = np.asarray(jax.vmap(layer)(drawn)) - np.asarray(layer(params))
    noise = noise.reshape(count, 6)
    q = np.kron(basis.inputs[0], basis.outputs[0])
    exact = q @ np.diag(variances.ravel()) @ q.T
    spread = np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact**2) / count)
    assert np.max(np.abs(noise.T @ noise / count - exact) / spread) < 4
    assert np.max(np.abs(exact) / spread) > 50
    assert np.max(np.abs(noise.mean(0)) / np.sqrt(np.diag(exact) / count)) < 4


def test_error_bound_is_both_inequalities_one_after_the_other():
    found = float(error_bound(0.1, 500.0, 10_000, num_draws=300, num_priors=70**3))
    middle = float(kl_inverse(0.1, math.log(4 / 0.05) / 300))
    price = 500 + 3 * math.log(70) + math.log(2 * 100 / 0.025)
    assert kl(middle, found) == pytest.approx(price / 10_000)
    assert kl(0.1, middle) == pytest.approx(math.log(2 / 0.025) / 300)
    assert found > middle > 0.1
    sure = error_bound(
        0.1, 500.0, 10_000, num_draws=300, num_priors=70**3, failure_probability=1e-6
    )
    assert sure > found


def test_error_bound_holds_where_everything_is_known():
    """Coins of a known error, drawn 300 times: the bound fails in 5 % at most."""
    rng, true, n, m = np.random.default_rng(2), 0.2, 200, 50
    rates = rng.binomial(n, true, 300) / n  # training errors of the only classifier
    observed = jnp.asarray(rng.binomial(m, rates) / m)  # of examples that are drawn
    assert jnp.mean(error_bound(observed, 0.0, n, num_draws=m) < true) <= 0.05
    assert jnp.mean(observed < true) > 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observed": 1.1}, r"rate is 1.1, and must be in \[0, 1\]"),
        ({"kl": -1.0}, r"kl is -1.0, and must be at least 0"),
        ({"num_examples": 7}, r"num_examples is 7, and must be at least 8"),
        ({"num_draws": 0}, r"num_draws is 0, and must be at least 1"),
        ({"num_priors": 0}, r"num_priors is 0, and must be at least 1"),
        ({"failure_probability": 1.0}, r"failure_probability is 1.0, .* in \(0, 1\)"),
    ],
)
def test_what_is_refused(change, message):
    arguments = {"observed": 0.1, "kl": 0.0, "num_examples": 100, "num_draws": 10}
    with pytest.raises(ValueError, match=message):
        error_bound(**arguments | change)


def test_a_divergence_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"divergence is -1.0, and must be at least 0"):
        kl_inverse(0.1, -1.0)
