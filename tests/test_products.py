"""hvp and hessian_matvec against dense Hessians and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp import DampingLearner
from rmtdamp.hessian import hessian_matvec, hvp, moments
from rmtdamp.transforms import Context

PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
VECTOR = mlp(jax.random.key(2))


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


@pytest.mark.parametrize("product", ["hvp", "hessian_matvec"])
def test_products_match_the_dense_hessian(product):
    if product == "hvp":
        found = hvp(mlp_loss, PARAMS, BATCH, VECTOR)
    else:
        found = hessian_matvec(mlp_loss, PARAMS, BATCH)(VECTOR)
    exact = dense_hessian(mlp_loss, PARAMS, BATCH) @ flat(VECTOR)
    np.testing.assert_allclose(flat(found), exact, atol=1e-12)
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)


def test_product_is_the_derivative_of_the_gradient():
    """Central differences, an oracle that shares no code: error O(eps^2) = 1e-10."""
    eps = 1e-5
    move = lambda sign: jax.tree.map(lambda p, v: p + sign * eps * v, PARAMS, VECTOR)
    gradient = jax.grad(mlp_loss)
    difference = (flat(gradient(move(1), BATCH)) - flat(gradient(move(-1), BATCH))) / (
        2 * eps
    )
    found = flat(hvp(mlp_loss, PARAMS, BATCH, VECTOR))
    np.testing.assert_allclose(found, difference, atol=1e-8)


def test_matvec_compiles_once_for_new_params_data_and_consumers():
    traces = []

    def loss(params, batch):
        traces.append("loss")
        return mlp_loss(params, batch)

    @jax.jit
    def twice(matvec, vector):
        traces.append("consumer")
        return matvec(matvec(vector))

    for seed in range(3):
        params = mlp(jax.random.key(seed))
        matvec = hessian_matvec(loss, params, mlp_batch(jax.random.key(seed)))
        matvec(VECTOR)
        twice(matvec, VECTOR)
        if seed == 0:
            first = list(traces)
    assert traces == first
    assert first.count("consumer") == 1


def test_linearised_product_costs_fewer_flops_than_jvp_of_grad():
    """Two gradients' worth after linearisation instead of three (per notes on cost)."""
    params = mlp(jax.random.key(0), (64, 64, 64, 64), jnp.float32)
    batch = mlp_batch(jax.random.key(1), 64, (64, 64, 64, 64), jnp.float32)
    matvec = hessian_matvec(mlp_loss, params, batch)
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    once = flops(lambda p, v: hvp(mlp_loss, p, batch, v), params, params)
    again = flops(lambda m, v: m(v), matvec, params)
    gradient = flops(jax.grad(mlp_loss), params, batch)
    assert again < 2.1 * gradient
    assert once > 1.25 * again


def test_loss_args_are_traced():
    def loss(params, batch, weight):
        return weight * mlp_loss(params, batch)

    double = hvp(loss, PARAMS, BATCH, VECTOR, loss_args=(jnp.float64(2),))
    single = hvp(mlp_loss, PARAMS, BATCH, VECTOR)
    np.testing.assert_allclose(flat(double), 2 * flat(single))


def test_precision_reaches_the_loss():
    def loss(params, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return jnp.mean((batch @ params) ** 2)

    seen = []
    hvp(loss, jnp.ones(2), jnp.ones((3, 2)), jnp.ones(2), precision="bfloat16")
    hessian_matvec(loss, jnp.ones(2), jnp.ones((3, 2)), precision="bfloat16")
    assert "bfloat16" in seen
    seen.clear()
    hvp(loss, jnp.ones(2), jnp.ones((3, 2)), jnp.ones(2))
    assert "bfloat16" not in seen


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (jnp.ones(3), "vector has 1 leaves and params have 4"),
        (
            jax.tree.map(lambda x: x.T, VECTOR),
            r"shape \(8, 4\) where params\[0\]\['kernel'\] has shape \(4, 8\)",
        ),
    ],
    ids=["structure", "shape"],
)
@pytest.mark.parametrize("product", ["hvp", "hessian_matvec"])
def test_wrong_vector(product, vector, message):
    if product == "hvp":
        matvec = lambda v: hvp(mlp_loss, PARAMS, BATCH, v)
    else:
        matvec = hessian_matvec(mlp_loss, PARAMS, BATCH)
    with pytest.raises(ValueError, match=message):
        matvec(vector)


