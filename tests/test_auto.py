"""auto_damping, its by-hand twin, set_damping: what they hold, hand on and refuse."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import log_compilations, mlp, mlp_batch, mlp_loss

import rmtdamp
from rmtdamp import (
    DampingLearner,
    adam_shrinkage,
    auto_adam,
    auto_damping,
    refresh,
    scale_by_adam_shrinkage,
    set_damping,
    with_damping,
)
from rmtdamp.damping import (
    GradientNorm,
    MeanFraction,
    Shrinkage,
    StabilityFloor,
    identity_target,
    learn_damping,
    needs,
)
from rmtdamp.hessian import moments
from rmtdamp.transforms._measurer import is_due

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZES = (8, 16, 4)
PARAMS = mlp(jax.random.key(0), SIZES, jnp.float32)
BATCH = mlp_batch(jax.random.key(1), 32, SIZES, jnp.float32)
GRADS = jax.grad(mlp_loss)(PARAMS, BATCH)
LEARNER = DampingLearner(mlp_loss, floor=1e-3)
get = optax.tree.get


def owned(learner=LEARNER, **options):
    return auto_damping(scale_by_adam_shrinkage(), learner, **options)


def take_steps(tx, num, state=None, **extras):
    state = tx.init(PARAMS) if state is None else state
    extras = {"batch": BATCH} | extras
    updates = GRADS
    for _ in range(num):
        updates, state = tx.update(GRADS, state, PARAMS, **extras)
    return updates, state


def test_first_damping_is_floor_plus_measured_variance():
    _, state = take_steps(owned(), 1)
    key = jax.random.fold_in(jax.random.key(0), 0)
    measured = moments(mlp_loss, PARAMS, BATCH, key)
    np.testing.assert_allclose(get(state, "measured_variance"), measured.variance)
    np.testing.assert_allclose(get(state, "damping"), 1e-3 + measured.variance)


def test_refreshes_every_so_many_steps_and_follows_the_learner():
    tx, state, expected = owned(refresh_every=3), None, LEARNER.init(PARAMS)
    for step in range(7):
        _, state = take_steps(tx, 1, state)
        if step in (0, 1, 3, 6):
            key = jax.random.fold_in(jax.random.key(0), expected.refresh_attempts)
            expected = learn_damping(
                expected,
                moments(mlp_loss, PARAMS, BATCH, key),
                step,
                rule=LEARNER.rule,
                floor=1e-3,
                decay=0.7,
                min_shrinkage=0.01,
            )
        chex.assert_trees_all_close(state.measured, expected, rtol=1e-5)
    assert get(state, "refresh_attempts") == 4
    assert get(state, "last_refresh") == 6


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [0, 1, 2, 3, 4, 5]),
        (2, [0, 2, 4, 6]),
        (10, [0, 1, 2, 4, 10, 20, 30]),
        (100, [0, 1, 2, 4, 8, 16, 32, 100, 200]),
    ],
)
def test_measurements_come_early_where_curvature_changes_most(every, expected):
    count = jnp.arange(expected[-1] + 1, dtype=jnp.int32)
    for period in (every, jnp.float32(every)):  # inject_hyperparams hands over the last
        np.testing.assert_array_equal(jnp.flatnonzero(is_due(count, period)), expected)


def test_the_update_is_that_of_adam_at_the_damping_in_force():
    tx = owned(refresh_every=2)
    state = tx.init(PARAMS)
    plain = scale_by_adam_shrinkage()
    plain_state = plain.init(PARAMS)
    compiled = jax.jit(lambda state: tx.update(GRADS, state, PARAMS, batch=BATCH))
    for _ in range(4):
        updates, state = compiled(state)
        expected, plain_state = plain.update(
            GRADS, plain_state, PARAMS, damping=get(state, "damping")
        )
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("rule", ["identity_target", "scaled_identity_target"])
def test_target_reaches_the_shrinkage_form(rule):
    learner = DampingLearner(mlp_loss, rule=getattr(rmtdamp, rule), num_probes=8)
    of = lambda form: take_steps(
        auto_damping(scale_by_adam_shrinkage(form=form), learner), 1
    )
    shrunk, state = of("shrinkage")
    damped, _ = of("damping")
    ratio = 1 + get(state, "damping") / get(state, "damping_target")
    assert get(state, "refresh_rejections") == 0
    chex.assert_trees_all_close(
        shrunk, jax.tree.map(lambda u: u * ratio, damped), rtol=1e-5
    )


def test_a_bare_loss_is_a_learner_with_the_defaults():
    chex.assert_trees_all_equal(
        take_steps(owned(mlp_loss), 2), take_steps(owned(DampingLearner(mlp_loss)), 2)
    )


def test_by_hand_twin_gives_what_the_step_gives():
    _, in_step = take_steps(owned(refresh_every=1), 1)
    by_hand = owned(refresh_every=None)
    state = refresh(by_hand.init(PARAMS), LEARNER, PARAMS, BATCH)
    chex.assert_trees_all_close(state.measured, in_step.measured, rtol=1e-6)
    updates, after = take_steps(by_hand, 1, state, batch=None)
    chex.assert_trees_all_equal(after.measured, state.measured)
    chex.assert_trees_all_close(
        updates, take_steps(owned(refresh_every=1), 1)[0], rtol=1e-5
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(-0.1)),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.named_chain(("damped", tx), ("rate", optax.scale(-0.1))),
    ],
    ids=["chain", "MultiSteps", "apply_if_finite", "named_chain"],
)
def test_found_in_any_chain(wrap):
    tx = wrap(owned(refresh_every=None))
    state = tx.init(PARAMS)
    before = get(state, "damping")
    refreshed = refresh(state, LEARNER, PARAMS, BATCH)
    assert get(refreshed, "damping") > before
    assert get(refreshed, "refresh_attempts") == 1
    chex.assert_trees_all_equal_structs(state, refreshed)
    _, after = take_steps(tx, 2, refreshed)
    assert get(after, "damping") == get(refreshed, "damping")


def test_curvature_batch_is_measured_and_batch_is_meant():
    """The authors' protocol: eight training batches' worth, the noise of one."""
    large = mlp_batch(jax.random.key(7), 8 * 32, SIZES, jnp.float32)
    _, state = take_steps(owned(), 1, curvature_batch=large)
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = moments(mlp_loss, PARAMS, large, key, batch_size=32)
    np.testing.assert_allclose(
        get(state, "measured_variance"), expected.variance, rtol=1e-5
    )
    by_hand = refresh(
        owned().init(PARAMS), LEARNER, PARAMS, BATCH, curvature_batch=large
    )
    chex.assert_trees_all_close(by_hand.measured.damping, state.measured.damping)


def test_loss_args_reach_the_loss_without_retracing():
    traces = []

    def loss(params, batch, weight):
        traces.append(None)
        return weight * mlp_loss(params, batch)

    tx = owned(DampingLearner(loss, floor=0.0), refresh_every=1)
    variances = []
    update = jax.jit(
        lambda w: tx.update(
            GRADS, tx.init(PARAMS), PARAMS, batch=BATCH, loss_args=(w,)
        )[1]
    )
    for weight in (1.0, 3.0):
        state = update(jnp.float32(weight))
        variances.append(get(state, "measured_variance"))
        if weight == 1.0:
            first = len(traces)
    np.testing.assert_allclose(variances[1], 9 * variances[0], rtol=1e-5)
    assert len(traces) == first


@pytest.mark.parametrize(("count", "measured"), [(31, 24), (5, 5)])
def test_short_last_batch(count, measured):
    """The largest part that eight divides; below eight, microbatches of one example."""
    batch = jax.tree.map(lambda x: x[:count], BATCH)
    _, state = take_steps(owned(), 1, batch=batch)
    part = jax.tree.map(lambda x: x[:measured], BATCH)
    expected = moments(
        mlp_loss,
        PARAMS,
        part,
        jax.random.fold_in(jax.random.key(0), 0),
        num_microbatches=min(8, measured),
        batch_size=count,
    )
    np.testing.assert_allclose(
        get(state, "measured_variance"), expected.variance, rtol=1e-5
    )


@pytest.mark.parametrize("refresh_every", [1, None])
def test_a_single_example_is_refused_aloud_and_counted(refresh_every):
    batch = jax.tree.map(lambda x: x[:1], BATCH)
    tx = owned(refresh_every=refresh_every)
    by_hand = lambda: refresh(tx.init(PARAMS), LEARNER, PARAMS, batch)
    in_step = lambda: take_steps(tx, 1, batch=batch)[1]
    with pytest.warns(UserWarning, match="a batch of one example has no variance"):
        state = by_hand() if refresh_every is None else in_step()
    assert get(state, "refresh_attempts") == get(state, "refresh_rejections") == 1
    assert get(state, "damping") == jnp.float32(1e-3)


def test_non_finite_measurement_is_counted_and_training_goes_on():
    tx = owned(refresh_every=1)
    _, state = take_steps(tx, 1)
    bad = (BATCH[0].at[0, 0].set(jnp.nan), BATCH[1])
    updates, after = take_steps(tx, 1, state, batch=bad)
    assert get(after, "refresh_rejections") == 1
    assert get(after, "damping") == get(state, "damping")
    assert jnp.isnan(get(after, "measured_variance"))
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))
    _, healed = take_steps(tx, 1, after)
    assert get(healed, "refresh_rejections") == 1
    assert jnp.isfinite(get(healed, "measured_variance"))


def test_measurement_is_reproducible_and_seeded():
    one = take_steps(owned(DampingLearner(mlp_loss, seed=0)), 1)[1]
    again = take_steps(owned(DampingLearner(mlp_loss, seed=0)), 1)[1]
    other = take_steps(owned(DampingLearner(mlp_loss, seed=1)), 1)[1]
    assert get(one, "damping") == get(again, "damping")
    assert get(one, "damping") != get(other, "damping")


@pytest.mark.parametrize("refresh_every", [1, None])
def test_a_step_may_donate_its_state(refresh_every):
    """Twice: a donated state must not take the learner's own numbers with it."""
    floor = jnp.float32(1e-3)
    learner = DampingLearner(mlp_loss, floor=floor)
    target = jnp.float32(0.5)
    for tx in (
        owned(learner, refresh_every=refresh_every),
        set_damping(adam_shrinkage(1e-3), floor, target=target),
    ):
        step = jax.jit(
            lambda params, state, tx=tx: tx.update(GRADS, state, params, batch=BATCH),
            donate_argnums=1,
        )
        for _ in range(2):
            state = step(PARAMS, tx.init(PARAMS))[1]
            state = step(PARAMS, state)[1]
    assert floor == jnp.float32(1e-3)
    assert target == 0.5


