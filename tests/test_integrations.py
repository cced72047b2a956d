"""Every row of docs/integrations.md, run with the library that it names.

The test of a row has its name, and the row's line of code in it.
"""

import functools
import inspect
import pathlib
import re

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import tensorboardX
from flax import nnx
from problems import mlp, mlp_batch, mlp_loss as loss_fn
from tensorboardX.proto.event_pb2 import Event

import rmtdamp
import rmtdamp.flax

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZES = (3, 4, 2)
PARAMS = mlp(jax.random.key(0), SIZES, jnp.float32)
batch = mlp_batch(jax.random.key(1), 16, SIZES, jnp.float32)
learner = rmtdamp.DampingLearner(loss_fn, floor=1e-3, num_microbatches=4)
auto = rmtdamp.auto_adam(0.05, learner, refresh_every=2)
by_hand = rmtdamp.auto_adam(0.05, learner, refresh_every=None)
adam = rmtdamp.adam_shrinkage(0.05)
KERNELS = [{"kernel": True, "bias": False}] * 2
get = optax.tree.get
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def one_step(tx, params, state, batch=batch, loss=loss_fn):
    grads = jax.grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def trained(tx, num=4, params=PARAMS, step=one_step):
    """The params and the state after some steps."""
    step, state = jax.jit(functools.partial(step, tx)), tx.init(params)
    for _ in range(num):
        params, state = step(params, state)
    return params, state


@functools.cache
def expected(num=4):
    """What `auto` does by itself: measured at steps 0 and 2."""
    params, state = trained(auto, num)
    assert loss_fn(params, batch) < loss_fn(PARAMS, batch)
    assert get(state, "damping") > 2e-3
    return params, state


# Flax and Equinox.

DATA = (
    3 + jax.random.normal(jax.random.key(0), (32, 4), jnp.float32),
    jnp.arange(32) % 3,
)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def model_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def test_nnx_optimizer():
    """BatchNorm and Dropout; the damping is that of the model in evaluation mode."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.relu,
        nnx.Dropout(0.2, rngs=rngs),
        nnx.Linear(8, 3, rngs=rngs),
    )
    curvature_loss = rmtdamp.flax.curvature_loss(model, model_loss)
    of_model = rmtdamp.DampingLearner(curvature_loss)
    tx = rmtdamp.auto_adam(0.05, of_model, refresh_every=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.as_pure(nnx.state(model))

    @nnx.jit
    def step(model, optimizer, batch):
        value, grads = nnx.value_and_grad(model_loss)(model, batch)
        state = rmtdamp.flax.loss_args(model)
        optimizer.update(model, grads, batch=batch, loss_args=state)
        return value

    losses = [step(model, optimizer, DATA) for _ in range(6)]
    assert np.mean(losses[3:]) < np.mean(losses[:3])
    assert get(optimizer.opt_state, "refresh_attempts")[...] == 3
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.as_pure(nnx.state(model)), before)


def test_nnx_lora():
    """The rest of the model is data of the loss, and stays as it is."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.LoRALinear(4, 8, lora_rank=2, rngs=rngs),
        nnx.relu,
        nnx.Linear(8, 3, rngs=rngs),
    )
    wrt = nnx.LoRAParam
    of_model = rmtdamp.flax.curvature_loss(model, model_loss, wrt=wrt)
    of_lora = rmtdamp.DampingLearner(of_model)
    tx = rmtdamp.auto_adam(0.05, of_lora, refresh_every=2)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    frozen, lora = (
        nnx.as_pure(nnx.clone(nnx.state(model, x))) for x in (nnx.Not(wrt), wrt)
    )

    @nnx.jit
    def step(model, optimizer, batch):
        of_loss = nnx.value_and_grad(model_loss, argnums=nnx.DiffState(0, wrt))
        value, grads = of_loss(model, batch)
        state = rmtdamp.flax.loss_args(model, wrt=wrt)
        optimizer.update(model, grads, batch=batch, loss_args=state)
        return value

    losses = [step(model, optimizer, DATA) for _ in range(4)]
    assert losses[-1] < losses[0]
    rmtdamp.flax.refresh(optimizer, of_lora, model, DATA)
    assert get(optimizer.opt_state, "refresh_attempts")[...] == 3  # 0, 2, by hand
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model, nnx.Not(wrt))), frozen)
    with pytest.raises(ValueError, match="got 2 as params and 0 as state: give curv"):
        of_model(lora, DATA, *rmtdamp.flax.loss_args(model))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class State(rmtdamp.flax.TrainState):
    batch_stats: dict


