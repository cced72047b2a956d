"""Lanczos-Newton: eq. 9 against dense algebra, its subspace's life, what it refuses."""

import functools
import warnings
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import log_compilations, quadratic_loss, symmetric

from rmtdamp import (
    DampingLearner,
    RitzMeasurer,
    StabilityFloor,
    auto_damping,
    check_state,
    kfac,
    lanczos_newton,
    refresh,
    scale_by_lanczos,
    set_damping,
)
from rmtdamp.hessian import ggn_matvec, hessian_matvec
from rmtdamp.kronecker import ModelFactors, make_blocks
from rmtdamp.transforms import ScaleByLanczosState

pytestmark = pytest.mark.usefixtures("standard_promotion")

P = 8
PARAMS = {"a": jnp.linspace(1.0, 2.0, 6).reshape(3, 2), "b": jnp.array([-1.0, 0.5])}
SPECTRUM = np.array([-3.0, -0.5, 0.1, 0.4, 1.0, 2.0, 5.0, 20.0])
get = optax.tree.get


def with_spectrum(eigenvalues, dtype=jnp.float64):
    """A batch of one matrix, built from its spectrum: the Hessian of quadratic_loss."""
    p = len(eigenvalues)
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(3), (p, p), jnp.float64))[0]
    matrix = (basis * jnp.asarray(eigenvalues)[None]) @ basis.T
    return ((matrix + matrix.T) / 2).astype(dtype)[None]


BATCH = with_spectrum(SPECTRUM)
GRADS = jax.grad(quadratic_loss)(PARAMS, BATCH)
OTHER = jax.tree.map(jnp.cos, PARAMS)  # a gradient that is not the quadratic's


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


class Newton(NamedTuple):
    """A transformation and what measures for it."""

    measurer: RitzMeasurer
    tx: optax.GradientTransformationExtraArgs

    def init(self, params):
        return self.tx.init(params)

    def update(self, *args, **kwargs):
        return self.tx.update(*args, **kwargs)


def newton(loss_fn=quadratic_loss, damping=0.1, sharp_divisor=1.0, **options):
    refresh_every = options.pop("refresh_every", None)
    measurer = RitzMeasurer(loss_fn, **{"num_steps": P} | options)
    tx = scale_by_lanczos(
        measurer,
        damping=damping,
        sharp_divisor=sharp_divisor,
        refresh_every=refresh_every,
    )
    return Newton(measurer, tx)


def step(made, grads=GRADS, batch=BATCH, params=PARAMS, **extras):
    """One update after a refresh by hand."""
    state = refresh(made.init(params), made.measurer, params, batch, grads=grads)
    return made.update(grads, state, params, **extras)


def absolute_inverse(matrix, damping, g):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return vectors @ ((vectors.T @ g) / (np.abs(values) + damping))


@pytest.mark.parametrize("start", ["random", "gradient"])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_on_a_quadratic_it_is_the_damped_absolute_newton_step(start, damping):
    """The issue's figure: 1e-5. Distinct eigenvalues of both signs, m = P."""
    tx = newton(damping=damping, start=start)
    for grads in (GRADS, OTHER):
        updates, state = step(tx, grads)
        expected = absolute_inverse(BATCH[0], damping, flat(grads))
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-8)
    np.testing.assert_allclose(get(state, "ritz_values"), SPECTRUM, rtol=1e-8)


