"""Rules that see more than moments: their numbers, what they are told and hold."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp
from rmtdamp import DampingLearner, auto_damping, scale_by_adam_shrinkage
from rmtdamp.damping import (
    Evidence,
    GradientNorm,
    LargestFraction,
    LevenbergMarquardt,
    Maximum,
    MeanFraction,
    Shrinkage,
    StabilityFloor,
    Sum,
    initial_damping,
    is_relative,
    learn_damping,
    needs,
    needs_of,
    relative_target,
)
from rmtdamp.hessian import HessianMoments
from rmtdamp.kronecker import ModelFactors, Tape, make_blocks

pytestmark = pytest.mark.usefixtures("standard_promotion")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
get = optax.tree.get

CURVATURE = jnp.array([3.0, -8.0, 1.0, 0.5], jnp.float32)
ROWS = 1 + 0.1 * jnp.cos(jnp.arange(16, dtype=jnp.float32))
PARAMS = jnp.ones(4, jnp.float32)


def loss_fn(params, batch):
    """The Hessian is diag(CURVATURE) times the mean of the batch."""
    return jnp.mean(batch) * jnp.sum(CURVATURE * params**2) / 2


LAMBDA = 8 * float(jnp.mean(ROWS))
FLOOR = StabilityFloor(safety=2.0, momentum=0.9, averaged=True)
AWARE = dataclasses.replace(FLOOR, preconditioned=True)


def learner_of(rule, **options):
    return DampingLearner(loss_fn, rule=rule, floor=0.0, **options)


def take_steps(tx, num, state=None, params=PARAMS, batch=ROWS, **extras):
    state = tx.init(params) if state is None else state
    update = jax.jit(lambda s: tx.update(params, s, params, batch=batch, **extras))
    for _ in range(num):
        updates, state = update(state)
    return updates, state


def test_the_stability_floor_is_that_of_a_damped_step():
    """At it a direction of curvature lambda_max, divided by delta, is at its bound."""
    for averaged, factor in ((False, 1.9), (True, 19.0)):
        for of in ("effective_eigenvalue", "max_eigenvalue"):
            aware = of == "effective_eigenvalue"
            known = Evidence(learning_rate=0.3)._replace(**{of: 5.0})
            options = {"averaged": averaged, "preconditioned": aware}
            found = StabilityFloor(safety=1.0, **options)(known)
            close(found.damping, 0.3 * 5 / (2 * factor))
            assert found.target == 5
            rule = StabilityFloor(**options)
            assert needs_of(rule) == {of, "learning_rate"}
            close(rule(known).damping, (8 if averaged else 12) * found.damping)


@pytest.mark.parametrize(
    ("momentum", "averaged", "safety"),
    [(0.0, False, 8), (0.9, False, 12), (0.99, True, 8), (0.99, False, 12 / 19 * 199)],
)
def test_the_floor_grows_with_momentum_that_sums(momentum, averaged, safety):
    known = Evidence(max_eigenvalue=5.0, learning_rate=0.3)
    options = {"momentum": momentum, "averaged": averaged}
    expected = StabilityFloor(safety=safety, **options)(known).damping
    close(StabilityFloor(**options)(known).damping, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_a_scattering_curvature_is_stable_above_its_safety_factor(momentum):
    """The docstring's c: second moments of a heavy ball on h x^2 / 2, h = 1 +- v^1/2.

    (x, velocity) <- A(h) (x, velocity), so the moments go by the mean of A (x) A, and
    are stable where its eigenvalues are within the unit circle.
    """
    variance = 0.37

    def growth(safety):
        rule = StabilityFloor(safety=safety, momentum=momentum)
        known = Evidence(max_eigenvalue=1.0, learning_rate=0.3)
        rate = 0.3 / float(rule(known).damping)
        maps = [
            np.array([[1 - rate * h, -rate * momentum], [h, momentum]])
            for h in (1 - variance**0.5, 1 + variance**0.5)
        ]
        return max(abs(np.linalg.eigvals(sum(np.kron(a, a) for a in maps) / 2)))

    bound = 1 + variance * (1 + momentum) / (1 - momentum)
    assert growth(1.01 * bound) < 1 < growth(0.99 * bound)


def test_the_floors_for_adam_and_lanczos_have_their_momentum():
    known = Evidence(1.0, 1.0, 1.0, 5.0, 5.0, learning_rate=0.3)
    lanczos = StabilityFloor.for_lanczos(momentum=0.5)
    close(lanczos(known).damping, 0.3 / (1 - 0.5) * 5 / 2)
    assert needs_of(lanczos) == {"max_eigenvalue", "learning_rate"}
    adam = StabilityFloor.for_adam(b1=0.5)
    close(adam(known).damping, 4 * 0.3 * 5 / (2 * 3))
    assert needs_of(adam) == {"effective_eigenvalue", "learning_rate"}


def test_a_quadratic_at_the_floor_is_stable_and_below_it_is_not():
    """Heavy ball on lambda x^2 / 2, divided by delta alone: a blind preconditioner."""

    def end(safety):
        rule = StabilityFloor(safety=safety)
        known = Evidence(max_eigenvalue=5.0, learning_rate=0.3)
        delta = float(rule(known).damping)
        x, velocity = 1.0, 0.0
        for _ in range(500):
            velocity = 0.9 * velocity + 5.0 * x / delta
            x = x - 0.3 * velocity
        return abs(x)

    assert end(1.05) < 1
    assert end(0.95) > 1e3  # not yet infinite


@pytest.mark.parametrize("kind", [Sum, Maximum])
def test_combinations_are_of_rules(kind):
    for wrong in ((FLOOR, AWARE),), (FLOOR, StabilityFloor):
        with pytest.raises(TypeError, match=f"one by one.*{kind.__name__}\\("):
            kind(*wrong)
    with pytest.raises(TypeError, match=f"{kind.__name__} needs at least one rule"):
        kind()


def test_rules_leave_no_tracer_behind():
    tx = rmtdamp.auto_adam(1e-2, DampingLearner(loss_fn, rule=Sum(AWARE, FLOOR)))
    state = tx.init(PARAMS)
    with jax.check_tracer_leaks():
        jax.jit(tx.update)(PARAMS, state, PARAMS, batch=ROWS)


def test_ratios_norms_and_combinations_in_closed_form():
    moments = HessianMoments(0.5, 1.25, 0.4)  # d^2 = 1
    close(relative_target(moments).relative, 0.4)
    assert relative_target(HessianMoments(0.5, 0.1, 0.4)).relative == jnp.inf
    known = Evidence(gradient_norm=jnp.float32(9.0))
    close(GradientNorm(0.25)(known).damping, 1.5)
    both = GradientNorm(0.25), GradientNorm(1.0), MeanFraction(0.1)
    close(Sum(*both)(known).damping, 4.5)
    close(Maximum(*both)(known).damping, 3.0)
    for kind in (Sum, Maximum):
        close(kind(*both)(known).relative, 0.1)
        assert needs_of(kind(*both, FLOOR)) == {
            "gradient_norm",
            "max_eigenvalue",
            "learning_rate",
        }
        assert kind(*both) == kind(*both)
        assert hash(kind(*both)) == hash(kind(*both))
    assert Sum(*both) != Maximum(*both)
    assert [is_relative(r) for r in (*both, relative_target, FLOOR)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_the_largest_eigenvalue_is_held_and_bad_ones_change_nothing():
    state = initial_damping(0.1, jnp.float32)
    options = {"floor": 0.0, "decay": 0.7, "min_shrinkage": 0.01}

    @needs("max_eigenvalue")
    def rule(evidence):
        return Shrinkage(evidence.max_eigenvalue / 10)

    held = []
    for step, value in enumerate((4.0, 1.0, 5.0, jnp.nan, 0.0, jnp.inf, 1.0)):
        state = learn_damping(
            state,
            None,
            jnp.int32(1000 + 100 * step),
            rule=rule,
            eigenvalue=value,
            **options,
        )
        held.append(float(state.max_eigenvalue))
        close(state.damping, held[-1] / 10)
    close(held, [4, 4 / np.e, 5, 5, 5, 5, 5 / np.e])
    many = functools.partial(learn_damping, state, None, rule=rule, **options)
    close(many(jnp.int32(9600), eigenvalue=1.0).max_eigenvalue, 1)
    close(many(jnp.int32(1700), eigenvalue=3.0).max_eigenvalue, 3)
    close(many(jnp.int32(1700), eigenvalue=1e9).max_eigenvalue, 50 / np.e)
    # At first faster: by a factor of e while the run doubles.
    young = learn_damping(
        initial_damping(0.1, jnp.float32), None, jnp.int32(2), rule=rule,
        eigenvalue=8.0, **options,
    )  # fmt: skip
    young = learn_damping(
        young, None, jnp.int32(4), rule=rule, eigenvalue=0.1, **options
    )
    close(young.max_eigenvalue, 8 / np.e)
    # By steps: two measurements forget what one would.
    twice = many(jnp.int32(1620), eigenvalue=0.1)
    twice = learn_damping(
        twice, None, jnp.int32(1700), rule=rule, eigenvalue=0.1, **options
    )
    close(twice.max_eigenvalue, many(jnp.int32(1700), eigenvalue=0.1).max_eigenvalue)
    assert state.refresh_attempts == 7
    assert state.refresh_rejections == 3


def test_the_power_iteration_finds_the_largest_magnitude_and_goes_on():
    tx = auto_damping(
        scale_by_adam_shrinkage(), learner_of(FLOOR), learning_rate=0.1, refresh_every=1
    )
    _, state = take_steps(tx, 1)
    close(get(state, "max_eigenvalue"), LAMBDA, rtol=0.05)
    _, state = take_steps(tx, 9, state)
    close(get(state, "max_eigenvalue"), LAMBDA, rtol=1e-4)
    close(get(state, "damping"), 2 * 0.1 * LAMBDA / 38, rtol=1e-4)
    assert get(state, "power_failures") <= 1
    assert jnp.isnan(get(state, "measured_variance"))  # nobody asked for it


def test_a_fraction_of_the_largest_eigenvalue_needs_no_learning_rate():
    learner = learner_of(LargestFraction(0.25))
    tx = auto_damping(scale_by_adam_shrinkage(), learner, refresh_every=None)
    state = tx.init(PARAMS)
    for _ in range(5):
        state = rmtdamp.refresh(state, learner, PARAMS, ROWS)
    close(get(state, "damping"), LAMBDA / 4, rtol=1e-3)


@pytest.mark.parametrize("rule", [FLOOR, AWARE], ids=["plain", "aware"])
def test_by_hand_is_what_the_step_does(rule):
    learner = learner_of(rule)
    make = lambda every: auto_damping(
        scale_by_adam_shrinkage(), learner, learning_rate=0.1, refresh_every=every
    )
    _, one = take_steps(make(1), 3)
    other, tx = make(None).init(PARAMS), make(None)
    for _ in range(3):
        other = rmtdamp.refresh(other, learner, PARAMS, ROWS)
        _, other = take_steps(tx, 1, other)
    jax.tree.map(functools.partial(close, rtol=1e-4), one, other)


def test_it_follows_the_learning_rate_of_every_step():
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    tx = auto_damping(
        scale_by_adam_shrinkage(),
        learner_of(FLOOR),
        learning_rate=schedule,
        refresh_every=100,
    )
    state = tx.init(PARAMS)
    for step in range(4):
        _, state = take_steps(tx, 1, state)
        held = get(state, "max_eigenvalue")
        close(get(state, "damping"), 2 * schedule(step) * held / 38)
    _, state = take_steps(tx, 1, state, learning_rate=0.3)  # handed in, it wins
    close(get(state, "damping"), 2 * 0.3 * get(state, "max_eigenvalue") / 38)


def test_a_rate_that_nobody_gave_is_asked_for():
    tx = auto_damping(scale_by_adam_shrinkage(), learner_of(FLOOR))
    with pytest.raises(ValueError, match="rule needs the learning rate: hand the opt"):
        take_steps(tx, 1)
    with pytest.raises(ValueError, match="cannot need 'hessian': choose from eff"):
        needs("hessian")
    with pytest.raises(ValueError, match="safety is 0, and must be above 0"):
        StabilityFloor(safety=0)
    with pytest.raises(ValueError, match="momentum is 1, and must be in"):
        StabilityFloor(momentum=1)
    with pytest.raises(ValueError, match="fraction is 0, and must be above 0"):
        LargestFraction(0)


def test_auto_adam_hands_its_rate_and_momentum_on():
    rule = dataclasses.replace(FLOOR, momentum=0.8)
    tx = rmtdamp.auto_adam(0.2, learner_of(rule), b1=0.8)
    _, state = take_steps(tx, 1)
    close(get(state, "damping"), 2 * 0.2 * get(state, "max_eigenvalue") / 18)


def test_rules_that_measure_nothing_need_no_batch():
    tx = auto_damping(scale_by_adam_shrinkage(), learner_of(GradientNorm(0.25)))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    close(get(state, "damping"), (0.25 * 2) ** 0.5)


def test_a_relative_damping_is_in_units_of_the_preconditioners_mean():
    """Adam: of sqrt(v) one step before; it does not change with the gradient's unit."""
    inner = scale_by_adam_shrinkage(b2=0.99)
    for unit in (1.0, 1e3):
        grads = unit * jnp.array([1.0, 2.0, 3.0, 6.0], jnp.float32)
        tx = auto_damping(inner, learner_of(MeanFraction(0.5)))
        state, plain = tx.init(PARAMS), inner.init(PARAMS)
        for step in range(3):
            updates, state = jax.jit(tx.update)(grads, state, PARAMS)
            damping = unit * 0.5 * 3 if step else 1e-30
            expected, plain = inner.update(grads, plain, PARAMS, damping=damping)
            close(updates, expected, rtol=1e-4)
    assert get(state, "relative_damping") == 0.5
    factory = rmtdamp.with_damping(optax.adam)(1e-3)
    with pytest.raises(ValueError, match="relative to the mean of the preconditioner"):
        auto_damping(factory, learner_of(MeanFraction())).init(PARAMS)