def test_linen_trainstate():
    model = Linen()
    variables = model.init(jax.random.key(0), DATA[0], train=False)

    def curvature_loss(params, batch, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        return cross_entropy(model.apply(variables, batch[0], train=False), batch[1])

    def create():
        return State.create(
            apply_fn=model.apply,
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            tx=rmtdamp.auto_adam(1e-2, curvature_loss, refresh_every=2),
        )

    @jax.jit
    def step(state, batch, key):
        def training_loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch[0],
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return cross_entropy(logits, batch[1]), new["batch_stats"]

        grads, batch_stats = jax.grad(training_loss, has_aux=True)(state.params)
        extra_args = {"batch": batch, "loss_args": (state.batch_stats,)}
        return state.apply_gradients(
            grads=grads, batch_stats=batch_stats, extra_args=extra_args
        )

    state = create()
    for i in range(3):
        state = step(state, DATA, jax.random.fold_in(jax.random.key(1), i))
    assert state.step == 3
    assert get(state.opt_state, "refresh_attempts") == 2
    assert not np.allclose(
        state.batch_stats["BatchNorm_0"]["mean"],
        variables["batch_stats"]["BatchNorm_0"]["mean"],
    )
    restored = flax.serialization.from_bytes(
        create(), flax.serialization.to_bytes(state)
    )
    chex.assert_trees_all_equal(restored.opt_state, state.opt_state)

    theirs = flax.training.train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=auto
    )
    with pytest.raises(ValueError, match="needs the batch to measure the curvature"):
        theirs.apply_gradients(grads=PARAMS)


def test_equinox():
    """The same network in Equinox: its functions and its None are no params."""
    first, last = PARAMS
    model = eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=jax.random.key(0))
    arrays = lambda m: [x for l in m.layers for x in (l.weight, l.bias)]
    values = [v for x in (first, last) for v in (x["kernel"].T, x["bias"])]
    model = eqx.tree_at(arrays, model, values)
    _, static = eqx.partition(model, eqx.is_inexact_array)

    def of_params(params, batch):
        model = eqx.combine(params, static)
        return cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    of_model = rmtdamp.DampingLearner(of_params, floor=1e-3, num_microbatches=4)
    tx = rmtdamp.auto_adam(0.05, of_model, refresh_every=2)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        params = eqx.filter(model, eqx.is_inexact_array)
        grads = jax.grad(of_params)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return eqx.apply_updates(model, updates), state

    for _ in range(4):
        model, state = step(model, state)
    assert get(state, "refresh_attempts") == 2
    # Another order of the leaves, so other probes: the noise is the same.
    np.testing.assert_allclose(
        get(state, "damping"), get(expected()[1], "damping"), rtol=0.5
    )
    assert of_params(eqx.filter(model, eqx.is_inexact_array), batch) < 0.9 * loss_fn(
        PARAMS, batch
    )
    with pytest.raises(TypeError, match="requires ndarray or scalar arguments"):
        tx.init(model)  # JAX itself: a function is no array


# Optax.


def test_optax_chain():
    tx = optax.chain(optax.clip_by_global_norm(10.0), auto)
    # The same but for what the compiler fuses.
    chex.assert_trees_all_close(trained(tx)[0], expected()[0], rtol=1e-5)


