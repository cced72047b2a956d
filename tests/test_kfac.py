"""KFAC's update against dense solves; its clocks, its damping, what it refuses."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtdamp
from rmtdamp import KroneckerMeasurer, kfac, scale_by_kfac
from rmtdamp.kronecker import (
    Factors,
    ModelFactors,
    Tape,
    eigenbasis,
    make_blocks,
    second_moments,
    to_matrix,
)

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Few and small, and one test looks for the warning itself.
    pytest.mark.filterwarnings("ignore:.* measures a model with convolutions"),
]
SILENT = Tape(keep=False)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def model_fn(params, x, tape):
    """A grouped convolution, a norm's scale, a linear layer."""
    y = jax.lax.conv_general_dilated(
        x,
        params["conv"],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )
    y = tape.convolution("conv", x, y, (2,), (1,), "SAME", groups=2)
    h = jnp.tanh(jnp.mean(y, axis=1)) * params["scale"][None]
    return tape.linear("dense", h, h @ params["kernel"] + params["bias"][None])


def cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def loss_fn(params, batch):
    return cross_entropy(model_fn(params, batch[0], SILENT), batch[1])


PARAMS = {
    "bias": normal(0, 3),
    "conv": normal(1, 2, 2, 4),
    "kernel": normal(2, 4, 3),
    "scale": normal(3, 4),
}
BATCH = normal(4, 8, 3, 4), jnp.arange(8) % 3
LAYERS = {
    "conv": {"kernel": "conv", "groups": 2},
    "dense": {"kernel": "kernel", "bias": "bias"},
}
BLOCKS = make_blocks(PARAMS, LAYERS)
FN = ModelFactors(
    model_fn=model_fn, criterion=cross_entropy, blocks=BLOCKS, fisher="empirical"
)
FOUND = jax.jit(lambda key: FN(PARAMS, BATCH, key))(jax.random.key(5))
GRADS = jax.jit(jax.grad(loss_fn))(PARAMS, BATCH)
NAN_BATCH = BATCH[0].at[0].set(jnp.nan), BATCH[1]


def stepper(tx):
    return jax.jit(lambda g, s, p, batch, **kw: tx.update(g, s, p, batch=batch, **kw))


MEASURER = KroneckerMeasurer(FN, eigen_every=2)
TX = scale_by_kfac(MEASURER, damping=1e-3, refresh_every=2)
STEP = stepper(TX)
with warnings.catch_warnings(action="ignore"):
    FIRST = STEP(GRADS, TX.init(PARAMS), PARAMS, BATCH)[1]


def check_solves(updates, curvature):
    """Each group's update solves its dense system, made by `curvature(layer, k)`."""
    leaves, given = jax.tree.leaves(GRADS), jax.tree.leaves(updates)
    for layer, block in enumerate(b for b in BLOCKS if b.groups):
        gradient, update = (
            to_matrix(block, [tree[place] for place in block.leaves])
            for tree in (leaves, given)
        )
        for k in range(block.groups):
            solved = jnp.linalg.solve(curvature(layer, k), gradient[k].reshape(-1))
            close(update[k].reshape(-1), solved)


def plus(matrix, damping):
    return matrix + damping * jnp.eye(len(matrix))


@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_update_is_the_dense_solve_with_the_damping_of_the_moment(damping):
    # The bases were made under another damping, and are not renewed.
    updates, state = STEP(GRADS, FIRST, PARAMS, BATCH, damping=damping)
    assert state.measured.kfac_measurements == 1

    def curvature(layer, k):
        a, g = FOUND.kronecker[layer]
        return plus(jnp.kron(a[k], g[k]), damping)

    check_solves(updates, curvature)
    close(updates["scale"], GRADS["scale"] / (FOUND.diagonal[0] + damping))


FACTORED = scale_by_kfac(FN, tikhonov="factored", refresh_every=None)
FACTORED_STEP = stepper(FACTORED)