def model_fn(params, x, tape):
    hidden = jnp.tanh(tape.linear("one", x, x @ params["a"]))
    return tape.linear("two", hidden, hidden @ params["b"])


def network(scale=1.0, unused=0):
    """Loss and params of a small network, and KFAC's view of it."""
    params = {
        "a": jax.random.normal(jax.random.key(0), (5, 6), jnp.float32),
        "b": jax.random.normal(jax.random.key(1), (6, 3), jnp.float32),
    }
    layers = {"one": {"kernel": "a"}, "two": {"kernel": "b"}}
    if unused:
        params["c"] = jnp.ones((unused,), jnp.float32)

    def criterion(outputs, targets):
        return scale * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1)) / 2

    fn = ModelFactors(
        model_fn=model_fn,
        criterion=criterion,
        blocks=make_blocks(params, layers),
        fisher="ggn",
    )

    def loss(params, batch):
        return criterion(model_fn(params, batch[0], Tape(keep=False)), batch[1])

    return params, loss, fn


DATA = (
    jax.random.normal(jax.random.key(2), (32, 5), jnp.float32),
    jax.random.normal(jax.random.key(3), (32, 3), jnp.float32),
)


def trained(rule, steps=12, learning_rate=0.05, **change):
    params, loss, fn = network(**change)
    learner = DampingLearner(loss, rule=rule, floor=0.0)
    tx = auto_damping(
        rmtdamp.kfac(learning_rate, fn, kl_clip=None),
        learner,
        learning_rate=learning_rate,
        refresh_every=2,
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, DATA)
        updates, state = tx.update(grads, state, params, batch=DATA)
        return optax.apply_updates(params, updates), state

    dampings = []
    for _ in range(steps):
        params, state = step(params, state)
        dampings.append(float(get(state, "damping")))
    return params, state, np.array(dampings)


