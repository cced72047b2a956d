"""Adam with shrinkage: optax, to the last bit; both forms; its limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp
from rmtdamp import (
    adam_shrinkage,
    adamw_shrinkage,
    scale_by_adam_shrinkage,
    set_damping,
    with_damping,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")
SIZES = (8, 16, 4)


def run(tx, steps=200, dtype=jnp.float32, **extras):
    """Params after jitted steps on fresh batches of a small network."""
    params = mlp(jax.random.key(0), SIZES, dtype)
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(mlp_loss)(params, mlp_batch(key, 16, SIZES, dtype))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(1), steps):
        params, state = step(params, state, key)
    return params


def first_update(tx, grads, **extras):
    return tx.update(grads, tx.init(grads), grads, **extras)[0]


@pytest.mark.parametrize(
    "nesterov", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_at_1e_8_it_is_optax_adam_to_the_last_bit(nesterov):
    plain = run(optax.adam(1e-2, nesterov=nesterov))
    chex.assert_trees_all_equal(plain, run(adam_shrinkage(1e-2, nesterov=nesterov)))
    owned = set_damping(adam_shrinkage(1e-2, nesterov=nesterov), 1e-8)
    chex.assert_trees_all_equal(plain, run(owned))


def test_the_rest_of_adams_arguments():
    arguments = {"b1": 0.8, "b2": 0.99, "eps_root": 1e-6, "mu_dtype": jnp.float16}
    plain = run(optax.adam(1e-2, eps=1e-3, **arguments))
    damped = run(adam_shrinkage(1e-2, damping=1e-3, **arguments))
    chex.assert_trees_all_equal(plain, damped)


def test_adamw_shrinkage_is_optax_adamw():
    mask = [{"kernel": True, "bias": False}] * 2
    plain = run(optax.adamw(1e-2, weight_decay=0.1, mask=mask))
    damped = run(adamw_shrinkage(1e-2, weight_decay=0.1, mask=mask))
    chex.assert_trees_all_equal(plain, damped)


def test_schedules_of_the_damping():
    schedule = optax.linear_schedule(1e-1, 1e-3, 50)
    by_argument = run(adam_shrinkage(1e-2, damping=schedule))
    by_owner = run(set_damping(adam_shrinkage(1e-2), schedule))
    chex.assert_trees_all_close(by_argument, by_owner, rtol=1e-5, atol=1e-6)
    constant = run(adam_shrinkage(1e-2, damping=1e-3))
    assert not np.allclose(by_argument[0]["kernel"], constant[0]["kernel"])


def test_forms_agree_as_algebra_says():
    grads = jax.random.normal(jax.random.key(0), (50,), jnp.float64)
    for damping in (1e-8, 1e-3, 10.0):
        for target in (1.0, 0.2):
            of = lambda form, d=damping, t=target: first_update(
                scale_by_adam_shrinkage(damping=d, form=form, target=t), grads
            )
            ratio = 1 + damping / target
            np.testing.assert_allclose(
                of("shrinkage"), of("damping") * ratio, rtol=1e-14
            )
            # and the shrinkage form is m / (beta s + (1 - beta) tau) itself
            beta = rmtdamp.shrinkage_from_damping(damping, target)
            weight = rmtdamp.damping.damping_weight(damping, target)
            direct = grads / (beta * jnp.abs(grads) + weight * target)
            np.testing.assert_allclose(of("shrinkage"), direct, rtol=1e-8)


@pytest.mark.parametrize("form", ["damping", "shrinkage"])
def test_no_zero_over_zero_at_small_damping(form):
    tx = scale_by_adam_shrinkage(damping=1e-8, form=form)
    updates = first_update(tx, jnp.array([0.0, 1.0], jnp.float32))
    np.testing.assert_allclose(updates, [0.0, 1.0], rtol=1e-6)


def test_large_damping_is_momentum_sgd():
    """Bias-corrected momentum over delta; in the shrinkage form over tau."""
    grads = jax.random.normal(jax.random.key(0), (5, 50), jnp.float64)
    directions = {}
    for name, tx in {
        "damping": scale_by_adam_shrinkage(damping=1e6),
        "shrinkage": scale_by_adam_shrinkage(damping=1e6, form="shrinkage", target=0.5),
        "momentum": optax.ema(0.9, debias=True),
    }.items():
        state = tx.init(grads[0])
        for g in grads:
            directions[name], state = tx.update(g, state, g)
    momentum = directions["momentum"]
    np.testing.assert_allclose(1e6 * directions["damping"], momentum, rtol=1e-5)
    np.testing.assert_allclose(0.5 * directions["shrinkage"], momentum, rtol=1e-5)


SLOW = pytest.mark.slow
FACTORIES = {
    "adam": lambda f, **k: f(optax.adam)(1e-2, **k),
    "adamw": lambda f, **k: f(optax.adamw)(1e-2, **k),
    "nadam": lambda f, **k: f(optax.nadam)(1e-2, **k),
    "amsgrad": lambda f, **k: f(optax.amsgrad)(1e-2, **k),
    "rmsprop": lambda f, **k: f(optax.rmsprop)(1e-2, eps_in_sqrt=False, **k),
    "rmsprop, momentum": lambda f, **k: f(optax.rmsprop)(
        1e-2, eps_in_sqrt=False, momentum=0.9, **k
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n if n == "adam" else pytest.param(n, marks=SLOW) for n in FACTORIES],
)
def test_with_damping_equals_the_factory_at_fixed_eps(name):
    build = FACTORIES[name]
    plain = run(build(lambda f: f, eps=1e-2), steps=50)
    damped = build(with_damping)
    chex.assert_trees_all_equal(plain, run(damped, steps=50, damping=1e-2))
    chex.assert_trees_all_equal(plain, run(set_damping(damped, 1e-2), steps=50))
    own = run(build(lambda f: f), steps=50)
    chex.assert_trees_all_equal(own, run(damped, steps=50))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["adam", "rmsprop, momentum"])
def test_an_owned_damping_keeps_low_precision_dtypes(name, dtype):
    tx = set_damping(FACTORIES[name](with_damping), 1e-2)
    params = {"w": jnp.ones(3, dtype), "none": None, "b": jnp.ones((), jnp.float32)}
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_cost_is_that_of_optax_adam():
    """FLOPs and bytes as XLA counts them, give or take what one scalar takes."""
    params = mlp(jax.random.key(0), (64, 64, 64), jnp.float32)

    def cost(tx):
        analysis = (
            jax.jit(tx.update)
            .lower(params, tx.init(params), params)
            .compile()
            .cost_analysis()
        )
        return analysis["flops"], analysis["bytes accessed"]

    plain = cost(optax.adam(1e-3))
    for tx in (adam_shrinkage(1e-3), set_damping(adam_shrinkage(1e-3), 1e-3)):
        for ours, theirs in zip(cost(tx), plain, strict=True):
            assert abs(ours - theirs) <= 64


def test_bad_arguments():
    with pytest.raises(ValueError, match="form is 'both': choose from 'damping'"):
        scale_by_adam_shrinkage(form="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError,
        match="sgd has no damping 'eps': an optimiser that divides by no curvature",
    ):
        with_damping(optax.sgd)
    with pytest.raises(
        TypeError, match=r"'learning_rate': name what stands .* of decay"
    ):
        with_damping(optax.rmsprop, "learning_rate")


@pytest.mark.parametrize("damping", [1e-8, 0.3, 1e4])
def test_length_is_that_of_undamped_adam_and_the_direction_is_damped(damping):
    grads = [jnp.array([1.0, -4.0], jnp.float32), jnp.full((2, 2), 0.25, jnp.float32)]
    kept = scale_by_adam_shrinkage(form="length")
    found, state = kept.update(grads, kept.init(grads), damping=damping)
    plain = scale_by_adam_shrinkage()
    damped, after = plain.update(grads, plain.init(grads), damping=damping)
    np.testing.assert_allclose(optax.tree.norm(found), 6**0.5, rtol=1e-6)
    ratio = optax.tree.norm(found) / optax.tree.norm(damped)
    chex.assert_trees_all_close(found, jax.tree.map(lambda u: ratio * u, damped))
    chex.assert_trees_all_equal(state, after)


def test_avagrad_normalises_its_rates():
    """eta = 1 / (sqrt(v) + delta), at unit mean square; here v = g^2 and m = g."""
    grads = jnp.array([1.0, -4.0, 0.0], jnp.float32)
    tx = scale_by_adam_shrinkage(form="avagrad", damping=0.5)
    updates = first_update(tx, grads)
    eta = 1 / (np.abs(grads) + 0.5)
    expected = grads * eta / np.sqrt(np.mean(eta**2))
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["length", "avagrad"])
def test_forms_survive_a_gradient_of_zero_and_keep_their_dtype(form):
    grads = {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    tx = set_damping(scale_by_adam_shrinkage(form=form), 0.1)
    updates = first_update(tx, grads)
    chex.assert_trees_all_equal(updates, grads)