def factored(factors, damping):
    def curvature(layer, k):
        a, g = (factor[k] for factor in factors[layer])
        pi = jnp.sqrt(jnp.trace(a) / len(a) / (jnp.trace(g) / len(g)))
        root = jnp.sqrt(damping)
        return jnp.kron(plus(a, pi * root), plus(g, root / pi))

    return curvature


def test_factored_damping_is_the_dense_solve_whatever_changes():
    state = FACTORED.init(PARAMS)._replace(measured=FIRST.measured)
    for damping in (0.01, 0.25):
        updates, state = FACTORED_STEP(GRADS, state, PARAMS, BATCH, damping=damping)
        check_solves(updates, factored(FOUND.kronecker, damping))
    double = jax.tree.map(lambda x: 2 * x, FOUND.kronecker)
    known = state.measured
    known = known._replace(
        factors=double,
        bases=tuple(map(eigenbasis, double)),
        eigen_refreshes=known.eigen_refreshes + 1,
    )
    state = state._replace(measured=known)
    updates, state = FACTORED_STEP(GRADS, state, PARAMS, BATCH, damping=0.25)
    check_solves(updates, factored(double, 0.25))


def test_inverses_are_kept_until_the_damping_or_the_bases_change():
    state = FACTORED.init(PARAMS)._replace(measured=FIRST.measured)
    first, state = FACTORED_STEP(GRADS, state, PARAMS, BATCH, damping=0.01)
    kept = jax.tree.map(lambda x: 3 * x, state.inverses.factors)
    state = state._replace(inverses=state.inverses._replace(factors=kept))
    again, state = FACTORED_STEP(GRADS, state, PARAMS, BATCH, damping=0.01)
    jax.tree.map(lambda u, v: close(u, 9 * v), again["conv"], first["conv"])
    # A product with the curvature neither needs nor renews them.
    product = jax.jit(functools.partial(FACTORED.update, curvature_power=1))
    back, same = product(first, state, PARAMS, damping=0.5)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    other, state = FACTORED_STEP(back, state, PARAMS, BATCH, damping=0.5)
    jax.tree.map(close, other, first)


@pytest.mark.slow
def test_factored_damping_of_zero_leaves_singular_directions_out():
    one = jax.tree.map(lambda x: x[:1], BATCH)
    tx = scale_by_kfac(FN, tikhonov="factored", damping=0.0, refresh_every=10)
    grads = jax.jit(jax.grad(loss_fn))(PARAMS, one)
    updates, state = stepper(tx)(grads, tx.init(PARAMS), PARAMS, one)
    assert state.kfac_fallbacks == 1
    for layer, block in enumerate(b for b in BLOCKS if b.groups):
        a, g = state.measured.factors[layer]
        gradient, update = (
            to_matrix(block, [jax.tree.leaves(tree)[i] for i in block.leaves])
            for tree in (grads, updates)
        )
        for k in range(block.groups):
            expected = jnp.linalg.pinv(a[k]) @ gradient[k] @ jnp.linalg.pinv(g[k])
            close(update[k], expected)


def test_ekfac_is_the_dense_solve_with_the_measured_diagonal():
    tx = scale_by_kfac(KroneckerMeasurer(FN, ekfac=True))
    updates, state = stepper(tx)(GRADS, tx.init(PARAMS), PARAMS, BATCH, damping=0.01)

    def curvature(layer, k):
        basis = state.measured.bases[layer]
        q = jnp.kron(basis.inputs[k], basis.outputs[k])
        moments = second_moments(FOUND.records[layer], basis)[k].reshape(-1)
        return plus(q @ jnp.diag(moments) @ q.T, 0.01)

    check_solves(updates, curvature)