def test_a_floor_follows_the_ritz_values_of_the_step_before():
    """Curvature that grows a hundredfold between two measurements of the rule."""
    loss_fn = lambda params, batch, scale: scale * quadratic_loss(params, batch)
    rate = 1e-3
    rule = StabilityFloor.for_lanczos(momentum=0.0)
    learner = DampingLearner(loss_fn, rule=rule, floor=0.0)
    measurer = RitzMeasurer(loss_fn, num_steps=P)
    tx = auto_damping(
        lanczos_newton(rate, measurer, momentum=None),
        learner,
        learning_rate=rate,
        refresh_every=None,
    )
    scaled = lambda scale: {"batch": BATCH, "loss_args": (jnp.asarray(scale),)}
    state = refresh(tx.init(PARAMS), learner, PARAMS, **scaled(1.0))
    held = float(get(state, "max_eigenvalue"))
    top = np.abs(SPECTRUM).max()
    dampings = []
    for scale in (1.0, 1.0, 100.0, 100.0, 1.0, 1.0):
        _, state = tx.update(GRADS, state, PARAMS, **scaled(scale))
        dampings.append(float(get(state, "damping")))
    # c alpha / (2 f) = alpha / 2; at first there is the power iteration alone.
    expected = [held, top, top, 100 * top, 100 * top, top]
    np.testing.assert_allclose(dampings, rate / 2 * np.array(expected), rtol=1e-6)
    assert held <= top
    assert float(get(state, "max_eigenvalue")) == held


@pytest.mark.parametrize(("rate", "ahead"), [(1e-3, 0), (0.1, 9), (0.1, 0)])
def test_its_floor_sees_a_rising_rate_ahead(rate, ahead):
    """Momentum keeps steps that were divided for the rate of their own time."""
    schedule = lambda step: rate * step / 9 if ahead else rate * (1 - step / 100)
    measurer = RitzMeasurer(quadratic_loss, num_steps=3, start="gradient")
    rule = StabilityFloor.for_lanczos(momentum=0.9)
    learner = DampingLearner(quadratic_loss, rule=rule, floor=1e-9)
    tx = auto_damping(
        lanczos_newton(schedule, measurer), learner, learning_rate=schedule
    )
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    # c alpha lambda / (2 f), f = 1 + rho and c = f / (1 - rho).
    expected = 5 * rate * get(state, "max_eigenvalue")
    np.testing.assert_allclose(get(state, "damping"), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kfac", "newton", "heavy"])
def test_a_hard_schedule_or_momentum_trains_under_the_floor(kind):
    """With the rate of the step alone the losses went to 10 and 10,000.

    "heavy" is KFAC with momentum 0.99: with a safety factor of 8 it went to 13.
    """
    inputs = jax.random.normal(jax.random.key(1), (1024, 12))
    labels = jnp.argmax(inputs[:, :5] ** 2, axis=1)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        name: {"kernel": jax.random.normal(k, shape) / 4, "bias": jnp.zeros(shape[1])}
        for name, k, shape in zip("ab", keys, ((12, 32), (32, 5)), strict=True)
    }

    def model_fn(params, x, tape=None):
        for name in "ab":
            z = x @ params[name]["kernel"] + params[name]["bias"][None]
            z = tape.linear(name, x, z) if tape else z
            x = jax.nn.relu(z)
        return z

    def criterion(logits, labels):
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean()

    def loss_fn(params, batch):
        return criterion(model_fn(params, batch[0]), batch[1])

    floor, heavy = StabilityFloor, kind == "heavy"
    rate = 3e-3 if heavy else optax.warmup_cosine_decay_schedule(0.0, 0.3, 50, 300)
    momentum = 0.99 if heavy else 0.9
    layers = {x: {"kernel": f"{x}/kernel", "bias": f"{x}/bias"} for x in "ab"}
    if kind == "newton":
        inner, rule = lanczos_newton(rate, RitzMeasurer(loss_fn)), floor.for_lanczos()
    else:
        blocks = make_blocks(params, layers)
        factors = ModelFactors(model_fn=model_fn, criterion=criterion, blocks=blocks)
        inner, rule = kfac(rate, factors, momentum=momentum), floor(momentum=momentum)
    learner = DampingLearner(loss_fn, rule=rule)
    tx = auto_damping(inner, learner, learning_rate=rate)

    def step(carry, places):
        params, state = carry
        batch = inputs[places], labels[places]
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    places = jax.random.randint(jax.random.key(2), (300, 64), 0, 1024)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, places)[1])
    losses = train((params, tx.init(params)))
    assert jnp.max(losses) < 2 * losses[0]
    assert jnp.mean(losses[-20:]) < losses[0] / 4


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_its_floor_holds_where_batches_have_other_hessians(momentum):
    """Matrix factorisation: a batch sees few rows, and many directions are as sharp."""
    rate, key = 0.1, jax.random.split(jax.random.key(0), 3)
    true = [
        jax.random.normal(k, (n, 8)) / 2 for k, n in zip(key, (60, 40), strict=False)
    ]
    places = jax.random.randint(key[2], (20, 2, 64), 0, 40)

    def loss_fn(params, batch):
        rows, columns = batch
        found, exact = (jnp.sum(u[rows] * v[columns], 1) for u, v in (params, true))
        return jnp.mean((found - exact) ** 2)

    measurer = RitzMeasurer(loss_fn, num_steps=10)
    rule = StabilityFloor.for_lanczos(momentum or 0.0)
    learner = DampingLearner(loss_fn, rule=rule, floor=1e-8)
    tx = lanczos_newton(rate, measurer, momentum=momentum)
    tx = auto_damping(tx, learner, learning_rate=rate)
    params = [u * 0.2 for u in true]

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    batches = jnp.tile(places, (8, 1, 1))
    batches = batches[:, 0], batches[:, 1]
    losses = jax.jit(lambda c: jax.lax.scan(step, c, batches)[1])(
        (params, tx.init(params))
    )
    assert jnp.max(losses) < 5 * losses[0]
    assert jnp.mean(losses[-20:]) < losses[0] / 2


