"""Params split over devices, a batch split over the same ones: the step is the same."""

import chex
import jax
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZES = (8, 4, 4)
PARAMS = mlp(jax.random.key(0), SIZES)
BATCH = mlp_batch(jax.random.key(1), 16, SIZES)


def learned(inner):
    return rmtdamp.auto_damping(
        inner, rmtdamp.DampingLearner(mlp_loss, floor=0.1), refresh_every=1
    )


measurer = rmtdamp.RitzMeasurer(mlp_loss, num_steps=4, start="gradient")
newton = rmtdamp.lanczos_newton(0.1, measurer, damping=0.1)
CASES = {
    "lanczos_newton": newton,
    "spectral": rmtdamp.set_damping(rmtdamp.spectral_descent(0.1), 0.1),
    "auto_damping(lanczos_newton)": learned(newton),
    "auto_damping(shampoo)": learned(rmtdamp.shampoo(0.1, eigen_every=1)),
}
VARIANTS = {"lanczos_newton", "auto_damping(lanczos_newton)", "auto_damping(shampoo)"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in CASES],
)
def test_split_params_take_the_same_step(name):
    tx = CASES[name]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(mlp_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    here = step(PARAMS, tx.init(PARAMS), BATCH)
    params, batch = jax.device_put((PARAMS, BATCH), split)
    there = step(params, jax.jit(tx.init)(params), batch)
    # Not the states: eigenvectors of one eigenvalue are any basis of its space.
    chex.assert_trees_all_close(here[0], there[0], rtol=1e-6, atol=1e-9)
    for new in jax.tree.leaves(there[0]):
        assert len(new.sharding.device_set) == 4