@pytest.mark.parametrize("scale", [1e-3, pytest.param(1e3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", [StabilityFloor(), MeanFraction(0.5)], ids=str)
def test_the_loss_in_another_unit_takes_the_same_path(rule, scale):
    params, _, dampings = trained(rule)
    scaled, _, others = trained(rule, scale=scale)
    jax.tree.map(functools.partial(close, rtol=2e-3, atol=2e-4), params, scaled)
    close(others, dampings * scale, rtol=2e-3)


def test_parameters_that_the_loss_ignores_change_nothing():
    params, state, dampings = trained(StabilityFloor())
    wider, other, others = trained(StabilityFloor(), unused=48)
    close(others, dampings, rtol=2e-2)  # the start of the iteration is another
    close(get(other, "max_eigenvalue"), get(state, "max_eigenvalue"), rtol=1e-2)
    for name, leaf in params.items():
        close(wider[name], leaf, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_kfac_and_lanczos_take_a_relative_damping():
    params, loss, fn = network()
    grads = jax.grad(loss)(params, DATA)
    for tx, mean in (
        (
            rmtdamp.scale_by_kfac(fn, refresh_every=1),
            lambda s: (
                sum(
                    float(jnp.sum(b.input_values) * jnp.sum(b.output_values))
                    for b in s.measured.bases
                )
                / 48
            ),
        ),
        (
            rmtdamp.scale_by_lanczos(rmtdamp.RitzMeasurer(loss, num_steps=5)),
            lambda s: float(jnp.sum(jnp.abs(s.measured.ritz_values))) / 48,
        ),
    ):
        update = jax.jit(tx.update)
        start, given = tx.init(params), {"batch": DATA, "relative_damping": 0.5}
        found, state = update(grads, start, params, damping=0.1, **given)
        given = {"batch": DATA, "relative_damping": 0.0}
        damping = 0.1 + 0.5 * mean(state)
        expected, _ = update(grads, start, params, damping=damping, **given)
        jax.tree.map(functools.partial(close, rtol=1e-4), found, expected)


SLOW_RATES = [pytest.param(x, marks=pytest.mark.slow) for x in (0.01, 0.1)]


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [*SLOW_RATES, 1.0])
def test_lanczos_newton_trains_where_sharp_directions_are_left_out(learning_rate):
    """Two Ritz pairs from a random start; eight directions are divided by delta."""
    curvature = jnp.linspace(1, 10, 10)

    def loss(params, batch):
        return jnp.mean(batch) * jnp.sum(curvature * params**2) / 2

    def end(rule):
        measurer = rmtdamp.RitzMeasurer(loss, num_steps=2, start="random")
        learner = DampingLearner(loss, rule=rule, floor=0.0)
        tx = auto_damping(
            rmtdamp.lanczos_newton(learning_rate, measurer),
            learner,
            learning_rate=learning_rate,
            refresh_every=1,
        )

        @jax.jit
        def run(params):
            def step(carry, _):
                params, state = carry
                grads = jax.grad(loss)(params, ROWS)
                updates, state = tx.update(grads, state, params, batch=ROWS)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), length=200)[0][0]

        return optax.tree.norm(run(jnp.ones(10)))

    @needs("max_eigenvalue")
    def too_small(evidence):
        return Shrinkage(learning_rate * evidence.max_eigenvalue / 20)

    assert end(StabilityFloor()) < 0.1
    assert not end(too_small) < 1e3


def preconditioners():
    """A transformation, and a step of it at these params, with a state worth having."""
    params, loss, fn = network()
    grads = jax.grad(loss)(params, DATA)
    return {
        "adam": (scale_by_adam_shrinkage(), params, loss, grads),
        "kfac": (rmtdamp.scale_by_kfac(fn, refresh_every=1), params, loss, grads),
        "lanczos": (
            rmtdamp.scale_by_lanczos(rmtdamp.RitzMeasurer(loss, num_steps=5)),
            params,
            loss,
            grads,
        ),
    }


@pytest.mark.parametrize("name", ["adam", "kfac", "lanczos"])
def test_a_preconditioner_gives_its_products(name):
    """(B + delta)^-1 undoes B + delta, and is what divides the gradient."""
    tx, params, _, grads = preconditioners()[name]
    given = {"params": params, "batch": DATA, "damping": 0.3}
    update = functools.partial(
        jax.jit(tx.update, static_argnames="curvature_power"), **given
    )
    _, state = update(grads, tx.init(params))
    divided, after = update(grads, state, curvature_power=-1)
    back, _ = update(divided, state, curvature_power=1)
    same, _ = update(grads, state, curvature_power=0)
    near = functools.partial(close, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, back, grads)
    jax.tree.map(near, same, grads)
    jax.tree.map(close, after, state)
    if name != "adam":  # whose update is momentum's
        step, new = update(grads, state)
        expected, _ = update(grads, new, curvature_power=-1)
        jax.tree.map(near, step, expected)


@pytest.mark.parametrize("chained", [False, True])
def test_the_effective_eigenvalue_is_that_of_the_preconditioned_hessian(chained):
    """Whatever else is in the chain; dense algebra is the judge."""
    adam, params, loss, grads = preconditioners()["adam"]
    inner = adam
    if chained:
        inner = optax.chain(
            optax.clip_by_global_norm(1e-3),
            adam,
            optax.trace(0.9),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(0.05),
        )

    @needs("effective_eigenvalue")
    def constant(evidence):
        return Shrinkage(0.3 + 0 * evidence.effective_eigenvalue)

    learner = DampingLearner(loss, rule=constant, floor=0.0)
    tx = auto_damping(inner, learner, refresh_every=1)
    update = lambda _, s: tx.update(grads, s, params, batch=DATA)[1]
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 300, update, s))
    state = run(tx.init(params))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    whole = jax.hessian(lambda x: loss(unravel(x), DATA))(flat)
    clip = min(1, 1e-3 / float(optax.tree.norm(grads))) if chained else 1
    root = clip * jnp.abs(jax.flatten_util.ravel_pytree(grads)[0])
    half = jnp.sqrt(0.3 / (root + 0.3))
    values = jnp.linalg.eigvalsh(half[:, None] * whole * half[None, :])
    found = get(state, "effective_eigenvalue")
    close(found, jnp.max(jnp.abs(values)), rtol=1e-3)
    largest = jnp.max(jnp.abs(jnp.linalg.eigvalsh(whole)))
    assert chained or found < 0.9 * largest
    assert get(state, "power_failures") < 100