@pytest.mark.slow
def test_a_start_at_the_gradient_needs_one_step_per_eigenvalue():
    """Three eigenvalues: the Krylov space of g holds the whole step, m = 3 or P. From
    a random start each counts once, and the rest of the gradient moves at 1/delta."""
    batch = with_spectrum([-1.0] * 3 + [2.0] * 3 + [7.0] * 2)
    grads = jax.grad(quadratic_loss)(PARAMS, batch)
    expected = absolute_inverse(batch[0], 1e-3, flat(grads))
    for num_steps in (3, P):
        tx = newton(num_steps=num_steps, damping=1e-3, start="gradient")
        updates, state = step(tx, grads, batch)
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-8)
    vectors = get(state, "ritz_vectors")
    assert all(jnp.all(leaf[3:] == 0) for leaf in jax.tree.leaves(vectors))
    random, _ = step(newton(damping=1e-3), grads, batch)
    assert np.linalg.norm(flat(random)) > 100 * np.linalg.norm(expected)


@pytest.mark.parametrize("sharp_divisor", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_equation_9_on_a_subspace(num_steps, sharp_divisor):
    """An independent computation: QR of the Krylov matrix, dense Ritz pairs."""
    hessian, g, damping = np.asarray(BATCH[0]), flat(OTHER), 0.1
    krylov = [np.arange(1.0, P + 1)]
    for _ in range(num_steps - 1):
        krylov.append(hessian @ krylov[-1])
    basis = np.linalg.qr(np.stack(krylov, axis=1))[0]
    values, vectors = np.linalg.eigh(basis.T @ hessian @ basis)
    vectors = basis @ vectors
    along = vectors.T @ g
    expected = vectors @ (along / (np.abs(values) + damping)) / sharp_divisor
    expected = expected + (g - vectors @ along) / damping

    start = lambda key, updates: jax.flatten_util.ravel_pytree(updates)[1](
        jnp.arange(1.0, P + 1)
    )
    tx = newton(num_steps=num_steps, sharp_divisor=sharp_divisor, start=start)
    updates, state = step(tx, OTHER)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-8)
    np.testing.assert_allclose(get(state, "ritz_values"), values, rtol=1e-8)


