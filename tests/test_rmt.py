"""Random-matrix laws: closed forms, defining relations, and simulated matrices."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import eigh_tridiagonal
from scipy.special import airy
from scipy.stats import binom

from rmtdamp import rmt

TRACY_WIDOM_DEVIATION = 1.607781034581**0.5
TRACY_WIDOM_MEAN = -1.2065335745820
variances = st.floats(1e-6, 1e6)
SHRINKAGES = [rmt.rotationally_invariant_shrinkage, rmt.outlier_true_eigenvalue]
signs = st.sampled_from([-1, 1])


def tridiagonal_goe(rng, size, variance):
    """Diagonals of a GOE matrix, P^-1 E Tr X^2 = s^2 (1 + 1/P), seen from e_1.

    Householder reflections that keep e_1 turn its entries, N(0, s^2/P) off the diagonal
    and N(0, 2 s^2/P) on it, into this: eigenvalues and the first components of the
    eigenvectors keep their joint law (Dumitriu and Edelman, 2002).
    """
    scale = np.sqrt(variance / size)
    diagonal = scale * np.sqrt(2) * rng.normal(size=size)
    return diagonal, scale * np.sqrt(rng.chisquare(np.arange(size - 1, 0, -1)))


def top_pair(diagonal, off_diagonal):
    """The largest eigenvalue, and the squared first component of its eigenvector."""
    last = (len(diagonal) - 1,) * 2
    values, vectors = eigh_tridiagonal(
        diagonal, off_diagonal, select="i", select_range=last
    )
    return values[0], vectors[0, 0] ** 2


def integrals(density, lower, upper):
    """Mass, mean and second moment; x = cos t removes the roots at the edges."""
    t = (np.arange(20_000) + 0.5) * np.pi / 20_000
    x = (lower + upper) / 2 + (upper - lower) / 2 * np.cos(t)
    mass = np.asarray(density(x)) * (upper - lower) / 2 * np.sin(t) * np.pi / 20_000
    return [float(np.sum(mass * x**k)) for k in range(3)]


@pytest.mark.parametrize("variance", [1e-4, 1.0, 9.0])
def test_semicircle_is_a_density_of_the_right_variance(variance):
    edge = float(rmt.semicircle_edge(variance))
    np.testing.assert_allclose(edge, 2 * variance**0.5)
    found = integrals(lambda x: rmt.semicircle_density(x, variance), -edge, edge)
    np.testing.assert_allclose(found, [1, 0, variance], rtol=1e-7, atol=1e-12)
    outside = np.array([-1.01, 1.0, 5.0]) * edge
    np.testing.assert_array_equal(rmt.semicircle_density(outside, variance), 0)
    np.testing.assert_array_equal(rmt.semicircle_cdf(outside, variance), [0, 1, 1])


def test_semicircle_density_is_the_derivative_of_the_cdf():
    x, variance = jnp.linspace(-3.99, 3.99, 50), 4.0
    slopes = jax.vmap(jax.grad(lambda x: rmt.semicircle_cdf(x, variance)))(x)
    np.testing.assert_allclose(slopes, rmt.semicircle_density(x, variance), rtol=1e-9)


def test_semicircle_against_a_simulated_goe():
    """Eigenvalues are rigid: they stay within a few ranks of the law."""
    size, variance = 1000, 2.0
    diagonals = tridiagonal_goe(np.random.default_rng(0), size, variance)
    seen = eigh_tridiagonal(*diagonals, eigvals_only=True)
    ranks = (np.arange(size) + 0.5) / size
    distance = np.abs(rmt.semicircle_cdf(seen, variance) - ranks).max()
    assert distance < 5 / size
    # Var P^-1 Tr X^2 is 4 s^4/P^2 to leading order.
    assert abs(np.mean(seen**2) - variance * (1 + 1 / size)) < 4 * 2 * variance / size


@pytest.mark.parametrize("variance", [0.3, 1.0])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_marchenko_pastur_is_a_density_with_the_right_moments(ratio, variance):
    lower, upper = map(float, rmt.marchenko_pastur_edges(ratio, variance))
    density = lambda x: rmt.marchenko_pastur_density(x, ratio, variance)
    expected = [min(1, 1 / ratio), variance, variance**2 * (1 + ratio)]
    np.testing.assert_allclose(integrals(density, lower, upper), expected, rtol=1e-6)
    outside = np.array([-1.0, 0.0, lower, upper, 2 * upper])
    np.testing.assert_array_equal(density(outside), 0)


@pytest.mark.parametrize("ratio", [0.25, 2.0])
def test_marchenko_pastur_against_a_sample_covariance(ratio):
    size, variance = 400, 0.5
    num_samples = int(size / ratio)
    samples = np.random.default_rng(0).normal(size=(size, num_samples))
    seen = variance * np.linalg.eigvalsh(samples @ samples.T / num_samples)
    edges = rmt.marchenko_pastur_edges(ratio, variance)
    zeros = int(np.sum(seen < 1e-9))
    assert zeros == size - min(size, num_samples)  # the atom, 1 - 1/q
    np.testing.assert_allclose([seen[zeros], seen[-1]], edges, rtol=0.15)
    np.testing.assert_allclose(np.mean(seen), variance, rtol=0.02)


def test_tracy_widom_table_by_painleve():
    """F_1(x) = exp(-1/2 int_x^inf q + (t - x) q^2 dt), q'' = t q + 2 q^3, q ~ Ai."""
    start = 6.0

    def derivative(t, state):
        q, slope, _, square, _ = state
        return [slope, t * q + 2 * q**3, -q, -(q**2), -square]

    value, slope = airy(start)[:2]
    # Ai decays like exp(-2/3 t^3/2): its integrals from 6 on are below 1e-5.
    result = solve_ivp(
        derivative, (start, 0), [value, slope, 0, 0, 0],
        dense_output=True, rtol=1e-10, atol=1e-14,
    )  # fmt: skip
    for level, quantile in rmt._TRACY_WIDOM_QUANTILES.items():
        _, _, integral, _, double = result.sol(quantile)
        np.testing.assert_allclose(
            np.exp(-(integral + double) / 2), level, rtol=0, atol=2e-5
        )


def test_tracy_widom_against_simulated_edges():
    size, variance, num_draws = 200, 4.0, 500
    rng = np.random.default_rng(0)
    draws = (tridiagonal_goe(rng, size, variance) for _ in range(num_draws))
    largest = np.array([top_pair(*diagonals)[0] for diagonals in draws])
    width = float(rmt.tracy_widom_width(size, variance))
    deviation = TRACY_WIDOM_DEVIATION * width
    # s/(2P), the next order: Johnstone and Ma (2012) centre at sqrt(P - 1/2).
    mean = 2 * variance**0.5 * (1 - 1 / (4 * size)) + TRACY_WIDOM_MEAN * width
    assert abs(np.mean(largest) - mean) < 3 * deviation / num_draws**0.5
    # The standard error of a deviation is its own over sqrt(2 n), times about 1.1 here.
    assert abs(np.std(largest) / deviation - 1) < 3 * 1.1 / (2 * num_draws) ** 0.5
    for level in (0.9, 0.95, 0.99):
        above = np.sum(largest > float(rmt.tracy_widom_edge(size, variance, level)))
        low, high = binom.interval(0.997, num_draws, 1 - level)
        assert low <= above <= high


def test_tracy_widom_edge_at_a_size_that_no_int32_holds():
    with jax.enable_x64(False):
        edge = rmt.tracy_widom_edge(10**12, 4.0)
    np.testing.assert_allclose(edge, 4 + 2e-8 * 0.9793, rtol=1e-6)


@hypothesis.given(u=st.floats(1.01, 1e3), variance=variances, sign=signs)
def test_spiked_and_true_eigenvalue_are_inverse(u, variance, sign):
    nu = sign * u * variance**0.5
    seen = rmt.spiked_eigenvalue(nu, variance)
    np.testing.assert_allclose(seen, nu + variance / nu, rtol=1e-12)
    np.testing.assert_allclose(rmt.true_eigenvalue(seen, variance), nu, rtol=1e-10)
    seen = sign * 2 * u * variance**0.5
    nu = rmt.true_eigenvalue(seen, variance)
    np.testing.assert_allclose(rmt.spiked_eigenvalue(nu, variance), seen, rtol=1e-12)


def test_overlap_is_the_slope_of_the_seen_eigenvalue():
    """d lambda / d nu is the squared overlap, by first-order perturbation theory."""
    nu, variance = jnp.array([-30.0, -3.0, -2.01, 2.01, 3.0, 30.0]), 4.0
    slopes = jax.vmap(jax.grad(lambda x: rmt.spiked_eigenvalue(x, variance)))(nu)
    np.testing.assert_allclose(rmt.overlap_squared(nu, variance), slopes, rtol=1e-9)


def test_what_drowns():
    nu = jnp.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    np.testing.assert_array_equal(rmt.overlap_squared(nu, 1.0), 0)
    np.testing.assert_array_equal(rmt.spiked_eigenvalue(nu, 1.0), [-2, -2, 2, 2, 2])
    assert jnp.isnan(rmt.true_eigenvalue(2 * nu, 1.0)).all()
    gradient = jax.grad(lambda x: jnp.nansum(rmt.true_eigenvalue(x, 1.0)))(nu)
    np.testing.assert_array_equal(gradient, 0)


def test_without_noise_everything_is_seen_as_it_is():
    nu = jnp.array([-2.0, 1.0])
    np.testing.assert_array_equal(rmt.spiked_eigenvalue(nu, 0.0), nu)
    np.testing.assert_array_equal(rmt.true_eigenvalue(nu, 0.0), nu)
    np.testing.assert_array_equal(rmt.overlap_squared(nu, 0.0), 1)
    for law in SHRINKAGES:
        np.testing.assert_array_equal(law(nu, nu, jnp.ones(2) / 2, 0.0, 2), nu)


@pytest.mark.slow
def test_theorem_1_by_experiment():
    """A rank-one spike in Wigner noise, P = 2000, nu/s through the transition."""
    size, variance, num_draws = 2000, 4.0, 100
    s, width = variance**0.5, float(rmt.tracy_widom_width(size, variance))
    rng = np.random.default_rng(0)
    far, near = [0.4, 0.8, 1.2, 1.5, 2.0, 3.0], [0.9, 1.0, 1.1]
    for u in far + near:
        draws = []
        for _ in range(num_draws):
            diagonal, off_diagonal = tridiagonal_goe(rng, size, variance)
            diagonal[0] += u * s  # the spike, along e_1
            draws.append(top_pair(diagonal, off_diagonal))
        seen, overlaps = np.transpose(draws)
        predicted = float(rmt.overlap_squared(u * s, variance))
        assert abs(np.mean(overlaps) - predicted) < (0.03 if u in far else 0.08)
        error = np.mean(seen) - float(rmt.spiked_eigenvalue(u * s, variance))
        if u >= 1.2:  # Var lambda = (2 s^2/P) (1 - s^2/nu^2)
            assert abs(error) < 4 * (2 * variance / size * predicted / num_draws) ** 0.5
        elif u <= 0.8:  # at the edge: the mean of TW_1, not yet reached at 0.8
            assert -1.5 * width < error < -0.5 * width
        else:  # the transition, where neither holds
            assert abs(error) < 1.5 * width


def seen_spectrum(size, variance, outliers=()):
    """A true Hessian of two bulks and outliers, and its noisy eigenpairs."""
    rng = np.random.default_rng(0)
    true = np.concatenate([
        np.zeros(size // 2), rng.gamma(2.0, 2.0, size - size // 2 - len(outliers)),
        outliers,
    ])  # fmt: skip
    entries = np.sqrt(variance / (2 * size)) * rng.normal(size=(size, size))
    values, vectors = np.linalg.eigh(np.diag(true) + entries + entries.T)
    return true, values, vectors


def lanczos_quadrature(values, num_probes, num_steps):
    """Nodes and weights from fully reorthogonalised Lanczos on diag(values)."""
    rng = np.random.default_rng(1)
    quadratures = []
    for _ in range(num_probes):
        basis = [rng.normal(size=values.size)]
        basis[0] /= np.linalg.norm(basis[0])
        diagonal, off_diagonal = [], []
        for _ in range(num_steps):
            product = values * basis[-1]
            diagonal.append(product @ basis[-1])
            stacked = np.stack(basis)
            for _ in range(2):
                product -= stacked.T @ (stacked @ product)
            off_diagonal.append(np.linalg.norm(product))
            basis.append(product / off_diagonal[-1])
        theta, q = eigh_tridiagonal(diagonal, off_diagonal[:-1])
        quadratures.append((theta, q[0] ** 2))
    return np.stack(quadratures, axis=1)


@pytest.mark.slow
def test_rotationally_invariant_shrinkage_comes_near_the_oracle():
    size, variance = 1000, 9.0
    true, seen, vectors = seen_spectrum(size, variance)
    oracle = np.einsum("ij,i,ij->j", vectors, true, vectors)

    def error(values):
        estimate = vectors * np.asarray(values) @ vectors.T
        return np.linalg.norm(estimate - np.diag(true)) / size**0.5

    uniform = np.full(size, 1 / size)
    cleaned = rmt.rotationally_invariant_shrinkage(seen, seen, uniform, variance, size)
    quadrature = lanczos_quadrature(seen, num_probes=4, num_steps=60)
    sparse = rmt.rotationally_invariant_shrinkage(seen, *quadrature, variance, 60)
    # Linear shrinkage at its best: the least squares of oracle on seen, a + b lambda.
    linear = np.polyval(np.polyfit(seen, oracle, 1), seen)
    least = error(oracle)
    assert least < error(cleaned) < 1.005 * least
    assert least < error(sparse) < 1.02 * least
    assert 1.1 * least < error(linear) < error(seen)


def test_shrinkage_of_a_spike_in_noise_has_a_closed_form():
    """In the bulk s^2 Re g = lambda/2, xi = 0; outside s^2/nu, xi = nu overlap^2."""
    size, variance = 1000, 4.0
    diagonal, off_diagonal = tridiagonal_goe(np.random.default_rng(0), size, variance)
    diagonal[0] += 6.0
    seen = eigh_tridiagonal(diagonal, off_diagonal, eigvals_only=True)
    spectrum = seen, np.full(size, 1 / size), variance, size
    nu = rmt.true_eigenvalue(seen[-1], variance)
    found = rmt.outlier_true_eigenvalue(seen[-1], *spectrum)
    np.testing.assert_allclose(found, nu, rtol=2e-3)
    cleaned = rmt.rotationally_invariant_shrinkage(seen, *spectrum)
    kept = nu * rmt.overlap_squared(nu, variance)
    np.testing.assert_allclose(cleaned[-1], kept, rtol=5e-3)
    assert np.std(cleaned[:-1]) < 0.1 * np.std(seen[:-1])


@pytest.mark.slow
def test_outliers_of_a_full_rank_hessian_are_recovered():
    size, variance, outliers = 1000, 9.0, np.array([-15.0, 35.0, 40.0])
    _, seen, _ = seen_spectrum(size, variance, outliers)
    found = seen[np.array([0, -2, -1])]
    # The standard error is s sqrt(2/P) over sqrt(the overlap), 0.13 to 0.15 here.
    weights = np.full(size, 1 / size)
    nu = rmt.outlier_true_eigenvalue(found, seen, weights, variance, size)
    np.testing.assert_allclose(nu, outliers, rtol=0, atol=4 * 0.15)
    quadrature = lanczos_quadrature(seen, num_probes=4, num_steps=60)
    again = rmt.outlier_true_eigenvalue(found, *quadrature, variance, size)
    np.testing.assert_allclose(again, nu, rtol=0, atol=0.02)


@pytest.mark.parametrize("law", SHRINKAGES)
def test_probes_are_averaged_and_shapes_kept(law):
    rng = np.random.default_rng(0)
    nodes, lambdas = rng.normal(size=(3, 5)), rng.normal(size=(2, 4))
    weights = rng.dirichlet(np.ones(5), size=3)
    each = [law(lambdas, nodes[i], weights[i], 0.5, 50) for i in range(3)]
    together = law(lambdas, nodes, weights, 0.5, 50)
    assert together.shape == lambdas.shape
    np.testing.assert_allclose(together, np.mean(each, axis=0), rtol=1e-12)


LAWS = {
    "semicircle_density": (rmt.semicircle_density, 0.5, 1.0),
    "semicircle_cdf": (rmt.semicircle_cdf, 0.5, 1.0),
    "semicircle_edge": (rmt.semicircle_edge, 1.0),
    "marchenko_pastur_density": (rmt.marchenko_pastur_density, 0.5, 0.5, 1.0),
    "marchenko_pastur_edges": (rmt.marchenko_pastur_edges, 0.5, 1.0),
    "tracy_widom_width": (rmt.tracy_widom_width, 100.0, 1.0),
    "tracy_widom_edge": (rmt.tracy_widom_edge, 100.0, 1.0),
    "spiked_eigenvalue": (rmt.spiked_eigenvalue, 3.0, 1.0),
    "true_eigenvalue": (rmt.true_eigenvalue, 3.0, 1.0),
    "overlap_squared": (rmt.overlap_squared, 3.0, 1.0),
    "rotationally_invariant_shrinkage": (
        rmt.rotationally_invariant_shrinkage, 3.0, [0.0, 3.0], [0.9, 0.1], 1.0, 100.0,
    ),
    "outlier_true_eigenvalue": (
        rmt.outlier_true_eigenvalue, 3.0, [0.0, 3.0], [0.9, 0.1], 1.0, 100.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_compiled_and_in_the_dtype_of_the_argument(name):
    """Traced float32 in a float64 session, whatever the dtype of the others."""
    law, *arguments = LAWS[name]
    kinds = [jnp.float64] * len(arguments)
    kinds["tracy_widom" in name] = jnp.float32
    mixed = [jnp.asarray(a, kind) for a, kind in zip(arguments, kinds, strict=True)]
    found, plain = (jax.tree.leaves(x) for x in (jax.jit(law)(*mixed), law(*arguments)))
    assert all(x.dtype == jnp.float32 for x in found)
    np.testing.assert_allclose(found, plain, rtol=1e-6)


@pytest.mark.parametrize("name", LAWS)
def test_nan_gives_nan_and_an_integer_is_a_number(name):
    law, _, *others = LAWS[name]
    found = law(jnp.nan * jnp.ones(()), *others)
    assert all(jnp.isnan(x) for x in jax.tree.leaves(found))
    np.testing.assert_array_equal(law(3, *others), law(3.0, *others))


OF_VARIANCE = [
    lambda v: rmt.semicircle_density(0.0, v),
    lambda v: rmt.semicircle_cdf(0.0, v),
    rmt.semicircle_edge,
    lambda v: rmt.tracy_widom_width(10, v),
    lambda v: rmt.tracy_widom_edge(10, v),
    lambda v: rmt.spiked_eigenvalue(1.0, v),
    lambda v: rmt.true_eigenvalue(1.0, v),
    lambda v: rmt.overlap_squared(1.0, v),
    *(lambda v, law=law: law(1.0, [0.0], [1.0], v, 10) for law in SHRINKAGES),
]


@pytest.mark.parametrize("variance", [-1.0, float("nan"), float("inf")])
def test_a_variance_that_is_none(variance):
    for law in OF_VARIANCE:
        with pytest.raises(ValueError, match=rf"variance is {variance} .* P\^-1 Tr X"):
            law(variance)


def test_a_density_needs_a_variance():
    for law in OF_VARIANCE[:2]:
        with pytest.raises(ValueError, match=r"variance is 0 .*finite, above 0: pass"):
            law(0)
    assert all(jnp.isfinite(law(0)) for law in OF_VARIANCE[2:])


@pytest.mark.parametrize("law", ["marchenko_pastur_edges", "marchenko_pastur_density"])
def test_a_ratio_or_an_entry_variance_that_is_none(law):
    law, *x = LAWS[law][:-2]
    with pytest.raises(ValueError, match=r"ratio is 0 .*above 0: pass P/n"):
        law(*x, 0)
    with pytest.raises(ValueError, match=r"variance is -2.0 .*above 0: .*one entry"):
        law(*x, 0.5, -2.0)


def test_a_size_or_a_level_that_is_none():
    laws = [
        rmt.tracy_widom_width,
        rmt.tracy_widom_edge,
        *(lambda p, v, law=law: law(1.0, [0.0], [1.0], v, p) for law in SHRINKAGES),
    ]
    for law in laws:
        with pytest.raises(ValueError, match=r"size is 0 .*at least 1: pass P"):
            law(0, 1.0)
    with pytest.raises(ValueError, match=r"level is 0.5, not in the table: choose"):
        rmt.tracy_widom_edge(10, 1.0, 0.5)


@pytest.mark.parametrize("law", SHRINKAGES)
@pytest.mark.parametrize(("nodes", "weights"), [((3,), (2,)), ((), ()), ((0,), (0,))])
def test_nodes_and_weights_that_do_not_match(law, nodes, weights):
    with pytest.raises(ValueError, match=r"nodes of shape .*both are \(num_nodes,\)"):
        law(1.0, jnp.ones(nodes), jnp.ones(weights), 1.0, 10)