def test_which_eigenvectors_have_no_eigenvalue_does_not_matter_to_ekfac():
    """They are a matter of rounding: turned among themselves, the same steps."""
    params = {"w": normal(0, 6, 5)}
    fn = ModelFactors(
        model_fn=lambda p, x, tape: tape.linear("layer", x, x @ p["w"]),
        criterion=lambda z, y: jnp.mean(jnp.sum((z - y) ** 2, axis=1)),
        blocks=make_blocks(params, {"layer": {"kernel": "w"}}),
        fisher="empirical",
    )
    measurer = KroneckerMeasurer(fn, ekfac=True, eigen_every=100)
    tx = scale_by_kfac(measurer, damping=1e-3, refresh_every=None)
    batches = normal(1, 4, 2, 6), normal(2, 4, 2, 5)  # of two examples
    at = lambda i: tuple(x[i] for x in batches)
    state = rmtdamp.refresh(tx.init(params), measurer, params, at(0))
    (basis,) = state.measured.bases

    def turned(vectors, values):
        unseen = int(jnp.sum(values < 1e-12 * values.max()))
        assert unseen == values.size - 2
        q = jnp.linalg.qr(normal(3, unseen, unseen))[0]
        return vectors.at[:, :, :unseen].set(vectors[:, :, :unseen] @ q)

    other = state._replace(
        measured=state.measured._replace(
            bases=(
                basis._replace(
                    inputs=turned(basis.inputs, basis.input_values),
                    outputs=turned(basis.outputs, basis.output_values),
                ),
            ),
            # No decomposition for a while.
            kfac_measurements=jnp.int32(10),
        )
    )
    state = state._replace(
        measured=state.measured._replace(kfac_measurements=jnp.int32(10))
    )
    for i in (1, 2, 3):
        state, other = (
            rmtdamp.refresh(s, measurer, params, at(i)) for s in (state, other)
        )
        updates = [tx.update(params, s, params)[0]["w"] for s in (state, other)]
        assert int(state.measured.eigen_refreshes) == 1
        np.testing.assert_allclose(*updates, rtol=1e-9)


def test_averages_are_debiased_and_the_clocks_keep_time():
    state, other = FIRST, (BATCH[0] + 1, BATCH[1])
    # The same but for what the compiler fuses.
    exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)
    jax.tree.map(exact, state.measured.factors, FOUND.kronecker)
    seen = []
    for _ in range(4):
        _, state = STEP(GRADS, state, PARAMS, other)
        known = state.measured
        seen.append((int(known.kfac_measurements), int(known.eigen_refreshes)))
    assert seen == [(1, 1), (2, 1), (2, 1), (3, 2)]
    second = jax.jit(lambda key: FN(PARAMS, other, key))(jax.random.key(6))
    # Weights 0.05 * (0.95^2, 0.95, 1), over their sum.
    w = np.array([0.95**2, 0.95 + 1]) / (0.95**2 + 0.95 + 1)
    jax.tree.map(
        lambda s, x, y: close(s, w[0] * x + w[1] * y),
        (known.factors, known.diagonal),
        (FOUND.kronecker, FOUND.diagonal),
        (second.kronecker, second.diagonal),
    )


def test_scanned_it_is_the_loop():
    @jax.jit
    def scanned(state):
        body = lambda s, _: TX.update(GRADS, s, PARAMS, batch=BATCH)[::-1]
        return jax.lax.scan(body, state, length=3)

    final, updates = scanned(FIRST)
    state = FIRST
    for i in range(3):
        expected, state = STEP(GRADS, state, PARAMS, BATCH)
        jax.tree.map(lambda u, e, i=i: close(u[i], e), updates, expected)
    jax.tree.map(close, final.measured.factors, state.measured.factors)
    assert STEP._cache_size() <= 3  # without damping=, with it, on other weak types


def test_a_measurement_that_is_not_finite_is_counted_and_nothing_else():
    state = FIRST
    for _ in range(2):
        _, state = STEP(GRADS, state, PARAMS, NAN_BATCH)
    known = state.measured
    assert (known.kfac_measurements, known.kfac_rejections) == (2, 1)
    kept = lambda s: s.measured._replace(kfac_measurements=0, kfac_rejections=0)
    jax.tree.map(np.testing.assert_array_equal, kept(state), kept(FIRST))