@pytest.mark.slow
def test_a_padded_ritz_vector_contributes_nothing():
    """I + 100 u u^T in float32, P = 200, m = 20: the Krylov space has two dimensions,
    in which the step is exact, and outside it is g / delta."""
    keys = jax.random.split(jax.random.key(0), 2)
    u, x = (jax.random.normal(key, (200,), jnp.float32) for key in keys)
    u = u / jnp.linalg.norm(u)
    loss = lambda x, batch: 0.5 * jnp.sum(x * x) + 50 * jnp.dot(u, x) ** 2
    tx = newton(loss, num_steps=20, damping=0.5)
    updates, state = step(tx, x, jnp.ones((1, 1), jnp.float32), x)
    rows = np.asarray(get(state, "ritz_vectors"))
    assert np.all(rows[2:] == 0)
    np.testing.assert_allclose(rows[:2] @ rows[:2].T, np.eye(2), atol=1e-5)
    inside = rows[:2].T @ ((rows[:2] @ x) / np.array([1.5, 101.5]))
    expected = inside + (x - rows[:2].T @ (rows[:2] @ x)) / 0.5
    np.testing.assert_allclose(updates, expected, atol=2e-5)


def test_rounding_is_not_divided_by_a_small_damping():
    """Float32, delta = 1e-12, all of g in the Krylov space: what two projections leave
    is 1e-7 of g and would be multiplied by 1e12."""
    params, grads, batch = jax.tree.map(
        lambda x: x.astype(jnp.float32), (PARAMS, GRADS, BATCH)
    )
    tx = newton(damping=1e-12, start="gradient")
    updates, _ = step(tx, grads, batch, params)
    expected = absolute_inverse(BATCH[0], 0, flat(GRADS))
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_steps", [20, 40])
def test_a_hessian_whose_spectrum_decays_to_rounding(num_steps):
    """With all of a gradient in few directions the step is exact, and stays so."""
    x, centres = jnp.linspace(-1, 1, 64), jnp.linspace(-1, 1, 40)
    features = jnp.exp(-(((x[:, None] - centres[None]) ** 2) / 2)).astype(jnp.float32)
    batch = features, jnp.sin(3 * x).astype(jnp.float32)
    loss_fn = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    params = jnp.zeros(40, jnp.float32)
    grads = jax.grad(loss_fn)(params, batch)
    exact = np.asarray(features, float)
    exact = np.linalg.solve(exact.T @ exact / 64 + 0.01 * np.eye(40), grads)
    for seed in range(4):
        measurer = RitzMeasurer(loss_fn, num_steps=num_steps, seed=seed)
        tx = scale_by_lanczos(measurer, damping=0.01)
        updates, _ = tx.update(grads, tx.init(params), params, batch=batch)
        error = np.linalg.norm(updates - exact) / np.linalg.norm(exact)
        assert error < 1e-3


def test_gauss_newton_in_place_of_the_hessian():
    """A linear model with squared error: the two are the same matrix."""
    inputs = jax.random.normal(jax.random.key(0), (20, P), jnp.float64)
    targets = jnp.cos(inputs[:, 0])
    model = lambda params, x: x @ jax.flatten_util.ravel_pytree(params)[0]
    mean_square = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    whole = lambda params, batch: mean_square(model(params, batch[0]), batch[1])
    by_ggn, _ = step(
        newton(mean_square, matvec_fn=functools.partial(ggn_matvec, model)),
        batch=(inputs, targets),
    )
    by_hessian, _ = step(newton(whole), batch=(inputs, targets))
    chex.assert_trees_all_close(by_ggn, by_hessian, rtol=1e-8)
    hessian = 2 * inputs.T @ inputs / 20
    expected = absolute_inverse(hessian, 0.1, flat(GRADS))
    np.testing.assert_allclose(flat(by_ggn), expected, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["given", "measured"])
