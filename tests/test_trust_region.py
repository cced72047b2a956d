"""A step within a trust region: its length, its momentum, what it looks at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp
from rmtdamp import DampingLearner, StabilityFloor, TrustRegion, kfac
from rmtdamp.hessian import hvp
from rmtdamp.kronecker import ModelFactors, make_blocks

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZES = (6, 8, 3)
PARAMS = mlp(jax.random.key(0), SIZES, jnp.float64)
BATCH = mlp_batch(jax.random.key(1), 32, SIZES, jnp.float64)
STEP = mlp(jax.random.key(2), SIZES, jnp.float64)
PART = jax.tree.map(lambda x: x[::8], BATCH)
close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def length(step, batch=PART, params=PARAMS, loss_fn=mlp_loss):
    return jnp.abs(optax.tree.vdot(step, hvp(loss_fn, params, batch, step)))


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_cut_ends_at_the_radius(sign):
    """Where the loss bends down, too."""
    loss_fn = lambda params, batch: sign * mlp_loss(params, batch)
    radius = 0.3 * float(length(STEP))
    share = TrustRegion(loss_fn, radius=radius).share(STEP, PARAMS, BATCH)
    cut = optax.tree.scale(share, STEP)
    assert share < 1
    close(length(cut, loss_fn=loss_fn), radius)
    wide = TrustRegion(loss_fn, radius=3.5 * radius)
    assert wide.share(STEP, PARAMS, BATCH) == 1


def test_one_microbatch_is_looked_at():
    hidden = jax.tree.map(
        lambda x: (
            jnp.full_like(x, jnp.nan).at[::8].set(x[::8])
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        BATCH,
    )
    region = TrustRegion(mlp_loss, radius=1e-3)
    close(region.share(STEP, PARAMS, hidden), region.share(STEP, PARAMS, BATCH))
    whole = TrustRegion(mlp_loss, radius=1e-3, num_microbatches=1)
    share = whole.share(STEP, PARAMS, BATCH)
    close(length(optax.tree.scale(share, STEP), BATCH), 1e-3)
    # Of fewer examples than microbatches, one.
    few = jax.tree.map(lambda x: x[:3], BATCH)
    first = jax.tree.map(lambda x: x[:1], BATCH)
    share = region.share(STEP, PARAMS, few)
    close(length(optax.tree.scale(share, STEP), first), 1e-3)


def test_nothing_is_cut_by_a_curvature_that_is_not_a_number():
    batch = jax.tree.map(lambda x: x * jnp.nan, BATCH[0]), BATCH[1]
    assert TrustRegion(mlp_loss).share(STEP, PARAMS, batch) == 1


def test_the_loss_is_that_of_training_and_sees_loss_args():
    def evaluated(params, batch, factor):
        raise AssertionError

    training = lambda params, batch, factor: factor * mlp_loss(params, batch)
    setattr(evaluated, "in_training", training)  # noqa: B010, for pyright
    region = TrustRegion(evaluated, radius=1e-3)
    share = region.share(STEP, PARAMS, BATCH, (4.0,))
    close(length(optax.tree.scale(share, STEP)), 1e-3 / 4)


def linear(params, x, tape):
    return tape.linear("dense", x, x @ params["w"])


def criterion(outputs, targets):
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))


def loss_fn(params, batch):
    return criterion(batch[0] @ params["w"], batch[1])


WEIGHTS = {"w": jax.random.normal(jax.random.key(3), (4, 2), jnp.float64)}
DATA = (
    jax.random.normal(jax.random.key(4), (16, 4), jnp.float64),
    jax.random.normal(jax.random.key(5), (16, 2), jnp.float64),
)
FN = ModelFactors(
    model_fn=linear,
    criterion=criterion,
    blocks=make_blocks(WEIGHTS, {"dense": {"kernel": "w"}}),
    fisher="ggn",
)
GRADS = jax.grad(loss_fn)(WEIGHTS, DATA)


def steps_of(tx, num=3):
    """Updates of the same gradient at the same params."""
    state, found = tx.init(WEIGHTS), []
    update = jax.jit(lambda s: tx.update(GRADS, s, WEIGHTS, batch=DATA))
    for _ in range(num):
        updates, state = update(state)
        found.append(updates["w"])
    return found, state


def bounded(radius, rate=0.5, **options):
    region = TrustRegion(loss_fn, radius=radius)
    return kfac(rate, FN, damping=1e-2, refresh_every=5, kl_clip=region, **options)


def test_a_wide_region_is_kfac_without_a_clip():
    free = kfac(0.5, FN, damping=1e-2, refresh_every=5, kl_clip=None, weight_decay=0.1)
    found, state = steps_of(bounded(1e6, weight_decay=0.1))
    jax.tree.map(np.testing.assert_array_equal, found, steps_of(free)[0])
    assert optax.tree.get(state, "shortened_steps") == 0


def test_momentum_keeps_what_the_step_kept():
    """With u the divided gradient, t <- nu (0.9 t + u), each step at the radius."""
    (u,), _ = steps_of(bounded(1e6, rate=1.0, momentum=None), num=1)
    rate = optax.linear_schedule(0.5, 0.25, 2)
    decay = {"weight_decay": 0.1}
    found, state = steps_of(bounded(1e-4, rate=rate, **decay))
    past = jnp.zeros_like(u)
    region = TrustRegion(loss_fn, radius=1e-4)
    for i, step in enumerate(found):
        past = 0.9 * past - u
        share = region.share({"w": -rate(i) * past}, WEIGHTS, DATA)
        past = share * past
        close(step, -rate(i) * (past + 0.1 * WEIGHTS["w"]))
        moved = {"w": -rate(i) * past}
        part = jax.tree.map(lambda x: x[::8], DATA)
        close(length(moved, part, WEIGHTS, loss_fn), 1e-4)
    assert optax.tree.get(state, "shortened_steps") == 3


@pytest.mark.parametrize("preconditioned", [False, True])
def test_under_a_learned_damping(preconditioned):
    """The learner asks the optimiser for products, which are no steps."""
    rule = StabilityFloor(preconditioned=preconditioned)
    learner = DampingLearner(loss_fn, rule=rule)
    tx = rmtdamp.auto_damping(bounded(1e-4), learner, learning_rate=0.5)
    found, state = steps_of(tx)
    part = jax.tree.map(lambda x: x[::8], DATA)
    for step in found:
        assert length({"w": step}, part, WEIGHTS, loss_fn) <= 1.00001e-4
    assert optax.tree.get(state, "shortened_steps") > 0
    free = rmtdamp.auto_damping(bounded(1e6), learner, learning_rate=0.5)
    close(*(steps_of(x, num=1)[1].measured.damping for x in (tx, free)))


def test_a_radius_may_be_injected():
    make = lambda radius: bounded(radius)
    found, _ = steps_of(optax.inject_hyperparams(make)(radius=1e-4))
    jax.tree.map(close, found, steps_of(bounded(1e-4))[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_fn": 0.1}, TypeError, "loss_fn is float: hand over a function"),
        ({"radius": 0.0}, ValueError, r"radius is 0.0, and must be above 0"),
        ({"num_microbatches": 0}, ValueError, "num_microbatches is 0, and must be a w"),
        ({"mode": "forward"}, ValueError, "mode is 'forward': choose from"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        TrustRegion(**{"loss_fn": mlp_loss} | arguments)


def test_a_loss_in_its_place_is_told_of_it():
    with pytest.raises(TypeError, match=r"kl_clip is a function: .* TrustRegion\(loss"):
        kfac(0.1, FN, kl_clip=loss_fn)


@pytest.mark.parametrize("missing", ["params", "batch"])
def test_a_step_needs_params_and_its_batch(missing):
    region = TrustRegion(loss_fn)
    tx = kfac(0.1, FN, damping=1e-2, refresh_every=None, kl_clip=region)
    given = {"params": WEIGHTS, "batch": DATA, missing: None}
    with pytest.raises(ValueError, match="a TrustRegion needs params and the batch"):
        tx.update(GRADS, tx.init(WEIGHTS), **given)