def test_before_any_good_measurement_gradients_are_kept():
    updates, state = STEP(GRADS, TX.init(PARAMS), PARAMS, NAN_BATCH, damping=0.25)
    known = state.measured
    assert (known.kfac_rejections, known.eigen_refreshes) == (1, 0)
    jax.tree.map(lambda u, g: close(u, g / 1.25), updates, GRADS)
    # The next good one is decomposed at once, whatever the clock says.
    for _ in range(2):
        _, state = STEP(GRADS, state, PARAMS, BATCH, damping=0.25)
    known = state.measured
    assert (known.kfac_measurements, known.eigen_refreshes) == (2, 1)


@pytest.mark.slow
def test_no_damping_and_a_singular_block_leaves_directions_out_and_counts():
    one = jax.tree.map(lambda x: x[:1], BATCH)
    grads = jax.grad(loss_fn)(PARAMS, one)
    updates, state = STEP(grads, TX.init(PARAMS), PARAMS, one, damping=0.0)
    assert state.kfac_fallbacks == 1
    # A block of rank one and its own gradient: F^+ g = g / |g|^2.
    square = jnp.sum(grads["kernel"] ** 2) + jnp.sum(grads["bias"] ** 2)
    close(updates["kernel"], grads["kernel"] / square)
    close(updates["bias"], grads["bias"] / square)
    _, state = STEP(grads, state, PARAMS, one, damping=1e-3)
    assert state.kfac_fallbacks == 1


def step_of(tx, state=FIRST):
    """One step of an optimiser whose factors are those of the first measurement."""
    state = jax.tree.map(
        lambda x: state if isinstance(x, type(FIRST)) else x,
        tx.init(PARAMS),
        is_leaf=lambda x: isinstance(x, type(FIRST)),
    )
    return stepper(tx)(GRADS, state, PARAMS, BATCH)


def test_kl_clip_bounds_the_step_and_leaves_small_ones():
    rate = optax.constant_schedule(0.5)
    options = {"damping": 1e-3, "refresh_every": None, "momentum": None}
    clip = lambda bound: jax.tree.map(
        lambda u: -2 * u, step_of(kfac(rate, FN, kl_clip=bound, **options))[0]
    )
    free = clip(None)
    jax.tree.map(close, free, STEP(GRADS, FIRST, PARAMS, BATCH)[0])
    clipped = clip(1e-3)
    length = lambda u: 0.25 * optax.tree.vdot(u, GRADS)
    assert length(free) > 1e-2
    # (nu u)^T F (nu u), which is nu^2 u^T g.
    close(length(clipped) ** 2 / length(free), 1e-3)
    jax.tree.map(
        lambda c, f: close(c, f * jnp.sqrt(1e-3 / length(free))), clipped, free
    )
    jax.tree.map(close, clip(1e3), free)


def test_kfac_is_clip_then_momentum_then_decay_then_rate():
    options = {"damping": 1e-3, "refresh_every": None}
    tx = kfac(0.1, FN, kl_clip=1e-5, weight_decay=0.01, **options)
    # A KL clip of 1e-5 at rate 0.1 is one of 1e-3 at rate 1.
    clipped, _ = step_of(kfac(1.0, FN, kl_clip=1e-3, momentum=None, **options))
    updates, state = step_of(tx)
    momentum = jax.tree.map(lambda u: -u, clipped)
    check = lambda u, m, p: close(u, -0.1 * (m + 0.01 * p))
    jax.tree.map(check, updates, momentum, PARAMS)
    updates, _ = stepper(tx)(GRADS, state, PARAMS, BATCH)
    jax.tree.map(lambda u, m, p: check(u, 1.9 * m, p), updates, momentum, PARAMS)


def test_small_damping_on_a_quadratic_is_a_newton_step():
    def linear(params, x, tape):
        return tape.linear("w", x, x @ params["w"])

    half = lambda z, y: 0.5 * jnp.mean(jnp.sum((z - y) ** 2, axis=1))
    params = {"w": normal(7, 4, 3)}
    batch = normal(8, 16, 4), normal(9, 16, 3)
    fn = ModelFactors(
        model_fn=linear,
        criterion=half,
        blocks=make_blocks(params, {"w": {"kernel": "w"}}),
        fisher="ggn",
    )
    tx = scale_by_kfac(fn)
    grads = jax.grad(lambda p: half(batch[0] @ p["w"], batch[1]))(params)
    step, _ = stepper(tx)(grads, tx.init(params), params, batch, damping=1e-9)
    solution = jnp.linalg.lstsq(*batch)[0]
    close(params["w"] - step["w"], solution, rtol=1e-6)