def test_cleaning_brings_ritz_values_nearer_to_the_true_curvature(given):
    """Four spikes in noise of 64 examples. The oracle is phi^T H_true phi, which theory
    promises as P grows; at this size a quarter of the distance remains, asked: half."""
    p, count = 100, 64
    true = np.diag(np.concatenate([[-4.0, 3.0, 5.0, 8.0], np.zeros(p - 4)]))
    noise = 2.0 * symmetric(jax.random.key(1), count, p)
    batch = true[None] + noise
    # Var of an off-diagonal entry is 4/2, of the batch's 2/count, and s^2 = P times it
    variance = (p + 1) * 2.0 / count if given else None
    tx = newton(num_steps=20, cleaning="rotationally_invariant", variance=variance)
    x = jnp.ones(p)
    _, state = step(tx, x, batch, x)
    rows = np.asarray(get(state, "ritz_vectors"))
    oracle = np.einsum("ip,pq,iq->i", rows, true, rows)
    error = lambda name: np.linalg.norm(get(state, name) - oracle)
    assert error("cleaned_ritz_values") < 0.5 * error("ritz_values")


def test_cleaning_of_no_noise_changes_nothing():
    tx = newton(cleaning="rotationally_invariant", variance=0.0)
    plain, _ = step(newton())
    cleaned, state = step(tx)
    chex.assert_trees_all_equal(plain, cleaned)
    chex.assert_trees_all_equal(state.measured[0], state.measured[1])


def test_in_the_step_it_is_what_it_is_by_hand_and_compiles_once():
    tx = newton(refresh_every=2, num_steps=4)
    by_hand = newton(refresh_every=None, num_steps=4)
    state, hand = tx.init(PARAMS), by_hand.init(PARAMS)

    @jax.jit
    def take(params, state, damping):
        return tx.update(GRADS, state, params, batch=BATCH, damping=damping)

    for i in range(4):
        params = jax.tree.map(lambda x, i=i: x + i, PARAMS)
        damping = jnp.asarray(0.1 + i)
        with log_compilations() as logs:
            updates, state = take(params, state, damping)
        assert i == 0 or not logs
        if i % 2 == 0:
            hand = refresh(hand, by_hand.measurer, params, BATCH)
        expected, hand = by_hand.update(GRADS, hand, params, damping=damping)
        chex.assert_trees_all_close(updates, expected, rtol=1e-8)
    chex.assert_trees_all_close(state, hand, rtol=1e-8, atol=1e-8)
    assert get(state, "subspace_refreshes") == 2
    assert get(state, "subspace_rejections") == 0


def test_a_refresh_by_hand_of_new_data_compiles_nothing():
    tx = newton()
    state = refresh(tx.init(PARAMS), tx.measurer, PARAMS, BATCH)
    params, batch = jax.tree.map(jnp.sin, PARAMS), 2 * BATCH
    with log_compilations() as logs:
        refresh(state, tx.measurer, params, batch)
    assert not logs


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: set_damping(tx, optax.linear_schedule(1.0, 0.1, 4)),
        lambda tx: auto_damping(tx, DampingLearner(quadratic_loss, floor=0.1)),
    ],
    ids=["set_damping", "auto_damping"],
)
def test_stands_inside_the_owners(wrap):
    """In a chain, scanned; and the step is that of the damping in the state."""
    inner = newton(refresh_every=None, start="gradient")
    tx = optax.chain(optax.clip_by_global_norm(1e3), wrap(inner.tx), optax.scale(-0.5))
    batch = BATCH + symmetric(jax.random.key(5), 8, P)
    state = refresh(tx.init(PARAMS), inner.measurer, PARAMS, batch, grads=GRADS)

    def body(state, _):
        updates, state = tx.update(GRADS, state, PARAMS, batch=batch)
        return state, updates

    state, updates = jax.jit(lambda s: jax.lax.scan(body, s, length=3))(state)
    last = jax.tree.map(lambda u: u[-1], updates)
    hessian = jnp.mean(batch, axis=0)
    expected = absolute_inverse(hessian, float(get(state, "damping")), flat(GRADS))
    np.testing.assert_allclose(flat(last), -0.5 * expected, rtol=1e-8)
    assert get(state, "damping_fallbacks") == 0


def test_lanczos_newton_is_followed_by_the_learning_rate():
    measurer = RitzMeasurer(quadratic_loss, num_steps=P)
    tx = lanczos_newton(0.5, measurer, damping=0.1, refresh_every=None)
    rated, _ = step(Newton(measurer, tx))
    plain, _ = step(newton())
    chex.assert_trees_all_close(rated, jax.tree.map(lambda u: -0.5 * u, plain))


