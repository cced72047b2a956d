"""Whole matrices: against jax.hessian, NumPy, and the estimates they replace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp.hessian import (
    SpectralDensity,
    dataset_matvec,
    dense_matvec,
    dense_moments,
    eigh,
    hessian_matvec,
    moments,
    noise_matvec,
    restrict,
    to_dense,
)

PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
P = 94


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def exact(batch=BATCH):
    return np.asarray(dense_hessian(mlp_loss, PARAMS, batch))


def parts(n):
    return [jax.tree.map(lambda x, i=i: x[i::n], BATCH) for i in range(n)]


def test_the_matrix_is_jax_s_own_hessian():
    found = to_dense(hessian_matvec(mlp_loss, PARAMS, BATCH), PARAMS)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, exact(), atol=1e-12)


def test_the_matrix_of_a_data_set_a_difference_and_a_block():
    a, b = parts(2)
    over = to_dense(dataset_matvec(mlp_loss, PARAMS, [a, b]), PARAMS)
    np.testing.assert_allclose(over, exact(), atol=1e-12)
    matvecs = [hessian_matvec(mlp_loss, PARAMS, x) for x in (a, b)]
    noise = to_dense(noise_matvec(*matvecs), PARAMS)
    np.testing.assert_allclose(noise, (exact(a) - exact(b)) / 2, atol=1e-12)
    block, part = restrict(matvecs[0], PARAMS, r"\[0\]")
    np.testing.assert_allclose(to_dense(block, part), exact(a)[:40, :40], atol=1e-12)


def test_columns_are_columns_and_more_of_them_than_one_call_makes():
    matrix = jax.random.normal(jax.random.key(0), (300, 300), jnp.float32)
    found = to_dense(lambda v: matrix @ v, jnp.zeros(300, jnp.float32))
    np.testing.assert_allclose(found, matrix, rtol=1e-6)


def test_narrow_params_give_float32():
    like = jnp.zeros(3, jnp.bfloat16)
    found = to_dense(lambda v: 2 * v, like)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, 2 * np.eye(3))
    assert eigh(found, like).eigenvectors.dtype == jnp.float32


def test_a_matrix_as_a_matvec_and_back():
    matvec = dense_matvec(exact(), PARAMS)
    np.testing.assert_allclose(to_dense(matvec, PARAMS), exact(), atol=1e-14)
    vector = mlp(jax.random.key(2))
    np.testing.assert_allclose(flat(matvec(vector)), exact() @ flat(vector), atol=1e-12)


def test_eigenpairs_by_their_defining_relation_and_in_every_order():
    pairs = eigh(exact(), PARAMS)
    values = np.linalg.eigvalsh(exact())
    np.testing.assert_allclose(pairs.eigenvalues, values, atol=1e-12)
    vectors = np.stack([flat(x) for x in unstacked(pairs.eigenvectors, P)])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(P), atol=1e-12)
    np.testing.assert_allclose(vectors @ exact(), values[:, None] * vectors, atol=1e-12)
    assert np.all(pairs.residuals < 1e-12)
    orders = {"LA": -values, "SA": values, "LM": -np.abs(values)}
    for which, order in orders.items():
        some = pairs.leading(3, which)
        index = np.argsort(order)[:3]
        np.testing.assert_allclose(some.eigenvalues, values[index], atol=1e-12)
        rows = np.stack([flat(x) for x in unstacked(some.eigenvectors, 3)])
        np.testing.assert_allclose(rows, vectors[index], atol=1e-14)
    with pytest.raises(ValueError, match="which is 'BE': choose from LA, SA, LM"):
        pairs.leading(1, "BE")


def unstacked(tree, count):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def test_residuals_show_what_symmetry_lacks():
    pairs = eigh(np.array([[1.0, 0.2], [0.0, 3.0]]), jnp.zeros(2))
    assert np.all(pairs.residuals > 0.05)


def test_what_is_not_finite_is_nan():
    pairs = eigh(np.array([[1.0, np.inf], [np.inf, 3.0]]), jnp.zeros(2))
    assert np.all(np.isnan(pairs.eigenvalues))
    assert np.all(np.isnan(pairs.residuals))


def test_moments_are_what_probes_see_on_average():
    """One probe's estimate is unbiased for them: 4,000 probes, by its own error."""
    hessians = [exact(x) for x in parts(8)]
    found = dense_moments(hessians, microbatch_size=4, batch_size=32)
    mean = np.mean(hessians, axis=0)
    spread = sum(np.sum((h - mean) ** 2) for h in hessians) / 7 / P
    np.testing.assert_allclose(found.variance, spread * 4 / 32, rtol=1e-12)
    np.testing.assert_allclose(found.mean, np.trace(exact()) / P, rtol=1e-10)
    square = np.sum(exact() ** 2) / P - spread / 8
    np.testing.assert_allclose(found.square, square, rtol=1e-10)
    assert found.probe_stderr == 0
    seen = moments(
        mlp_loss, PARAMS, BATCH, jax.random.key(3), num_probes=4000, execution="scan"
    )
    assert abs(seen.variance - found.variance) < 4 * seen.probe_stderr
    np.testing.assert_allclose(
        seen.microbatch_stderr, found.microbatch_stderr, rtol=0.05
    )


def test_two_microbatches_have_no_jackknife():
    found = dense_moments([np.eye(2), 3 * np.eye(2)], microbatch_size=1, batch_size=1)
    assert np.isnan(found.microbatch_stderr)
    assert found.variance == 2


def test_a_spectrum_of_known_eigenvalues():
    found = SpectralDensity.from_eigenvalues(np.array([1.0, 2.0, 6.0]))
    assert found.nodes.shape == found.weights.shape == (1, 3)
    assert found.num_parameters == 3
    value, stderr = found.moment(2)
    np.testing.assert_allclose(value, 41 / 3)
    assert stderr == 0


def test_a_function_in_place_of_a_matrix_is_refused():
    for of in (eigh, dense_matvec):
        with pytest.raises(TypeError, match=r"is a function: .*to_dense\(matvec, par"):
            of(lambda v: v, jnp.zeros(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dense_matvec(np.eye(3), jnp.zeros(2)),
            r"shape \(3, 3\), and `like` holds 2 parameters: it must be of shape \(2, ",
        ),
        (lambda: eigh(np.ones(4), jnp.zeros(2)), r"the matrix has shape \(4,\)"),
        (
            lambda: dense_moments([np.eye(2)], microbatch_size=1, batch_size=1),
            "there are 1 Hessians, and a variance needs at least 2",
        ),
        (
            lambda: to_dense(lambda v: v, jnp.zeros(90_000, jnp.float32)),
            r"of 90000 parameters would take 32\.4 GB.*max_size, which is 20000",
        ),
        (
            lambda: to_dense(lambda v: v, jnp.zeros(3), max_size=2),
            "or raise max_size, which is 2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
