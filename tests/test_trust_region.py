"""A step within a trust region: its length, what it looks at, whose steps it bounds."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp
from rmtdamp import DampingLearner, StabilityFloor, trust_region
from rmtdamp.hessian import hvp

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZES = (6, 8, 3)
PARAMS = mlp(jax.random.key(0), SIZES, jnp.float64)
BATCH = mlp_batch(jax.random.key(1), 32, SIZES, jnp.float64)
STEP = mlp(jax.random.key(2), SIZES, jnp.float64)
PART = jax.tree.map(lambda x: x[::8], BATCH)
close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def length(step, batch=PART, loss_fn=mlp_loss):
    """|d^T H d|, of a dense product."""
    return jnp.abs(optax.tree.vdot(step, hvp(loss_fn, PARAMS, batch, step)))


def region(loss_fn=mlp_loss, radius=1e-3, **options):
    """Around an optimiser whose step is what it is handed."""
    return trust_region(optax.identity(), loss_fn, radius, **options)


def clipped(tx, step=STEP, batch=BATCH, **extra_args):
    """The step that is left, and the count of those that were cut."""
    state = tx.init(PARAMS)
    step, state = tx.update(step, state, PARAMS, batch=batch, **extra_args)
    return step, optax.tree.get(state, "clipped_steps")


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_cut_ends_at_the_radius_and_keeps_its_direction(sign):
    """Where the loss bends down, too."""
    loss_fn = lambda params, batch: sign * mlp_loss(params, batch)
    radius = 0.3 * float(length(STEP))
    step, count = clipped(region(loss_fn, radius))
    close(length(step), radius)
    assert count == 1
    jax.tree.map(lambda new, old: close(new, 0.3**0.5 * old), step, STEP)
    tx = region(loss_fn)
    assert jnp.isnan(optax.tree.get(tx.init(PARAMS), "step_curvature"))
    _, state = tx.update(STEP, tx.init(PARAMS), PARAMS, batch=BATCH)
    close(state.step_curvature, optax.tree.vdot(STEP, hvp(loss_fn, PARAMS, PART, STEP)))
    step, count = clipped(region(loss_fn, 3.5 * radius))
    jax.tree.map(np.testing.assert_array_equal, step, STEP)
    assert count == 0


def test_a_loss_times_a_constant_takes_a_radius_times_it():
    loss_fn = lambda params, batch: 1e3 * mlp_loss(params, batch)
    at = (mlp_loss, 1e-3), (loss_fn, 1.0)
    jax.tree.map(close, *(clipped(region(*of))[0] for of in at))


def test_one_microbatch_is_looked_at():
    hidden = jax.tree.map(
        lambda x: (
            jnp.full_like(x, jnp.nan).at[::8].set(x[::8])
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        BATCH,
    )
    jax.tree.map(close, *(clipped(region(), batch=x)[0] for x in (hidden, BATCH)))
    whole = region(num_microbatches=1)
    close(length(clipped(whole)[0], BATCH), 1e-3)
    # Of fewer examples than microbatches, one.
    few, first = (jax.tree.map(lambda x, n=n: x[:n], BATCH) for n in (3, 1))
    close(length(clipped(region(), batch=few)[0], first), 1e-3)


def test_nothing_is_cut_by_a_curvature_that_is_not_a_number():
    batch = jax.tree.map(lambda x: x * jnp.nan, BATCH[0]), BATCH[1]
    step, count = clipped(region(), batch=batch)
    jax.tree.map(np.testing.assert_array_equal, step, STEP)
    assert count == 0


def test_the_loss_is_that_of_training_and_sees_loss_args():
    def evaluated(params, batch, shift):
        raise AssertionError

    training = lambda params, batch, shift: mlp_loss(params, batch) + shift
    setattr(evaluated, "in_training", training)  # noqa: B010, for pyright
    step, _ = clipped(region(evaluated), loss_args=(4.0,))
    close(length(step, loss_fn=lambda *at: training(*at, 4.0)), 1e-3)


def test_steps_keep_their_dtype():
    step = jax.tree.map(lambda x: x.astype(jnp.bfloat16), STEP)
    step, _ = clipped(region(), step)
    assert {x.dtype for x in jax.tree.leaves(step)} == {jnp.dtype(jnp.bfloat16)}


BIG = mlp(jax.random.key(3), SIZES, jnp.float64)
ALL = jax.tree.map(lambda _: True, PARAMS)


def stepped(tx, grads, **extra_args):
    """Its first step, and the state after."""
    return tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCH, **extra_args)


@pytest.mark.parametrize(
    ("tx", "momentum", "rest"),
    [
        (optax.sgd(3.0, momentum=0.9, nesterov=True), "trace", ()),
        (optax.adamw(0.3, weight_decay=0.1), "mu", ("nu",)),
        (rmtdamp.adam_shrinkage(0.3), "mu", ("nu",)),
        (optax.chain(optax.clip(1.0), optax.lion(0.3)), "mu", ()),
        (optax.inject_hyperparams(optax.adam)(0.3), "mu", ("nu",)),
        (optax.masked(optax.adam(0.3), ALL), "mu", ("nu",)),
    ],
    ids=["sgd", "adamw", "adam_shrinkage", "lion", "injected", "masked"],
)
def test_momentum_is_cut_with_its_step(tx, momentum, rest):
    """And all else in the state is what it was."""
    step, state = stepped(tx, BIG)
    short, within = stepped(trust_region(tx, mlp_loss, 1e-3), BIG)
    share = optax.tree.norm(short) / optax.tree.norm(step)
    assert share < 0.9
    close(length(short), 1e-3)
    jax.tree.map(lambda x, y: close(x, share * y), short, step)
    get = optax.tree.get
    found = get(within, momentum), get(state, momentum)
    jax.tree.map(lambda x, y: close(x, share * y), *found)
    for name in rest:
        jax.tree.map(np.testing.assert_array_equal, get(within, name), get(state, name))


@pytest.mark.parametrize(
    ("tx", "cut", "kept"),
    [
        (optax.contrib.ademamix(0.3), ("m1", "m2"), ("nu",)),
        (optax.contrib.simplified_ademamix(0.3), ("m",), ("n",)),
        (optax.adan(0.3), ("m", "v"), ("n",)),
        (optax.sm3(0.3, 0.9), ("nu",), ("mu",)),
        (optax.adafactor(0.3, momentum=0.9), ("ema",), ("v",)),
        (optax.rmsprop(3.0, centered=True, momentum=0.9), ("trace",), ("mu", "nu")),
    ],
    ids=["ademamix", "simplified_ademamix", "adan", "sm3", "adafactor", "rmsprop"],
)
def test_momentum_by_other_names(tx, cut, kept):
    """Where optax calls it otherwise, or something else `mu`."""
    _, state = stepped(tx, BIG)
    _, within = stepped(trust_region(tx, mlp_loss, 1e-4), BIG)
    assert optax.tree.get(within, "clipped_steps") == 1
    get = lambda state, name: next(
        x for path, x in optax.tree.get_all_with_path(state, name)
    )
    for name in cut:
        pairs = zip(
            *(jax.tree.leaves(get(x, name)) for x in (within, state)), strict=True
        )
        assert all(jnp.all(jnp.abs(x) <= 0.9 * jnp.abs(y)) for x, y in pairs)
    for name in kept:
        jax.tree.map(np.testing.assert_array_equal, get(within, name), get(state, name))


def test_params_may_be_called_mu():
    """Only a state's own momentum is cut."""

    class Gaussian(NamedTuple):
        mu: jax.Array
        sigma: jax.Array

    params = Gaussian(jnp.ones(3), jnp.ones(3))
    loss_fn = lambda params, batch: jnp.mean((batch @ params.mu * params.sigma[0]) ** 2)
    batch = jnp.ones((8, 3))
    grads = jax.grad(loss_fn)(params, batch)
    found = []
    for tx in (optax.adam(1.0), trust_region(optax.adam(1.0), loss_fn, 1e-3)):
        _, state = tx.update(grads, tx.init(params), params, batch=batch)
        found.append(state)
    plain, within = found[0][0], found[1].inner_state[0]
    jax.tree.map(np.testing.assert_array_equal, plain.nu, within.nu)
    assert jnp.all(within.mu.mu < 0.9 * plain.mu.mu)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(3.0, momentum=0.9),
        optax.adamw(0.3, weight_decay=0.1),
        rmtdamp.auto_adam(0.3, mlp_loss, refresh_every=2),
    ],
    ids=["sgd", "adamw", "auto_adam"],
)
def test_whole_steps_of_any_optimiser_stay_within(tx):
    tx, params = trust_region(tx, mlp_loss, 1e-3), PARAMS
    state = tx.init(params)

    @jax.jit
    def train(params, state):
        grads = jax.grad(mlp_loss)(params, BATCH)
        updates, state = tx.update(grads, state, params, batch=BATCH)
        bent = optax.tree.vdot(updates, hvp(mlp_loss, params, PART, updates))
        return optax.apply_updates(params, updates), state, jnp.abs(bent)

    before = mlp_loss(params, BATCH)
    for _ in range(6):
        params, state, bent = train(params, state)
        assert bent <= 1.00001e-3
    assert optax.tree.get(state, "clipped_steps") > 3
    assert mlp_loss(params, BATCH) < before