def test_optax_masked():
    """The mask inside; around, params have holes, and a loss cannot be evaluated."""
    tx = rmtdamp.auto_damping(optax.masked(adam, KERNELS), learner)
    grads = jax.grad(loss_fn)(PARAMS, batch)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, batch=batch)
    theirs, _ = auto.update(grads, auto.init(PARAMS), PARAMS, batch=batch)
    for masked, plain, grad in zip(updates, theirs, grads, strict=True):
        close(masked["kernel"], plain["kernel"])
        close(masked["bias"], grad["bias"])
    assert get(state, "refresh_attempts") == 1
    with pytest.raises(ValueError, match=r"params with holes.*masked\(inner, mask\)"):
        optax.masked(auto, KERNELS).init(PARAMS)


def test_optax_flatten():
    """Inside, Adam sees one vector; around, the loss would."""
    tx = rmtdamp.auto_damping(optax.flatten(adam), learner)
    updates, _ = one_step(tx, PARAMS, tx.init(PARAMS))
    close(updates, one_step(auto, PARAMS, auto.init(PARAMS))[0])
    around = optax.flatten(auto)
    with pytest.raises(TypeError):
        one_step(around, PARAMS, around.init(PARAMS))


def test_optax_partition():
    labels = [{"kernel": "damped", "bias": "sgd"}] * 2
    parts = {"damped": adam, "sgd": optax.sgd(0.05)}
    tx = rmtdamp.auto_damping(optax.partition(parts, labels), learner)
    grads = jax.grad(loss_fn)(PARAMS, batch)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, batch=batch)
    theirs, _ = auto.update(grads, auto.init(PARAMS), PARAMS, batch=batch)
    for split, plain, grad in zip(updates, theirs, grads, strict=True):
        close(split["kernel"], plain["kernel"])
        close(split["bias"], -0.05 * grad["bias"])
    around = optax.partition({"damped": auto, "sgd": optax.sgd(0.1)}, labels)
    with pytest.raises(ValueError, match=r"params with holes, as inside optax\.mas"):
        around.init(PARAMS)


def test_optax_multisteps():
    """The same batch twice is one step; measured on the second of each two."""
    tx = optax.MultiSteps(auto, every_k_schedule=2)
    params, state = trained(tx, 8)
    close(params, expected()[0])
    assert get(state, "refresh_attempts") == 2
    with pytest.raises(ValueError, match="wrapper inside that drops extra arguments"):
        rmtdamp.auto_damping(optax.MultiSteps(adam, 2), learner)


def test_optax_apply_if_finite():
    """A step that is not finite is no step: neither for Adam nor for the learner."""
    tx = optax.apply_if_finite(auto, max_consecutive_errors=3)

    @jax.jit
    def step(params, state, factor):
        grads = jax.grad(loss_fn)(params, batch)
        grads = jax.tree.map(lambda g: factor * g, grads)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    carry = PARAMS, tx.init(PARAMS)
    for factor in (1.0, 1.0, jnp.nan, 1.0, 1.0):
        carry = step(*carry, factor)
    assert get(carry[1], "total_notfinite") == 1
    close(carry[0], expected()[0])
    close(get(carry[1], "measured"), get(expected()[1], "measured"))


def test_optax_inject_hyperparams():
    tx = optax.inject_hyperparams(rmtdamp.auto_adam)(0.05, learner, refresh_every=2)
    params, state = trained(tx)
    close(params, expected()[0])
    assert state.hyperparams["learning_rate"] == jnp.float32(0.05)
    bare = optax.inject_hyperparams(rmtdamp.auto_adam)(0.05, loss_fn)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        bare.init(PARAMS)  # optax itself: it takes a function for a schedule