@pytest.mark.parametrize("by_hand", [False, True])
def test_no_measurement_exceeds_the_largest_eigenvalue_of_the_hessian(by_hand):
    """Under the default floor, where B + delta grows by orders in the first step."""
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1), 64)
    learner = DampingLearner(mlp_loss, rule=StabilityFloor.for_adam())
    every = None if by_hand else 100
    tx = rmtdamp.auto_adam(0.05, learner, refresh_every=every)
    unravel = jax.flatten_util.ravel_pytree(params)[1]
    hessian = jax.jit(jax.hessian(lambda x: mlp_loss(unravel(x), batch)))
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(9):
        if by_hand and step in {0, 1, 2, 4, 8}:
            state = rmtdamp.refresh(state, learner, params, batch)
        grads = jax.grad(mlp_loss)(params, batch)
        flat = jax.flatten_util.ravel_pytree(params)[0]
        updates, state = update(grads, state, params, batch=batch)
        largest = jnp.max(jnp.abs(jnp.linalg.eigvalsh(hessian(flat))))
        seen.append(float(get(state, "effective_eigenvalue") / largest))
        params = optax.apply_updates(params, updates)
    assert get(state, "refresh_attempts") == 5
    assert 0.9 < seen[0] < 1
    assert max(seen[1:]) < 0.5


