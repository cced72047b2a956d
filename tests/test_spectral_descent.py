"""The damped polar factor: both methods against an SVD, their limits, every shape."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from problems import log_compilations, mlp, mlp_batch, mlp_loss

from rmtdamp import scale_by_spectral_descent as scale_by_spectral, spectral_descent
from rmtdamp.transforms import DampingLearner, auto_damping, set_damping
from rmtdamp.transforms._spectral_descent import dimension_numbers

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.slow]
METHODS = ["svd", "newton_schulz"]
REACH = 1.5**-24  # r at 30 steps
CONV = MuonDimensionNumbers((0, 1, 2), 3)


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def polar(g, damping):
    u, s, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return (u * (s / (s + damping))) @ vt


def first(tx, grads, **extras):
    return jax.jit(tx.update)(grads, tx.init(grads), grads, **extras)[0]


def with_singular_values(values, rows=10, dtype=jnp.float64):
    left = np.linalg.qr(normal(1, rows, len(values)))[0]
    right = np.linalg.qr(normal(2, len(values), len(values)))[0]
    return jnp.asarray((left * np.asarray(values)) @ right, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_damped_polar_factor(method):
    """Tall, wide and square, from spectral descent to SGD. The smallest singular value
    is 0.1 of the norm, so Newton-Schulz has converged: rounding times the condition."""
    grads = {"tall": normal(0, 7, 4), "wide": normal(1, 3, 6)}
    grads["square"] = with_singular_values([1.0, 0.5, 0.2], rows=3)
    tx = scale_by_spectral(method=method)
    update = jax.jit(tx.update)
    for damping in (0.0, 1e-2, 1.0, 1e3):
        updates, _ = update(grads, tx.init(grads), damping=damping)
        for name, g in grads.items():
            expected = polar(g, damping)
            np.testing.assert_allclose(updates[name], expected, rtol=1e-9, atol=1e-13)
    # The limits: U V^T has unit singular values, and delta u tends to g.
    for name, g in grads.items():
        spectral_step = update(grads, tx.init(grads), damping=0.0)[0][name]
        np.testing.assert_allclose(np.linalg.svd(spectral_step)[1], 1, rtol=1e-9)
        sgd = 1e6 * update(grads, tx.init(grads), damping=1e6)[0][name]
        np.testing.assert_allclose(sgd, g, rtol=1e-5, atol=1e-5)


def test_methods_agree_on_ill_conditioned_gradients_as_documented():
    """Singular values from 1 to 1e-8: (r ||G||_F / delta)^2. And below that damping
    no singular value of the step exceeds 1, whatever has converged."""
    g = with_singular_values(np.logspace(0, -8, 6))
    svd, newton_schulz = (scale_by_spectral(method=method) for method in METHODS)
    for damping in (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        by_svd = first(svd, g, damping=damping)
        np.testing.assert_allclose(by_svd, polar(g, damping), atol=1e-8)
        by_products = first(newton_schulz, g, damping=damping)
        assert np.linalg.norm(by_products, 2) < 1 + 1e-9
        if damping > REACH * jnp.linalg.norm(g):
            bound = (REACH * jnp.linalg.norm(g) / damping) ** 2
            assert np.linalg.norm(by_products - by_svd, 2) < bound
    # More steps reach further.
    far = first(scale_by_spectral(damping=1e-6, num_iterations=60), g)
    np.testing.assert_allclose(far, polar(g, 1e-6), atol=1e-5)


def test_methods_agree_in_float32():
    """Rounding of 30 products, some eps times the condition, 20 with the damping."""
    g = normal(0, 40, 24, dtype=jnp.float32)
    one, other = (
        first(scale_by_spectral(damping=0.1, method=method), g) for method in METHODS
    )
    np.testing.assert_allclose(one, other, atol=2e-5)
    np.testing.assert_allclose(one, polar(g, 0.1), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradients_scale_does_not_matter(method, dtype):
    """G and delta times 1e-20 or 1e20, whose squares float32 cannot hold, give the same
    step: of full rank, of rank one, and zero. With delta far above G, delta u is G."""
    update = jax.jit(scale_by_spectral(method=method).update)
    state = scale_by_spectral().init(None)
    full = normal(0, 7, 4, dtype=dtype)
    one = jnp.outer(jnp.arange(5.0), jnp.array([1.0, -2.0, 4.0])).astype(dtype)
    rounding = 2e-6 if dtype == jnp.float32 else 4e-3
    for scale in (2.0**-120, 2.0**-66, 1.0, 2.0**66, 2.0**120):  # exact: no rounding
        grads = {"full": scale * full, "one": scale * one, "zero": 0 * full}
        for damping in (0.0, 0.3):
            updates, _ = update(grads, state, damping=scale * damping)
            updates = jax.tree.map(lambda u: u.astype(jnp.float64), updates)
            expected = polar(full, damping)
            np.testing.assert_allclose(updates["full"], expected, atol=rounding)
            # Undamped, a singular value of 0 that rounds to some eps ||G|| is divided
            # by max(rows, columns) eps ||G||.
            expected = one.astype(jnp.float64) / (jnp.linalg.norm(one) + damping)
            atol = rounding if damping else 0.05
            np.testing.assert_allclose(updates["one"], expected, atol=atol)
            np.testing.assert_array_equal(updates["zero"], 0)
    updates, _ = update(2.0**-66 * full, state, damping=2.0**50)
    np.testing.assert_allclose(2.0**116 * updates, full, atol=rounding)


@pytest.mark.parametrize("method", METHODS)
def test_singular_and_zero_gradients_without_damping(method):
    """The step lives on the gradient's range, and is zero for a zero gradient."""
    g = jnp.outer(jnp.array([3.0, 4.0, 0.0]), jnp.array([0.0, 2.0]))
    updates = first(scale_by_spectral(damping=0.0, method=method), {"a": g, "b": 0 * g})
    np.testing.assert_allclose(updates["a"], g / 10, atol=1e-9)
    np.testing.assert_array_equal(updates["b"], 0)