def test_trust_region():
    """Around a learner and inside it, and in what hands params and batch on."""
    tx = rmtdamp.trust_region(optax.adamw(0.05), loss_fn)
    params, _ = trained(tx)
    close(params, trained(optax.MultiSteps(tx, 2), 8)[0])
    close(params, trained(optax.apply_if_finite(tx, 3))[0])
    # Wide enough to cut nothing.
    wide = lambda tx: rmtdamp.trust_region(tx, loss_fn, radius=1e6)
    close(trained(wide(auto))[0], expected()[0])
    inside = rmtdamp.auto_damping(wide(adam), learner, refresh_every=2)
    close(trained(inside)[0], expected()[0])
    narrow = functools.partial(rmtdamp.trust_region, loss_fn=loss_fn, radius=1e-6)
    parts = {True: optax.adam(0.05), False: optax.sgd(0.05)}
    for tx in (
        narrow(optax.partition(parts, KERNELS)),
        optax.contrib.schedule_free(narrow(optax.sgd(0.05)), 0.05, b1=0.9),
        narrow(optax.contrib.schedule_free(optax.sgd(0.05), 0.05, b1=0.9)),
        narrow(optax.contrib.muon(0.05)),
    ):
        params, state = trained(tx)
        assert get(state, "clipped_steps") == 4
        assert loss_fn(params, batch) < loss_fn(PARAMS, batch)
    with pytest.raises(ValueError, match="trust_region got params with holes"):
        optax.masked(narrow(optax.sgd(0.05)), KERNELS).init(PARAMS)


def test_optax_contrib_schedule_free():
    """Around and inside: the curvature is that of the params in training, y."""
    rate = 0.05
    plain = rmtdamp.adam_shrinkage(rate, b1=0.0)
    held = rmtdamp.auto_damping(plain, learner, refresh_every=2)
    around = optax.contrib.schedule_free(held, rate, b1=0.9)
    inside = optax.contrib.schedule_free(plain, rate, b1=0.9)
    inside = rmtdamp.auto_damping(inside, learner, refresh_every=2)
    (params, state), (others, other) = trained(around), trained(inside)
    close(params, others)
    close(get(state, "measured"), get(other, "measured"))
    assert get(state, "refresh_attempts") == 2
    assert loss_fn(params, batch) < loss_fn(PARAMS, batch)


WAY_OUT = "refresh_every=None and rmtdamp.refresh by hand"


def measured_by_hand(tx, learner, num=6, params=PARAMS, fast=lambda params: params):
    """A run whose wrapper drops extra arguments: measured before every second step."""
    state, attempts = tx.init(params), 0
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for i in range(num):
        if i % 2 == 0:
            state = rmtdamp.refresh(state, learner, fast(params), batch)
            attempts += 1
        updates, state = update(jax.grad(loss_fn)(fast(params), batch), state, params)
        params = optax.apply_updates(params, updates)
    assert get(state, "refresh_attempts") == attempts
    assert loss_fn(fast(params), batch) < loss_fn(PARAMS, batch)
    return params, state


def test_optax_lookahead():
    """With slow steps of a whole it is the fast optimiser."""
    tx = optax.lookahead(by_hand, sync_period=3, slow_step_size=1.0)
    both = optax.LookaheadParams.init_synced(PARAMS)
    fast = lambda params: params.fast
    params, _ = measured_by_hand(tx, learner, params=both, fast=fast)
    close(params.fast, measured_by_hand(by_hand, learner)[0])
    wrong = optax.lookahead(auto, sync_period=3, slow_step_size=0.5)
    with pytest.raises(ValueError, match=WAY_OUT):
        wrong.update(PARAMS, wrong.init(both), both)
    for hold in (rmtdamp.auto_damping, rmtdamp.set_damping):
        with pytest.raises(ValueError, match="the transformation inside ignores `dam"):
            hold(optax.lookahead(adam, 3, 0.5), learner)


RADIUS = 0.05
ADVERSARY = optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))


@pytest.mark.parametrize("rule", [rmtdamp.identity_target, None])
def test_optax_contrib_sam(rule):
    """By hand it is what it stands for: the damped step of the gradient uphill."""
    rule = rule or rmtdamp.StabilityFloor.for_adam()
    learner = rmtdamp.DampingLearner(loss_fn, floor=1e-3, rule=rule)
    by_hand = rmtdamp.auto_adam(0.05, learner, refresh_every=None)
    tx = optax.contrib.sam(by_hand, ADVERSARY)
    params, state = measured_by_hand(tx, learner)

    expected, plain = PARAMS, by_hand.init(PARAMS)
    update = jax.jit(by_hand.update)
    for _ in range(3):
        plain = rmtdamp.refresh(plain, learner, expected, batch)
        grads = jax.grad(loss_fn)(expected, batch)
        factor = RADIUS / optax.tree.norm(grads)
        up = optax.tree.add_scale(expected, factor, grads)
        updates, plain = update(jax.grad(loss_fn)(up, batch), plain, expected)
        expected = optax.apply_updates(expected, updates)
    close(params, expected)
    close(get(state, "measured"), get(plain, "measured"))


