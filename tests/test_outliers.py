"""Outliers of simulated Hessians, whose truth is known, and of a batch of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp import rmt
from rmtdamp.hessian import Spectrum, hessian_matvec
from rmtdamp.outliers import halves, outliers, spiked_law

P = 300
RNG = np.random.default_rng(0)


def rotation():
    return np.linalg.qr(RNG.normal(size=(P, P)))[0]


# Spectra of mean square 1: Wigner's, and one whose semicircle verdict would be wrong.
WIGNER = np.linalg.eigvalsh(
    (lambda a: (a + a.T) / (2 * P) ** 0.5)(RNG.normal(size=(P, P)))
)
HEAVY = np.concatenate([np.linspace(-0.5, 0.5, P - 20), np.linspace(2, 4.5, 10)])
HEAVY = np.concatenate([HEAVY, -np.linspace(2, 4.5, 10)])
HEAVY /= np.sqrt(np.mean(HEAVY**2))
TRUE = np.array([9.0, -7.0, 6.0])


def halves_of(spectrum, true):
    """A, B with (A + B)/2 = true + X and (A - B)/2 = X', X and X' of one law."""
    noise, other = ((q * spectrum) @ q.T for q in (rotation(), rotation()))
    vectors = rotation()[:, : len(true)]
    whole = (vectors * true) @ vectors.T + noise
    return jnp.asarray(whole + other), jnp.asarray(whole - other), vectors


def multiply(matrix, vector):
    return matrix @ vector


def find(first, second, seed, **options):
    matvecs = (jax.tree_util.Partial(multiply, m) for m in (first, second))
    return outliers(*matvecs, jnp.zeros(P), jax.random.key(seed), **options)


@pytest.mark.parametrize("spectrum", [WIGNER, HEAVY], ids=["wigner", "heavy"])
def test_true_eigenvalues_and_overlaps_of_a_spiked_matrix(spectrum):
    true, overlap = [], []
    for seed in range(4):
        first, second, vectors = halves_of(spectrum, TRUE)
        found = find(first, second, seed, k=5, num_probes=2, num_steps=40)
        assert found.is_outlier.tolist() == [True, True, True, False, False]
        assert np.isnan(found.true_eigenvalues[3:]).all()
        assert (found.overlaps_squared[3:] == 0).all()
        largest = np.sort(abs(spectrum))[::-1]
        np.testing.assert_allclose(found.edge, 2 * largest[0] - largest[4], rtol=1e-3)
        true.append(found.true_eigenvalues[:3])
        measured = np.square(np.asarray(found.eigenvectors[:3]) @ vectors)
        overlap.append(np.diag(measured) - found.overlaps_squared[:3])
        # Means of squares over 2 probes: relative deviations (2 kurtosis / 2 P)^1/2.
        np.testing.assert_allclose(found.variance, 1, rtol=0.35)
        moment = np.mean(spectrum**4)
        np.testing.assert_allclose(found.kurtosis, moment, rtol=0.5)
    # Fluctuations are of order s (2/P)^1/2 = 0.08, halved by four draws.
    np.testing.assert_allclose(np.mean(true, axis=0), TRUE, atol=0.16)
    np.testing.assert_allclose(np.mean(overlap, axis=0), 0, atol=0.03)


@pytest.mark.slow
def test_noise_alone_has_no_outliers_and_the_semicircle_would_say_so_wrongly():
    alarms = 0
    for seed in range(10):
        first, second, _ = halves_of(HEAVY, TRUE[:0])
        found = find(first, second, seed, k=2, num_probes=1, num_steps=30)
        alarms += int(found.is_outlier.any())
        assert abs(found.eigenvalues[0]) > rmt.semicircle_edge(1.0)
    assert alarms <= 1


def test_law_is_theorem_1_for_the_semicircle():
    """Gauss quadrature of the semicircle is known: Chebyshev's of the second kind."""
    n, s = 60, 0.7
    angles = np.pi * np.arange(1, n + 1) / (n + 1)
    nodes, weights = 2 * s * np.cos(angles), 2 / (n + 1) * np.sin(angles) ** 2
    noise = Spectrum(jnp.asarray(nodes)[None], jnp.asarray(weights)[None], 1000)
    seen = jnp.array([1.6, -2.0, 5.0])
    true, overlap = spiked_law(seen, noise)
    np.testing.assert_allclose(true, rmt.true_eigenvalue(seen, s**2), rtol=1e-8)
    np.testing.assert_allclose(overlap, rmt.overlap_squared(true, s**2), rtol=1e-8)


def test_halves_of_a_network_batch_against_the_dense_hessian():
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    parts = halves(batch)
    matvecs = [hessian_matvec(mlp_loss, params, part) for part in parts]
    found = outliers(
        *matvecs, params, jax.random.key(2), k=4, num_steps=30, num_probes=1
    )
    exact = np.linalg.eigvalsh(dense_hessian(mlp_loss, params, batch))
    exact = exact[np.argsort(-abs(exact))][:4]
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-4)
    a, b = (dense_hessian(mlp_loss, params, part) for part in parts)
    noise = np.linalg.eigvalsh((a - b) / 2)
    largest = np.sort(abs(noise))[::-1]
    np.testing.assert_allclose(found.edge, 2 * largest[0] - largest[4], rtol=1e-3)
    assert found.is_outlier.tolist() == (abs(exact) > found.edge).tolist()


def test_bad_input():
    with pytest.raises(ValueError, match=r"batch holds 5 examples, .* leave one out"):
        halves(jnp.zeros(5))
    with pytest.raises(ValueError, match=r"there are 4 parameters, and the edge"):
        outliers(lambda v: v, lambda v: v, jnp.zeros(4), jax.random.key(0))
