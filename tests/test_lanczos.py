"""Lanczos, eigsh, spectral density: defining relations, dense oracles, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp.hessian import (
    SpectralDensity,
    check_symmetric,
    eigsh,
    hessian_matvec,
    lanczos,
    noise_matvec,
    spectral_density,
)

PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
P = 94


def with_spectrum(eigenvalues, seed=0, dtype=jnp.float64):
    """A dense symmetric matrix built from its spectrum."""
    p = len(eigenvalues)
    draw = jax.random.normal(jax.random.key(seed), (p, p), jnp.float64)
    basis = jnp.linalg.qr(draw)[0]
    matrix = (basis * jnp.asarray(eigenvalues, jnp.float64)[None]) @ basis.T
    return ((matrix + matrix.T) / 2).astype(dtype)


def normal(seed, p=P, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), (p,), dtype)


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def rows(basis, count):
    return np.stack(
        [flat(jax.tree.map(lambda q, i=i: q[i], basis)) for i in range(count)]
    )


@pytest.mark.parametrize("reorthogonalization", ["none", "full", "twice"])
def test_defining_relation_on_a_pytree(reorthogonalization):
    """A Q^T = Q^T T + r e^T and Q orthonormal, for the Hessian of a network."""
    matvec = hessian_matvec(mlp_loss, PARAMS, BATCH)
    start = mlp(jax.random.key(5))
    found = lanczos(
        matvec, start, 20, reorthogonalization=reorthogonalization, keep_basis=True
    )
    basis = rows(found.basis, 20)
    hessian = np.asarray(dense_hessian(mlp_loss, PARAMS, BATCH))
    left = hessian @ basis.T - basis.T @ np.asarray(found.matrix())
    left[:, -1] -= flat(found.residual)
    np.testing.assert_allclose(left, 0, atol=1e-10)
    tolerance = 1e-5 if reorthogonalization == "none" else 1e-12
    np.testing.assert_allclose(basis @ basis.T, np.eye(20), atol=tolerance)
    np.testing.assert_allclose(
        basis[0], flat(start) / np.linalg.norm(flat(start)), rtol=1e-12
    )
    assert found.num_steps == 20


def test_full_space_gives_the_whole_spectrum():
    spectrum = np.linspace(-3, 7, 40)
    matrix = with_spectrum(spectrum)
    found = lanczos(
        lambda v: matrix @ v, normal(1, 40), 40, reorthogonalization="twice"
    )
    np.testing.assert_allclose(found.ritz()[0], spectrum, atol=1e-9)
    np.testing.assert_allclose(found.ritz()[1].sum(), 1)


@pytest.mark.parametrize("reorthogonalization", ["none", "full", "twice"])
@pytest.mark.parametrize("num_steps", [2, 12, 60, 200])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_breakdown_gives_true_eigenvalues_and_nothing_else(
    shift, num_steps, reorthogonalization
):
    """shift I + 100 u u^T in float32, P = 200: a two-dimensional Krylov space. (One
    peer's Lanczos reports Ritz values up to 454 here.)"""
    u = normal(0, 200, jnp.float32)
    u = u / jnp.linalg.norm(u)
    found = lanczos(
        lambda v: shift * v + 100 * u * jnp.dot(u, v),
        normal(1, 200, jnp.float32),
        num_steps,
        reorthogonalization=reorthogonalization,
    )
    values, weights = found.ritz()
    distance = jnp.minimum(jnp.abs(values - shift), jnp.abs(values - shift - 100))
    assert jnp.max(distance) < 1e-3
    assert found.num_steps == 2
    assert jnp.all(jnp.isfinite(values))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert jnp.all(weights[2:] == 0)


@pytest.mark.parametrize("reorthogonalization", ["full", "twice"])
@pytest.mark.parametrize("num_steps", [15, 40])
def test_a_spectrum_that_decays_to_rounding(num_steps, reorthogonalization):
    """Eigenvalues 20, 2, 0.03, 3e-4, 1e-6, ... in float32: the tail is rounding, in
    which a basis loses its orthogonality by powers unless two passes are made."""
    x, centres = jnp.linspace(-1, 1, 64), jnp.linspace(-1, 1, 40)
    features = jnp.exp(-(((x[:, None] - centres[None]) ** 2) / 2)).astype(jnp.float32)
    found = lanczos(
        lambda v: features.T @ (features @ v) / 64,
        normal(0, 40, jnp.float32),
        num_steps,
        reorthogonalization=reorthogonalization,
    )
    basis = rows(found.basis, int(found.num_steps)).astype(float)
    error = basis @ basis.T - np.eye(len(basis))
    np.testing.assert_allclose(error, 0, atol=2e-6)
    exact = np.linalg.eigvalsh(np.asarray(features.T @ features, float) / 64)
    values = found.ritz()[0]
    np.testing.assert_allclose(values.max(), exact[-1], rtol=1e-5)
    np.testing.assert_allclose(values.min(), 0, atol=1e-5)


def test_a_matvec_that_returns_its_argument():
    found = lanczos(lambda v: v, normal(0), 3)
    assert found.num_steps == 1
    np.testing.assert_allclose(found.ritz()[0], 1)


def test_zero_matrix():
    found = lanczos(jnp.zeros_like, normal(0), 5)
    assert found.num_steps == 1
    np.testing.assert_array_equal(found.ritz()[0], 0)


@pytest.mark.slow
def test_a_small_bulk_beside_a_large_outlier_is_no_breakdown():
    """Outlier 100, bulk of 1e-2 in float32: the bulk is far above rounding."""
    spectrum = np.concatenate([1e-2 * np.linspace(-1, 1, 99), [100.0]])
    matrix = with_spectrum(spectrum, dtype=jnp.float32)
    found = lanczos(lambda v: matrix @ v, normal(1, 100, jnp.float32), 10)
    assert found.num_steps == 10


def test_traced_equals_eager():
    matvec = hessian_matvec(mlp_loss, PARAMS, BATCH)
    start = mlp(jax.random.key(5))
    traced = jax.jit(lambda m, s: lanczos(m, s, 8))(matvec, start)
    eager = lanczos(matvec, start, 8)
    np.testing.assert_allclose(traced.diagonal, eager.diagonal, rtol=1e-10)
    np.testing.assert_allclose(traced.off_diagonal, eager.off_diagonal, rtol=1e-10)


def test_low_precision_params_are_handled_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    inputs, labels = BATCH
    matvec = hessian_matvec(mlp_loss, params, (inputs.astype(jnp.bfloat16), labels))
    found = lanczos(matvec, params, 5)
    assert found.diagonal.dtype == jnp.float32


SCALES = [1e25, 1e-25, 1e36, 1e-32]


@pytest.mark.parametrize("reorthogonalization", ["none", "twice"])
@pytest.mark.parametrize("unit", SCALES)
def test_a_matrix_whose_norm_has_no_square_in_float32(unit, reorthogonalization):
    """unit (I + 3 u u^T): Ritz values 1 and 4 units after two steps, then breakdown."""
    u = normal(0, 50, jnp.float32)
    u = u / jnp.linalg.norm(u)
    matvec = lambda v: (v + 3 * u * (u @ v)) * jnp.float32(unit)
    start = normal(1, 50, jnp.float32)
    found = lanczos(matvec, start, 5, reorthogonalization=reorthogonalization)
    assert found.num_steps == 2
    values, weights = found.ritz()
    np.testing.assert_allclose(values / np.float32(unit), [1, 4, 4, 4, 4], rtol=1e-5)
    share = float((u @ start) ** 2 / (start @ start))
    np.testing.assert_allclose(weights, [1 - share, share, 0, 0, 0], atol=1e-5)


@pytest.mark.parametrize("unit", SCALES)
def test_a_start_whose_norm_has_no_square_in_float32(unit):
    diagonal = jnp.array([1.0, 2.0, 5.0], jnp.float32)
    found = lanczos(lambda v: diagonal * v, jnp.full(3, unit, jnp.float32), 3)
    np.testing.assert_allclose(found.ritz()[0], [1, 2, 5], rtol=1e-5)


@pytest.mark.parametrize("unit", SCALES)
def test_every_scale_has_the_same_spectrum_and_eigenpairs(unit):
    """Uniform on [-1, 1] and one at 3, in units whose square float32 does not have."""
    diagonal = jnp.linspace(-1, 1, 99, dtype=jnp.float32)
    diagonal = jnp.concatenate([diagonal, jnp.array([3.0], jnp.float32)])
    matvec = lambda v: diagonal * jnp.float32(unit) * v
    key = jax.random.key(4)
    spectrum = spectral_density(matvec, diagonal, key, num_steps=40, num_probes=8)
    nodes = spectrum.nodes / np.float32(unit)
    np.testing.assert_allclose(nodes.max(1), 3, rtol=1e-5)
    np.testing.assert_allclose(nodes.min(1), -1, rtol=1e-2)
    means = (spectrum.weights * nodes).sum(1)
    stderr = means.std(ddof=1) / 8**0.5
    assert abs(means.mean() - 3 / 100) < 5 * stderr
    other = jax.random.key(5)
    pairs = eigsh(matvec, diagonal, other, k=2)
    np.testing.assert_allclose(pairs.eigenvalues / np.float32(unit), [3, 1], rtol=1e-5)
    assert np.all(pairs.residuals < 1e-3 * unit)
    assert np.all(np.asarray(pairs.residuals) > 0)  # JAX takes denormals for 0


def test_eigsh_of_what_is_not_finite_is_nan_and_soon():
    matvec = lambda v: v * jnp.where(jnp.arange(30) == 4, jnp.nan, 1.0)
    pairs = eigsh(matvec, jnp.ones(30), jax.random.key(0), k=2)
    assert np.all(np.isnan(pairs.eigenvalues))
    assert pairs.num_products == 20


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigsh_matches_the_dense_hessian(which):
    """To 1e-6 in float64, vectors by the defining relation, order as SciPy's words."""
    matvec = hessian_matvec(mlp_loss, PARAMS, BATCH)
    found = eigsh(matvec, PARAMS, jax.random.key(0), k=5, which=which)
    hessian = np.asarray(dense_hessian(mlp_loss, PARAMS, BATCH))
    values = np.linalg.eigvalsh(hessian)
    key = {"LA": -values, "SA": values, "LM": -np.abs(values)}[which]
    np.testing.assert_allclose(
        found.eigenvalues, values[np.argsort(key)][:5], atol=1e-6
    )
    vectors = rows(found.eigenvectors, 5)
    defect = hessian @ vectors.T - vectors.T * np.asarray(found.eigenvalues)[None]
    assert np.all(np.linalg.norm(defect, axis=0) <= found.residuals + 1e-12)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-10)