def test_optax_contrib_sam_refuses():
    around = optax.contrib.sam(auto, ADVERSARY)
    with pytest.raises(ValueError, match=WAY_OUT):
        around.update(PARAMS, around.init(PARAMS), PARAMS)
    inside = optax.contrib.sam(adam, ADVERSARY)
    with pytest.raises(ValueError, match=r"extra arguments, .* optax\.contrib\.sam"):
        rmtdamp.auto_damping(inside, learner)


def test_ema_of_params():
    """An average beside the run changes nothing in it, and is measured like params."""
    params, state = average, _ = PARAMS, auto.init(PARAMS)
    for _ in range(4):
        params, state = jax.jit(functools.partial(one_step, auto))(params, state)
        average = optax.incremental_update(params, average, step_size=0.1)
    chex.assert_trees_all_equal(params, expected()[0])
    seen = rmtdamp.refresh(state, learner, average, batch)
    assert get(seen, "measured_variance") != get(state, "measured_variance")
    assert get(seen, "refresh_rejections") == 0


# Checkpoints: more of them in test_checkpoints.py.


def assert_goes_on(restored):
    """From what was saved after two steps, the two that follow."""
    params, state = restored
    chex.assert_trees_all_equal(state, expected(2)[1])
    for _ in range(2):
        params, state = jax.jit(functools.partial(one_step, auto))(params, state)
    chex.assert_trees_all_equal((params, state), expected())


def test_orbax(tmp_path):
    template = jax.tree.map(jnp.zeros_like, expected(2))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", expected(2))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", template)
    assert_goes_on(restored)


def test_flax_serialization():
    saved = flax.serialization.to_bytes(expected(2))
    template = (PARAMS, auto.init(PARAMS))
    assert_goes_on(flax.serialization.from_bytes(template, saved))


# JAX.


def test_jax_jit():
    step = jax.jit(lambda params, state: one_step(auto, params, state))
    carry = eager = PARAMS, auto.init(PARAMS)
    for _ in range(3):
        carry, eager = step(*carry), one_step(auto, *eager)
    close(carry, eager)
    assert step._cache_size() == 1


def test_jax_lax_scan():
    steps = lambda carry, _: (one_step(auto, *carry), None)
    carry = PARAMS, auto.init(PARAMS)
    carry, _ = jax.jit(lambda carry: jax.lax.scan(steps, carry, length=4))(carry)
    close(carry, expected())