@pytest.mark.slow
def test_every_setting_of_the_learner_reaches_the_measurement():
    seen = []

    def loss(params, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return mlp_loss(params, batch)

    learner = DampingLearner(
        loss,
        floor=0.25,
        decay=0.5,
        num_microbatches=4,
        num_probes=3,
        batch_size=64,
        seed=5,
        execution="unroll",
        precision="bfloat16",
    )
    state = refresh(owned(learner).init(PARAMS), learner, PARAMS, BATCH)
    assert "bfloat16" in seen
    expected = moments(
        loss,
        PARAMS,
        BATCH,
        jax.random.fold_in(jax.random.key(5), 0),
        num_microbatches=4,
        num_probes=3,
        batch_size=64,
        execution="unroll",
        precision="bfloat16",
    )
    np.testing.assert_allclose(
        get(state, "damping"), 0.25 + expected.variance, rtol=1e-5
    )


def test_every_argument_of_auto_adam_reaches_its_part():
    learner = DampingLearner(
        mlp_loss,
        floor=1e-2,
        decay=0.2,
        rule=rmtdamp.scaled_identity_target,
        num_microbatches=4,
        num_probes=2,
        min_shrinkage=0.5,
        seed=3,
    )
    one = auto_adam(1e-2, learner, b1=0.5, b2=0.8, refresh_every=1, form="shrinkage")
    inner = scale_by_adam_shrinkage(b1=0.5, b2=0.8, form="shrinkage")
    chain = optax.chain(
        auto_damping(inner, learner, refresh_every=1),
        optax.scale_by_learning_rate(1e-2),
    )
    (updates, state), (expected, other) = take_steps(one, 3), take_steps(chain, 3)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_equal(get(state, "measured"), get(other, "measured"))


def test_auto_adam_can_be_made_within_a_compiled_function():
    def damping(rate):
        return get(auto_adam(rate, mlp_loss).init(PARAMS), "damping")

    np.testing.assert_allclose(jax.jit(damping)(1e-2), 1e-8)


def test_learner_is_a_pytree_that_passes_through_jit():
    learner = DampingLearner(mlp_loss, floor=0.25)
    floor = jax.jit(lambda learner: learner.floor * 2)(learner)
    assert floor == 0.5
    assert jax.tree.map(lambda x: x, learner) == learner


def test_eager_updates_do_not_compile_again():
    tx = owned(refresh_every=2)
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(GRADS, state, PARAMS, batch=BATCH)
    with log_compilations() as logs:
        tx.update(GRADS, state, PARAMS, batch=BATCH)
    assert not [log for log in logs if "refresh" in log.getMessage()]


def test_sharded_training_matches_one_device():
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    place = lambda tree, *axes: jax.device_put(
        tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    )
    tx = owned(refresh_every=1)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(mlp_loss)(params, batch)
        return tx.update(grads, state, params, batch=batch)

    here = step(PARAMS, tx.init(PARAMS), BATCH)
    params = place(PARAMS)
    there = step(params, place(tx.init(PARAMS)), place(BATCH, "data"))
    chex.assert_trees_all_close(here, there, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", [identity_target, StabilityFloor.for_adam()])
def test_convolutions_on_a_cpu_get_a_warning_and_by_hand_does_not(rule):
    def loss(params, batch):
        y = jax.lax.conv(batch, params, (1, 1), "SAME")
        return jnp.mean(y**2)

    params = jnp.ones((1, 1, 3, 3), jnp.float32)
    batch = jnp.ones((4, 1, 5, 5), jnp.float32)
    learner = DampingLearner(loss, rule=rule)
    tx = owned(learner, refresh_every=2, learning_rate=0.1)
    message = "^DampingLearner measures .*refresh_every=None and call rmtdamp.refresh"
    with pytest.warns(UserWarning, match=message):
        tx.update(params, tx.init(params), params, batch=batch)
    state = owned(learner, refresh_every=None).init(params)
    refresh(state, learner, params, batch)  # warnings are errors here


def test_set_damping_shows_what_is_in_force():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = set_damping(scale_by_adam_shrinkage(), schedule, target=0.5)
    state = tx.init(PARAMS)
    for step in range(3):
        _, state = tx.update(GRADS, state, PARAMS)
        np.testing.assert_allclose(get(state, "damping"), schedule(step))
    assert get(state, "damping_target") == 0.5


def test_empty_trees_and_none_leaves():
    tx = owned()
    for params in ({}, {"a": None}):
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates == params


# What cannot be right says so, before any state is touched.

HOLES = lambda: optax.masked(owned(), [{"kernel": True, "bias": False}] * 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: owned().update(GRADS, owned().init(PARAMS)), "needs params, where it"),
        (
            lambda: owned().update(GRADS, owned().init(PARAMS), PARAMS),
            "needs the batch to measure the curvature on: .*batch=batch",
        ),
        (lambda: take_steps(owned(), 1, batch=()), "batch holds no arrays"),
        (
            lambda: take_steps(owned(), 1, batch=(BATCH[0], BATCH[1][:3])),
            "unequal leading axes",
        ),
        (
            lambda: take_steps(owned(), 1, batch=jax.tree.map(lambda x: x[:0], BATCH)),
            "batch holds no examples",
        ),
        (
            lambda: take_steps(auto_damping(optax.adam(1e-3), LEARNER), 1),
            r"ignores `damping`.*with_damping\(optax.adam\)",
        ),
        (
            lambda: take_steps(set_damping(optax.sgd(1e-3), 1e-3), 1),
            "ignores `damping`",
        ),
        (
            lambda: auto_damping(owned(), LEARNER).init(PARAMS),
            "two transformations of one chain hold a damping",
        ),
        (lambda: set_damping(owned(), 1e-3).init(PARAMS), "the one inside already"),
        (
            lambda: auto_damping(
                optax.chain(set_damping(adam_shrinkage(1e-3), 1e-3)), LEARNER
            ).init(PARAMS),
            "the one inside already does",
        ),
        (
            lambda: take_steps(owned(), 1, damping=jnp.float32(1.0)),
            "handed another from outside.* do not pass damping= to update",
        ),
        (
            lambda: refresh(
                optax.chain(owned(), owned()).init(PARAMS), LEARNER, PARAMS, BATCH
            ),
            "holds 2 states of a DampingLearner, and refresh needs exactly one",
        ),
        (
            lambda: refresh(optax.adam(1e-3).init(PARAMS), LEARNER, PARAMS, BATCH),
            "holds 0 states of a DampingLearner",
        ),
        (lambda: HOLES().init(PARAMS), r"params with holes.*masked\(inner, mask\)"),
        (
            lambda: owned(refresh_every=0),
            "refresh_every is 0: take a whole number of at least 1",
        ),
        (lambda: owned(refresh_every=0.5), "refresh_every is 0.5: take a whole number"),
        (lambda: owned(refresh_every=10.0), "refresh_every is 10.0: take a whole"),
        (
            lambda: take_steps(owned(), 1, curvature_batch=(BATCH[0], BATCH[1][:3])),
            "leaves of curvature_batch have unequal",
        ),
        (
            lambda: DampingLearner(mlp_loss, floor=jnp.float32(-1).item()),
            r"floor is -1\.0, and must be at least 0$",
        ),
        (lambda: set_damping(adam_shrinkage(1e-3), -1.0), "damping is -1.0, and must"),
        (lambda: adam_shrinkage(1e-3, damping=-1.0), "damping is -1.0, and must be at"),
        (lambda: auto_adam(-0.1, LEARNER), "learning_rate is -0.1, and must be at"),
        (lambda: adam_shrinkage(float("nan")), "learning_rate is nan, and must be"),
        (
            lambda: jax.jit(lambda b1: auto_adam(1e-3, mlp_loss, b1).init(PARAMS))(0.9),
            "b1 is traced, .* static_args, or hand over a DampingLearner",
        ),
        (lambda: rmtdamp.check_state(PARAMS), "a list, holds nothing that is measured"),
        (lambda: rmtdamp.check_state(owned()), "holds nothing that is measured"),
        (lambda: DampingLearner(mlp_loss, floor=-1.0), "floor is -1.0, .* at least 0"),
        (lambda: DampingLearner(mlp_loss, decay=1.0), r"decay is 1.0, .* in \[0, 1\)"),
        (lambda: DampingLearner(mlp_loss, min_shrinkage=0.0), "min_shrinkage is 0.0"),
        (
            lambda: DampingLearner(mlp_loss, num_microbatches=1),
            "num_microbatches is 1, .* a whole number of at least 2, for a",
        ),
        (lambda: DampingLearner(mlp_loss, num_microbatches=2.5), "is 2.5, .* a whole"),
        (lambda: DampingLearner(mlp_loss, mode="rr"), "mode is 'rr': choose from"),
        (lambda: DampingLearner(mlp_loss, num_probes=0), "num_probes is 0"),
        (lambda: DampingLearner(mlp_loss, batch_size=0), "batch_size is 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize(
    "tx",
    [
        auto_adam(1e-3, mlp_loss),
        rmtdamp.lanczos_newton(1e-3, mlp_loss),
        rmtdamp.trust_region(optax.adam(1e-3), mlp_loss),
    ],
    ids=["auto_adam", "lanczos_newton", "trust_region"],
)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_params_without_a_hessian_are_refused_at_once(tx, dtype):
    with pytest.raises(TypeError, match=r"params\['w'\] is .* a real floating dtype"):
        tx.init({"w": jnp.ones(3, dtype)})
    tx.init({})  # an optimiser of nothing, as in optax


def test_holes_at_update_are_refused_too():
    state = owned().init(PARAMS)
    holes = [{"kernel": PARAMS[0]["kernel"], "bias": optax.MaskedNode()}]
    with pytest.raises(ValueError, match="params with holes"):
        owned().update(GRADS, state, holes, batch=BATCH)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: take_steps(owned(lambda p, b: b[0]), 1),
            r"real scalar and returned shape \(4, 8\)",
        ),
        (
            lambda: owned().update(
                jnp.ones(2), owned().init(jnp.ones(2)), jnp.arange(2), batch=BATCH
            ),
            "params is int64",
        ),
        (
            lambda: owned().update(
                jnp.ones(2), owned().init(jnp.ones(2)), jnp.ones(2) * 1j, batch=BATCH
            ),
            "params is complex128",
        ),
        (lambda: DampingLearner(None), "loss_fn is NoneType"),  # pyright: ignore
        (lambda: DampingLearner(mlp_loss, rule=0.5), "rule is 0.5"),  # pyright: ignore
        (
            lambda: DampingLearner(mlp_loss, rule=rmtdamp.StabilityFloor),  # pyright: ignore
            r"or an instance, rmtdamp\.StabilityFloor\(\)",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_auto_adam_is_the_chain_it_stands_for():
    mask = [{"kernel": True, "bias": False}] * 2
    one = auto_adam(1e-2, LEARNER, weight_decay=0.1, mask=mask)
    chain = optax.chain(
        owned(),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(1e-2),
    )
    chex.assert_trees_all_equal(take_steps(one, 3)[0], take_steps(chain, 3)[0])


@pytest.mark.parametrize(
    "rule", [StabilityFloor.for_adam(), identity_target], ids=["floor", "noise"]
)
def test_by_hand_nothing_is_compiled_one_operation_at_a_time(rule):
    """Which takes longer than it looks: every program has a name of ours."""
    learner = DampingLearner(mlp_loss, floor=1e-8, rule=rule)
    state = auto_adam(1e-2, learner, refresh_every=None).init(PARAMS)
    jax.clear_caches()
    with log_compilations() as logs:
        refresh(state, learner, PARAMS, BATCH)
    names = [re.search(r"jit\((\w+)\)", log.getMessage())[1] for log in logs]
    assert 3 <= len(names) <= 9
    assert all(name.startswith("_") for name in names), names


def test_with_damping_inside_a_mask_inside_the_owner():
    """The documented way to mask: the owner outside, the mask inside."""
    mask = [{"kernel": True, "bias": False}] * 2
    inner = optax.masked(with_damping(optax.scale_by_adam)(), mask)
    updates, state = take_steps(auto_damping(inner, LEARNER), 1)
    chex.assert_trees_all_equal(updates[0]["bias"], GRADS[0]["bias"])
    assert get(state, "damping") > 1e-3


# What used to be silent: losses that are no mean over the batch, settings that differ.


def sum_loss(params, batch):
    return mlp_loss(params, batch) * len(batch[1])


def batch_norm_loss(params, batch):
    x, labels = batch
    mean, deviation = x.mean(0), x.std(0)
    return mlp_loss(params, ((x - mean[None]) / deviation[None], labels))


def dropout_loss(params, batch, key_data):
    key = jax.random.wrap_key_data(key_data)
    keep = jax.random.bernoulli(key, 0.5, batch[0].shape)
    return mlp_loss(params, (jnp.where(keep, batch[0], 0), batch[1]))


LARGE = mlp_batch(jax.random.key(1), 128, SIZES, jnp.float32)


NO_MEANS = [
    (batch_norm_loss, ()),
    (dropout_loss, (jax.random.key_data(jax.random.key(3)),)),
]


@pytest.mark.parametrize(
    ("loss", "loss_args", "rule"),
    [
        (sum_loss, (), identity_target),
        (sum_loss, (), StabilityFloor.for_adam()),
        *((*case, identity_target) for case in NO_MEANS),
    ],
)
def test_a_loss_that_is_no_mean_is_counted_and_named(loss, loss_args, rule):
    """Whether moments are measured, with the losses beside them, or an eigenvalue."""
    learner = DampingLearner(loss, rule=rule)
    tx = owned(learner, refresh_every=1, learning_rate=1e-3)
    _, state = take_steps(tx, 2, batch=LARGE, loss_args=loss_args)
    assert get(state, "loss_mismatches") == 1
    with pytest.warns(UserWarning, match="is not the mean of its microbatches"):
        rmtdamp.check_state((state, optax.EmptyState()))
    with pytest.warns(UserWarning, match="is not the mean of its microbatches"):
        state = refresh(tx.init(PARAMS), learner, PARAMS, LARGE, loss_args=loss_args)
    assert get(state, "loss_mismatches") == 1


@pytest.mark.parametrize(("loss", "loss_args"), NO_MEANS)
def test_an_eigenvalue_needs_no_mean_over_examples(loss, loss_args):
    learner = DampingLearner(loss, rule=StabilityFloor.for_adam())
    tx = owned(learner, refresh_every=1, learning_rate=1e-3)
    _, state = take_steps(tx, 2, batch=LARGE, loss_args=loss_args)
    assert get(state, "loss_mismatches") == 0
    rmtdamp.check_state(state)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rule", [identity_target, StabilityFloor.for_adam()])
@pytest.mark.parametrize("count", [128, 127])
def test_a_mean_is_no_mismatch_at_any_scale(factor, rule, count):
    loss = lambda params, batch: factor * mlp_loss(params, batch)
    learner = DampingLearner(loss, min_shrinkage=1e-9, rule=rule)
    tx = owned(learner, learning_rate=1e-3)
    batch = jax.tree.map(lambda x: x[:count], LARGE)
    state = refresh(tx.init(PARAMS), learner, PARAMS, batch)
    assert get(state, "loss_mismatches") == 0  # and warnings are errors here


def test_one_place_for_a_setting():
    """What auto_adam was given is what a refresh by hand learns with."""
    learner = DampingLearner(mlp_loss, floor=5e-2)
    tx = auto_adam(1e-3, learner, refresh_every=None)
    state = refresh(tx.init(PARAMS), learner, PARAMS, BATCH)
    _, in_step = take_steps(auto_adam(1e-3, learner), 1)
    np.testing.assert_allclose(
        get(state, "damping"), get(in_step, "damping"), rtol=1e-6
    )
    assert get(state, "damping") > 5e-2
    with pytest.raises(TypeError, match=r"of type function.*DampingLearner\(loss_fn\)"):
        refresh(state, mlp_loss, PARAMS, BATCH)


def test_a_run_whose_measurements_all_fail_says_so():
    bad = (BATCH[0].at[0, 0].set(jnp.nan), BATCH[1])
    _, state = take_steps(owned(refresh_every=1), 2, batch=bad)
    with pytest.warns(UserWarning, match="no measurement of the damping could be used"):
        rmtdamp.check_state(state)


@pytest.mark.parametrize("finite", [False, True])
def test_a_state_of_nan_says_so(finite):
    """A single gradient that is not finite stays in an average for good."""
    tx = auto_adam(1e-3, mlp_loss)
    if finite:
        tx = optax.with_extra_args_support(optax.apply_if_finite(tx, 9))
    state, said = tx.init(PARAMS), []
    for factor in (1.0, jnp.nan, 1.0):
        grads = jax.tree.map(lambda x, factor=factor: factor * x, PARAMS)
        _, state = tx.update(grads, state, PARAMS, batch=BATCH)
        with warnings.catch_warnings(record=True, action="always") as caught:
            rmtdamp.check_state(state)
        said.append(any("state holds NaN" in str(x.message) for x in caught))
    assert said == [False, not finite, not finite]


def lost(known):
    return Shrinkage(known.max_eigenvalue * known.learning_rate)


@pytest.mark.parametrize("names", [("moments", "learning_rate"), ("learning_rate",)])
def test_a_rule_that_reads_what_it_does_not_name_says_so(names):
    learner = DampingLearner(mlp_loss, rule=needs(*names)(lost), floor=1e-2)
    tx = owned(learner, refresh_every=2, learning_rate=1e-3)
    _, state = take_steps(tx, 5)
    assert get(state, "damping") == np.float32(1e-2)
    assert get(state, "refresh_rejections") == (3 if "moments" in names else 1)
    with pytest.warns(UserWarning, match="reads what it does not name among its"):
        rmtdamp.check_state(state)


@pytest.mark.parametrize("rule", [identity_target, StabilityFloor.for_adam()])
def test_steps_without_the_measurement_by_hand_say_so(rule):
    learner = DampingLearner(mlp_loss, rule=rule)
    tx = optax.chain(
        optax.clip(1.0), owned(learner, refresh_every=None, learning_rate=1e-3)
    )
    rmtdamp.check_state(tx.init(PARAMS))  # nothing to say yet
    _, state = take_steps(tx, 1)
    with pytest.warns(UserWarning, match="steps were taken and nothing was measured"):
        rmtdamp.check_state(state)
    rmtdamp.check_state(refresh(state, learner, PARAMS, BATCH))


def test_a_rule_that_needs_no_measurement_is_none_the_worse_for_it():
    learner = DampingLearner(mlp_loss, rule=GradientNorm(), floor=1e-2)
    _, state = take_steps(owned(learner, refresh_every=None), 2)
    assert get(state, "last_refresh") == -2
    rmtdamp.check_state(state)


def test_the_states_of_many_runs_are_looked_at_together():
    learner = DampingLearner(sum_loss, rule=StabilityFloor.for_adam())
    tx = owned(learner, refresh_every=None, learning_rate=1e-3)
    starts = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    states = jax.vmap(tx.init)(starts)
    rmtdamp.check_state(states)
    by_hand = lambda state, params: refresh(state, learner, params, LARGE)
    states = jax.vmap(by_hand)(states, starts)
    with pytest.warns(UserWarning, match="is not the mean of its microbatches"):
        rmtdamp.check_state(states)
    assert get(states, "loss_mismatches").tolist() == [1, 1]


def test_another_learner_is_refused_by_hand():
    tx = auto_adam(1e-3, mlp_loss, refresh_every=None)
    with pytest.raises(ValueError, match="is not that of a learner with the rule"):
        refresh(tx.init(PARAMS), DampingLearner(mlp_loss), PARAMS, BATCH)


@pytest.mark.parametrize(
    ("rule", "b1"),
    [(StabilityFloor(), 0.9), (StabilityFloor.for_adam(), 0.0)],
)
def test_a_floor_for_another_momentum_is_refused(rule, b1):
    with pytest.raises(ValueError, match=rf"take StabilityFloor.for_adam\({b1}\)"):
        auto_adam(1e-3, DampingLearner(mlp_loss, rule=rule), b1)


@pytest.mark.parametrize(
    "rule", [StabilityFloor.for_adam(), StabilityFloor.for_lanczos(momentum=0.0)]
)
def test_a_floor_that_does_not_know_of_a_sum_of_past_steps_is_refused(rule):
    sums = rmtdamp.adam_shrinkage(1e-3), optax.trace(0.9)
    tx = auto_damping(optax.chain(*sums), DampingLearner(mlp_loss, rule=rule))
    with pytest.raises(ValueError, match=r"sums past steps .*for_lanczos\(momentum="):
        tx.init(PARAMS)


def test_momentum_0_sums_nothing():
    """And so it is no sum that a floor must know of."""
    measurer = rmtdamp.RitzMeasurer(mlp_loss, num_steps=2)
    rule = StabilityFloor.for_lanczos(momentum=0.0)
    plain, none = (
        auto_damping(
            rmtdamp.lanczos_newton(0.1, measurer, momentum=momentum),
            DampingLearner(mlp_loss, rule=rule),
            learning_rate=0.1,
        )
        for momentum in (0.0, None)
    )
    chex.assert_trees_all_equal(plain.init(PARAMS), none.init(PARAMS))


def test_a_learning_rate_with_axes_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate has shape \(1,\), .* one num"):
        auto_adam(np.array([1e-3]), mlp_loss)


def test_a_run_that_sits_on_the_bound_says_so():
    learner = DampingLearner(mlp_loss, min_shrinkage=1 - 1e-6)
    _, state = take_steps(owned(learner), 1)
    with pytest.warns(UserWarning, match="meets the bound of its learner"):
        rmtdamp.check_state(state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: take_steps(owned(lambda params, x, y: jnp.mean(x)), 1),
            r"missing a required argument: 'y'.*lambda params, batch: loss",
        ),
        (
            lambda: take_steps(owned(), 1, loss_args=jax.random.key(0)),
            r"loss_args is of type .*loss_args=\(x,\) for a single one",
        ),
        (
            lambda: with_damping(optax.adam(1e-3)),
            r"already made: .*with_damping\(optax.adam\)\(1e-3\)",
        ),
        (
            lambda: auto_damping(with_damping(optax.adam), LEARNER),
            r"inner is adam, and no .* with_damping\(optax.adam\)\(1e-3\)",
        ),
        (lambda: set_damping(0.1, optax.adam(1e-3)), "inner is float, and no gradient"),
        (lambda: auto_adam("1e-3", LEARNER), "learning_rate is the string '1e-3'"),
        (lambda: DampingLearner(mlp_loss, floor="0"), "floor is the string '0': hand"),
    ],
    ids=[
        "loss(params, x, y)",
        "loss_args=key",
        "with_damping(adam(...))",
        "with_damping(adam)",
        "swapped",
        "rate",
        "floor",
    ],
)
def test_messages_that_point_to_the_mistake(call, message):
    with pytest.raises(TypeError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("chained", [False, True])
def test_frozen_leaves_inside_are_pointed_out(chained):
    """Their curvature would decide on the damping of the others."""
    adam = optax.partition(
        {"train": adam_shrinkage(1e-3), "freeze": optax.set_to_zero()},
        lambda params: [
            {"kernel": "freeze", "bias": "freeze"},
            *[{"kernel": "train", "bias": "train"}] * (len(params) - 1),
        ],
    )
    inner = optax.chain(optax.clip(1.0), adam) if chained else adam
    tx = auto_damping(inner, DampingLearner(mlp_loss, rule=StabilityFloor(safety=8.0)))
    with pytest.warns(UserWarning, match=r"moves 0/bias, 0/kernel, .* loss_args"):
        tx.init(PARAMS)
    with warnings.catch_warnings(action="error"):
        auto_damping(inner, DampingLearner(mlp_loss, rule=MeanFraction()))
        owned().init(PARAMS)


def test_a_schedule_below_zero_counts_as_none():
    tx = set_damping(adam_shrinkage(1e-3), optax.linear_schedule(0.1, -0.5, 2))
    _, state = take_steps(tx, 3)
    assert optax.tree.get(state, "damping") == 0


def test_a_blow_up_does_not_lock_the_damping():
    """One measurement of 9e6 among small ones, in the step, as it happened."""

    def loss(params, batch, scale):
        return scale * mlp_loss(params, batch)

    tx = owned(DampingLearner(loss, floor=1e-4), refresh_every=1)
    state, dampings = tx.init(PARAMS), []
    for scale in [1.0, 1.0, 1.0, 3e5, 1.0, 1.0, 1.0]:
        _, state = take_steps(tx, 1, state, loss_args=(jnp.float32(scale),))
        dampings.append(float(get(state, "damping")))
    assert max(dampings) < 3 * dampings[0]
    assert get(state, "refresh_rejections") == 1


def test_an_eager_step_by_hand_compiles_nothing_anew():
    tx = auto_adam(1e-2, mlp_loss, refresh_every=None)
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(PARAMS, state, PARAMS, batch=BATCH)
    with log_compilations() as logs:
        tx.update(PARAMS, state, PARAMS, batch=BATCH)
    assert not logs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: set_damping(scale_by_adam_shrinkage(), 0.1, target=0.0),
            r"target is 0.0, and must be above 0",
        ),
        (
            lambda: auto_damping(
                scale_by_adam_shrinkage(), LEARNER, learning_rate=-0.1
            ),
            r"learning_rate is -0.1, and must be at least 0",
        ),
        (lambda: scale_by_adam_shrinkage(b2=-1.0), r"b2 is -1.0, and must be in \[0, "),
    ],
    ids=["target", "rate", "b2"],
)
def test_numbers_out_of_their_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