@pytest.mark.slow
def test_a_preconditioner_that_sees_the_curvature_needs_less_damping():
    """KFAC with its factors exact on a linear model: nothing is left but delta."""
    params = {"w": jnp.zeros((3, 2), jnp.float32)}

    def model_fn(params, x, tape):
        return tape.linear("one", x, x @ params["w"])

    def criterion(outputs, targets):
        return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1)) / 2

    blocks = make_blocks(params, {"one": {"kernel": "w"}})
    fn = ModelFactors(
        model_fn=model_fn, criterion=criterion, blocks=blocks, fisher="ggn"
    )
    x = jax.random.normal(jax.random.key(0), (64, 3), jnp.float32)
    batch = x @ jnp.diag(jnp.array([1.0, 3.0, 10.0])), jnp.ones((64, 2), jnp.float32)

    def loss(params, batch):
        return criterion(model_fn(params, batch[0], Tape(keep=False)), batch[1])

    grads = jax.grad(loss)(params, batch)
    top = jnp.linalg.eigvalsh(batch[0].T @ batch[0] / 64)[-1]
    found = {}
    for aware in (False, True):
        rule = StabilityFloor(safety=1.0, preconditioned=aware)
        learner = DampingLearner(loss, rule=rule, floor=0.0)
        tx = auto_damping(
            rmtdamp.kfac(0.1, fn, kl_clip=None, refresh_every=1),
            learner,
            learning_rate=0.1,
            refresh_every=1,
        )
        update = lambda _, s, tx=tx: tx.update(grads, s, params, batch=batch)[1]
        run = jax.jit(functools.partial(jax.lax.fori_loop, 0, 300, update))
        state = run(tx.init(params))
        found[aware] = float(get(state, "damping"))
    close(found[False], 0.1 * top / 3.8, rtol=1e-3)
    # B is H: alpha lambda / (lambda + delta) is below 2 f whatever delta is.
    assert found[True] < found[False] / 100


