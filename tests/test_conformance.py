"""The peers' contract, optax/contrib/_common_test.py, for every transformation we ship.

Each row is a factory and its arguments. The objectives are optax's; the loss that the
learner measures is the objective times 1 + (mean of the batch), so that there is noise.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import log_compilations

import rmtdamp
from rmtdamp.kronecker import ModelFactors, leaf_names, make_blocks

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH = (np.linspace(-0.5, 0.5, 16, dtype=np.float32),) * 2


def parabola(dtype):
    final = jnp.array([1.0, -1.0, 1.0], dtype)
    return (
        jnp.array([-1.0, 10.0, 1.0], dtype),
        final,
        lambda x: jnp.sum((x - final) ** 2),
    )


def rosenbrock(dtype):
    objective = lambda x: (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2
    return jnp.zeros(2, dtype), jnp.ones(2, dtype), objective


def matrix_parabola(dtype):
    final = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), final, lambda x: jnp.sum((x - final) ** 2)


def mixed_tensors(dtype):
    final = (
        jnp.array([1.0, -1.0, 2.0], dtype),
        jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype),
    )
    objective = lambda x: sum(
        jnp.sum((a - b) ** 2) for a, b in zip(x, final, strict=True)
    )
    return jax.tree.map(jnp.zeros_like, final), final, objective


TARGETS = [parabola, rosenbrock, matrix_parabola, mixed_tensors]


def loss_of(objective):
    def loss(params, batch):
        value = objective(params)
        return value * (1 + jnp.mean(batch[0]).astype(value.dtype))

    return loss


def factors_of(objective, params):
    """A model whose outputs are its params, so that G is the objective's Hessian.

    Matrices are linear layers that see the unit vectors; all else is a bare array.
    """
    names, leaves = leaf_names(params), jax.tree.leaves(params)
    matrices = (n for n, x in zip(names, leaves, strict=True) if x.ndim == 2)
    layers = {name: {"kernel": name} for name in matrices}
    _, unravel = jax.flatten_util.ravel_pytree(params)

    def model_fn(params, inputs, tape):
        rows = []
        for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
            repeat = lambda x: jnp.broadcast_to(x[None], (len(inputs), *x.shape))
            outputs = repeat(leaf)
            if name in layers:
                units = jnp.eye(len(leaf), dtype=leaf.dtype)
                outputs = tape.linear(name, repeat(units), outputs)
            rows.append(jnp.reshape(outputs, (len(inputs), -1)))
        return jnp.concatenate(rows, axis=1)

    def criterion(outputs, targets):
        values = jax.vmap(lambda z: objective(unravel(z)))(outputs)
        return jnp.mean(values * (1 + targets).astype(values.dtype))

    return ModelFactors(
        model_fn=model_fn,
        criterion=criterion,
        blocks=make_blocks(params, layers),
        fisher="ggn",
    )


def auto(inner):
    """A factory with a loss: auto_damping around `inner(learning_rate)`."""

    def factory(learning_rate, learner, refresh_every=3):
        learner = dataclasses.replace(learner, floor=1e-4, min_shrinkage=0.5)
        inside = inner(learning_rate)
        return rmtdamp.auto_damping(inside, learner, refresh_every=refresh_every)

    return factory


def held(learning_rate: optax.ScalarOrSchedule, damping: float = 1e-3):
    return rmtdamp.set_damping(rmtdamp.adam_shrinkage(learning_rate), damping)


def newton(learning_rate, learner, damping=1e-3):
    measurer = rmtdamp.RitzMeasurer(learner.loss_fn, num_steps=10, start="gradient")
    return rmtdamp.lanczos_newton(
        learning_rate, measurer, damping=damping, momentum=None
    )


def auto_spectral(learning_rate, learner):
    # At a damping of 99, the default's largest, 30,000 steps end far from the minimum.
    learner = dataclasses.replace(learner, floor=1.0, min_shrinkage=0.4)
    descent = rmtdamp.spectral_descent(learning_rate, method="svd")
    return rmtdamp.auto_damping(descent, learner)


def auto_kfac(learning_rate, learner, measurer):
    learner = dataclasses.replace(learner, floor=0.1)
    return rmtdamp.auto_damping(rmtdamp.kfac(learning_rate, measurer), learner)


def auto_adam(learning_rate, learner, rule=None, refresh_every=100, form="damping"):
    if rule is not None:
        learner = dataclasses.replace(learner, rule=rule)
    return rmtdamp.auto_adam(
        learning_rate, learner, refresh_every=refresh_every, form=form
    )


def kfac(learning_rate, measurer, damping=0.1, refresh_every=10):
    return rmtdamp.kfac(
        learning_rate, measurer, damping=damping, refresh_every=refresh_every
    )


def ekfac(learning_rate, measurer):
    measurer = dataclasses.replace(measurer, ekfac=True)
    return rmtdamp.kfac(learning_rate, measurer, damping=0.1, nesterov=True)


def plain_kfac(learning_rate, measurer):
    """Factored damping, every step, and nothing beside the preconditioner."""
    measurer = dataclasses.replace(measurer, eigen_every=1)
    return rmtdamp.kfac(
        learning_rate,
        measurer,
        damping=0.1,
        tikhonov="factored",
        kl_clip=None,
        momentum=None,
        refresh_every=1,
    )


# name: (factory, arguments). One with a `learner` or a `measurer` needs a batch.
TABLE = {
    "adam_shrinkage": (rmtdamp.adam_shrinkage, {"learning_rate": 1e-2}),
    "adam_shrinkage, damped": (
        rmtdamp.adam_shrinkage,
        {"learning_rate": 1e-1, "damping": 1e-1, "form": "shrinkage"},
    ),
    "adamw_shrinkage": (
        rmtdamp.adamw_shrinkage,
        {"learning_rate": 1e-2, "damping": 1e-3, "weight_decay": 0.0},
    ),
    "with_damping(amsgrad)": (
        rmtdamp.with_damping(optax.amsgrad),
        {"learning_rate": 1e-1, "eps": 1e-2},
    ),
    "with_damping(rmsprop)": (
        rmtdamp.with_damping(optax.rmsprop),
        {"learning_rate": 5e-3, "eps_in_sqrt": False},
    ),
    "set_damping": (held, {"learning_rate": 1e-2}),
    "auto_damping(adam)": (auto(rmtdamp.adam_shrinkage), {"learning_rate": 1e-1}),
    "auto_damping(amsgrad)": (
        auto(rmtdamp.with_damping(optax.amsgrad)),
        {"learning_rate": 1e-1},
    ),
    "auto_damping, by hand": (
        auto(rmtdamp.adam_shrinkage),
        {"learning_rate": 1e-2, "refresh_every": None},
    ),
    "auto_adam": (auto_adam, {"learning_rate": 1e-1, "refresh_every": 10}),
    "auto_adam, shrinkage": (
        auto_adam,
        {
            "learning_rate": 1e-1,
            "form": "shrinkage",
            "rule": rmtdamp.scaled_identity_target,
        },
    ),
    "lanczos_newton": (newton, {"learning_rate": 1e-1}),
    "spectral_descent": (
        rmtdamp.spectral_descent,
        {"learning_rate": 1e-3, "damping": 1.0, "num_iterations": 12},
    ),
    "shampoo": (rmtdamp.shampoo, {"learning_rate": 1e-3, "damping": 1.0}),
    "auto_damping(spectral_descent)": (auto_spectral, {"learning_rate": 1e-3}),
    "kfac": (kfac, {"learning_rate": 1e-2}),
    "kfac, EKFAC": (ekfac, {"learning_rate": 1e-2}),
    "kfac, factored, every step": (plain_kfac, {"learning_rate": 1e-1}),
    "auto_damping(kfac)": (auto_kfac, {"learning_rate": 1e-2}),
}
# Variants of other rows: run with the slow tests.
VARIANTS = {
    "adam_shrinkage, damped",
    "with_damping(rmsprop)",
    "auto_damping(amsgrad)",
    "auto_damping, by hand",
    "auto_adam, shrinkage",
    "auto_damping(spectral_descent)",
    "adamw_shrinkage",
    "with_damping(amsgrad)",
    "spectral_descent",
    "auto_adam",
    "kfac, EKFAC",
    "kfac, factored, every step",
    "auto_damping(kfac)",
}
every_row = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in TABLE],
)


def given(name, objective, params):
    """A row's factory, its arguments, and the extras that its update needs."""
    factory, arguments = TABLE[name]
    measurers = {
        "learner": rmtdamp.DampingLearner(loss_of(objective)),
        "measurer": rmtdamp.KroneckerMeasurer(factors_of(objective, params)),
    }
    measurers = {
        key: measurer
        for key, measurer in measurers.items()
        if key in inspect.signature(factory).parameters
    }
    return factory, arguments | measurers, {"batch": BATCH} if measurers else {}