def test_learned_held_and_by_hand():
    learner = rmtdamp.DampingLearner(loss_fn, floor=1e-2)
    inner = scale_by_kfac(MEASURER, refresh_every=None)
    tx = rmtdamp.auto_damping(inner, learner, refresh_every=None)
    state = tx.init(PARAMS)
    for measurer in (MEASURER, learner):
        state = rmtdamp.refresh(state, measurer, PARAMS, BATCH)
    damping = optax.tree.get(state, "damping")
    assert damping > 1e-2
    step = jax.jit(lambda s: tx.update(GRADS, s, PARAMS, batch=BATCH, unexpected=1))
    updates, state = step(state)
    assert optax.tree.get(state, "kfac_measurements") == 1
    expected, _ = STEP(GRADS, FIRST, PARAMS, BATCH, damping=damping)
    jax.tree.map(close, updates, expected)

    held = rmtdamp.set_damping(TX, 0.1)
    updates, _ = jax.jit(lambda s: held.update(GRADS, s, PARAMS, batch=BATCH))(
        held.init(PARAMS)
    )
    expected, _ = STEP(GRADS, FIRST, PARAMS, BATCH, damping=0.1)
    jax.tree.map(close, updates, expected)


@pytest.mark.parametrize("change", [{}, {"ekfac": True}, {"debias": False}], ids=str)
def test_by_hand_is_what_the_step_does_with_every_setting(change):
    """Three measurements, the third of which renews the bases; and a bad one."""
    measurer = KroneckerMeasurer(FN, decay=0.6, eigen_every=2, seed=3, **change)
    in_step = scale_by_kfac(measurer, damping=0.1, refresh_every=1)
    by_hand = scale_by_kfac(measurer, damping=0.1, refresh_every=None)
    step, (one, other) = stepper(in_step), (in_step.init(PARAMS), by_hand.init(PARAMS))
    for batch in (BATCH, (BATCH[0] + 1, BATCH[1]), (BATCH[0] - 1, BATCH[1]), NAN_BATCH):
        _, one = step(GRADS, one, PARAMS, batch)
        other = rmtdamp.refresh(other, measurer, PARAMS, batch)
    assert one.measured.kfac_measurements == 4
    assert one.measured.kfac_rejections == 1
    # Eigenvectors are known up to their signs.
    known = lambda s: s.measured._replace(
        bases=[(b.input_values, b.output_values) for b in s.measured.bases]
    )
    jax.tree.map(close, known(one), known(other))


def test_without_debiasing_the_identity_fades():
    """After k measurements of the same batch: decay^k I + (1 - decay^k) A."""
    measurer = KroneckerMeasurer(FN, decay=0.6, debias=False)
    tx = scale_by_kfac(measurer, refresh_every=None)
    state = tx.init(PARAMS)
    for k in (1, 2, 3):
        state = rmtdamp.refresh(state, measurer, PARAMS, BATCH)
        for found, factors in zip(FOUND.kronecker, state.measured.factors, strict=True):
            for a, average in zip(found, factors, strict=True):
                eye = jnp.eye(a.shape[-1])[None]
                close(average, 0.6**k * eye + (1 - 0.6**k) * a)