def test_a_product_that_is_not_finite_changes_nothing_and_growth_is_bounded():
    def loss(params, batch):
        return jnp.mean(batch) * jnp.sum(CURVATURE * params**2) / 2

    learner = DampingLearner(loss, rule=AWARE, floor=0.0)
    tx = auto_damping(
        scale_by_adam_shrinkage(), learner, learning_rate=0.1, refresh_every=1
    )
    update = jax.jit(lambda s, x: tx.update(PARAMS, s, PARAMS, batch=x)[1])
    before = update(update(tx.init(PARAMS), ROWS), ROWS)
    after = update(before, ROWS * jnp.nan)
    for name in ("damping", "effective_eigenvalue"):
        assert get(after, name) == get(before, name)
    jax.tree.map(close, after.measured.probe.vector, before.measured.probe.vector)
    assert get(after, "refresh_rejections") == 1
    blown = update(before, ROWS * 1e8)
    ratio = get(blown, "effective_eigenvalue") / get(before, "effective_eigenvalue")
    close(ratio, 10)


def test_a_transformation_without_products_is_told_apart():
    factory = rmtdamp.with_damping(optax.adam)(1e-3)
    with pytest.raises(ValueError, match="does not give its product: take scale_by_ad"):
        auto_damping(factory, learner_of(AWARE), learning_rate=0.1).init(PARAMS)
    plain = auto_damping(factory, learner_of(FLOOR), learning_rate=0.1)
    assert get(plain.init(PARAMS), "damping") == 0
    sgd = optax.sgd(1e-3)
    within = rmtdamp.trust_region(sgd, mlp_loss)  # whose step cannot be traced in init
    for bare in (optax.adam(1e-3), sgd, within):  # no damping comes first
        with pytest.raises(ValueError, match=r"inside ignores `damping`.*sgd, lion"):
            auto_damping(bare, learner_of(AWARE), learning_rate=0.1).init(PARAMS)


