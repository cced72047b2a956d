"""Packed vectors and blocks of them: there and back, and the algebra against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmtdamp._basis import (
    SMALL,
    combine,
    draw,
    magnitude,
    orthogonalise,
    pack,
    project,
    row,
    store,
    unpack,
    zeros,
)
from rmtdamp._tree import scattered

TREE = {
    "bias": jnp.arange(3.0),
    "conv": jnp.arange(8.0).reshape(2, 2, 2),
    "large": jnp.arange(SMALL + 2.0).reshape(2, -1),
    "scalar": jnp.float64(7),
}


def test_small_leaves_are_joined_and_large_ones_are_not():
    joined, large = pack(TREE, TREE)
    np.testing.assert_array_equal(joined, [*range(3), *range(8), 7])
    assert large.shape == TREE["large"].shape
    assert len(pack(TREE, TREE, small=2**20)) == 1
    back = unpack([joined, large], TREE)
    jax.tree.map(np.testing.assert_array_equal, back, TREE)


def test_leading_axes_stay_and_narrow_leaves_are_widened():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE)
    parts = pack(narrow, narrow)
    assert {x.dtype for x in parts} == {jnp.dtype(jnp.float32)}
    block = unpack([jnp.stack([x, 2 * x, 3 * x]) for x in parts], narrow)
    assert jax.tree.map(jnp.shape, block) == {
        name: (3, *x.shape) for name, x in TREE.items()
    }
    np.testing.assert_array_equal(block["conv"][2], 3 * TREE["conv"])


def test_only_large_leaves_and_only_small_ones():
    alone = {"large": TREE["large"]}
    assert [x.shape for x in pack(alone, alone)] == [alone["large"].shape]
    np.testing.assert_array_equal(
        unpack(pack(alone, alone), alone)["large"], alone["large"]
    )
    ones = jnp.ones((2, 3))
    assert [x.shape for x in pack(ones, ones)] == [(6,)]


def test_leaves_that_are_split_by_their_type_are_not_joined():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = jax.device_put(jnp.arange(8.0).reshape(4, 2), jax.P("x"))
        tree = [split, jnp.arange(3.0), jnp.arange(2.0)]
        parts = pack(tree, tree)
        assert [x.shape for x in parts] == [(5,), (4, 2)]
        assert jax.typeof(parts[1]).sharding.spec == jax.P("x", None)
        jax.tree.map(np.testing.assert_array_equal, unpack(parts, tree), tree)


def test_a_draw_has_independent_entries():
    """Two leaves, one joined and one apart: correlation 0 by its standard error."""
    like = [jnp.zeros(SMALL, jnp.float32), jnp.zeros(SMALL + 1, jnp.float32)]
    first, second = draw(jax.random.key(0), like, jax.random.normal)
    assert (first.shape, second.shape) == ((SMALL,), (SMALL + 1,))
    for values in (first, second):
        assert abs(np.mean(values)) < 4 / SMALL**0.5
        assert abs(np.var(values) - 1) < 4 * (2 / SMALL) ** 0.5
    assert abs(np.mean(first * second[:-1])) < 4 / SMALL**0.5
    (signs,) = draw(jax.random.key(1), jnp.zeros(9), jax.random.rademacher)
    assert set(np.abs(signs)) == {1.0}


def block(rows=4):
    keys = jax.random.split(jax.random.key(2), 2)
    return [
        jax.random.normal(keys[0], (rows, 5)),
        jax.random.normal(keys[1], (rows, 2, 3)),
    ]


def flat(tree):
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in tree], axis=1)


def transformed(x: np.ndarray) -> list[np.ndarray]:
    """Walsh-Hadamard and Fourier coefficients, each of unit variance for white x."""
    walsh, width = x / np.linalg.norm(x), 1
    while width < x.size:
        a, b = np.moveaxis(walsh.reshape(-1, 2, width), 1, 0)
        walsh = np.stack([a + b, a - b], 1).ravel()
        width *= 2
    return [walsh, np.fft.rfft(x / np.linalg.norm(x))[1:]]


@pytest.mark.parametrize("seed", range(3))
def test_a_scattered_vector_is_orthogonal_to_nothing_regular(seed):
    shape = 64, 128
    x = np.asarray(scattered(jax.random.key(seed), shape, jnp.float32))
    assert abs(x.mean()) < 4 / np.sqrt(3 * x.size)
    assert abs(3 * np.mean(x**2) - 1) < 4 / np.sqrt(1.25 * x.size)
    # The largest of n Gaussian coefficients is sqrt(2 log n) = 4.2 of their spread.
    assert all(np.abs(y).max() < 5.5 for y in transformed(x.ravel()))
    other = np.asarray(scattered(jax.random.key(seed + 1), shape, jnp.float32))
    assert abs(np.corrcoef(x.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(x.size)


def test_a_scattered_vector_does_not_depend_on_its_shape_or_on_the_form_of_the_key():
    key = jax.random.key(7)
    flat = scattered(key, (24,), jnp.float32)
    cube = scattered(jax.random.PRNGKey(7), (2, 3, 4), jnp.float32)
    np.testing.assert_array_equal(cube.ravel(), flat)
    assert scattered(key, (), jnp.bfloat16).dtype == jnp.bfloat16


def test_algebra_is_that_of_matrices():
    basis, vector = block(), row(block(), 1)
    dense, x = flat(basis), flat(basis)[1]
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    near(project(basis, vector), dense @ x)
    sums = jnp.array([[1.0, 2.0, 0.0, -1.0], [0.5, 0.0, 0.0, 0.0]])
    near(flat(combine(sums, basis)), sums @ dense)
    stored = flat(store(basis, 2, vector))
    near(stored[2], x)
    near(np.delete(stored, 2, 0), np.delete(dense, 2, 0))
    assert not flat(zeros(vector, 3)).any()
    assert flat(zeros(vector, 3)).shape == (3, 11)


def test_two_passes_leave_nothing_of_a_vector_almost_within_the_span():
    """1e-9 of it is outside: one pass leaves rounding relative to that, two do not."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 6)))[0].T
    basis, outside = [jnp.asarray(q[:5])], q[5]
    vector = [jnp.asarray(q[:5].sum(0) + 1e-9 * outside)]
    rest, coefficients = orthogonalise(basis, vector)
    np.testing.assert_allclose(coefficients, np.ones(5), rtol=1e-12)
    unit = np.asarray(rest[0]) / np.linalg.norm(rest[0])
    np.testing.assert_allclose(q[:5] @ unit, 0, atol=1e-14)
    np.testing.assert_allclose(abs(unit @ outside), 1, rtol=1e-6)
    once = np.asarray(orthogonalise(basis, vector, 1)[0][0])
    assert np.abs(q[:5] @ once).max() / np.linalg.norm(once) > 1e-10


@pytest.mark.parametrize(("values", "expected"), [([-3.0, 2.0], 3), ([0.0], 1)])
def test_magnitude_is_something_to_divide_by(values, expected):
    assert magnitude([jnp.array(values), jnp.zeros(0)]) == expected
