"""Outliers where the truth is known: simulated Hessians, and networks on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss
from scipy.stats import binom

from rmtdamp import rmt
from rmtdamp.hessian import (
    SpectralDensity,
    SplitHalfPairs,
    dataset_matvec,
    eigh,
    eigsh,
    halves,
    hessian_matvec,
    spectral_density,
    split_half_eigsh,
)
from rmtdamp.outliers import outliers, spiked_law

P = 160


def rotation(rng, size=P):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def wigner(rng, size=P):
    """P^-1 Tr X^2 = 1, edge 2."""
    a = rng.normal(size=(size, size))
    return (a + a.T) / (2 * size) ** 0.5


# A spectrum of mean square 1 that reaches far beyond the semicircle.
HEAVY = np.concatenate([np.linspace(-0.5, 0.5, P - 20), np.linspace(2, 4.5, 10)])
HEAVY = np.concatenate([HEAVY, -np.linspace(2, 4.5, 10)])
HEAVY /= np.sqrt(np.mean(HEAVY**2))


def heavy(rng):
    q = rotation(rng)
    return (q * HEAVY) @ q.T


def spiked(rng, noise, true):
    """(A, B, truth): independent halves, so that (A + B) / 2 has the noise's variance.

    The truth is (eigenvalues, eigenvectors as columns).
    """
    vectors = np.linalg.qr(rng.normal(size=(P, len(true))))[0]
    whole = (vectors * np.array(true)) @ vectors.T
    first, second = (whole + 2**0.5 * noise(rng) for _ in range(2))
    return first, second, vectors


def scattered(rng, batch=64, count=8):
    """H_i = sum_k c_ik u_k u_k^T + bulk: the noise has the true directions in it."""
    vectors = np.linalg.qr(rng.normal(size=(P, count)))[0]

    def half():
        draws = rng.lognormal(sigma=1.5, size=(batch // 2, count))
        mean = draws.mean(0) * np.linspace(5, 1, count) * np.exp(-(1.5**2) / 2)
        return (vectors * mean) @ vectors.T + 0.35 * wigner(rng)

    return half(), half(), vectors


def regression(rng, batch=256, degrees=3):
    """H_i = x_i x_i^T with a few wide directions, and Student's tails."""
    variance = np.ones(P)
    variance[:4] = [120, 90, 60, 40]
    vectors = rotation(rng)

    def half():
        x = rng.normal(size=(batch // 2, P)) * np.sqrt(variance)
        x *= (1 / rng.chisquare(degrees, size=(len(x), 1))) ** 0.5
        x = x @ vectors.T
        return x.T @ x / len(x)

    return half(), half(), vectors[:, :4]


def leading(matrix, count):
    values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(-abs(values))[:count]
    return values[order], vectors[:, order]


def exact_pairs(first, second, k, spare=2):
    """What `split_half_eigsh` measures, from whole matrices."""
    values, vectors = leading((first + second) / 2, k)
    (low, a), (low_b, b) = (leading(m, k + spare) for m in (first, second))
    agreements = []
    for value, u in zip(values, vectors.T, strict=True):
        in_a, in_b = a[:, low * value > 0], b[:, low_b * value > 0]
        agreements.append((in_a @ (in_a.T @ u)) @ (in_b @ (in_b.T @ u)))
    found = values, vectors.T, np.zeros(k), np.array(agreements)
    return SplitHalfPairs(*map(jnp.asarray, found), 0)


def rates(draws):
    """Counts of (missed, true directions, false alarms, noise) over (found, overlap).

    A true direction has a squared overlap of 0.9 or more, noise below 0.5.
    """
    called = np.concatenate([np.asarray(found.is_outlier) for found, _ in draws])
    overlap = np.concatenate([overlap for _, overlap in draws])
    true, noise = overlap >= 0.9, overlap < 0.5
    return (~called & true).sum(), true.sum(), (called & noise).sum(), noise.sum()


def check_rates(draws, at_least=20):
    """At most 10 % missed and 5 % false, up to what chance does one time in 1,000."""
    missed, true, false, noise = rates(draws)
    assert min(true, noise) >= at_least
    assert missed <= binom.ppf(0.999, true, 0.1)
    assert false <= binom.ppf(0.999, noise, 0.05)


SETTINGS = {
    "wigner": lambda rng: spiked(
        rng, wigner, rng.uniform(3, 8, 5) * rng.choice([-1, 1], 5)
    ),
    "degenerate": lambda rng: spiked(rng, wigner, [5, 5, 5, -5]),
    "heavy": lambda rng: spiked(rng, heavy, [9, -8, 7]),
    "scattered": scattered,
    "regression": regression,
}


def test_eigenpairs_of_one_batch_have_no_verdict():
    found = eigh(np.eye(3), jnp.zeros(3))
    with pytest.raises(TypeError, match=r"EigenPairs, .* split_half_eigsh returns"):
        outliers(found)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_few_are_missed_and_few_are_false(setting):
    rng, draws = np.random.default_rng(7), []
    for _ in range(30):
        first, second, vectors = SETTINGS[setting](rng)
        found = outliers(exact_pairs(first, second, 9))
        overlap = (np.asarray(found.eigenvectors) @ vectors) ** 2
        draws.append((found, overlap.sum(1)))
    check_rates(draws)
    # Where a vector is true the overlap is estimated without bias to speak of.
    errors = np.concatenate(
        [(np.asarray(f.overlaps_squared) - o)[o >= 0.9] for f, o in draws]
    )
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.07


def test_no_edge_of_the_noise_tells_directions_that_are_in_it():
    rng, beyond, called = np.random.default_rng(3), 0, 0
    for _ in range(10):
        first, second, vectors = scattered(rng, batch=32)
        found = outliers(exact_pairs(first, second, 5))
        overlap = ((np.asarray(found.eigenvectors) @ vectors) ** 2).sum(1)
        assert (overlap > 0.9).all()
        edge = np.abs(np.linalg.eigvalsh((first - second) / 2)).max()
        beyond += int(np.sum(np.abs(found.eigenvalues) > edge))
        called += int(found.is_outlier.sum())
    assert beyond <= 40
    assert called >= 49


def test_noise_alone_has_no_outliers_and_the_semicircle_would_say_so_wrongly():
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(10):
        first, second, _ = spiked(rng, heavy, [])
        found = outliers(exact_pairs(first, second, 9))
        alarms += int(found.is_outlier.sum())
        assert abs(found.eigenvalues[0]) > rmt.semicircle_edge(1.0)
    assert alarms <= 1


def test_one_number_gives_both_overlaps_in_the_setting_of_theorem_1():
    nu, s2 = jnp.array([6.0, -4.0, 2.5, 1.5]), 1.0
    half = rmt.overlap_squared(nu, 2 * s2)
    pairs = SplitHalfPairs(
        eigenvalues=rmt.spiked_eigenvalue(nu, s2),
        eigenvectors=jnp.eye(4),
        residuals=jnp.zeros(4),
        agreements=2 * half**2 / (1 + half),
        num_products=0,
    )
    found = outliers(pairs)
    np.testing.assert_allclose(
        found.overlaps_squared, rmt.overlap_squared(nu, s2), rtol=1e-12
    )
    # c_h^4 is 0.89, 0.77, 0.46 and 0.01.
    assert found.is_outlier.tolist() == [True, True, False, False]
    np.testing.assert_allclose(found.true_eigenvalues[:2], nu[:2], rtol=1e-12)
    assert np.isnan(found.true_eigenvalues[2:]).all()


def test_chance_and_lost_numbers():
    pairs = SplitHalfPairs(
        jnp.ones(4), jnp.eye(4), jnp.zeros(4), jnp.array([-0.1, 0, 1 + 1e-9, np.nan]), 0
    )
    found = outliers(pairs)
    assert found.is_outlier.tolist() == [False, False, True, False]
    np.testing.assert_allclose(found.overlaps_squared, [0.5, 0.5, 1, np.nan])


def test_agreements_of_a_spiked_wigner_matrix_follow_the_law():
    """2 c_h^4 / (1 + c_h^2) as P grows; the mean of some draws is off by P^(-1/2)."""
    rng, nu = np.random.default_rng(2), [6.0, -4.0, 3.0]
    measured = [
        exact_pairs(*spiked(rng, wigner, nu)[:2], k=3).agreements for _ in range(20)
    ]
    half = rmt.overlap_squared(jnp.array(nu), 2.0)
    law = 2 * half**2 / (1 + half)
    np.testing.assert_allclose(np.mean(measured, axis=0), law, atol=0.02)


@pytest.mark.parametrize("noise", [wigner, heavy])
def test_true_eigenvalues_of_a_spiked_matrix(noise):
    true, found_true, law = np.array([9.0, -8.0, 7.0]), [], []
    rng = np.random.default_rng(0)
    for seed in range(4):
        first, second, vectors = spiked(rng, noise, true)
        found = outliers(exact_pairs(first, second, 9))
        assert found.is_outlier.tolist() == [True] * 3 + [False] * 6
        found_true.append(found.true_eigenvalues[:3])
        # Without preferred directions the law of the noise's spectrum holds too.
        spectrum = spectral_density(
            matvec_of((first - second) / 2),
            jnp.zeros(P),
            jax.random.key(seed),
            num_steps=40,
        )
        nu, overlap = spiked_law(found.eigenvalues[:3], spectrum)
        measured = np.square(np.asarray(found.eigenvectors[:3]) @ vectors)
        law.append(np.stack([nu - true, overlap - np.diag(measured)]))
    # Fluctuations are of order s (2/P)^1/2 = 0.09, halved by four draws.
    np.testing.assert_allclose(np.mean(found_true, axis=0), true, atol=0.2)
    np.testing.assert_allclose(np.mean(law, axis=0)[0], 0, atol=0.16)
    np.testing.assert_allclose(np.mean(law, axis=0)[1], 0, atol=0.03)


def test_law_is_theorem_1_for_the_semicircle():
    """Gauss quadrature of the semicircle is known: Chebyshev's of the second kind."""
    n, s = 60, 0.7
    angles = np.pi * np.arange(1, n + 1) / (n + 1)
    nodes, weights = 2 * s * np.cos(angles), 2 / (n + 1) * np.sin(angles) ** 2
    noise = SpectralDensity(jnp.asarray(nodes)[None], jnp.asarray(weights)[None], 1000)
    seen = jnp.array([1.6, -2.0, 5.0])
    true, overlap = spiked_law(seen, noise)
    np.testing.assert_allclose(true, rmt.true_eigenvalue(seen, s**2), rtol=1e-8)
    np.testing.assert_allclose(overlap, rmt.overlap_squared(true, s**2), rtol=1e-8)


def multiply(matrix, vector):
    return matrix @ vector


def matvec_of(matrix):
    return jax.tree_util.Partial(multiply, jnp.asarray(matrix))


def check_pairs(found, exact):
    np.testing.assert_allclose(found.eigenvalues, exact.eigenvalues, rtol=1e-6)
    np.testing.assert_allclose(found.agreements, exact.agreements, atol=1e-5)
    flat = [np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(found.eigenvectors)]
    cosines = np.sum(np.concatenate(flat, 1) * np.asarray(exact.eigenvectors), axis=1)
    np.testing.assert_allclose(abs(cosines), 1, atol=1e-6)
    assert (found.residuals < 1e-6 * abs(exact.eigenvalues[0])).all()


@pytest.mark.parametrize("spare", [0, 3])
def test_pairs_are_those_of_the_matrices(spare):
    """Of both signs."""
    first, second, _ = spiked(np.random.default_rng(5), wigner, [6, -5, 4, -3, 3])
    found = split_half_eigsh(
        matvec_of(first),
        matvec_of(second),
        jnp.zeros(P),
        jax.random.key(0),
        k=5,
        spare=spare,
        tol=1e-7,
    )
    check_pairs(found, exact_pairs(first, second, 5, spare))
    assert found.num_products >= 4 * (5 + spare)


def test_halves_of_a_network_batch_are_those_of_dense_hessians():
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    parts = halves(batch)
    matvecs = [hessian_matvec(mlp_loss, params, part) for part in parts]
    found = split_half_eigsh(*matvecs, params, jax.random.key(2), k=5, tol=1e-7)
    dense = [np.asarray(dense_hessian(mlp_loss, params, part)) for part in parts]
    check_pairs(found, exact_pairs(*dense, 5))


def test_a_scaled_loss_scales_eigenvalues_alone():
    first, second, _ = spiked(np.random.default_rng(6), wigner, [6, -5, 4])
    one, other = (
        outliers(exact_pairs(c * first, c * second, 5)) for c in (1.0, -100.0)
    )
    assert one.is_outlier.any()
    assert other.is_outlier.tolist() == one.is_outlier.tolist()
    for name, factor in (
        ("eigenvalues", -100),
        ("true_eigenvalues", -100),
        ("overlaps_squared", 1),
    ):
        expected = factor * getattr(one, name)
        np.testing.assert_allclose(getattr(other, name), expected, rtol=1e-9)


def overlaps_with(found, truth):
    """Squared projections on the span of the true eigenvectors."""
    flat = lambda pairs: np.concatenate(
        [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(pairs)], axis=1
    )
    product = flat(found.eigenvectors) @ flat(truth.eigenvectors).T
    return (product**2).sum(1)


def judged(loss_fn, params, batches, data, key, k=9):
    """(found, overlap with the data set) of each batch, a draw each."""
    whole = dataset_matvec(loss_fn, params, data)
    keys = jax.random.split(key, 1 + len(batches))
    truth = eigsh(whole, params, keys[0], k=k + 2, which="LM")
    draws = []
    for batch, batch_key in zip(batches, keys[1:], strict=True):
        matvecs = [hessian_matvec(loss_fn, params, half) for half in halves(batch)]
        found = outliers(split_half_eigsh(*matvecs, params, batch_key, k=k))
        draws.append((found, overlaps_with(found, truth)))
    return draws


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_network_on_digits():
    """Batches of 64 and 128 against all 1,280 images, from the start to the end."""
    from rmtdamp.demo import spectrum_example as example
    from rmtdamp.demo._data import load_digits

    data = jax.device_put(load_digits().train)
    rows = lambda index: jax.tree.map(lambda x: x[index], data)
    draws = []
    with jax.numpy_rank_promotion("allow"):
        for seed, num_steps in enumerate((0, 40, 150, 600)):
            shuffle, order, judging = jax.random.split(jax.random.key(seed), 3)
            params = example._initial(np.random.default_rng(seed))
            steps = jax.random.randint(shuffle, (num_steps, 128), 0, 1280)
            if num_steps:
                params = example._train(params, data, steps)
            order = jax.random.permutation(order, 1280)
            batches = [rows(order[i : i + 64]) for i in range(0, 320, 64)]
            batches += [rows(order[i : i + 128]) for i in range(320, 960, 128)]
            draws += judged(example.loss_fn, params, batches, [data], judging)
    check_rates(draws, at_least=15)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_example_of_the_command_is_not_contradicted_by_its_data_set():
    from rmtdamp.demo.spectrum_example import digits

    with jax.numpy_rank_promotion("allow"):
        loss_fn, params, batches, _ = digits()
        draws = judged(loss_fn, params, batches, batches, jax.random.key(0))
    errors = []
    for found, overlap in draws:
        assert np.asarray(found.is_outlier)[overlap >= 0.95].all()
        errors.append(np.asarray(found.overlaps_squared) - overlap)
    assert np.abs(np.mean(errors)) < 0.03
    assert np.max(np.abs(errors)) < 0.08


def test_bad_input():
    with pytest.raises(ValueError, match=r"batch holds 5 examples, .* leave one out"):
        halves(jnp.zeros(5))
    with pytest.raises(ValueError, match=r"k is 3, and at most a quarter of the 8 par"):
        split_half_eigsh(lambda v: v, lambda v: v, jnp.zeros(8), jax.random.key(0), k=3)
    with pytest.raises(TypeError, match=r"params\[0\] is int64|params is int64"):
        split_half_eigsh(
            lambda v: v, lambda v: v, jnp.zeros(8, int), jax.random.key(0), k=1
        )
