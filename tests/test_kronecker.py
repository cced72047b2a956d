"""Kronecker factors against matrices that are built entry by entry."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

from rmtdamp.kronecker import (
    KroneckerFactors,
    ModelFactors,
    Tape,
    block_table,
    eigenbasis,
    from_matrix,
    leaf_names,
    make_blocks,
    second_moments,
    to_matrix,
)
from rmtdamp.kronecker._tape import convolution_patches

pytestmark = pytest.mark.slow

N = 6
SILENT = Tape(keep=False)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)
jitted = jax.jit(
    lambda fn, params, batch, key: fn(params, batch, key), static_argnums=0
)


def kron(factors: KroneckerFactors, group=0):
    return jnp.kron(factors.inputs[group], factors.outputs[group])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def squared(outputs, targets):
    """Half the squared distance, a mean over examples."""
    return 0.5 * jnp.sum((outputs - targets) ** 2) / outputs.shape[0]


def cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[..., None], axis=-1))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def dense_block(model, loss, leaves, batch, kind):
    """The block of a weight matrix (bias a last row) by per-example derivatives."""
    matrix = jnp.concatenate([leaves[0], leaves[1][None]])

    def one(x, y):
        outputs = lambda matrix: model([matrix[:-1], matrix[-1]], x[None])[0]
        jacobian, z = jax.jacobian(outputs)(matrix), outputs(matrix)
        jacobian = jacobian.reshape(z.size, -1)
        loss_of = lambda z: loss(z[None], y[None])
        if kind == "ggn":
            middle = jax.hessian(loss_of)(z).reshape(z.size, z.size)
        else:
            u = jax.grad(loss_of)(z).reshape(-1)
            middle = jnp.outer(u, u)
        return jacobian.T @ middle @ jacobian

    return jnp.mean(jax.vmap(one)(*batch), axis=0)


# --- a network of two layers -------------------------------------------------------


def taped_mlp(params, x, tape, activation=jnp.tanh):
    for i, layer in enumerate(params):
        y = x @ layer["kernel"] + layer["bias"][None]
        y = tape.linear(f"{i}", x, y)
        x = activation(y) if i < len(params) - 1 else y
    return x


def mlp_blocks(params):
    spec = {
        f"{i}": {"kernel": f"{i}/kernel", "bias": f"{i}/bias"}
        for i in range(len(params))
    }
    return make_blocks(params, spec)


MLP = mlp(jax.random.key(0))
MLP_FN = ModelFactors(
    model_fn=taped_mlp,
    criterion=cross_entropy,
    blocks=mlp_blocks(MLP),
    fisher="empirical",
)


def test_batch_of_one_is_the_fisher_block():
    batch = mlp_batch(jax.random.key(1), 1)
    found = jitted(MLP_FN, MLP, batch, jax.random.key(2))
    gradient = jax.grad(mlp_loss)(MLP, batch)
    for layer, factors in zip(gradient, found.kronecker, strict=True):
        g = jnp.concatenate([layer["kernel"], layer["bias"][None]]).reshape(-1)
        close(kron(factors), jnp.outer(g, g), rtol=1e-10)


def test_factors_are_the_means_of_outer_products():
    x, labels = batch = mlp_batch(jax.random.key(3), N)
    found = jitted(MLP_FN, MLP, batch, jax.random.key(4))
    hidden = jnp.tanh(x @ MLP[0]["kernel"])
    p = jax.nn.softmax(hidden @ MLP[1]["kernel"])
    last = p - jax.nn.one_hot(labels, 6, dtype=p.dtype)
    first = (last @ MLP[1]["kernel"].T) * (1 - hidden**2)
    for factors, a, g in zip(found.kronecker, (x, hidden), (first, last), strict=True):
        a = jnp.concatenate([a, jnp.ones((N, 1))], axis=1)
        close(factors.inputs[0], a.T @ a / N)
        close(factors.outputs[0], g.T @ g / N)


def test_linear_network_with_squared_error_is_the_gauss_newton_block():
    fn = ModelFactors(
        model_fn=functools.partial(taped_mlp, activation=lambda y: y),
        criterion=squared,
        blocks=mlp_blocks(MLP),
        fisher="ggn",
    )
    batch = normal(5, N, 4), normal(6, N, 6)
    found = jitted(fn, MLP, batch, jax.random.key(7)).kronecker
    first, second = ([layer["kernel"], layer["bias"]] for layer in MLP)
    after = lambda leaves, x: (
        (x @ leaves[0] + leaves[1][None]) @ second[0] + second[1][None]
    )
    close(kron(found[0]), dense_block(after, squared, first, batch, "ggn"))
    last = lambda leaves, x: (
        (x @ first[0] + first[1][None]) @ leaves[0] + leaves[1][None]
    )
    close(kron(found[1]), dense_block(last, squared, second, batch, "ggn"))


def single(params, x, tape):
    """One layer, of which all places of an example's inputs make use."""
    return tape.linear(
        "dense", x, x @ params["w"] + params["b"][(None,) * (x.ndim - 1)]
    )