def build(name, objective, params, **change):
    """The transformation of a row, and the extras."""
    factory, arguments, extras = given(name, objective, params)
    return factory(**arguments | change), extras


@every_row
def test_accepts_extra_args_and_compiles_once(name):
    params, _, objective = rosenbrock(jnp.float32)
    tx, extras = build(name, objective, params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(objective)(params), state, params, unexpected=1, **extras
        )
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    with log_compilations() as logs:
        step(params, state)
    assert not logs


@every_row
@pytest.mark.parametrize("target", TARGETS, ids=lambda f: f.__name__)
def test_converges_and_maps_params(name, target):
    params, final, objective = target(jnp.float32)
    tx, extras = build(name, objective, params)
    state = optax.tree.map_params(tx, lambda v: v, tx.init(params))

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(
                jax.grad(objective)(params), state, params, **extras
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=30_000)[0]

    params, state = run(params, state)
    for found, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(final), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=3e-2, atol=3e-2)


@every_row
def test_inject_hyperparams(name):
    objective = lambda params: sum(jnp.sum(x**2) for x in params)
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    factory, arguments, extras = given(name, objective, params)
    tx = factory(**arguments)
    static = {"rule", "max_side"} & set(inspect.signature(factory).parameters)
    injected = optax.inject_hyperparams(factory, static_args=tuple(static))(**arguments)

    def first_step(tx):
        state = jax.jit(tx.init)(params)
        return jax.jit(functools.partial(tx.update, **extras))(grads, state, params)

    (updates, state), (injected_updates, injected_state) = map(
        first_step, (tx, injected)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, injected_updates, updates)
    jax.tree.map(close, injected_state.inner_state, state)