def test_weight_decay_shrinks_weights_by_the_rate_times_it():
    """With zero gradients: (1 - 0.1 * 0.01)^200, as in adamw_shrinkage."""
    rate, decay, steps = 0.1, 0.01, 200
    optimisers = (
        kfac(rate, FN, damping=0.1, weight_decay=decay, refresh_every=None),
        rmtdamp.lanczos_newton(
            rate, loss_fn, damping=0.1, weight_decay=decay, refresh_every=None
        ),
        rmtdamp.spectral_descent(rate, weight_decay=decay),
        rmtdamp.shampoo(rate, weight_decay=decay),
        rmtdamp.adamw_shrinkage(rate, weight_decay=decay),
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for tx in optimisers:

        @jax.jit
        def run(params, tx=tx):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(zeros, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

        expected = (1 - rate * decay) ** steps
        left = jax.tree.map(lambda p, c=expected: c * p, PARAMS)
        jax.tree.map(close, run(PARAMS), left)


def test_learning_in_the_step_hands_the_batch_on():
    tx = rmtdamp.auto_damping(TX, loss_fn, refresh_every=2)
    _, state = stepper(tx)(GRADS, tx.init(PARAMS), PARAMS, BATCH)
    assert optax.tree.get(state, "refresh_attempts") == 1
    jax.tree.map(close, optax.tree.get(state, "factors"), FOUND.kronecker)


@pytest.mark.slow
def test_dtypes_and_state_stay():
    dtype = jnp.bfloat16
    params, grads, x = (
        jax.tree.map(lambda v: v.astype(dtype), t) for t in (PARAMS, GRADS, BATCH[0])
    )
    tx = kfac(0.1, KroneckerMeasurer(FN, eigen_every=1), damping=0.1, refresh_every=2)

    @jax.jit
    def step(state, take):
        # A conditional refuses branches whose states differ in shape or dtype.
        return jax.lax.cond(
            take,
            lambda: tx.update(grads, state, params, batch=(x, BATCH[1])),
            lambda: (grads, state),
        )

    updates, state = step(tx.init(params), True)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state[0])}
    assert dtypes == {jnp.dtype(d) for d in ("float32", "int32")}
    assert jnp.isfinite(optax.tree.norm(updates))


def test_maps_params_and_injects_hyperparameters():
    state = optax.tree.map_params(TX, lambda v: v, FIRST)
    jax.tree.map(np.testing.assert_array_equal, state, FIRST)

    injected = optax.inject_hyperparams(kfac, hyperparam_dtype=jnp.float32)(
        0.1, MEASURER, damping=0.1, kl_clip=None, momentum=None
    )
    updates, state = stepper(injected)(GRADS, injected.init(PARAMS), PARAMS, BATCH)
    assert optax.tree.get(state, "kfac_measurements") == 1
    expected, _ = STEP(GRADS, FIRST, PARAMS, BATCH, damping=0.1)
    jax.tree.map(lambda u, e: close(u, -0.1 * e, rtol=1e-4), updates, expected)


def test_bare_arrays_get_diagonal_blocks():
    params = {"w": jnp.ones(3)}
    half = lambda z, y: 0.5 * jnp.mean((z - y) ** 2)
    fn = ModelFactors(
        model_fn=lambda p, x, tape: x @ p["w"],
        criterion=half,
        blocks=make_blocks(params, {}),
        fisher="ggn",
    )
    batch = normal(10, 8, 3), normal(11, 8)
    tx = scale_by_kfac(fn)
    grads = {"w": jnp.arange(3.0)}
    updates, _ = stepper(tx)(grads, tx.init(params), params, batch, damping=0.5)
    close(updates["w"], grads["w"] / (jnp.mean(batch[0] ** 2, axis=0) + 0.5))


def test_a_sharded_batch_gives_the_same_step():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=auto)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    batch = jax.device_put(BATCH, rows)
    params, grads, state = jax.device_put(
        (PARAMS, GRADS, TX.init(PARAMS)), jax.NamedSharding(mesh, jax.P())
    )
    updates, _ = STEP(grads, state, params, batch)
    expected, _ = STEP(GRADS, TX.init(PARAMS), PARAMS, BATCH)
    jax.tree.map(close, updates, expected)


# --- what is refused ---------------------------------------------------------------


def test_missing_params_or_batch_is_refused():
    state = TX.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs params, where it measures"):
        TX.update(GRADS, state, batch=BATCH)
    with pytest.raises(ValueError, match=r"needs the batch .*refresh_every=None"):
        TX.update(GRADS, state, PARAMS)


