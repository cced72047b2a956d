"""The Frobenius norm against the dense one, by its own standard error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import symmetric

from rmtdamp.hessian import frobenius_norm

MATRIX = symmetric(jax.random.key(0), 1, 12)[0]
LIKE = {"a": jnp.zeros((2, 4)), "b": jnp.zeros(4)}


@jax.tree_util.Partial
def matvec(vector):
    product = MATRIX @ jnp.concatenate([vector["a"].ravel(), vector["b"]])
    return {"a": product[:8].reshape(2, 4), "b": product[8:]}


def test_square_is_unbiased_and_the_standard_error_true():
    keys = jax.random.split(jax.random.key(1), 2000)
    find = lambda key: frobenius_norm(matvec, LIKE, key, num_probes=16)
    found = jax.jit(jax.vmap(find))(keys)
    exact = np.sum(np.square(MATRIX))
    squares = np.square(found.value)
    z = (squares.mean() - exact) / (squares.std(ddof=1) / len(keys) ** 0.5)
    assert abs(z) < 4
    # To a tenth: the error of a standard error from 16 samples of heavier tail.
    spread = float(found.value.std())
    assert float(found.stderr.mean()) == pytest.approx(spread, rel=0.1)


def test_eager_is_traced_and_a_multiple_of_the_identity_is_exact():
    find = lambda key: frobenius_norm(matvec, LIKE, key, num_probes=3)
    eager, traced = find(jax.random.key(2)), jax.jit(find)(jax.random.key(2))
    np.testing.assert_allclose(eager.value, traced.value, rtol=1e-12)
    like = jnp.zeros(9, jnp.bfloat16)
    single = frobenius_norm(lambda v: 2 * v, like, jax.random.key(3), num_probes=1)
    assert single.value == 6
    assert single.value.dtype == jnp.float32
    assert np.isnan(single.stderr)
    zero = frobenius_norm(lambda v: 0 * v, like, jax.random.key(4), num_probes=2)
    assert tuple(zero) == (0, 0)


@pytest.mark.parametrize("unit", [1e25, 1e-25])
def test_a_norm_that_has_no_square_in_float32(unit):
    like = jnp.zeros(9, jnp.float32)
    found = frobenius_norm(
        lambda v: v * jnp.float32(unit), like, jax.random.key(5), num_probes=3
    )
    np.testing.assert_allclose(found.value, 3 * unit, rtol=1e-6)
    assert found.stderr < 1e-6 * unit


def test_no_probe_is_refused():
    with pytest.raises(ValueError, match="num_probes is 0, and at least 1 is needed"):
        frobenius_norm(matvec, LIKE, jax.random.key(0), num_probes=0)
