"""KFAC's update against dense solves; its clocks, its damping, what it refuses."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtdamp
from rmtdamp.hessian._factors import FactorsFn
from rmtdamp.hessian._kronecker import Factors, make_blocks, second_moments, to_matrix
from rmtdamp.transforms._kfac import refresh_factors, scale_by_kfac
from rmtdamp.transforms._kfac_optimizer import kfac

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Few and small, and one test looks for the warning itself.
    pytest.mark.filterwarnings("ignore:the (model|loss) contains convolutions"),
]
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


class Silent:
    def linear(self, name, x, y):
        return y

    def convolution(self, name, x, y, *args, **kwargs):
        return y


def loss_fn(params, batch):
    return cross_entropy(model_fn(params, batch[0], Silent()), batch[1])


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
FN = FactorsFn(
    model_fn=model_fn, loss_fn=cross_entropy, blocks=BLOCKS, fisher="empirical"
)
FOUND = jax.jit(lambda key: FN(PARAMS, BATCH, key))(jax.random.key(5))
GRADS = jax.jit(jax.grad(loss_fn))(PARAMS, BATCH)
NAN_BATCH = BATCH[0].at[0].set(jnp.nan), BATCH[1]


def stepper(tx):
    return jax.jit(lambda g, s, p, batch, **kw: tx.update(g, s, p, batch=batch, **kw))


TX = scale_by_kfac(FN, factor_every=2, eigen_every=4)
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
    assert state.kfac_measurements == 1

    def curvature(layer, k):
        a, g = FOUND.kronecker[layer]
        return plus(jnp.kron(a[k], g[k]), damping)

    check_solves(updates, curvature)
    close(updates["scale"], GRADS["scale"] / (FOUND.diagonal[0] + damping))


def test_factored_damping_is_the_dense_solve():
    step = stepper(scale_by_kfac(FN, tikhonov="factored", factor_every=None))
    updates, _ = step(GRADS, FIRST, PARAMS, BATCH, damping=0.01)

    def curvature(layer, k):
        a, g = (factor[k] for factor in FOUND.kronecker[layer])
        pi = jnp.sqrt(jnp.trace(a) / len(a) / (jnp.trace(g) / len(g)))
        return jnp.kron(plus(a, pi * 0.1), plus(g, 0.1 / pi))

    check_solves(updates, curvature)


def test_ekfac_is_the_dense_solve_with_the_measured_diagonal():
    tx = scale_by_kfac(FN, ekfac=True)
    updates, state = stepper(tx)(GRADS, tx.init(PARAMS), PARAMS, BATCH, damping=0.01)

    def curvature(layer, k):
        basis = state.bases[layer]
        q = jnp.kron(basis.inputs[k], basis.outputs[k])
        moments = second_moments(FOUND.records[layer], basis)[k].reshape(-1)
        return plus(q @ jnp.diag(moments) @ q.T, 0.01)

    check_solves(updates, curvature)


def test_averages_are_debiased_and_the_clocks_keep_time():
    state, other = FIRST, (BATCH[0] + 1, BATCH[1])
    # The same but for what the compiler fuses.
    exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)
    jax.tree.map(exact, state.factors, FOUND.kronecker)
    seen = []
    for _ in range(4):
        _, state = STEP(GRADS, state, PARAMS, other)
        seen.append((int(state.kfac_measurements), int(state.eigen_refreshes)))
    assert seen == [(1, 1), (2, 1), (2, 1), (3, 2)]
    second = jax.jit(lambda key: FN(PARAMS, other, key))(jax.random.key(6))
    # Weights 0.05 * (0.95^2, 0.95, 1), over their sum.
    w = np.array([0.95**2, 0.95 + 1]) / (0.95**2 + 0.95 + 1)
    jax.tree.map(
        lambda s, x, y: close(s, w[0] * x + w[1] * y),
        (state.factors, state.diagonal),
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
    jax.tree.map(close, final.factors, state.factors)
    assert STEP._cache_size() <= 3  # without damping=, with it, on other weak types


def test_a_measurement_that_is_not_finite_is_counted_and_nothing_else():
    state = FIRST
    for _ in range(2):
        _, state = STEP(GRADS, state, PARAMS, NAN_BATCH)
    assert (state.kfac_measurements, state.kfac_rejections) == (2, 1)
    kept = lambda s: (s.factors, s.diagonal, s.bases, s.factor_weight)
    jax.tree.map(np.testing.assert_array_equal, kept(state), kept(FIRST))


def test_before_any_good_measurement_gradients_are_kept():
    updates, state = STEP(GRADS, TX.init(PARAMS), PARAMS, NAN_BATCH, damping=0.25)
    assert (state.kfac_rejections, state.eigen_refreshes) == (1, 0)
    jax.tree.map(lambda u, g: close(u, g / 1.25), updates, GRADS)
    # The next good one is decomposed at once, whatever the clock says.
    for _ in range(2):
        _, state = STEP(GRADS, state, PARAMS, BATCH, damping=0.25)
    assert (state.kfac_measurements, state.eigen_refreshes) == (2, 1)


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


def test_kl_clip_bounds_the_step_and_leaves_small_ones():
    rate = optax.constant_schedule(0.5)

    @jax.jit
    def clip(bound):
        tx = scale_by_kfac(FN, kl_clip=bound, learning_rate=rate, factor_every=None)
        return tx.update(GRADS, FIRST, PARAMS)[0]

    free, _ = STEP(GRADS, FIRST, PARAMS, BATCH)
    clipped = clip(1e-3)
    length = lambda u: 0.25 * optax.tree.vdot(u, GRADS)
    assert length(free) > 1e-2
    # (nu u)^T F (nu u), which is nu^2 u^T g.
    close(length(clipped) ** 2 / length(free), 1e-3)
    jax.tree.map(
        lambda c, f: close(c, f * jnp.sqrt(1e-3 / length(free))), clipped, free
    )
    same = clip(1e3)
    jax.tree.map(close, same, free)


def test_kfac_is_clip_then_decay_then_momentum_then_rate():
    tx = kfac(0.1, FN, weight_decay=0.01, factor_every=None)
    step = stepper(tx)
    clipped = stepper(
        scale_by_kfac(FN, kl_clip=0.01, learning_rate=0.1, factor_every=None)
    )
    state, inner = (FIRST, *tuple(tx.init(PARAMS))[1:]), FIRST
    momentum = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(2):
        updates, state = step(GRADS, state, PARAMS, BATCH)
        u, inner = clipped(GRADS, inner, PARAMS, BATCH)
        momentum = jax.tree.map(
            lambda m, u, p: 0.9 * m + u + 0.01 * p, momentum, u, PARAMS
        )
        jax.tree.map(lambda u, m: close(u, -0.1 * m), updates, momentum)


def test_small_damping_on_a_quadratic_is_a_newton_step():
    def linear(params, x, tape):
        return tape.linear("w", x, x @ params["w"])

    half = lambda z, y: 0.5 * jnp.mean(jnp.sum((z - y) ** 2, axis=1))
    params = {"w": normal(7, 4, 3)}
    batch = normal(8, 16, 4), normal(9, 16, 3)
    fn = FactorsFn(
        model_fn=linear,
        loss_fn=half,
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
    tx = rmtdamp.auto_damping(scale_by_kfac(FN, factor_every=None), learner, every=None)
    state = tx.init(PARAMS)
    state = refresh_factors(state, FN, PARAMS, BATCH)
    state = rmtdamp.refresh_damping(state, learner, PARAMS, BATCH)
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


def test_learning_in_the_step_hands_the_batch_on():
    tx = rmtdamp.auto_damping(TX, loss_fn, every=2)
    _, state = stepper(tx)(GRADS, tx.init(PARAMS), PARAMS, BATCH)
    assert optax.tree.get(state, "refresh_attempts") == 1
    jax.tree.map(close, optax.tree.get(state, "factors"), FOUND.kronecker)


def test_dtypes_and_state_stay():
    dtype = jnp.bfloat16
    params, grads, x = (
        jax.tree.map(lambda v: v.astype(dtype), t) for t in (PARAMS, GRADS, BATCH[0])
    )
    tx = kfac(0.1, FN, factor_every=2, eigen_every=2)

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
    assert dtypes == {jnp.dtype(d) for d in ("float32", "int32", "uint32")}
    assert jnp.isfinite(optax.tree.norm(updates))


def test_maps_params_and_injects_hyperparameters():
    state = optax.tree.map_params(TX, lambda v: v, FIRST)
    jax.tree.map(np.testing.assert_array_equal, state, FIRST)

    static = ("factors_fn", "tikhonov", "ekfac", "nesterov")
    injected = optax.inject_hyperparams(
        kfac, static_args=static, hyperparam_dtype=jnp.float32
    )(0.1, FN, damping=0.1, kl_clip=None, momentum=None)
    updates, state = stepper(injected)(GRADS, injected.init(PARAMS), PARAMS, BATCH)
    assert optax.tree.get(state, "kfac_measurements") == 1
    expected, _ = STEP(GRADS, FIRST, PARAMS, BATCH, damping=0.1)
    jax.tree.map(lambda u, e: close(u, -0.1 * e, rtol=1e-4), updates, expected)


def test_bare_arrays_get_diagonal_blocks():
    params = {"w": jnp.ones(3)}
    half = lambda z, y: 0.5 * jnp.mean((z - y) ** 2)
    fn = FactorsFn(
        model_fn=lambda p, x, tape: x @ p["w"],
        loss_fn=half,
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
    with pytest.raises(ValueError, match=r"needs the batch .*factor_every=None"):
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
        ({"factor_decay": 1.0}, r"factor_decay is 1.0, and must be in \[0, 1\)"),
        ({"factor_every": 0}, r"factor_every is 0: take a whole number .*None"),
        ({"eigen_every": 2.5}, r"eigen_every is 2.5: take a whole number"),
        ({"eigen_every": 15}, r"eigen_every is 15, and must be a multiple of .*10"),
        ({"tikhonov": "none"}, r"tikhonov is 'none': choose from eigenvalues, fact"),
        ({"tikhonov": "factored", "ekfac": True}, r"ekfac=True has no factors left"),
    ],
    ids=["damping", "decay", "every", "eigen", "multiple", "tikhonov", "ekfac"],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_kfac(FN, **change)


class Foreign:
    """A hand-written factors_fn: the protocol is `blocks` and a call."""

    blocks = BLOCKS

    def __init__(self, factors):
        self.factors = factors

    def __call__(self, params, batch, key, *loss_args):
        return self.factors


def test_factors_from_another_framework():
    constant = Factors(FOUND.kronecker, FOUND.diagonal)
    tx = scale_by_kfac(Foreign(constant))
    updates, _ = stepper(tx)(GRADS, tx.init(PARAMS), PARAMS, BATCH)
    expected, _ = STEP(GRADS, FIRST, PARAMS, BATCH)
    jax.tree.map(close, updates, expected)

    tx = scale_by_kfac(Foreign(constant), ekfac=True)
    with pytest.raises(
        ValueError, match=r"record of each of the 2 layers, .*returned 0"
    ):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    tx = scale_by_kfac(Foreign(Factors((), FOUND.diagonal)))
    with pytest.raises(ValueError, match=r"\(dense, conv, scale\) need \[\(1, 5, 5\)"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)


def test_refresh_by_hand_needs_one_state():
    with pytest.raises(ValueError, match=r"holds 0 KFAC states"):
        refresh_factors(optax.sgd(0.1).init(PARAMS), FN, PARAMS, BATCH)


def test_convolutions_in_the_step_warn_on_a_cpu():
    # Not jitted: the warning is about the conditional, which an eager call has too.
    tx = scale_by_kfac(FN)
    with pytest.warns(UserWarning, match=r"contains convolutions.*refresh_factors"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
