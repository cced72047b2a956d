"""float16: params or activations in it, and a loss scaled so that gradients survive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = mlp(jax.random.key(0), dtype=jnp.float32)
BATCH = mlp_batch(jax.random.key(1), dtype=jnp.float32)
SCALE = 2.0**10


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def half_loss(params, batch):
    """Computed in float16, whatever the params are in."""
    inputs, labels = batch
    half = cast(params, jnp.float16), (inputs.astype(jnp.float16), labels)
    return mlp_loss(*half).astype(jnp.float32)


def trained(tx, params, loss_fn, scale=1.0, num_steps=3):
    """Some steps on `scale` times the loss, its gradient unscaled in float32."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: scale * loss_fn(p, BATCH))(params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
        updates, state = tx.update(grads, state, params, batch=BATCH)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


def transformations(loss_fn):
    """The stability floor of auto_adam, and eq. 15."""
    learner = rmtdamp.DampingLearner(loss_fn)
    return {
        "auto_adam": rmtdamp.auto_adam(1e-2, loss_fn, refresh_every=1),
        "eq. 15": rmtdamp.auto_adam(1e-2, learner, refresh_every=1),
    }


# Not auto_adam on float16 params: there Adam's own second moment underflows.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("auto_adam", jnp.float32, marks=pytest.mark.slow),
        pytest.param("eq. 15", jnp.float32, marks=pytest.mark.slow),
        ("eq. 15", jnp.float16),
    ],
)
def test_a_scaled_float16_loss_trains_as_float32_does(name, dtype):
    params, state = trained(
        transformations(half_loss)[name], cast(PARAMS, dtype), half_loss, SCALE
    )
    exact, known = trained(transformations(mlp_loss)[name], PARAMS, mlp_loss)
    damping, expected = (optax.tree.get(s, "damping") for s in (state, known))
    np.testing.assert_allclose(damping, expected, rtol=0.05)
    assert optax.tree.get(state, "refresh_rejections") == 0
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(exact), strict=True):
        assert a.dtype == dtype
        # Three steps of 0.01, and the rounding of params to 11 bits.
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=5e-3)


def test_a_learner_of_the_scaled_loss_learns_the_square_of_the_scale():
    """Why it takes the loss without it."""
    scaled = lambda params, batch: SCALE * mlp_loss(params, batch)
    variance = lambda loss_fn: optax.tree.get(
        trained(transformations(loss_fn)["eq. 15"], PARAMS, mlp_loss, num_steps=1)[1],
        "measured_variance",
    )
    np.testing.assert_allclose(
        variance(scaled), SCALE**2 * variance(mlp_loss), rtol=1e-4
    )