def pooled(params, x, tape):
    return jnp.mean(single(params, x, tape), axis=1)


PLACES = {"w": normal(8, 3, 4), "b": normal(9, 4)}
PLACES_FN = ModelFactors(
    model_fn=single,
    criterion=squared,
    blocks=make_blocks(PLACES, {"dense": {"kernel": "w", "bias": "b"}}),
    fisher="ggn",
)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sharing_is_exact_in_its_own_setting(sharing):
    """Eschenhagen et al.: a loss per place for expand, of the mean place for reduce."""
    model = single if sharing == "expand" else pooled
    x = normal(10, N, 5, 3)
    batch = x, jnp.zeros((N, 5, 4) if sharing == "expand" else (N, 4))
    fn = ModelFactors(
        model_fn=model,
        criterion=squared,
        blocks=PLACES_FN.blocks,
        fisher="ggn",
        sharing=sharing,
    )
    (found,) = jitted(fn, PLACES, batch, jax.random.key(11)).kronecker

    plain = lambda leaves, x: model({"w": leaves[0], "b": leaves[1]}, x, SILENT)
    leaves = [PLACES["w"], PLACES["b"]]
    close(kron(found), dense_block(plain, squared, leaves, batch, "ggn"))


def test_a_second_call_is_a_second_place():
    def twice(params, x, tape):
        first = single(params, x[:, 0], tape)
        return jnp.stack([first, single(params, x[:, 1], tape)], axis=1)

    fn = ModelFactors(
        model_fn=twice, criterion=squared, blocks=PLACES_FN.blocks, fisher="ggn"
    )
    batch = normal(12, N, 2, 3), normal(13, N, 2, 4)
    found = jitted(fn, PLACES, batch, jax.random.key(14)).kronecker[0]
    expected = jitted(PLACES_FN, PLACES, batch, jax.random.key(15)).kronecker[0]
    jax.tree.map(close, found, expected)


def summed(logits, labels):
    return labels.shape[1] * cross_entropy(logits, labels)


def masked(logits, labels):
    """A mean over the labels that are not below 0."""
    logp = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.clip(labels, 0, 3)[..., None], axis=-1
    )
    counts = (labels >= 0) & (labels < 4)
    return -jnp.sum(jnp.where(counts, logp[..., 0], 0)) / jnp.sum(
        counts.astype(logp.dtype)
    )