def test_what_is_no_matrix_is_damped_entry_by_entry():
    grads = {
        "bias": jnp.array([0.0, 2.0, -6.0]),
        "scale": jnp.asarray(-1.0),
        "kernel": normal(0, 2, 2, 3),
        "hole": None,
        "empty": jnp.zeros((0, 3)),
    }
    updates = first(scale_by_spectral(damping=2.0), grads)
    np.testing.assert_allclose(updates["bias"], [0, 0.5, -0.75])
    np.testing.assert_allclose(updates["scale"], -1 / 3)
    kernel = grads["kernel"]
    np.testing.assert_allclose(updates["kernel"], kernel / (jnp.abs(kernel) + 2))
    assert updates["hole"] is None
    assert updates["empty"].shape == (0, 3)
    zero = first(scale_by_spectral(damping=0.0), {"bias": grads["bias"]})["bias"]
    np.testing.assert_array_equal(zero, [0, 1, -1])


@pytest.mark.parametrize("method", METHODS)
def test_stacks_and_convolutions_are_their_matrices(method):
    grads = {
        "conv": normal(0, 3, 2, 2, 5),
        "stack": normal(1, 4, 3, 2),
        "mixed": normal(2, 2, 3, 2, 4),
    }
    numbers = {
        "conv": CONV,
        "stack": MuonDimensionNumbers(-2, -1),
        "mixed": MuonDimensionNumbers((3, 0), 1),
    }
    tx = scale_by_spectral(damping=0.3, method=method, weight_dimension_numbers=numbers)
    updates = first(tx, grads)
    expected = polar(grads["conv"].reshape(12, 5), 0.3).reshape(3, 2, 2, 5)
    np.testing.assert_allclose(updates["conv"], expected, atol=1e-9)
    for i in range(4):
        expected = polar(grads["stack"][i], 0.3)
        np.testing.assert_allclose(updates["stack"][i], expected, atol=1e-9)
    for i in range(2):
        matrix = jnp.transpose(grads["mixed"][:, :, i], (2, 0, 1)).reshape(8, 3)
        found = jnp.transpose(updates["mixed"][:, :, i], (2, 0, 1)).reshape(8, 3)
        np.testing.assert_allclose(found, polar(matrix, 0.3), atol=1e-9)


def test_dimension_numbers_are_muons():
    """Muon with the convergent coefficients and no momentum is our limit, so the same
    numbers must give the same step: given as a tree, a prefix of one, a function."""
    grads = {"layer": {"conv": normal(0, 3, 2, 2, 5)}, "matrix": normal(1, 4, 3)}
    tree = {"layer": {"conv": CONV}, "matrix": MuonDimensionNumbers(1, 0)}
    # Singular values above 0.1 of the norm: 12 steps converge.
    muon = scale_by_muon(
        (1.5, -0.5, 0.0), 12, 0.0, 0.0, nesterov=False, weight_dimension_numbers=tree
    )
    expected = first(muon, grads)
    found = first(scale_by_spectral(damping=0.0, weight_dimension_numbers=tree), grads)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    both = [CONV, MuonDimensionNumbers(1, 0)]
    prefix = {"layer": CONV, "matrix": MuonDimensionNumbers(1, 0)}
    for numbers in (tree, prefix, lambda params: tree):
        assert dimension_numbers(numbers, grads) == both
    none = {"layer": None, "matrix": None}
    assert dimension_numbers(none, grads) == [None, None]
    assert dimension_numbers(None, grads) == [None, MuonDimensionNumbers()]