def test_jax_vmap():
    """Seeds side by side, each with a damping of its own; measured by hand."""
    seeds = [mlp(jax.random.key(i), SIZES, jnp.float32) for i in range(3)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    measure = lambda state, params: rmtdamp.refresh(state, learner, params, batch)
    state = jax.jit(jax.vmap(measure))(jax.vmap(by_hand.init)(params), params)
    step = jax.jit(jax.vmap(functools.partial(one_step, by_hand)))
    for _ in range(2):
        params, state = step(params, state)
    assert len(set(get(state, "damping").tolist())) == 3
    alone = rmtdamp.refresh(by_hand.init(seeds[1]), learner, seeds[1], batch)
    carry = seeds[1], alone
    for _ in range(2):
        carry = jax.jit(functools.partial(one_step, by_hand))(*carry)
    close(jax.tree.map(lambda x: x[1], (params, state)), carry)


def test_jax_shard_map():
    """Each of four devices sees its examples; the loss is the mean over all."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def of_all(params, batch):
        return jax.lax.pmean(loss_fn(params, batch), "data")

    over_all = rmtdamp.DampingLearner(of_all, floor=1e-3, num_microbatches=4)
    tx = rmtdamp.auto_adam(0.05, over_all, refresh_every=2)
    step = jax.shard_map(
        lambda params, state, batch: one_step(tx, params, state, batch, of_all),
        mesh=mesh,
        in_specs=(jax.P(), jax.P(), jax.P("data")),
        out_specs=jax.P(),
    )
    carry = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        carry = jax.jit(step)(*carry, batch)
    # The microbatches are the same: rows i, i + 4, ... of all.
    close(carry, expected())


@pytest.mark.parametrize("inside", ["pmap", "shard_map"])
def test_jax_shard_map_refuses_what_is_not_tracked(inside):
    """JAX differentiates a pmean there as if it were not there."""
    of_all = lambda params, batch: jax.lax.pmean(loss_fn(params, batch), "data")
    tx = rmtdamp.auto_adam(0.05, of_all)
    update = lambda batch: tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=batch)[0]
    if inside == "pmap":
        shards = jax.tree.map(lambda x: jnp.reshape(x, (4, -1, *x.shape[1:])), batch)
        step = functools.partial(jax.pmap(update, axis_name="data"), shards)
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split = {"in_specs": (jax.P("data"),), "out_specs": jax.P()}
        each = jax.shard_map(update, mesh=mesh, check_vma=False, **split)
        step = functools.partial(jax.jit(each), batch)
    with pytest.warns(UserWarning, match=r"own shard, a pmean in the loss or not"):
        step()


def test_jax_shard_map_refuses_the_loss_of_a_shard():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = rmtdamp.auto_adam(0.05, loss_fn)
    update = lambda batch: tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=batch)[0]
    split = {"in_specs": (jax.P("data"),), "out_specs": jax.P()}
    with pytest.raises(TypeError, match=r"average the loss .*jax.lax.pmean\(loss"):
        jax.jit(jax.shard_map(update, mesh=mesh, **split))(batch)


def test_donate_argnums():
    step = jax.jit(functools.partial(one_step, auto), donate_argnums=(0, 1))
    carry = first = jax.tree.map(jnp.copy, (PARAMS, auto.init(PARAMS)))
    for _ in range(4):
        carry = step(*carry)
    chex.assert_trees_all_equal(carry, expected())
    assert all(x.is_deleted() for x in jax.tree.leaves(first[0]))


def test_jax_checkpoint():
    rematerialised = rmtdamp.DampingLearner(
        jax.checkpoint(loss_fn), floor=1e-3, num_microbatches=4
    )
    tx = rmtdamp.auto_adam(0.05, rematerialised, refresh_every=2)
    close(trained(tx), expected())


def test_tensorboard(tmp_path):
    params, state = PARAMS, auto.init(PARAMS)
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        for i in range(3):
            params, state = jax.jit(functools.partial(one_step, auto))(params, state)
            writer.add_scalar("damping", get(state, "damping").item(), i)
    (path,) = tmp_path.iterdir()
    raw, found = path.read_bytes(), []
    while raw:  # length, its checksum, event, its checksum
        size = int.from_bytes(raw[:8], "little")
        found += Event.FromString(raw[12 : 12 + size]).summary.value
        raw = raw[16 + size :]
    assert [value.tag for value in found] == ["damping"] * 3
    assert found[2].simple_value == get(state, "damping")


# The page.

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
ROWS = {
    re.sub(r"\W+", "_", name.replace("`", "").strip().lower()).strip("_"): code
    for name, code in re.findall(r"^\| (.+?) \|.*\| `([^|]+)` \|$", PAGE, re.MULTILINE)
}


def squeezed(text):
    """Without blanks and commas, which a formatter sets."""
    return re.sub(r"[\s,]", "", text)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_page_has_a_test_with_its_line(row):
    source = inspect.getsource(globals()[f"test_{row}"])
    assert squeezed(ROWS[row]) in squeezed(source)


def test_every_test_of_a_library_has_a_row():
    of_rows = {f"test_{row}" for row in ROWS}
    mine = {name for name in globals() if name.startswith("test_")}
    assert {x for x in mine if "row" not in x and "refuses" not in x} == of_rows