def test_eigsh_counts_multiplicity_and_restarts():
    spectrum = np.concatenate([np.linspace(0, 1, 195), [2, 2, 2, 3, 3]])
    matrix = with_spectrum(spectrum)
    found = eigsh(
        lambda v: matrix @ v, jnp.zeros(200), jax.random.key(0), k=5, basis_size=12
    )
    np.testing.assert_allclose(found.eigenvalues, [3, 3, 2, 2, 2], atol=1e-7)
    assert found.num_products > 12


@pytest.mark.parametrize("k", [3, 20])
def test_eigsh_of_low_rank_and_identity(k):
    u = normal(0, 20)
    u = u / jnp.linalg.norm(u)
    find = lambda matvec: eigsh(matvec, jnp.zeros(20), jax.random.key(0), k=k)
    expected = np.zeros(k)
    np.testing.assert_allclose(find(lambda v: v).eigenvalues, 1 + expected, atol=1e-9)
    expected[0] = 5
    low_rank = find(lambda v: 5 * u * (u @ v))
    np.testing.assert_allclose(low_rank.eigenvalues, expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("p", [8, 30])
def test_eigsh_as_exact_as_can_be(p, dtype):
    diagonal = jnp.arange(1, p + 1, dtype=dtype)
    options = {"k": 2, "tol": 0.0}
    found = eigsh(lambda v: diagonal * v, diagonal, jax.random.key(1), **options)
    np.testing.assert_allclose(found.eigenvalues, [p, p - 1], rtol=1e-6)
    assert found.num_products < 100


@pytest.mark.slow
def test_eigsh_respects_its_budget_and_reports_what_is_left():
    matrix = with_spectrum(np.linspace(0, 1, 300))
    calls = []

    def matvec(v):
        calls.append(None)
        return matrix @ v

    with jax.disable_jit():
        found = eigsh(
            matvec, jnp.zeros(300), jax.random.key(0), k=2, max_products=30, tol=1e-12
        )
    assert len(calls) == found.num_products <= 30
    assert np.all(np.asarray(found.residuals) > 1e-12)


def test_density_moments_match_dense_moments():
    """Moments 0 to 3: over 60 keys neither the values nor their scatter are off."""
    matvec = hessian_matvec(mlp_loss, PARAMS, BATCH)
    hessian = dense_hessian(mlp_loss, PARAMS, BATCH)
    find = lambda m, key: spectral_density(m, PARAMS, key, num_steps=10, num_probes=8)
    compiled = jax.jit(lambda m, key: find(m, key)[:2])
    found = {order: [] for order in (1, 2, 3)}
    for seed in range(60):
        nodes, weights = compiled(matvec, jax.random.key(seed))
        spectrum = SpectralDensity(nodes, weights, P)
        assert spectrum.nodes.shape == spectrum.weights.shape == (8, 10)
        np.testing.assert_allclose(spectrum.weights.sum(1), 1, rtol=1e-10)
        np.testing.assert_allclose(spectrum.moment(0)[0], 1, rtol=1e-10)
        for order, pairs in found.items():
            pairs.append(spectrum.moment(order))
    for order, pairs in found.items():
        # Pooled: a moment of few large eigenvalues is skewed, and low ones come with a
        # small standard error of their own.
        values, stderrs = np.array(pairs).T
        predicted = np.mean(stderrs**2) ** 0.5
        exact = jnp.trace(jnp.linalg.matrix_power(hessian, order)) / P
        assert abs(values.mean() - exact) < 4 * predicted / 60**0.5
        scatter = 4 * (2 / 59) ** 0.5  # of the variance of 60 values
        np.testing.assert_allclose(values.var(ddof=1), predicted**2, rtol=scatter)


@pytest.mark.slow
def test_density_of_a_traced_call_and_with_a_basis():
    matvec = hessian_matvec(mlp_loss, PARAMS, BATCH)
    find = lambda m, how: spectral_density(
        m, PARAMS, jax.random.key(0), num_steps=6, reorthogonalization=how
    )
    eager, full = find(matvec, "none"), find(matvec, "full")
    traced = jax.jit(lambda m: find(m, "none")[:2])(matvec)
    np.testing.assert_allclose(traced[0], eager.nodes, rtol=1e-8)
    np.testing.assert_allclose(full.nodes, eager.nodes, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_density_smoothing_integrates_to_one_and_breakdown_has_no_weight():
    u = normal(0, 50)
    u = u / jnp.linalg.norm(u)
    spectrum = spectral_density(
        lambda v: v + 9 * u * (u @ v), u, jax.random.key(0), num_steps=10
    )
    assert jnp.all(jnp.isfinite(spectrum.nodes))
    grid = jnp.linspace(-2, 13, 2000)
    density = spectrum.density(grid, 0.2)
    np.testing.assert_allclose(jnp.trapezoid(density, grid), 1, rtol=1e-3)
    assert density[jnp.argmin(jnp.abs(grid - 5))] < 1e-6
    assert jnp.isnan(
        spectral_density(
            jnp.copy, u, jax.random.key(0), num_steps=2, num_probes=1
        ).moment(1)[1]
    )


def test_noise_matvec_is_half_the_difference():
    halves = [
        jax.tree.map(lambda x, s=s: x[s], BATCH) for s in (slice(16), slice(16, 32))
    ]
    matvec = noise_matvec(*(hessian_matvec(mlp_loss, PARAMS, h) for h in halves))
    a, b = (dense_hessian(mlp_loss, PARAMS, h) for h in halves)
    vector = mlp(jax.random.key(7))
    np.testing.assert_allclose(
        flat(matvec(vector)), (a - b) @ flat(vector) / 2, atol=1e-12
    )


def test_check_symmetric():
    check_symmetric(hessian_matvec(mlp_loss, PARAMS, BATCH), PARAMS, jax.random.key(0))
    matrix = jax.random.normal(jax.random.key(1), (P, P), jnp.float64)
    with pytest.raises(ValueError, match=r"not symmetric: x\^T A y = .* needs a symm"):
        check_symmetric(lambda v: matrix @ v, normal(0), jax.random.key(2))
    with pytest.raises(ValueError, match=r"the matvec is not finite: x\^T A y = nan"):
        check_symmetric(lambda v: jnp.nan * v, normal(0), jax.random.key(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lanczos(jnp.copy, normal(0), 95), "num_steps is 95, .* 1 and the 94"),
        (lambda: lanczos(jnp.copy, normal(0), 0), "num_steps is 0"),
        (lambda: lanczos(jnp.copy, 0 * normal(0), 2), "start has norm 0.0"),
        (lambda: lanczos(jnp.copy, jnp.nan * normal(0), 2), "start has norm nan"),
        (
            lambda: lanczos(jnp.copy, normal(0), 2, reorthogonalization="some"),
            "reorthogonalization is 'some': choose from none, full, twice",
        ),
        (
            lambda: spectral_density(
                jnp.copy, normal(0), jax.random.key(0), num_steps=95
            ),
            "num_steps is 95",
        ),
        (
            lambda: spectral_density(
                jnp.copy, normal(0), jax.random.key(0), num_probes=0
            ),
            "num_probes is 0, and at least 1",
        ),
        (
            lambda: eigsh(jnp.copy, normal(0), jax.random.key(0), tol=-1.0),
            "tol is -1.0, and must be at least 0",
        ),
        (
            lambda: jax.jit(
                lambda a: eigsh(lambda v: a * v, normal(0), jax.random.key(0))
            )(normal(1)),
            "eigsh decides by its residuals when to stop, so it cannot be traced",
        ),
        (
            lambda: eigsh(jnp.copy, normal(0), jax.random.key(0), k=95),
            "k is 95, and must lie between 1 and the 94 parameters",
        ),
        (
            lambda: eigsh(jnp.copy, normal(0), jax.random.key(0), basis_size=7),
            "basis_size is 7, and must lie between 8",
        ),
        (
            lambda: eigsh(jnp.copy, normal(0), jax.random.key(0), max_products=19),
            "max_products is 19, .* takes 20",
        ),
        (
            lambda: eigsh(jnp.copy, normal(0), jax.random.key(0), which="BE"),
            "which is 'BE': choose from LA, SA, LM",
        ),
        (
            lambda: jax.jit(lambda v: eigsh(jnp.copy, v, jax.random.key(0)))(normal(0)),
            "cannot be traced: .* or take lanczos",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_ritz_pairs_have_the_residuals_they_say(which):
    matrix = with_spectrum(np.linspace(-4, 5, 30))
    matvec = jax.tree_util.Partial(jnp.matmul, matrix)
    found = lanczos(matvec, jax.random.normal(jax.random.key(21), (30,)), 12)
    pairs = found.eigenpairs(4, which)
    order = {"LA": lambda x: -x, "SA": lambda x: x, "LM": lambda x: -abs(x)}[which]
    values, x = pairs.eigenvalues, pairs.eigenvectors
    np.testing.assert_array_equal(values, sorted(values, key=order))
    np.testing.assert_allclose(x @ x.T, np.eye(4), atol=1e-12)
    residuals = np.linalg.norm(x @ matrix - values[:, None] * x, axis=1)
    np.testing.assert_allclose(pairs.residuals, residuals, atol=1e-12)


def test_ritz_pairs_after_breakdown_and_beyond_what_was_asked():
    diagonal = jnp.where(jnp.arange(9) < 3, -5.0, 2.0)
    matvec = jax.tree_util.Partial(jnp.multiply, diagonal)
    found = lanczos(matvec, jnp.ones(9), 6)
    pairs = found.eigenpairs(3, "LM")
    np.testing.assert_allclose(pairs.eigenvalues[:2], [-5, 2])
    np.testing.assert_array_equal(pairs.eigenvectors[2], np.zeros(9))
    assert np.isinf(pairs.residuals[2])
    with pytest.raises(
        ValueError, match=r"k is 7, and the decomposition has 6 steps: ask"
    ):
        found.eigenpairs(7)
    with pytest.raises(ValueError, match=r"which is 'BE': choose from LA, SA, LM"):
        found.eigenpairs(1, "BE")
    bare = lanczos(matvec, jnp.ones(9), 2, reorthogonalization="none")
    with pytest.raises(ValueError, match=r"no basis, .* pass keep_basis=True"):
        bare.eigenpairs(1)
