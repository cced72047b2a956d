"""The trace of the Hessian as a penalty, and its closed form for linear networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp.flatness import (
    least_linear_network_trace,
    linear_network_trace,
    trace_penalty,
)

PARAMS, BATCH = mlp(jax.random.key(0), (3, 4, 3)), mlp_batch(jax.random.key(1))
BATCH = (BATCH[0][:, :3], BATCH[1] % 3)
flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]


def z_scores(found, exact):
    """Of the mean over the leading axis, by its own standard error."""
    error = np.std(found, axis=0, ddof=1) / len(found) ** 0.5
    return (np.mean(found, axis=0) - exact) / error


def test_value_and_gradient_are_those_of_the_dense_trace_on_average():
    dense = functools.partial(dense_hessian, mlp_loss)
    exact, slope = jax.value_and_grad(lambda p: jnp.trace(dense(p, BATCH)))(PARAMS)
    estimate = functools.partial(trace_penalty, mlp_loss)
    both = jax.value_and_grad(lambda p, key: estimate(p, BATCH, key, num_probes=2))
    keys = jax.random.split(jax.random.key(2), 4000)
    values, slopes = jax.jit(jax.vmap(both, (None, 0)))(PARAMS, keys)
    assert abs(z_scores(values, exact)) < 4
    assert np.abs(z_scores(jax.vmap(flat)(slopes), flat(slope))).max() < 4.5
    hessian = dense(PARAMS, BATCH)
    variance = np.sum(np.square(hessian - np.diag(np.diag(hessian))))  # 2 / n = 1
    # The relative error of a variance from 4000 draws is 0.02 to 0.05.
    assert np.var(values, ddof=1) == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_exact_where_the_hessian_is_diagonal(dtype):
    loss_fn = lambda w, batch, power: jnp.sum(w["a"] ** power) + jnp.sum(batch)
    params = {"a": jnp.array([1.0, -2.0], dtype)}
    find = lambda w: trace_penalty(
        loss_fn, w, jnp.zeros(1, dtype), jax.random.key(0), loss_args=(4,)
    )
    value, slope = jax.value_and_grad(find)(params)
    assert value == 60  # 12 w^2
    assert value.dtype == dtype
    np.testing.assert_array_equal(slope["a"].astype(float), [24, -48])


def random_weights(sizes):
    keys = jax.random.split(jax.random.key(3), len(sizes))
    pairs = zip(keys[1:], sizes[1:], sizes[:-1], strict=True)
    return [jax.random.normal(key, pair) for key, *pair in pairs]


@pytest.mark.parametrize("sizes", [(3, 2), (3, 2, 4, 2)])
def test_closed_form_is_the_trace_where_the_measurements_are_fitted(sizes):
    weights = random_weights(sizes)
    matrices = jax.random.normal(jax.random.key(4), (5, sizes[-1], sizes[0]))
    end_to_end = functools.reduce(lambda x, w: w @ x, weights)
    see = lambda m: jnp.einsum("nkm,km->n", matrices, m)
    targets = see(end_to_end)

    def loss_fn(weights, targets):
        product = functools.reduce(lambda x, w: w @ x, weights)
        return jnp.mean((see(product) - targets) ** 2)

    exact = jnp.trace(dense_hessian(loss_fn, weights, targets))
    np.testing.assert_allclose(linear_network_trace(weights, matrices), exact)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_no_factorisation_is_flatter_than_the_least_and_one_attains_it(depth):
    rows, columns = 4, 3
    every = jnp.eye(12).reshape(12, rows, columns) * 12**0.5  # E[A x A] = identity
    weights = random_weights((columns, *[5] * (depth - 1), rows))
    matrix = functools.reduce(lambda x, w: w @ x, weights)
    least = least_linear_network_trace(matrix, depth)
    if depth == 1:
        np.testing.assert_allclose(linear_network_trace(weights, every), least)
        return
    assert linear_network_trace(weights, every) > least
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    nuclear, each = s.sum(), least / (2 * depth)
    first = (columns * nuclear / each) ** 0.5 * jnp.sqrt(s)[:, None] * vt
    last = (rows * nuclear / each) ** 0.5 * u * jnp.sqrt(s)[None]
    inner = [nuclear / each**0.5 * jnp.eye(3)] * (depth - 2)
    best = [first, *inner, last]
    np.testing.assert_allclose(functools.reduce(lambda x, w: w @ x, best), matrix)
    np.testing.assert_allclose(linear_network_trace(best, every), least)


@jax.custom_vjp
def backwards_only(x):
    return x**2


backwards_only.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


def test_what_cannot_be_estimated_is_refused():
    key, w = jax.random.key(0), jnp.ones(2)
    with pytest.raises(TypeError, match="custom VJP and no derivative forward"):
        trace_penalty(lambda w, b: jnp.sum(backwards_only(w)), w, w, key)
    with pytest.raises(TypeError, match="must return a real scalar"):
        trace_penalty(lambda w, b: w, w, w, key)
    with pytest.raises(ValueError, match="num_probes is 0, and must be at least 1"):
        trace_penalty(lambda w, b: w.sum(), w, w, key, num_probes=0)
    with pytest.raises(ValueError, match="depth is 0, and must be at least 1"):
        least_linear_network_trace(jnp.eye(2), 0)
    matrices = jnp.ones((5, 2, 3))
    for sizes in [(3, 3), (2, 3), (4, 2)]:
        with pytest.raises(ValueError, match="do not fit"):
            linear_network_trace(random_weights(sizes), matrices)
    with pytest.raises(ValueError, match="do not fit"):
        linear_network_trace([jnp.ones((4, 3)), jnp.ones((2, 5))], matrices)
    with pytest.raises(ValueError, match="do not fit"):
        linear_network_trace([], matrices)
