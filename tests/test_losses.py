"""The chunked cross-entropy against optax on dense logits, and how little it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmtdamp.hessian import ggn_matvec, hessian_matvec, hvp
from rmtdamp.losses import chunked_softmax_cross_entropy

pytestmark = pytest.mark.usefixtures("standard_promotion")


def problem(dtype=jnp.float64, tokens=(2, 5), width=3, vocabulary=7):
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, *shape: jax.random.normal(key, shape, dtype)
    params = {
        "trunk": draw(keys[0], width, width),
        "kernel": draw(keys[1], width, vocabulary),
        "bias": draw(keys[2], vocabulary),
    }
    labels = jax.random.randint(keys[3], tokens, 0, vocabulary)
    batch = draw(keys[4], *tokens, width), labels
    return params, batch, jax.tree.map(jnp.cos, params)


def features(params, inputs):
    return jnp.tanh(inputs @ params["trunk"]), params["kernel"], params["bias"]


def logits(params, inputs):
    hidden, kernel, bias = features(params, inputs)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    found = jnp.dot(hidden, kernel, preferred_element_type=wide)
    return found + jnp.expand_dims(bias, range(hidden.ndim - 1))


def dense_criterion(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def dense(params, batch):
    return dense_criterion(logits(params, batch[0]), batch[1])


def chunked_criterion(outputs, labels, **options):
    hidden, kernel, bias = outputs
    return chunked_softmax_cross_entropy(
        hidden, kernel, labels, bias, **{"chunk_size": 4, **options}
    ).mean()


def chunked(params, batch, **options):
    return chunked_criterion(features(params, batch[0]), batch[1], **options)


gauss_newton = functools.partial(chunked_criterion, gauss_newton=True)


def assert_close(found, exact, rtol):
    """By the largest entry of each leaf."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# 1, a number that divides the 10 tokens, two that do not, and more than there are.
@pytest.mark.parametrize(
    "chunk_size",
    [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 7, 100))],
)
def test_losses_and_gradients_are_those_of_dense_logits(chunk_size):
    params, batch, _ = problem()
    hidden, kernel, bias = features(params, batch[0])
    losses = chunked_softmax_cross_entropy(
        hidden, kernel, batch[1], bias, chunk_size=chunk_size
    )
    exact = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch[0]), batch[1]
    )
    np.testing.assert_allclose(losses, exact, rtol=1e-12)
    for curved in (False, True):
        options = {"chunk_size": chunk_size, "gauss_newton": curved}
        found = jax.grad(functools.partial(chunked, **options))(params, batch)
        assert_close(found, jax.grad(dense)(params, batch), 1e-12)


def test_without_a_bias_the_logits_are_a_product():
    params, batch, _ = problem()
    hidden, kernel, _ = features(params, batch[0])
    found = chunked_softmax_cross_entropy(hidden, kernel, batch[1], chunk_size=4)
    exact = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, batch[1])
    np.testing.assert_allclose(found, exact, rtol=1e-12)


# Of what is rounded on the way, to 24 and 8 bits.
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (jnp.float64, 1e-12),
        pytest.param(jnp.float32, 1e-5, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 0.05, marks=pytest.mark.slow),
    ],
)
def test_products_are_those_of_dense_logits(dtype, rtol):
    params, batch, vector = problem(dtype)
    np.testing.assert_allclose(chunked(params, batch), dense(params, batch), rtol=rtol)
    assert_close(
        hvp(chunked, params, batch, vector), hvp(dense, params, batch, vector), rtol
    )
    assert_close(
        hessian_matvec(chunked, params, batch)(vector),
        hessian_matvec(dense, params, batch)(vector),
        rtol,
    )
    assert_close(
        ggn_matvec(features, gauss_newton, params, batch)(vector),
        ggn_matvec(logits, dense_criterion, params, batch)(vector),
        rtol,
    )