def test_works_in_float32_and_hands_back_the_gradients_dtype():
    g = {"kernel": normal(0, 6, 4), "bias": normal(1, 4)}
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), g)
    tx = scale_by_spectral(damping=0.1, method="svd")
    updates = first(tx, low)
    chex.assert_trees_all_equal_dtypes(updates, low)
    wide = first(tx, jax.tree.map(lambda x: x.astype(jnp.float32), low))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    chex.assert_trees_all_equal(updates, rounded)


PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
GRADS = jax.grad(mlp_loss)(PARAMS, BATCH)


def test_stands_inside_the_owners_and_compiles_once():
    """Scanned; the step is that of the damping in the state."""
    learner = DampingLearner(mlp_loss, floor=0.1)
    inner = scale_by_spectral(method="svd")
    for tx in (
        set_damping(inner, optax.linear_schedule(1.0, 0.1, 4)),
        auto_damping(optax.chain(optax.identity(), inner), learner, refresh_every=2),
    ):

        def body(state, _, tx=tx):
            updates, state = tx.update(GRADS, state, PARAMS, batch=BATCH)
            return state, updates

        run = jax.jit(lambda s, body=body: jax.lax.scan(body, s, length=3))
        state, updates = run(tx.init(PARAMS))
        damping = float(optax.tree.get(state, "damping"))
        assert damping > 0.1
        kernel = polar(GRADS[0]["kernel"], damping)
        np.testing.assert_allclose(updates[0]["kernel"][-1], kernel, rtol=1e-8)
        with log_compilations() as logs:
            run(state)
        assert not logs


def test_a_schedule_of_the_damping():
    tx = scale_by_spectral(damping=optax.linear_schedule(1.0, 0.5, 1))
    g = normal(0, 3, 2)
    update = jax.jit(tx.update)
    one, state = update(g, tx.init(g))
    two, state = update(g, state)
    np.testing.assert_allclose(one, polar(g, 1.0), rtol=1e-9)
    np.testing.assert_allclose(two, polar(g, 0.5), rtol=1e-9)
    assert state.count == 2


def test_spectral_averages_before_and_scales_after():
    """The debiased mean of the gradients, at a damping of its own unit."""
    a, b = normal(0, 3, 2), normal(1, 3, 2)
    tx = spectral_descent(0.1, damping=0.5, momentum=0.8)
    update = jax.jit(tx.update)
    _, state = update(a, tx.init(a))
    updates, _ = update(b, state)
    mean = (0.16 * a + 0.2 * b) / 0.36
    np.testing.assert_allclose(updates, -0.1 * polar(mean, 0.5), rtol=1e-9)
    plain = first(spectral_descent(0.1, damping=0.5, momentum=None, method="svd"), b)
    np.testing.assert_allclose(plain, -0.1 * polar(b, 0.5), rtol=1e-9)
    ahead = spectral_descent(0.1, damping=0.5, momentum=0.8, nesterov=True)
    _, state = ahead.update(a, ahead.init(a))
    updates, _ = ahead.update(b, state)
    expected = -0.1 * polar(0.8 * mean + 0.2 * b, 0.5)
    np.testing.assert_allclose(updates, expected, rtol=1e-9)


def test_masked_leaves_are_left_alone():
    grads = {"kernel": normal(0, 3, 2), "other": normal(1, 3, 2)}
    mask = {"kernel": True, "other": False}
    tx = set_damping(optax.masked(scale_by_spectral(method="svd"), mask), 1.0)
    updates = first(tx, grads)
    np.testing.assert_allclose(updates["kernel"], polar(grads["kernel"], 1.0))
    np.testing.assert_array_equal(updates["other"], grads["other"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": -1.0}, r"damping is -1.0, and must be at least 0"),
        ({"method": "qr"}, r"method is 'qr': choose from 'newton_schulz', 'sv"),
        ({"num_iterations": 0}, r"num_iterations is 0, and must be at least 1"),
    ],
)
def test_refuses_at_construction(options, match):
    with pytest.raises(ValueError, match=match):
        scale_by_spectral(**options)


@pytest.mark.parametrize(
    "numbers",
    [
        MuonDimensionNumbers(0, 2),
        MuonDimensionNumbers(0, -2),
        MuonDimensionNumbers((), 1),
        MuonDimensionNumbers((0, 1), 1),
    ],
    ids=["range", "same", "none", "overlap"],
)
def test_refuses_axes_that_make_no_matrix(numbers):
    tx = scale_by_spectral(weight_dimension_numbers=numbers)
    with pytest.raises(ValueError, match=r"do not make a matrix .* shape \(3, 2\)"):
        tx.update(jnp.ones((3, 2)), tx.init(jnp.ones((3, 2))))


def test_refuses_a_negative_damping_at_update():
    tx = scale_by_spectral()
    with pytest.raises(ValueError, match=r"damping is -2, and must be at least 0"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), damping=-2)
