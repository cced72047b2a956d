"""The paper's networks: published counts, invariants, and what KFAC makes of them."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmtdamp.flax
from benchmarks.shared.models import build, max_pool

pytestmark = pytest.mark.usefixtures("standard_promotion")
# Narrow, on small images.
SMALL = {
    "logistic": ((6, 5, 2), 1.0),
    "mlp": ((6, 5, 2), 0.05),
    "vgg16": ((16, 16, 3), 0.02),
    "vgg16-bn": ((16, 16, 3), 0.02),
    "cnn": ((4, 4, 3), 1.0),
    "lenet": ((4, 4, 1), 1.0),
}
networks = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (i > 1)) for i, n in enumerate(SMALL)],
)


@functools.cache
def made(name):
    shape, width = SMALL[name]
    with jax.default_prng_impl("rbg"):  # compiles in a fifth of the time
        model = build(name, 7, shape, width)
    images = jax.random.normal(jax.random.key(1), (4, *shape), jnp.float32)
    return *nnx.split(model), images


def small(name):
    """A model with 7 classes, and 4 images for it."""
    graphdef, state, images = made(name)
    return nnx.merge(graphdef, state, copy=True), images


def abstract(name, num_classes, shape, width=1.0):
    """The model's structure, without making its numbers."""
    return nnx.eval_shape(lambda: build(name, num_classes, shape, width))


def num_params(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def multiplications(jaxpr):
    """Of the convolutions and matrix products of one image."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in {"conv_general_dilated", "dot_general"}:
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            count += math.prod(out) * math.prod(kernel[:-1])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            count += multiplications(inner)
    return count


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "expected"),
    [
        ("logistic", 10, (28, 28, 1), 7_850),
        ("mlp", 10, (28, 28, 1), 785 * 256 + 257 * 256 + 257 * 10),
        # Convolutions of the usual VGG-16 (torchvision's `features`), then the head.
        ("vgg16", 100, (32, 32, 3), 14_714_688 + 2 * 513 * 512 + 513 * 100),
        ("vgg16-bn", 100, (32, 32, 3), 14_723_136 + 2 * 513 * 512 + 513 * 100),
        ("vgg16", 100, (64, 64, 3), 14_714_688 + (2049 + 513) * 512 + 513 * 100),
        ("cnn", 10, (32, 32, 3), 28 * 32 + 2 * 289 * 32 + 33 * 10),
        ("lenet", 10, (28, 28, 1), 26 * 6 + 151 * 16 + 785 * 120 + 121 * 84 + 85 * 10),
    ],
)
def test_number_of_parameters(name, num_classes, shape, expected):
    assert num_params(abstract(name, num_classes, shape)) == expected


def test_number_of_multiplications():
    """Those of torchvision's VGG-16: pooling stands where it should."""
    graphdef, state = nnx.split(abstract("vgg16", 100, (32, 32, 3)))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    expected = 313_196_544 + 2 * 512**2 + 512 * 100
    forward = lambda state, x: nnx.merge(graphdef, state)(x)
    assert multiplications(jax.make_jaxpr(forward)(state, images).jaxpr) == expected


def test_width_scales_channels():
    half = abstract("vgg16", 100, (32, 32, 3), 0.5)
    sizes = [conv.out_features for stage in half.stages for conv in stage]
    assert sizes == [32, 32, 64, 64, *[128] * 3, *[256] * 6]
    assert half.head.out.in_features == 256
    assert abstract("mlp", 10, (28, 28, 1), 0.5).out.in_features == 128
    assert abstract("vgg16", 100, (32, 32, 3), 1e-3).head.out.in_features == 1


@pytest.mark.slow
@networks
def test_gradient_is_finite_and_evaluation_deterministic(name):
    model, images = small(name)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype("float32")
    }

    @nnx.jit
    def gradient(model, images):
        loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(
            model(images), jnp.arange(4)
        ).mean()
        return nnx.grad(loss)(model)

    gradients = jax.tree.leaves(gradient(model, images))
    assert all(jnp.isfinite(x).all() for x in gradients)
    # No layer is cut off: all but biases before BatchNorm get a gradient.
    assert all((x != 0).any() for x in gradients if x.ndim > 1)
    model.eval()
    forward = nnx.jit(lambda model, x: model(x))
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
    logits = forward(model, images)
    assert logits.shape == (4, 7)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, forward(model, images))
    # An image's logits do not depend on the others, and nothing is updated.
    other = forward(model, images.at[1:].multiply(2.0))
    np.testing.assert_allclose(other[0], logits[0], rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.as_pure(nnx.state(model)))


