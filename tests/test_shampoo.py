"""Shampoo: the damped polar factor in one step, dense powers in several, its bases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from problems import log_compilations, mlp, mlp_batch, mlp_loss

from rmtdamp import scale_by_shampoo, shampoo
from rmtdamp.transforms import DampingLearner, auto_damping, set_damping

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.slow]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def spectrally(g, function):
    """U f(s) V^T."""
    u, s, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return (u * function(s)) @ vt


def power(matrix, exponent, damping):
    """(A^1/2 + delta I)^exponent."""
    values, vectors = np.linalg.eigh(matrix)
    return (
        vectors * (np.sqrt(np.maximum(values, 0)) + damping) ** exponent
    ) @ vectors.T


def run(tx, gradients, damping=None):
    """The last update and state, jitted."""
    update, state, updates = jax.jit(tx.update), tx.init(gradients[0]), None
    for g in gradients:
        updates, state = update(g, state, damping=damping)
    return updates, state


@pytest.mark.parametrize("shape", [(6, 4), (3, 5)], ids=["tall", "wide"])
@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_with_one_gradient_it_is_the_damped_polar_factor(shape, decay):
    """Averages are debiased, so the decay does not matter. The eigenvalues of the
    longer side are known to eps ||G||^2, their roots to 1e-8 ||G||."""
    g, tx = normal(0, *shape), scale_by_shampoo(decay=decay)
    update = jax.jit(tx.update)
    for damping in (0.0, 1e-3, 0.1, 1.0, 1e3):
        updates, _ = update(g, tx.init(g), damping=damping)
        expected = spectrally(g, lambda s, d=damping: s / (s + d))
        np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-9)
    sgd = 1e6 * update(g, tx.init(g), damping=1e6)[0]
    np.testing.assert_allclose(sgd, g, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({"exponents": 0.5}, lambda s: s / (s + 0.1) ** 2),
        ({"exponents": (0.5, 0)}, lambda s: s / (s + 0.1)),
        ({"exponents": (0, 0.5)}, lambda s: s / (s + 0.1)),
        ({"exponents": (0.25, 0.5)}, lambda s: s / (s + 0.1) ** 1.5),
        ({"damping_in_root": True}, lambda s: s / (s**2 + 0.1) ** 0.5),
        ({"max_side": 5}, lambda s: s / (s + 0.1)),
    ],
    ids=["1/2", "left", "right", "unequal", "in the root", "a long side"],
)
def test_powers_and_sides(options, function):
    g = normal(0, 6, 4)
    updates, state = run(scale_by_shampoo(damping=0.1, eigen_every=1, **options), [g])
    np.testing.assert_allclose(updates, spectrally(g, function), rtol=1e-7, atol=1e-9)
    left, right = (side.average for side in (state.left, state.right))
    assert (left.ndim == 0) == (
        "max_side" in options or options.get("exponents") == (0, 0.5)
    )
    assert (right.ndim == 0) == (options.get("exponents") == (0.5, 0))


def test_averages_over_several_gradients_in_dense_algebra():
    gradients, decay, damping = normal(0, 4, 5, 3), 0.8, 0.2
    tx = scale_by_shampoo(
        damping=damping, exponents=(0.25, 0.5), decay=decay, eigen_every=1
    )
    updates, _ = run(tx, list(gradients))
    weights = (1 - decay) * decay ** np.arange(3, -1, -1) / (1 - decay**4)
    grams = lambda spec: np.einsum(spec, weights, gradients, gradients)
    left = power(grams("n,nij,nkj->ik"), -0.5, damping)
    right = power(grams("n,nji,njk->ik"), -1.0, damping)
    np.testing.assert_allclose(updates, left @ gradients[-1] @ right, rtol=1e-8)


def test_eigenvectors_are_cached_and_eigenvalues_and_damping_are_of_now():
    a, b = normal(0, 4, 3), normal(1, 4, 3)
    tx = scale_by_shampoo(decay=0.5, eigen_every=2)
    update = jax.jit(tx.update)
    _, first = update(a, tx.init(a), damping=1.0)
    updates, second = update(b, first, damping=0.3)
    sides = []
    for before, factor in zip(first[2:4], second[2:4], strict=True):
        chex.assert_trees_all_equal(before.eigenvectors, factor.eigenvectors)
        (v,), (average,) = factor.eigenvectors, factor.average
        values = np.diag(v.T @ average @ v)
        np.testing.assert_allclose(factor.eigenvalues[0], values, atol=1e-12)
        debiased = values / 0.75
        np.testing.assert_array_less(4 * 2.3e-16 * debiased.max(), debiased)
        sides.append(np.asarray(v) @ np.diag((np.sqrt(debiased) + 0.3) ** -0.5) @ v.T)
    left, right = sides
    np.testing.assert_allclose(updates, left @ b @ right, rtol=1e-8)
    _, third = update(b, second, damping=0.3)
    averaged = 0.125 * a @ a.T + 0.25 * b @ b.T + 0.5 * b @ b.T
    expected = np.linalg.eigvalsh(averaged)
    np.testing.assert_allclose(third.left.eigenvalues[0], expected, atol=1e-10)


@pytest.mark.parametrize("damping_in_root", [False, True])
def test_a_direction_that_is_new_is_no_longer_than_others(damping_in_root):
    """Between decompositions its eigenvalue was 0 and its step endless.

    Directions that are new since share their energy.
    """
    tx = scale_by_shampoo(
        damping=1e-8, decay=0.9, eigen_every=100, damping_in_root=damping_in_root
    )
    state, shared = tx.init(jnp.zeros((6, 4))), 0.0
    for i in (0, 0, 0, 0, 0, 1, 2, 3):  # decomposed at 0, 1, 2 and 4
        grads = jnp.zeros((6, 4)).at[i, i].set(1.0)
        updates, state = tx.update(grads, state)
        shared = 0.9 * shared + 0.1 * (i > 0)
        weight = shared / (1 - 0.9 ** int(state.count)) if i else 1.0
        np.testing.assert_allclose(updates[i, i], weight**-0.5, rtol=1e-3)


def test_which_eigenvectors_span_what_was_unseen_does_not_matter():
    """They are a matter of rounding: turned among themselves, the same steps."""
    rng = np.random.default_rng(0)
    tx = scale_by_shampoo(damping=1e-8, eigen_every=100)
    state = tx.init(jnp.zeros((6, 5)))
    low = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5))
    _, state = tx.update(jnp.asarray(low), state)

    def turned(factor):
        assert factor.unseen.sum() == factor.unseen.size - 2
        n = int(factor.unseen.sum())
        turn = np.eye(factor.unseen.size)
        turn[:n, :n] = np.linalg.qr(rng.standard_normal((n, n)))[0]
        return factor._replace(eigenvectors=factor.eigenvectors @ turn)

    other = state._replace(left=turned(state.left), right=turned(state.right))
    count = jnp.int32(10)  # no decomposition for a while
    state, other = (s._replace(count=count) for s in (state, other))
    for grads in rng.standard_normal((3, 6, 5)):
        updates, state = tx.update(jnp.asarray(grads), state)
        expected, other = tx.update(jnp.asarray(grads), other)
        np.testing.assert_allclose(updates, expected, rtol=1e-9)


def test_stacks_and_convolutions_are_their_matrices():
    grads = {"conv": normal(0, 2, 2, 1, 3), "stack": normal(1, 4, 3, 2)}
    numbers = {
        "conv": MuonDimensionNumbers((0, 1, 2), 3),
        "stack": MuonDimensionNumbers(1, 2),
    }
    tx = scale_by_shampoo(damping=0.3, weight_dimension_numbers=numbers)
    updates, _ = run(tx, [grads])
    damped = lambda g: spectrally(g, lambda s: s / (s + 0.3))
    conv = damped(grads["conv"].reshape(4, 3)).reshape(2, 2, 1, 3)
    np.testing.assert_allclose(updates["conv"], conv, atol=1e-7)
    stack = np.stack([damped(g) for g in grads["stack"]])
    np.testing.assert_allclose(updates["stack"], stack, atol=1e-7)


def test_what_is_no_matrix_is_rmsprop():
    """g / (sqrt(v) + delta), v debiased; and a matrix whose sides are both too long."""
    a = {"bias": normal(0, 3), "huge": normal(1, 4, 3), "hole": None}
    b = {"bias": normal(2, 3), "huge": normal(3, 4, 3), "hole": None}
    updates, state = run(scale_by_shampoo(damping=0.1, decay=0.5, max_side=2), [a, b])
    for name in ("bias", "huge"):
        v = (0.25 * a[name] ** 2 + 0.5 * b[name] ** 2) / 0.75
        expected = b[name] / (jnp.sqrt(v) + 0.1)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-12)
        assert state.left.average[name].ndim == 0
    inside, _ = run(scale_by_shampoo(damping=0.1, decay=0.0, damping_in_root=True), [a])
    np.testing.assert_allclose(
        inside["bias"], a["bias"] / jnp.sqrt(a["bias"] ** 2 + 0.1), rtol=1e-12
    )


def test_singular_and_zero_gradients_without_damping():
    g = jnp.outer(jnp.array([3.0, 4.0, 0.0]), jnp.array([0.0, 2.0]))
    updates, _ = run(
        scale_by_shampoo(damping=0.0), [{"a": g, "b": 0 * g, "c": 0 * g[0]}]
    )
    np.testing.assert_allclose(updates["a"], g / 10, atol=1e-7)
    np.testing.assert_array_equal(updates["b"], 0)
    np.testing.assert_array_equal(updates["c"], 0)


def test_a_gradient_that_is_not_finite_leaves_the_factors():
    """And does not count in the debiasing, not even as the first."""
    g = {"a": normal(0, 4, 3), "b": normal(1, 2)}
    bad = g | {"b": jnp.array([1.0, jnp.nan])}
    tx = scale_by_shampoo(damping=0.1, eigen_every=1)
    expected, clean = run(tx, [g])
    updates, state = run(tx, [bad, g])
    chex.assert_trees_all_close(updates, expected, rtol=1e-9)
    chex.assert_trees_all_close(state[2:], clean[2:], rtol=1e-9, atol=1e-12)
    assert optax.tree.get(state, "factor_rejections") == 1
    assert optax.tree.get(state, "count") == 2


PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
GRADS = jax.grad(mlp_loss)(PARAMS, BATCH)


def test_stands_inside_the_owners_and_compiles_once():
    """Scanned; with one gradient throughout, the step is the damped polar factor."""
    learner = DampingLearner(mlp_loss, floor=0.1)
    inner = scale_by_shampoo(eigen_every=2)
    for tx in (
        set_damping(inner, optax.linear_schedule(1.0, 0.1, 4)),
        auto_damping(optax.chain(inner), learner, refresh_every=2),
    ):

        def body(state, _, tx=tx):
            updates, state = tx.update(GRADS, state, PARAMS, batch=BATCH)
            return state, updates

        scanned = jax.jit(lambda s, body=body: jax.lax.scan(body, s, length=3))
        state, updates = scanned(tx.init(PARAMS))
        damping = float(optax.tree.get(state, "damping"))
        assert damping > 0.1
        kernel = spectrally(GRADS[0]["kernel"], lambda s, d=damping: s / (s + d))
        np.testing.assert_allclose(updates[0]["kernel"][-1], kernel, rtol=1e-6)
        with log_compilations() as logs:
            scanned(state)
        assert not logs


def test_an_eager_update_compiles_its_refresh_once():
    tx = scale_by_shampoo(damping=0.1, eigen_every=2)
    g = normal(0, 3, 2)
    _, state = tx.update(g, tx.init(g))
    _, state = tx.update(g, state)
    with log_compilations() as logs:
        tx.update(g, state)
    assert not logs


def test_shampoo_sums_the_steps_and_scales_them():
    a, b = normal(0, 3, 2), normal(1, 3, 2)
    updates, _ = run(
        shampoo(0.1, damping=0.5, momentum=0.8, decay=0.0, eigen_every=1), [a, b]
    )
    one, two = (spectrally(g, lambda s: s / (s + 0.5)) for g in (a, b))
    np.testing.assert_allclose(updates, -0.1 * (0.8 * one + two), rtol=1e-6)
    updates, _ = run(
        shampoo(0.1, damping=0.5, momentum=None, decay=0.0, eigen_every=1), [a]
    )
    np.testing.assert_allclose(updates, -0.1 * one, rtol=1e-6)


def test_low_precision_keeps_float32_factors_and_the_state_maps():
    low = {"kernel": normal(0, 4, 3), "bias": normal(1, 3)}
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), low)
    tx = scale_by_shampoo(damping=0.1)
    updates, state = run(tx, [low])
    chex.assert_trees_all_equal_dtypes(updates, low)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(low))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state[2:]))
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(mapped, state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": -1.0}, r"damping is -1.0, and must be at least 0"),
        ({"exponents": -0.25}, r"exponents is -0.25: take one number or a pair"),
        ({"exponents": (1, 2, 3)}, r"exponents is \(1, 2, 3\)"),
        ({"decay": 1.0}, r"decay is 1.0, and must be in \[0, 1\)"),
        ({"eigen_every": 0}, r"eigen_every is 0: take a whole number"),
        ({"max_side": 0}, r"max_side is 0: .* static_args"),
    ],
)
def test_refuses_at_construction(options, match):
    with pytest.raises(ValueError, match=match):
        scale_by_shampoo(**options)


def test_refuses_axes_that_make_no_matrix():
    tx = scale_by_shampoo(weight_dimension_numbers=MuonDimensionNumbers(0, 0))
    with pytest.raises(ValueError, match=r"do not make a matrix"):
        tx.init(jnp.ones((3, 2)))