def test_levenberg_marquardt_in_closed_form():
    rule = LevenbergMarquardt(initial=3.0, factor=0.5)
    at = lambda ratio, delta: (
        rule(Evidence(reduction_ratio=ratio, damping=jnp.float32(delta))).damping
    )
    close(at(0.9, 2.0), 1.0)
    close(at(0.5, 2.0), 2.0)
    close(at(0.1, 2.0), 4.0)
    close(at(-jnp.inf, 2.0), 4.0)
    close(at(jnp.nan, 2.0), 2.0)
    close(at(jnp.nan, jnp.nan), 3.0)
    with pytest.raises(ValueError, match="factor is 1, and must be in"):
        LevenbergMarquardt(factor=1)
    with pytest.raises(ValueError, match="initial is 0, and must be above 0"):
        LevenbergMarquardt(initial=0)


@pytest.mark.parametrize("refresh_every", [1, None])
def test_the_reduction_ratio_is_one_on_a_quadratic(refresh_every):
    """What the model foretells lowers the damping, what blows up raises it."""

    def loss(params, batch):
        return jnp.mean(batch) * jnp.sum(params**2) / 2 + jnp.sum(
            jnp.exp(jnp.maximum(params - 2, 0)) - 1
        )

    learner = DampingLearner(loss, rule=LevenbergMarquardt(1.0, 0.5), floor=0.0)
    tx = auto_damping(scale_by_adam_shrinkage(), learner, refresh_every=refresh_every)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, batch=ROWS))
    state, dampings = tx.init(PARAMS), []
    for params in (PARAMS, 0.5 * PARAMS, 0.5 * PARAMS, 9.0 * PARAMS, jnp.nan * PARAMS):
        if refresh_every is None:
            state = rmtdamp.refresh(state, learner, params, ROWS)
        _, state = update(PARAMS, state, params)
        dampings.append(float(get(state, "damping")))
    close(dampings, [1.0, 0.5, 0.5, 1.0, 2.0])