@pytest.mark.parametrize("product", [hvp, hessian_matvec])
def test_wrong_loss_and_params(product):
    rest = (jnp.ones(2),) if product is hvp else ()
    with pytest.raises(TypeError, match=r"real scalar and returned shape \(2,\)"):
        product(lambda p, b: p * b, jnp.ones(2), jnp.ones(2), *rest)
    with pytest.raises(TypeError, match="params is int64"):
        product(lambda p, b: p.sum(), jnp.arange(2), jnp.ones(2), *rest)


@jax.custom_vjp
def custom(x):
    return jnp.tanh(x)


# The forward rule calls the function itself, as attention kernels' do.
custom.defvjp(lambda x: (custom(x),) * 2, lambda y, g: (g * (1 - y**2),))


@jax.custom_vjp
def looped(x):
    return jnp.tanh(x)


def square_in_a_loop(y):
    step = lambda carry: (carry[0] + 1, carry[1] * y)
    return jax.lax.while_loop(lambda c: c[0] < 2, step, (0, jnp.ones_like(y)))[1]


looped.defvjp(
    lambda x: (jnp.tanh(x),) * 2, lambda y, g: (g * (1 - square_in_a_loop(y)),)
)


def loss_with(activation):
    def loss(params, batch):
        return jnp.mean(jnp.sum(activation(batch @ params) ** 2, axis=1))

    return loss


CUSTOM, LOOPED, PLAIN = map(loss_with, (custom, looped, jnp.tanh))
WEIGHTS = jax.random.normal(jax.random.key(5), (3, 2))
INPUTS = jax.random.normal(jax.random.key(6), (8, 3))


@pytest.mark.parametrize(
    ("loss", "mode"),
    [
        (PLAIN, "reverse-over-reverse"),
        (CUSTOM, "reverse-over-reverse"),
        (LOOPED, "forward-over-reverse"),
    ],
    ids=["plain", "custom VJP", "loop in its gradient"],
)
def test_modes_agree(loss, mode):
    vector = jnp.arange(6.0).reshape(3, 2)
    exact = hvp(PLAIN, WEIGHTS, INPUTS, vector)
    once = hvp(loss, WEIGHTS, INPUTS, vector, mode=mode)
    many = hessian_matvec(loss, WEIGHTS, INPUTS, mode=mode)(vector)
    np.testing.assert_allclose(once, exact, atol=1e-12)
    np.testing.assert_allclose(many, exact, atol=1e-12)
    measure = lambda loss, **options: moments(
        loss, WEIGHTS, INPUTS, jax.random.key(7), num_microbatches=2, **options
    )
    np.testing.assert_allclose(
        measure(loss, mode=mode).variance, measure(PLAIN).variance, rtol=1e-12
    )


def test_a_loss_that_cannot_be_differentiated_names_the_other_mode():
    reverse, forward = "reverse-over-reverse", "forward-over-reverse"
    for product in (hessian_matvec, lambda *args, **kw: hvp(*args, WEIGHTS, **kw)):
        with pytest.raises(TypeError, match=rf'custom VJP .* pass mode="{reverse}"'):
            product(CUSTOM, WEIGHTS, INPUTS)
        with pytest.raises(ValueError, match=rf'unknown length.*pass mode="{forward}"'):
            product(LOOPED, WEIGHTS, INPUTS, mode=reverse)
        with pytest.raises(
            ValueError, match=r"mode is 'reverse': choose from 'forward"
        ):
            product(PLAIN, WEIGHTS, INPUTS, mode="reverse")
    learner = DampingLearner(CUSTOM, num_microbatches=2)
    step = jnp.zeros((), jnp.int32)
    arguments = learner.init(WEIGHTS), Context(step, WEIGHTS, INPUTS, 8)
    with pytest.raises(TypeError, match=rf'pass mode="{reverse}"'):
        learner.refresh(*arguments)
    learner = DampingLearner(CUSTOM, num_microbatches=2, mode=reverse)
    assert learner.refresh(*arguments).measured_variance > 0