@pytest.mark.parametrize("preconditioned", [False, True])
def test_inside_a_learned_damping(preconditioned):
    """The learner asks the optimiser for products, which are no steps."""
    rule = StabilityFloor(preconditioned=preconditioned)
    learner = DampingLearner(mlp_loss, rule=rule)
    tx = rmtdamp.adam_shrinkage(0.5)
    learned = lambda tx: rmtdamp.auto_damping(tx, learner, learning_rate=0.5)
    grads = jax.grad(mlp_loss)(PARAMS, BATCH)
    within = lambda tx, radius: trust_region(tx, mlp_loss, radius)
    orders = (
        learned(within(tx, 1e-3)),
        within(learned(tx), 1e-3),
        learned(within(tx, 1e6)),
    )
    found = [stepped(tx, grads) for tx in orders]
    get = lambda state: optax.tree.get(state, "damping")
    close(get(found[0][1]), get(found[2][1]))
    close(get(found[1][1]), get(found[2][1]))
    for step, state in found[:2]:
        close(length(step), 1e-3)
        assert optax.tree.get(state, "clipped_steps") == 1


def test_a_radius_may_be_injected():
    static = "inner", "loss_fn", "num_microbatches"
    make = optax.inject_hyperparams(trust_region, static_args=static)

    @jax.jit
    def found(tx):
        return clipped(tx(optax.identity(), mlp_loss, 1e-4))

    jax.tree.map(close, *map(found, map(jax.tree_util.Partial, (make, trust_region))))
    make = optax.inject_hyperparams(trust_region, static_args=static[:2])
    with pytest.raises(ValueError, match=r"name it in static_args of optax\.inject"):
        clipped(make(optax.identity(), mlp_loss, 1e-4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"inner": optax.sgd},
            TypeError,
            "inner is sgd, and no gradient tr",
        ),
        ({"loss_fn": 0.1}, TypeError, "loss_fn is float: hand over a function"),
        ({"radius": 0.0}, ValueError, r"radius is 0.0, and must be above 0"),
        (
            {"num_microbatches": 0},
            ValueError,
            "num_microbatches is 0: take a whole n",
        ),
        ({"mode": "forward"}, ValueError, "mode is 'forward': choose from"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        trust_region(**{"inner": optax.sgd(0.1), "loss_fn": mlp_loss} | arguments)


@pytest.mark.parametrize("missing", ["params", "batch"])
def test_a_step_needs_params_and_its_batch(missing):
    tx = region()
    given = {"params": PARAMS, "batch": BATCH, missing: None}
    with pytest.raises(ValueError, match="trust_region needs params and the batch of"):
        tx.update(STEP, tx.init(PARAMS), **given)