def test_a_schedule_of_the_damping():
    tx = newton(damping=optax.linear_schedule(1.0, 0.0, 2))
    first, state = step(tx)
    chex.assert_trees_all_close(first, step(newton(damping=1.0))[0], rtol=1e-8)
    second, state = tx.update(GRADS, state, PARAMS)
    chex.assert_trees_all_close(second, step(newton(damping=0.5))[0], rtol=1e-8)
    # Where it ends at 0 there is nothing to fall back on: no step, and counted.
    third, state = tx.update(GRADS, state, PARAMS)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(third))
    assert get(state, "damping_fallbacks") == 1


@pytest.mark.parametrize("bad", [0.0, -1.0, jnp.nan])
def test_a_bad_damping_falls_back_on_the_constructors_and_is_counted(bad):
    tx = newton()
    expected, state = step(tx)
    updates, state = tx.update(GRADS, state, PARAMS, damping=jnp.asarray(bad))
    chex.assert_trees_all_equal(updates, expected)
    assert get(state, "damping_fallbacks") == 1


def test_a_refresh_that_is_not_finite_keeps_the_last_good_subspace():
    tx = newton()
    good = refresh(tx.init(PARAMS), tx.measurer, PARAMS, BATCH)
    bad = refresh(good, tx.measurer, PARAMS, BATCH * jnp.nan)
    chex.assert_trees_all_equal(good.measured[:3], bad.measured[:3])
    assert get(bad, "subspace_refreshes") == 2
    assert get(bad, "subspace_rejections") == 1


@pytest.mark.parametrize("value", [0.0, jnp.nan])
def test_a_gradient_that_spans_nothing_gives_way_to_a_random_start(value):
    tx = newton(start="gradient")
    grads = jax.tree.map(lambda g: g * value, GRADS)
    updates, state = step(tx, grads)
    np.testing.assert_allclose(get(state, "ritz_values"), SPECTRUM, rtol=1e-8)
    assert np.all(np.isnan(flat(updates)) if np.isnan(value) else flat(updates) == 0)


def test_without_a_subspace_or_without_params():
    tx = newton(damping=0.5)
    updates, _ = tx.update(GRADS, tx.init(PARAMS))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: g / 0.5, GRADS))
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state.count == 1


def test_low_precision_params_keep_a_float32_subspace():
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    updates, state = step(newton(), cast(GRADS), cast(BATCH), cast(PARAMS))
    chex.assert_trees_all_equal_dtypes(updates, cast(GRADS))
    chex.assert_trees_all_equal_shapes(updates, GRADS)
    vectors = jax.tree.leaves(state.measured[:3])
    assert all(v.dtype == jnp.float32 for v in vectors)
    np.testing.assert_allclose(get(state, "ritz_values")[-1], 20, rtol=0.02)


def test_the_state_restores_and_maps():
    state = step(newton())[1]
    assert isinstance(state, ScaleByLanczosState)
    seen = []
    mapped = optax.tree.map_params(
        newton().tx, lambda v: seen.append(v.shape) or v, state
    )
    chex.assert_trees_all_equal(mapped, state)
    assert sorted(seen) == [(P, 2), (P, 3, 2)]


def test_warns_of_convolutions_in_the_step():
    def loss(kernel, batch):
        out = jax.lax.conv_general_dilated(batch, kernel, (1, 1), "SAME")
        return jnp.mean(jnp.tanh(out) ** 2)

    kernel, batch = jnp.ones((2, 1, 1, 1)), jnp.ones((2, 1, 2, 2))
    tx = newton(loss, num_steps=1, refresh_every=1)
    if jax.default_backend() == "cpu":
        with pytest.warns(UserWarning, match=r"RitzMeasurer .* call rmtdamp.refresh"):
            jax.eval_shape(
                lambda s: tx.update(kernel, s, kernel, batch=batch), tx.init(kernel)
            )


