"""Save, restore, go on: the same run to the last bit, for whatever has a state."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp
import rmtdamp.flax
from benchmarks.costs.scaling import split_over
from rmtdamp.kronecker import ModelFactors, make_blocks

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZES = (3, 4, 2)
PARAMS = mlp(jax.random.key(0), SIZES, jnp.float32)
BATCH = mlp_batch(jax.random.key(1), 16, SIZES, jnp.float32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def taped_mlp(params, x, tape):
    """The first layer has a Kronecker block, the second is bare arrays."""
    first, last = params
    z = x @ first["kernel"] + first["bias"][None]
    x = jnp.tanh(tape.linear("first", x, z))
    return x @ last["kernel"] + last["bias"][None]


FACTORS_FN = ModelFactors(
    model_fn=taped_mlp,
    criterion=cross_entropy,
    blocks=make_blocks(PARAMS, {"first": {"kernel": "0/kernel", "bias": "0/bias"}}),
)


def kfac(**change):
    measurer = rmtdamp.KroneckerMeasurer(FACTORS_FN, eigen_every=2, **change)
    return rmtdamp.kfac(0.05, measurer, damping=0.01, refresh_every=2)


def newton(**change):
    measurer = rmtdamp.RitzMeasurer(mlp_loss, num_steps=3, **change)
    return rmtdamp.lanczos_newton(0.05, measurer, damping=0.1, refresh_every=2)


def learned(inner):
    learner = rmtdamp.DampingLearner(mlp_loss, floor=0.1)
    return rmtdamp.auto_damping(inner, learner, refresh_every=2)


def scheduled(inner):
    return rmtdamp.set_damping(inner, optax.linear_schedule(1.0, 0.1, 5))


CASES = {
    "auto_damping(kfac)": learned(kfac(ekfac=True)),
    "lanczos_newton": newton(),
    "set_damping(spectral)": scheduled(rmtdamp.spectral_descent(0.05)),
    "set_damping(shampoo)": scheduled(rmtdamp.shampoo(0.05, eigen_every=2)),
    "kfac": kfac(),
    "auto_damping(lanczos_newton)": learned(
        newton(cleaning="rotationally_invariant", variance=0.01)
    ),
    "auto_damping(spectral)": learned(rmtdamp.spectral_descent(0.05, method="svd")),
    "auto_damping(shampoo)": learned(rmtdamp.shampoo(0.05, eigen_every=2)),
}
# Their states hold nothing new: run with the slow tests.
VARIANTS = {
    "kfac",
    *(f"auto_damping({x})" for x in ("lanczos_newton", "spectral", "shampoo")),
}
every_case = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in CASES],
)


def through_orbax(saved, template, folder):
    """What a new process would do: it has the template alone."""
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", saved)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint", template)


def through_flax(saved, template, folder):
    (folder / "checkpoint").write_bytes(flax.serialization.to_bytes(saved))
    return flax.serialization.from_bytes(template, (folder / "checkpoint").read_bytes())


both_ways = pytest.mark.parametrize(
    "restore", [through_orbax, through_flax], ids=["orbax", "flax"]
)


def assert_same_bits(found, expected):
    """NaN, "not known yet", is equal to itself; -0 differs from 0."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.tobytes() == y.tobytes()


def on_device(tree):
    """As a checkpoint hands it over, so that one program serves all."""
    return jax.device_put(tree, jax.devices()[0])


@functools.cache
def uninterrupted(name):
    """A step, what there is after three, and after the two that follow."""
    tx = CASES[name]

    @jax.jit
    def step(params, state):
        grads = jax.grad(mlp_loss)(params, BATCH)
        updates, state = tx.update(grads, state, params, batch=BATCH)
        return optax.apply_updates(params, updates), state

    kept = [on_device((PARAMS, tx.init(PARAMS)))]
    for _ in range(5):
        kept.append(step(*kept[-1]))
    return step, kept[3], kept[5]


@every_case
@both_ways
def test_a_restored_run_goes_on_as_if_uninterrupted(name, restore, tmp_path):
    step, saved, expected = uninterrupted(name)
    template = jax.tree.map(jnp.zeros_like, (PARAMS, CASES[name].init(PARAMS)))
    carry = on_device(restore(saved, template, tmp_path))
    assert_same_bits(carry, saved)
    for _ in range(2):
        carry = step(*carry)
    assert_same_bits(carry, expected)


def on_devices(tree, num):
    """Split over so many devices, each leaf that can be."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((num,), ("data",), auto, devices=jax.devices()[:num])
    return jax.device_put(tree, split_over(mesh, tree))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto_damping(kfac)", "lanczos_newton"])
def test_a_run_goes_on_on_another_number_of_devices(name, tmp_path):
    step, _, expected = uninterrupted(name)
    start = jax.tree.map(jnp.copy, (PARAMS, CASES[name].init(PARAMS)))
    template = jax.tree.map(jnp.zeros_like, start)
    moved = lambda saved, num: through_orbax(
        saved, on_devices(template, num), tmp_path / f"to {num}"
    )
    carry = on_devices(start, 4)
    for _ in range(3):
        carry = step(*carry)
    # On as many devices bit for bit, on fewer but for the order of sums.
    again, whole = moved(carry, 4), carry
    for _ in range(2):
        again, whole = step(*again), step(*whole)
    assert_same_bits(again, whole)
    carry = step(*moved(carry, 2))
    last = step(*moved(carry, 1))
    chex.assert_trees_all_close(last[0], expected[0], rtol=1e-4, atol=1e-5)
    assert len(jax.tree.leaves(last)[0].sharding.device_set) == 1


def nnx_training(seed):
    """A model and its optimizer, as a new process would make them."""
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs),
        nnx.Linear(4, 2, rngs=rngs),
    )
    factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
    measurer = rmtdamp.KroneckerMeasurer(factors_fn, eigen_every=2)
    tx = rmtdamp.kfac(0.05, measurer, damping=0.01, refresh_every=2)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer):
    loss = lambda model: cross_entropy(model(BATCH[0]), BATCH[1])
    grads = nnx.grad(loss)(model)
    state = rmtdamp.flax.loss_args(model)
    optimizer.update(model, grads, batch=BATCH, loss_args=state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "restore",
    [through_orbax, pytest.param(through_flax, marks=pytest.mark.slow)],
    ids=["orbax", "flax"],
)
def test_an_nnx_optimizer_with_kfac_goes_on_as_if_uninterrupted(restore, tmp_path):
    whole = nnx_training(0)
    for _ in range(3):
        nnx_step(*whole)
    saved = nnx.to_pure_dict(nnx.state(whole))
    other = nnx_training(1)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, restore(saved, nnx.to_pure_dict(state), tmp_path))
    nnx.update(other, state)
    assert_same_bits(nnx.to_pure_dict(nnx.state(other)), saved)
    for _ in range(2):
        nnx_step(*whole)
        nnx_step(*other)
    assert_same_bits(*(nnx.to_pure_dict(nnx.state(pair)) for pair in (other, whole)))
    assert optax.tree.get(other[1].opt_state, "kfac_measurements")[...] == 3