def test_params_with_holes_are_refused():
    masked = optax.masked(
        TX, {"bias": True, "conv": False, "kernel": True, "scale": True}
    )
    with pytest.raises(ValueError, match=r"scale_by_kfac got params with holes"):
        masked.init(PARAMS)


def test_other_params_are_refused():
    with pytest.raises(ValueError, match=r"params has leaves of shapes \[\(2,\)\]"):
        TX.init({"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": -1.0}, r"damping is -1.0, and must be at least 0"),
        ({"refresh_every": 0}, r"refresh_every is 0: take a whole number .*None"),
        ({"tikhonov": "none"}, r"tikhonov is 'none': choose from 'eigenvalues', 'f"),
    ],
    ids=["damping", "every", "tikhonov"],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_kfac(FN, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_clip": 0.0}, r"kl_clip is 0.0, and must be above 0, or None"),
        ({"momentum": 1.0}, r"momentum is 1.0, and must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1, and must be at least 0"),
        ({"learning_rate": -0.1}, r"learning_rate is -0.1, and must be at least 0"),
    ],
    ids=["clip", "momentum", "decay", "rate"],
)
def test_bad_numbers_of_the_optimiser_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kfac(**{"learning_rate": 0.1, "measurer": FN} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.0}, r"decay is 1.0, and must be in \[0, 1\)"),
        ({"eigen_every": 2.5}, r"eigen_every is 2.5: take a whole number"),
        ({"eigen_every": None}, r"eigen_every is None: take a whole number"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KroneckerMeasurer(FN, **change)


def test_ekfac_has_no_factored_damping():
    with pytest.raises(ValueError, match=r"ekfac=True has no factors left"):
        scale_by_kfac(KroneckerMeasurer(FN, ekfac=True), tikhonov="factored")


def test_a_loss_function_is_no_measurer():
    with pytest.raises(TypeError, match=r"has no blocks: .*nnx_factors"):
        kfac(0.1, loss_fn)


def test_a_damping_is_required():
    tx = scale_by_kfac(FN, refresh_every=None)
    with pytest.raises(ValueError, match=r"scale_by_kfac needs a damping: .*auto_damp"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_a_run_whose_factors_are_never_finite_says_so():
    state = TX.init(PARAMS)
    for _ in range(3):
        _, state = STEP(GRADS, state, PARAMS, NAN_BATCH)
    with pytest.warns(UserWarning, match="most measurements of the Kronecker factors"):
        rmtdamp.check_state(state)


class Foreign:
    """A hand-written factors_fn: the protocol is `blocks` and a call."""

    blocks = BLOCKS

    def __init__(self, factors):
        self.factors = factors

    def __call__(self, params, batch, key, *loss_args):
        return self.factors


def test_factors_from_another_framework():
    constant = Factors(FOUND.kronecker, FOUND.diagonal)
    tx = scale_by_kfac(Foreign(constant), damping=1e-3)
    updates, _ = stepper(tx)(GRADS, tx.init(PARAMS), PARAMS, BATCH)
    expected, _ = STEP(GRADS, FIRST, PARAMS, BATCH)
    jax.tree.map(close, updates, expected)

    tx = scale_by_kfac(KroneckerMeasurer(Foreign(constant), ekfac=True))
    with pytest.raises(
        ValueError, match=r"record of each of the 2 layers, .*returned 0"
    ):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    tx = scale_by_kfac(Foreign(Factors((), FOUND.diagonal)))
    with pytest.raises(ValueError, match=r"\(dense, conv, scale\) need \[\(1, 5, 5\)"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)


def test_refresh_by_hand_needs_one_state():
    with pytest.raises(ValueError, match=r"holds 0 states of a KroneckerMeasurer"):
        rmtdamp.refresh(optax.sgd(0.1).init(PARAMS), MEASURER, PARAMS, BATCH)


def test_convolutions_in_the_step_warn_on_a_cpu():
    # Not jitted: the warning is about the conditional, which an eager call has too.
    tx = scale_by_kfac(FN, damping=0.1)
    with pytest.warns(UserWarning, match=r"KroneckerMeasurer .*refresh_every=None"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