@every_row
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_preserves_dtype_and_accumulates_gradients(name, dtype):
    objective = lambda x: jnp.sum(x**2)
    params = jnp.array([1.0, 2.0], dtype)
    tx, extras = build(name, objective, params)
    grads = jax.grad(objective)(params)
    updates, _ = jax.jit(functools.partial(tx.update, **extras))(
        grads, jax.jit(tx.init)(params), params
    )
    assert updates.dtype == dtype

    multi = optax.MultiSteps(tx, every_k_schedule=4)
    updates, _ = jax.jit(functools.partial(multi.update, **extras))(
        grads, jax.jit(multi.init)(params), params
    )
    assert updates.dtype == dtype
    np.testing.assert_array_equal(updates, jnp.zeros_like(params))


@every_row
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_keeps_structure_shape_and_dtype(name, dtype):
    params, _, objective = parabola(dtype)
    tx, extras = build(name, objective, params)

    @jax.jit
    def step(params, state, take):
        # A conditional refuses branches whose states differ in any of the three.
        grads = jax.grad(objective)(params)
        updates, state = jax.lax.cond(
            take,
            lambda: tx.update(grads, state, params, **extras),
            lambda: (params, state),
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for take in (True, False):
        params, state = step(params, state, take)
    assert params.dtype == dtype


@every_row
def test_accepts_a_learning_rate_schedule(name):
    params, _, objective = parabola(jnp.float32)

    def run(rate):
        tx, extras = build(name, objective, params, learning_rate=rate)
        x, state = params, tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(objective)(x), state, x, **extras)
            x = optax.apply_updates(x, updates)
        return x

    np.testing.assert_allclose(run(optax.constant_schedule(1e-3)), run(1e-3), rtol=1e-6)