def own_mean(logits, labels):
    """A mean over examples of the mean over an example's own one or two places."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    kept = jnp.array([[1.0, 1.0], [1.0, 0.0]])[jnp.arange(N) % 2]
    return jnp.mean(jnp.sum(kept * losses, axis=1) / jnp.sum(kept, axis=1))


def noisy(key, outputs):
    """Targets of `mean_squared`, a likelihood of unit variance."""
    return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)


def mean_squared(outputs, targets):
    return 0.5 * jnp.mean((outputs - targets) ** 2)


INTEGERS = jnp.zeros((N, 2), jnp.int32)


@pytest.mark.parametrize(
    ("criterion", "targets", "options"),
    [
        (cross_entropy, INTEGERS, {"num_terms": 2}),
        (cross_entropy, INTEGERS, {}),
        (summed, INTEGERS, {}),
        (masked, INTEGERS.at[jnp.arange(N), jnp.arange(N) % 2].set(-1), {}),
        (masked, INTEGERS.at[jnp.arange(N), jnp.arange(N) % 2].set(255), {}),
        (mean_squared, normal(13, N, 2, 4), {"sample_fn": noisy}),
        (
            lambda z, y: 6 * mean_squared(z, y),
            normal(13, N, 2, 4),
            {"sample_fn": noisy},
        ),
        (lambda z, y: 10 * cross_entropy(z, y), INTEGERS, {}),
        (lambda z, y: summed(z, y) / 3, INTEGERS, {}),
        (own_mean, INTEGERS, {}),
    ],
    ids=[
        *("told", "mean", "sum", "masked mean", "by 255", "regression"),
        *("scaled regression", "scaled", "by a constant", "mean of means"),
    ],
)
def test_sampled_labels_give_the_gauss_newton_factor_on_average(
    criterion, targets, options
):
    """In scale, too, which a mean over tokens takes away: it is told, or found."""
    make = functools.partial(
        ModelFactors, model_fn=single, criterion=criterion, blocks=PLACES_FN.blocks
    )
    batch = normal(16, N, 2, 3), targets
    exact = jitted(make(fisher="ggn"), PLACES, batch, jax.random.key(17)).kronecker[0]
    keys = jax.random.split(jax.random.key(18), 2000)
    draw = lambda key: make(**options)(PLACES, batch, key).kronecker[0].outputs
    sampled = jax.jit(jax.vmap(draw))(keys)
    stderr = jnp.std(sampled, axis=0) / len(keys) ** 0.5
    score = (jnp.mean(sampled, axis=0) - exact.outputs) / stderr
    # Ten distinct entries: beyond 4 in one of a thousand seeds, and the seed is fixed.
    assert jnp.max(jnp.abs(score)) < 4
    assert jnp.max(jnp.abs(exact.outputs) / stderr) > 30


def empirical(criterion, batch, view=lambda z: z, num_terms=None):
    """G of the labels that are there; `view` is what a model makes of its layer."""
    fn = ModelFactors(
        model_fn=lambda params, x, tape: view(single(params, x, tape)),
        criterion=criterion,
        blocks=PLACES_FN.blocks,
        fisher="empirical",
        num_terms=num_terms,
    )
    return fn(PLACES, batch, jax.random.key(17)).kronecker[0].outputs


def test_the_number_of_terms_is_found_for_numpy_arrays_too():
    batch = np.asarray(normal(16, N, 2, 3)), np.zeros((N, 2), np.int32)
    found = empirical(cross_entropy, batch)
    close(found, empirical(cross_entropy, batch, num_terms=2))
    close(found, 2 * empirical(cross_entropy, batch, num_terms=1))


def one_hot(labels):
    return jax.nn.one_hot(labels, 4)


def soft(labels):
    """Distributions of a teacher; those that are there stay."""
    return labels if labels.ndim > 2 else 0.1 + 0.6 * one_hot(labels)


def focal(logits, labels):
    losses = optax.softmax_cross_entropy(logits, one_hot(labels))
    return (1 - jnp.exp(-losses)) ** 2 * losses


@pytest.mark.parametrize(
    ("criterion", "num_terms"),
    [
        (lambda z, y: jnp.mean(jnp.sum((z - one_hot(y)) ** 2, -1)), 2),
        (lambda z, y: jnp.sum(jax.nn.softplus(z - 3 * one_hot(y))) / N, 1),
        (
            lambda z, y: (
                5 * jnp.mean(optax.softmax_cross_entropy(z, 0.05 + 0.8 * one_hot(y)))
            ),
            2 / 5 / 0.8**2,
        ),
        (lambda z, y: jnp.sum(focal(z, y)) / N, 1),
        (lambda z, y: 5 * jnp.mean(optax.softmax_cross_entropy(z, soft(y))), 2 / 5),
    ],
    ids=["squared error of classes", "binary", "smoothed", "focal", "distributions"],
)
def test_the_scale_of_other_losses_of_labels(criterion, num_terms):
    """Cross-entropy is recognised, with smoothed labels too, and nothing else is."""
    labels = jax.random.randint(jax.random.key(3), (N, 2), 0, 4)
    batch = normal(16, N, 2, 3), soft(labels) if num_terms == 2 / 5 else labels
    told = empirical(criterion, batch, num_terms=num_terms)
    close(empirical(criterion, batch), told)


@pytest.mark.parametrize("way", ["on", "out"])
def test_a_model_goes_on_with_what_the_tape_returns(way):
    def model(params, x, tape):
        y = x @ params["w"] + params["b"][None]
        tape.linear("dense", x, y)
        return jnp.tanh(y) if way == "on" else y

    fn = dataclasses.replace(PLACES_FN, model_fn=model)
    with pytest.raises(ValueError, match=r"its own outputs of layer 'dense', and not"):
        fn(PLACES, (normal(10, N, 3), jnp.zeros((N, 4))), jax.random.key(11))


def channels_first(logits, labels):
    return summed(jnp.moveaxis(logits, 1, 2), labels)


TARGETS = {
    "one-hot": (
        lambda z, y: jnp.mean(optax.softmax_cross_entropy(z, y)),
        one_hot(jnp.arange(2 * N).reshape(N, 2) % 4),
        lambda z: z,
        0.5,
    ),
    "a column of labels": (
        lambda z, y: 7 * jnp.mean(cross_entropy(z, y[:, 0])),
        jnp.arange(N)[:, None] % 4,
        lambda z: z[:, 0],
        7,
    ),
    "channels first": (
        lambda z, y: 3 * channels_first(z, y) / y.shape[1],
        jnp.arange(2 * N).reshape(N, 2) % 4,
        lambda z: jnp.moveaxis(z, 1, 2),
        1.5,
    ),
    "binary": (
        lambda z, y: 3 * jnp.sum(optax.sigmoid_binary_cross_entropy(z, y)) / N,
        jnp.asarray(np.arange(8 * N).reshape(N, 2, 4) % 3 == 0, float),
        lambda z: z,
        3,
    ),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_the_scale_of_targets_of_other_shapes(kind):
    """The weight c of every target, against gradients divided by its root."""
    criterion, targets, view, weight = TARGETS[kind]
    batch = normal(16, N, 2, 3), targets
    told = empirical(criterion, batch, view, num_terms=1 / weight)
    close(empirical(criterion, batch, view), told)


def test_the_scale_of_several_outputs_with_weights():
    """A softmax, and sigmoids whose classes have weights of their own."""

    def make(factors, weighted):
        def criterion(outputs, targets):
            found = optax.sigmoid_binary_cross_entropy(outputs["b"], targets["b"])
            weights = 1 + weighted * targets["b"] * jnp.arange(4.0)[None, None]
            first = jnp.sum(
                optax.softmax_cross_entropy_with_integer_labels(
                    outputs["a"], targets["a"]
                )
            )
            second = jnp.sum(weights * found)
            return (factors[0] * first + factors[1] * second) / N

        def model(params, x, tape):
            z = single(params, x, tape)
            return {"a": z, "b": 2 * z}

        fn = ModelFactors(
            model_fn=model,
            criterion=criterion,
            blocks=PLACES_FN.blocks,
            fisher="empirical",
        )
        labels = jnp.arange(2 * N).reshape(N, 2) % 4
        targets = {"a": labels, "b": one_hot(labels)}
        batch = normal(16, N, 2, 3), targets
        return fn(PLACES, batch, jax.random.key(17)).records[0][1]

    plain = [make(factors, 0) for factors in ((1, 0), (0, 1))]
    # The gradients of both add up in a layer, each over the root of its weight.
    close(make((4, 9), 0), 2 * plain[0] + 3 * plain[1])
    assert jnp.max(jnp.abs(make((4, 9), 1) - make((4, 9), 0))) > 0.1


def test_a_single_logit_has_no_label_to_draw():
    def model(params, x, tape):
        return single(params, x, tape)[:, :1]

    fn = ModelFactors(
        model_fn=model,
        criterion=lambda z, y: jnp.mean(
            jax.nn.softplus(z[:, 0]) - y.astype(z.dtype) * z[:, 0]
        ),
        blocks=PLACES_FN.blocks,
    )
    batch = normal(16, N, 3), jnp.arange(N) % 2
    with pytest.raises(ValueError, match=r"logits of length 1 .*over a sample_fn"):
        fn(PLACES, batch, jax.random.key(17))


def test_a_loss_that_does_not_tell_mean_from_sum_asks():
    weights = jnp.ones((N, 2, 4))
    fn = ModelFactors(
        model_fn=single,
        criterion=lambda z, y: jnp.mean(weights * (z - y) ** 4),
        blocks=PLACES_FN.blocks,
        fisher="empirical",
    )
    batch = normal(16, N, 2, 3), normal(13, N, 2, 4)
    with pytest.raises(
        ValueError, match=r"targets of shape \(2, 4\).* hand over num_t"
    ):
        fn(PLACES, batch, jax.random.key(17))
    compiled = jitted(fn, PLACES, batch, jax.random.key(17)).kronecker[0]
    assert jnp.all(jnp.isnan(compiled.outputs))


# --- convolutions ------------------------------------------------------------------

SLOW = pytest.mark.slow
CONVOLUTIONS = {
    "same, stride": {"strides": (2, 3)},
    "valid, kernel dilation": {"padding": "VALID", "kernel_dilation": (2, 1)},
    "uneven padding": {"padding": ((1, 2), (0, 3)), "strides": (2, 1)},
    "input dilation": {"input_dilation": (2, 3), "padding": ((1, 1), (2, 0))},
    "groups": {"groups": 2, "strides": (1, 2)},
    "depthwise": {"groups": 4},
}


def convolve(x, kernel, strides, padding, input_dilation, kernel_dilation, groups):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=input_dilation,
        rhs_dilation=kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("groups", "uneven padding") else pytest.param(n, marks=SLOW)
        for n in CONVOLUTIONS
    ],
)
def test_convolution_factors_equal_a_dense_construction(name):
    defaults = {
        "strides": (1, 1),
        "padding": "SAME",
        "input_dilation": (1, 1),
        "kernel_dilation": (1, 1),
        "groups": 1,
    }
    options = defaults | CONVOLUTIONS[name]
    groups = options["groups"]
    kernel = normal(20, 3, 2, 4 // groups, 8)
    params = {"kernel": kernel, "bias": normal(21, 8)}
    x = normal(22, 3, 5, 6, 4)

    def model(params, x, tape):
        y = convolve(x, params["kernel"], **options) + params["bias"][None, None, None]
        return tape.convolution("conv", x, y, (3, 2), **options)

    fn = ModelFactors(
        model_fn=model,
        criterion=lambda y, targets: jnp.mean(jnp.cos(y)),
        blocks=make_blocks(
            params, {"conv": {"kernel": "kernel", "bias": "bias", "groups": groups}}
        ),
        fisher="empirical",
    )
    (found,) = jitted(fn, params, (x, x), jax.random.key(23)).kronecker

    y = convolve(x, kernel, **options) + params["bias"][None, None, None]
    g = -jnp.sin(y) * 3 / y.size
    # Entry by entry: the patch is the derivative of one output in the kernel.
    expected_a = np.zeros(found.inputs.shape)
    expected_g = np.zeros(found.outputs.shape)
    outputs_per_group = 8 // groups
    derivative = jax.jit(jax.jacobian(lambda w: convolve(x, w, **options)))(kernel)
    derivative = derivative.reshape(-1, 8, *kernel.shape)
    for group in range(groups):
        o = group * outputs_per_group
        a = derivative[:, o, ..., o].reshape(derivative.shape[0], -1)
        a = jnp.concatenate([a, jnp.ones((a.shape[0], 1))], axis=1)
        expected_a[group] = a.T @ a / a.shape[0]
        part = g.reshape(-1, 8)[:, o : o + outputs_per_group]
        expected_g[group] = part.T @ part / 3
    close(found.inputs, expected_a)
    close(found.outputs, expected_g)

    # Patch times weight matrix is the convolution, so both agree on the order.
    (block,) = fn.blocks
    matrix = to_matrix(block, [kernel, params["bias"]])
    window_options = {k: v for k, v in options.items() if k not in ("padding",)}
    patches = convolution_patches(
        x, (3, 2), padding=options["padding"], **window_options
    )
    product = jnp.einsum("ntka,kao->ntko", patches, matrix[:, :-1])
    close(product.reshape(y.shape) + params["bias"][None, None, None], y)
    for leaf, back in zip(
        (kernel, params["bias"]), from_matrix(block, matrix), strict=True
    ):
        np.testing.assert_array_equal(leaf, back)


# --- diagonal blocks, EKFAC --------------------------------------------------------


def scaled(params, x, tape):
    """A norm scale and an embedding around a layer."""
    x = params["table"][x] * params["scale"][None]
    return tape.linear("dense", x, x @ params["w"])


SCALED = {"scale": normal(24, 3), "table": normal(25, 5, 3), "w": normal(26, 3, 4)}
SCALED_BLOCKS = make_blocks(SCALED, {"dense": {"kernel": "w"}})
SCALED_BATCH = jnp.arange(N) % 5, jnp.arange(N) % 4


@pytest.mark.parametrize("diagonal", ["examples", "signs"])
def test_diagonal_blocks_are_mean_squared_gradients(diagonal):

    def one(params, x, y):
        return cross_entropy(scaled(params, x[None], SILENT), y[None])

    each = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0)))(SCALED, *SCALED_BATCH)
    fn = ModelFactors(
        model_fn=scaled,
        criterion=cross_entropy,
        blocks=SCALED_BLOCKS,
        fisher="empirical",
        diagonal=diagonal,
    )
    expected = [jnp.mean(each[name] ** 2, axis=0) for name in ("scale", "table")]
    if diagonal == "examples":
        found = jitted(fn, SCALED, SCALED_BATCH, jax.random.key(27)).diagonal
        jax.tree.map(close, list(found), expected)
        return
    keys = jax.random.split(jax.random.key(28), 4000)
    draw = lambda key: fn(SCALED, SCALED_BATCH, key).diagonal
    draws = jax.jit(jax.vmap(draw))(keys)
    for sample, mean in zip(draws, expected, strict=True):
        stderr = jnp.std(sample, axis=0) / len(keys) ** 0.5
        error = jnp.abs(jnp.mean(sample, axis=0) - mean)
        assert jnp.all(error < 4 * stderr + 1e-9)
        assert jnp.max(mean / (stderr + 1e-12)) > 30


def test_exact_gauss_newton_diagonal():
    fn = ModelFactors(
        model_fn=scaled, criterion=cross_entropy, blocks=SCALED_BLOCKS, fisher="ggn"
    )
    found = jitted(fn, SCALED, SCALED_BATCH, jax.random.key(29)).diagonal[0]

    def logits(scale):
        return scaled(SCALED | {"scale": scale}, SCALED_BATCH[0], SILENT)

    jacobian = jax.jacobian(logits)(SCALED["scale"])  # (N, 4, 3)
    p = jax.nn.softmax(logits(SCALED["scale"]))
    middle = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    close(found, jnp.einsum("nop,nos,nps->s", middle, jacobian, jacobian) / N)


@pytest.mark.parametrize("places", [1, 5])
def test_second_moments_are_the_diagonal_in_the_eigenbasis(places):
    batch = normal(30, N, places, 3), normal(31, N, places, 4)
    fn = ModelFactors(
        model_fn=single, criterion=squared, blocks=PLACES_FN.blocks, fisher="empirical"
    )
    found = jitted(fn, PLACES, batch, jax.random.key(32))
    basis = eigenbasis(found.kronecker[0])
    q = jnp.kron(basis.inputs[0], basis.outputs[0])

    plain = lambda leaves, x: single({"w": leaves[0], "b": leaves[1]}, x, SILENT)
    fisher = dense_block(plain, squared, [PLACES["w"], PLACES["b"]], batch, "empirical")
    expected = jnp.diag(q.T @ fisher @ q).reshape(1, 4, 4)
    close(second_moments(found.records[0], basis), expected)


def test_bfloat16_is_accumulated_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MLP)
    x, labels = mlp_batch(jax.random.key(33), N)
    found = jitted(MLP_FN, half, (x.astype(jnp.bfloat16), labels), jax.random.key(34))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    exact = jitted(MLP_FN, MLP, (x, labels), jax.random.key(35))
    for a, b in zip(found.kronecker, exact.kronecker, strict=True):
        np.testing.assert_allclose(kron(a), kron(b), rtol=0.1, atol=0.02)


# --- what is refused ---------------------------------------------------------------


def test_a_layer_called_with_different_shapes_is_refused():
    def model(params, x, tape):
        longer = jnp.stack([x, x], axis=1)
        return single(params, x, tape) + jnp.sum(single(params, longer, tape), axis=1)

    fn = ModelFactors(model_fn=model, criterion=squared, blocks=PLACES_FN.blocks)
    batch = normal(36, N, 3), normal(37, N, 4)
    with pytest.raises(ValueError, match=r"'dense' is called twice .*\(6, 4\).*\(6, 2"):
        fn(PLACES, batch, jax.random.key(38))


def test_a_layer_that_is_not_called_is_refused():
    fn = ModelFactors(
        model_fn=lambda p, x, tape: x @ p["w"],
        criterion=squared,
        blocks=PLACES_FN.blocks,
        fisher="ggn",
    )
    with pytest.raises(ValueError, match=r"'dense' was not called by the model"):
        fn(PLACES, (normal(39, N, 3), normal(40, N, 4)), jax.random.key(41))


def test_rows_that_are_not_examples_are_refused():
    def model(params, x, tape):
        some = single(params, jnp.ones((4, 3)) * x[0, 0], tape)
        return x + jnp.sum(some, axis=0)[None]

    fn = ModelFactors(
        model_fn=model, criterion=squared, blocks=PLACES_FN.blocks, fisher="ggn"
    )
    with pytest.raises(ValueError, match=r"sees 4 rows, which 6 examples do not"):
        fn(PLACES, (normal(42, N, 4), normal(43, N, 4)), jax.random.key(44))


@pytest.mark.parametrize("transform", ["scan", "vmap", "checkpoint"])
def test_a_layer_inside_a_transformation_is_refused(transform):
    def model(params, x, tape):
        layer = lambda row: single(params, row, tape)
        if transform == "scan":
            step = lambda carry, row: (carry, layer(row))
            return jax.lax.scan(step, 0, jnp.moveaxis(x, 1, 0))[1][0]
        return (jax.vmap if transform == "vmap" else jax.checkpoint)(layer)(x)

    fn = ModelFactors(
        model_fn=model, criterion=squared, blocks=PLACES_FN.blocks, fisher="ggn"
    )
    batch = normal(45, N, 2, 3), normal(46, N, 4)
    with pytest.raises(ValueError, match=r"layers dense sit inside a transformed part"):
        fn(PLACES, batch, jax.random.key(47))
    with pytest.raises(ValueError, match=r"inside a transformed part"):
        jitted(fn, PLACES, batch, jax.random.key(60))


def test_sampled_targets_unlike_the_batch_are_refused():
    fn = ModelFactors(model_fn=single, criterion=squared, blocks=PLACES_FN.blocks)
    with pytest.raises(ValueError, match=r"shapes \[\(6,\)\] and those .*sample_fn"):
        fn(PLACES, (normal(48, N, 3), normal(49, N, 4)), jax.random.key(50))


def test_exact_curvature_of_several_outputs_is_refused():
    fn = ModelFactors(
        model_fn=lambda p, x, tape: {"z": single(p, x, tape)},
        criterion=lambda z, y: squared(z["z"], y),
        blocks=PLACES_FN.blocks,
        fisher="ggn",
    )
    with pytest.raises(ValueError, match=r"one array of outputs, and got a dict"):
        fn(PLACES, (normal(51, N, 3), normal(52, N, 4)), jax.random.key(53))
    fn = dataclasses.replace(fn, fisher="sampled")
    with pytest.raises(ValueError, match=r"outputs are a dict, .* over a sample_fn"):
        fn(PLACES, (normal(51, N, 3), normal(52, N, 4)), jax.random.key(53))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fisher": "true"},
            r"fisher is 'true': choose from 'sampled', 'empirical', 'ggn'",
        ),
        ({"sharing": "mean"}, r"sharing is 'mean': choose from 'expand', 'reduce'"),
        ({"diagonal": "full"}, r"diagonal is 'full': choose from 'examples', 'signs'"),
        ({"num_terms": 0}, r"num_terms is 0, and must be above 0"),
    ],
    ids=["fisher", "sharing", "diagonal", "num_terms"],
)
def test_unknown_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelFactors(
            model_fn=single, criterion=squared, blocks=PLACES_FN.blocks, **change
        )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"l": {"kernel": "v"}}, r"names 'v', and no leaf .*choose from b, w"),
        (
            {"l": {"kernel": "w"}, "m": {"kernel": "w"}},
            r"'w' belongs to layers 'l' and 'm'",
        ),
        ({"l": {"kernel": "b"}}, r"'l' has shapes \[\(4,\)\] for 4 outputs in 1"),
        ({"l": {"kernel": "w", "groups": 3}}, r"for 4 outputs in 3 groups"),
    ],
    ids=["no leaf", "twice", "vector", "groups"],
)
def test_impossible_blocks_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        make_blocks(PLACES, layers)


def test_table_names_every_leaf():
    assert leaf_names(SCALED) == ["scale", "table", "w"]
    lines = block_table(SCALED_BLOCKS).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "scale", "table", "dense"]
    assert lines[-1].endswith("Kronecker 3 x 4")
    grouped = make_blocks(
        {"k": jnp.zeros((3, 3, 1, 8))}, {"c": {"kernel": "k", "groups": 4}}
    )
    assert "Kronecker 9 x 2, 4 groups" in block_table(grouped)
