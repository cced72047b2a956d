"""Gauss-Newton and Fisher products against dense constructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import mlp, mlp_batch

from rmtdamp.hessian import fisher_matvec, ggn_matvec, hvp

PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
VECTOR = mlp(jax.random.key(2))


def model(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


def loss(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def jacobian():
    """(N, outputs, P)"""
    x, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    return jax.jacobian(lambda p: model(unravel(p), BATCH[0]))(x)


def dense_ggn():
    jac = jacobian()
    p = jax.nn.softmax(model(PARAMS, BATCH[0]))
    middle = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return jnp.einsum("nap,nab,nbq->pq", jac, middle, jac) / len(jac)


def test_ggn_is_jacobian_times_softmax_curvature():
    found = ggn_matvec(model, loss, PARAMS, BATCH)(VECTOR)
    np.testing.assert_allclose(flat(found), dense_ggn() @ flat(VECTOR), atol=1e-12)


def test_ggn_of_a_linear_model_is_its_hessian():
    linear = lambda p, x: x @ p
    params = jax.random.normal(jax.random.key(3), (4, 6), jnp.float64)
    found = ggn_matvec(linear, loss, params, BATCH)(params)
    whole = lambda p, b: loss(linear(p, b[0]), b[1])
    np.testing.assert_allclose(found, hvp(whole, params, BATCH, params), atol=1e-12)


def test_empirical_fisher_is_the_mean_outer_product_of_gradients():
    single = lambda x, y: flat(
        jax.grad(lambda p: loss(model(p, x[None]), y[None]))(PARAMS)
    )
    gradients = jnp.stack([single(x, y) for x, y in zip(*BATCH, strict=True)])
    expected = gradients.T @ (gradients @ flat(VECTOR)) / len(gradients)
    found = fisher_matvec(model, loss, PARAMS, BATCH)(VECTOR)
    np.testing.assert_allclose(flat(found), expected, atol=1e-12)


def test_sampled_fisher_is_the_gauss_newton_matrix_in_expectation():
    """v^T F v over 2,000 draws against v^T G v, by its own standard error."""
    vector = flat(VECTOR)
    exact = vector @ dense_ggn() @ vector

    def quadratic(key):
        matvec = fisher_matvec(
            model, loss, PARAMS, BATCH, key, sample_fn=jax.random.categorical
        )
        return vector @ flat(matvec(VECTOR))

    keys = jax.random.split(jax.random.key(4), 2000)
    draws = jax.jit(lambda keys: jax.lax.map(quadratic, keys))(keys)
    assert abs(draws.mean() - exact) < 4 * draws.std() / 2000**0.5
    assert draws.std() > 0.01 * exact


def test_products_do_not_retrace_for_new_params_and_data():
    traces = []

    def counting(params, x):
        traces.append(None)
        return model(params, x)

    for seed in range(3):
        params, batch = mlp(jax.random.key(seed)), mlp_batch(jax.random.key(seed))
        ggn_matvec(counting, loss, params, batch)(VECTOR)
        fisher_matvec(counting, loss, params, batch)(VECTOR)
        if seed == 0:
            first = len(traces)
    assert len(traces) == first


def test_loss_args_reach_the_model():
    scaled = lambda p, x, c: c * model(p, x)
    half = ggn_matvec(scaled, loss, PARAMS, BATCH, loss_args=(jnp.float64(1),))(VECTOR)
    np.testing.assert_allclose(
        flat(half), flat(ggn_matvec(model, loss, PARAMS, BATCH)(VECTOR)), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ggn_matvec(model, loss, PARAMS, BATCH[0]),
            ValueError,
            r"batch is an array of shape .*, and must be a pair \(inputs, targets\)",
        ),
        (
            lambda: ggn_matvec(model, lambda z, y: z, PARAMS, BATCH),
            TypeError,
            r"real scalar and returned shape \(32, 6\)",
        ),
        (
            lambda: fisher_matvec(lambda p, x: model(p, x).sum(0), loss, PARAMS, BATCH),
            ValueError,
            r"output has shape \(6,\) for 32 inputs: outputs need one row",
        ),
        (
            lambda: fisher_matvec(model, loss, PARAMS, BATCH, jax.random.key(0)),
            ValueError,
            "key and sample_fn go together",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