CONSTRUCTOR = {
    "damping": ({"damping": 0.0}, r"damping is 0.0, .* divided by"),
    "divisor": ({"sharp_divisor": -1.0}, r"sharp_divisor is -1.0, and must be above 0"),
    "no steps": ({"num_steps": 0}, r"num_steps is 0: take a whole number"),
    "traced steps": ({"num_steps": jnp.ones(())}, r"num_steps is .*: take a whole"),
    "every": ({"refresh_every": 0}, r"refresh_every is 0: take a whole number"),
    "start": ({"start": "zero"}, r"start is 'zero': choose 'random', 'gradient'"),
    "cleaning": ({"cleaning": "soap"}, r"cleaning is 'soap': choose from None, 'rotat"),
    "cleaning, start": (
        {"cleaning": "rotationally_invariant", "start": "gradient"},
        r"choose start='random'",
    ),
    "cleaning, other matrix": (
        {
            "cleaning": "rotationally_invariant",
            "matvec_fn": functools.partial(hessian_matvec),
        },
        r"pass the variance of its noise",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_refuses_at_construction(name):
    options, match = CONSTRUCTOR[name]
    with pytest.raises(ValueError, match=match):
        newton(**options)


HOLES = {"a": PARAMS["a"], "b": optax.MaskedNode()}
UPDATE = {
    "no params": (None, {"batch": BATCH}, r"needs params"),
    "no batch": (PARAMS, {}, r"needs the batch .* rmtdamp.refresh by hand"),
    "holes": (HOLES, {"batch": BATCH}, r"scale_by_lanczos got params with holes"),
    "empty batch": (PARAMS, {"batch": BATCH[:0]}, r"batch holds no examples"),
    "damping": (PARAMS, {"batch": BATCH, "damping": 0.0}, r"damping is 0.0"),
}


@pytest.mark.parametrize("name", UPDATE)
def test_refuses_at_update(name):
    params, extras, match = UPDATE[name]
    tx = newton(refresh_every=1)
    with pytest.raises(ValueError, match=match):
        tx.update(GRADS, tx.init(PARAMS), params, **extras)


def test_refuses_a_refresh_by_hand():
    tx = newton(start="gradient")
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"hand over what measures, with all its sett"):
        refresh(state, tx.tx, PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"pass grads"):
        refresh(state, tx.measurer, PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"holds 2 states of a RitzMeasurer"):
        refresh((state, state), newton().measurer, PARAMS, BATCH)


def test_a_run_whose_subspace_is_never_finite_says_so():
    tx = newton(refresh_every=1)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH * jnp.nan)
    with pytest.warns(UserWarning, match="most measurements of the Ritz subspace"):
        check_state(state)


@pytest.mark.parametrize(("good", "bad"), [(3, 2), (2, 3)])
def test_a_run_that_diverges_says_so(good, bad):
    tx = newton(refresh_every=None)
    state = tx.init(PARAMS)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for batch in [BATCH] * good + [jnp.nan * BATCH] * bad:
            state = refresh(state, tx.measurer, PARAMS, batch, grads=GRADS)
    assert get(state, "subspace_rejections") == bad
    said = [x for x in caught if "most measurements of the Ritz" in str(x.message)]
    assert len(said) == (bad > good)


def test_products_are_of_the_loss_in_training_mode():
    """Where the loss knows it; what is cleaned of noise stays a mean over examples."""
    loss, other = (lambda p, b, c=c: c * jnp.sum(p**2) / 2 for c in (1.0, 3.0))
    vars(loss)["in_training"] = other
    params, batch = jnp.arange(1.0, 9.0), jnp.ones((8, 1))
    for cleaning, value in ((None, 3.0), ("rotationally_invariant", 1.0)):
        measurer = RitzMeasurer(loss, num_steps=1, cleaning=cleaning)
        tx = lanczos_newton(0.1, measurer, damping=0.1)
        state = refresh(tx.init(params), measurer, params, batch)
        found = optax.tree.get(state, "ritz_values")
        np.testing.assert_allclose(found, value, rtol=1e-5)