def test_without_gauss_newton_the_criterion_has_the_curvature_of_the_product():
    """Else the test above would say nothing of the option."""
    params, batch, vector = problem()
    found = ggn_matvec(features, chunked_criterion, params, batch)(vector)
    exact = ggn_matvec(logits, dense_criterion, params, batch)(vector)
    assert np.abs(found["kernel"] - exact["kernel"]).max() > 1e-3


def test_gradients_of_bfloat16_are_summed_up_in_float32():
    """A thousand chunks: in bfloat16 a sum stops to grow at 256 of its terms."""
    params, batch, _ = problem(jnp.bfloat16, tokens=(1024,))
    total = lambda params: 1024 * chunked(params, batch, chunk_size=1)
    exact = lambda params: 1024 * dense(params, batch)
    assert_close(jax.grad(total)(params), jax.grad(exact)(params), 0.05)


def held(function, *args):
    """Bytes of a compiled program's temporary arrays and its results."""
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


PROGRAMS = {
    "gradient": lambda p, b, loss, *_: jax.grad(loss)(p, b),
    "hvp": lambda p, b, loss, *_: hvp(loss, p, b, p),
    "hessian_matvec": lambda p, b, loss, *_: hessian_matvec(loss, p, b),
    "product of hessian_matvec": lambda p, b, loss, *_: hessian_matvec(loss, p, b)(p),
    "ggn_matvec": lambda p, b, _, *split: ggn_matvec(*split, p, b),
    "product of ggn_matvec": lambda p, b, _, *split: ggn_matvec(*split, p, b)(p),
}
VARIANTS = {"gradient", "hessian_matvec", "product of hessian_matvec", "ggn_matvec"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in PROGRAMS],
)
def test_memory_grows_with_the_chunk_and_not_with_all_logits(name):
    vocabulary = 2048

    def bytes_held(tokens, chunk_size):
        params, batch, _ = problem(jnp.float32, (tokens,), 4, vocabulary)
        options = {"chunk_size": chunk_size}
        loss = functools.partial(chunked, **options)
        criterion = functools.partial(gauss_newton, **options)
        program = lambda p, b: PROGRAMS[name](p, b, loss, features, criterion)
        return held(program, params, batch)

    chunk, all_logits = (tokens * vocabulary * 4 for tokens in (16, 512))
    few = bytes_held(512, 16)
    assert few < all_logits / 4
    assert bytes_held(1024, 16) - few < all_logits / 32
    if name in ("gradient", "hvp"):
        assert bytes_held(512, 64) - few > 3 * chunk
    program = lambda p, b: PROGRAMS[name](p, b, dense, logits, dense_criterion)
    given = problem(jnp.float32, (512,), 4, vocabulary)[:2]
    assert held(program, *given) > all_logits


def test_tokens_split_over_devices_stay_spread():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params, batch, _ = problem(tokens=(16,))
    exact = jax.grad(chunked)(params, batch)
    split = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("x")))
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    compiled = jax.jit(jax.grad(chunked)).lower(params, split).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(params, split), exact, 1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"kernel": jnp.ones((4, 7))},
            ValueError,
            r"kernel \(4, 7\) and labels \(2, 5",
        ),
        ({"labels": jnp.zeros(2, int)}, ValueError, r"labels \(2,\): they must be"),
        ({"bias": jnp.ones(3)}, ValueError, r"bias has shape \(3,\) and kernel \(3, 7"),
        (
            {"labels": jnp.zeros((2, 5))},
            TypeError,
            "labels are float64, and must be in",
        ),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0, and must be at least 1"),
    ],
)
def test_wrong_arguments(change, error, message):
    params, batch, _ = problem()
    hidden, kernel, bias = features(params, batch[0])
    given = {"hidden": hidden, "kernel": kernel, "labels": batch[1], "bias": bias}
    with pytest.raises(error, match=message):
        chunked_softmax_cross_entropy(**given | change)