def test_logistic_regression_begins_at_zero():
    model, images = small("logistic")
    np.testing.assert_array_equal(model(images), np.zeros((4, 7)))


def test_kernels_begin_by_the_rule_of_he_with_fan_in():
    model, _ = small("vgg16")
    layers = [conv for stage in model.stages for conv in stage]
    assert len(layers) == 13
    layers += model.head.hidden
    assert not any(layer.bias[...].any() for layer in layers)
    # Where layers widen, fan-out would be 28 % off.
    widening = [x for x in layers if x.out_features > x.in_features]
    for some in (layers, widening):
        draws = [
            layer.kernel[...] * math.sqrt(math.prod(layer.kernel.shape[:-1]) / 2)
            for layer in some
        ]
        draws = np.concatenate([x.reshape(-1) for x in draws])
        # The deviation of n normal draws has a relative error of 1/sqrt(2 n).
        rel = 4 / math.sqrt(2 * draws.size)
        assert float(draws.std()) == pytest.approx(1, rel=rel)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2), (2, 1, 4, 2)])
def test_max_pool_is_that_of_flax(shape):
    x = jax.random.normal(jax.random.key(5), shape)
    if shape[1] == 1:
        np.testing.assert_array_equal(max_pool(x), x)
        return
    theirs = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    np.testing.assert_array_equal(max_pool(x), theirs(x))
    slope = lambda pool: jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))(x)
    np.testing.assert_allclose(slope(max_pool), slope(theirs), rtol=1e-12)


@pytest.mark.slow
def test_transformer_is_causal():
    with jax.default_prng_impl("rbg"):
        model = build("transformer", 11, (8,), width=0.125, seed=6)
    tokens = jnp.arange(16).reshape(2, 8) % 11
    forward = nnx.jit(lambda model, tokens: model(tokens))
    logits = forward(model, tokens)
    assert logits.shape == (2, 8, 11)
    assert logits.dtype == jnp.float32
    other = forward(model, tokens.at[:, 5].set(10))
    np.testing.assert_array_equal(other[:, :5], logits[:, :5])
    assert (other[:, 5:] != logits[:, 5:]).any(-1).all()
    # Shorter inputs too.
    np.testing.assert_allclose(
        forward(model, tokens[:, :3]), logits[:, :3], rtol=1e-4, atol=1e-5
    )
    # Embeddings; per block two norms, attention, two layers; the last norm and layer.
    blocks = 2 * (2 * 16 + 4 * 9 * 8 + 9 * 32 + 33 * 8)
    assert num_params(model) == (11 + 8) * 8 + blocks + 16 + 9 * 11


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_kfac_gives_every_layer_of_vgg_a_kronecker_block():
    model, _ = small("vgg16")
    blocks = rmtdamp.flax.nnx_factors(model, cross_entropy).blocks
    assert len(blocks) == 16
    assert all(block.groups for block in blocks)
    table = rmtdamp.kronecker.block_table(blocks).splitlines()[1:]
    assert all("Kronecker" in line for line in table)
    assert sum(line.startswith("stages/") for line in table) == 13
    assert sum(line.startswith("head/") for line in table) == 3
    covered = sorted(leaf for block in blocks for leaf in block.leaves)
    assert covered == list(range(32))


@pytest.mark.slow
def test_kfac_measures_vgg():
    model, images = small("vgg16")
    factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy, fisher="empirical")
    found = jax.jit(factors_fn)(
        nnx.as_pure(nnx.state(model, nnx.Param)),
        (images, jnp.arange(4)),
        jax.random.key(7),
        *nnx.as_pure(rmtdamp.flax.loss_args(model)),
    )
    leaves = jax.tree.leaves(found.kronecker)
    assert len(leaves) == 2 * 16
    assert all(jnp.isfinite(x).all() and (x != 0).any() for x in leaves)
