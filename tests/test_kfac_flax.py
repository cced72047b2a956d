"""Factors of unchanged Flax models against the model's own derivatives."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmtdamp
import rmtdamp.flax
from rmtdamp import kfac, scale_by_kfac
from rmtdamp.flax import linen_factors, nnx_factors
from rmtdamp.kronecker import block_table

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.slow]
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


BATCH = normal(0, 4, 6, 5, 4), jnp.arange(4) % 3
double = {"param_dtype": jnp.float64}


class NNX(nnx.Module):
    """Convolutions, a norm, a bare array, dropout, a layer that is called twice."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, rngs=rngs, **double)
        self.first = conv(4, 6, (3, 3), strides=2, padding="CIRCULAR")
        self.grouped = conv(
            6, 4, (2, 3), feature_group_count=2, kernel_dilation=2, use_bias=False
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs, **double)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.shift = nnx.Param(jnp.zeros(4))
        self.twice = nnx.Linear(4, 4, rngs=rngs, **double)
        self.out = nnx.Linear(4, 3, rngs=rngs, **double)

    def __call__(self, x):
        x = nnx.tanh(self.grouped(nnx.tanh(self.first(x))))
        x = self.dropout(self.norm(jnp.mean(x, axis=(1, 2)))) + self.shift[...][None]
        return self.out(nnx.tanh(self.twice(nnx.tanh(self.twice(x)))))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        conv = functools.partial(nn.Conv, **double)
        x = nn.tanh(conv(6, (3, 3), strides=2, padding="CIRCULAR", name="first")(x))
        x = conv(
            4,
            (2, 3),
            feature_group_count=2,
            kernel_dilation=2,
            use_bias=False,
            name="grouped",
        )(x)
        x = jnp.mean(nn.tanh(x), axis=(1, 2))
        x = nn.BatchNorm(use_running_average=not train, name="norm", **double)(x)
        x = x + self.param("shift", nn.initializers.zeros, (4,), jnp.float64)[None]
        twice = nn.Dense(4, name="twice", **double)
        return nn.Dense(3, name="out", **double)(nn.tanh(twice(nn.tanh(twice(x)))))


def nnx_case(**options):
    model = NNX(nnx.Rngs(0))
    factors_fn = nnx_factors(model, cross_entropy, **options)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = nnx.as_pure(rmtdamp.flax.loss_args(model))
    loss_fn = rmtdamp.flax.curvature_loss(
        model, lambda m, batch: cross_entropy(m(batch[0]), batch[1])
    )
    return factors_fn, params, state, loss_fn


def linen_case(**options):
    model = Linen()
    variables = model.init(jax.random.key(1), BATCH[0])
    params, state = variables["params"], (variables["batch_stats"],)

    def model_fn(params, x, stats):
        return model.apply({"params": params, "batch_stats": stats}, x)

    factors_fn = linen_factors(
        model_fn, cross_entropy, params, BATCH[0], loss_args=state, **options
    )
    loss_fn = lambda p, batch, s: cross_entropy(model_fn(p, batch[0], s), batch[1])
    return factors_fn, params, state, loss_fn


CASES = {"nnx": nnx_case, "linen": linen_case}
both = pytest.mark.parametrize("case", CASES)
measure = jax.jit(lambda fn, p, b, key, *s: fn(p, b, key, *s), static_argnums=0)


@both
def test_records_reproduce_the_gradient_of_every_layer(case):
    """Sum over examples and places of a g^T: the gradient, kernel and bias."""
    factors_fn, params, state, loss_fn = CASES[case](fisher="empirical")
    found = measure(factors_fn, params, BATCH, jax.random.key(2), *state)
    gradient = jax.tree.leaves(jax.jit(jax.grad(loss_fn))(params, BATCH, *state))
    layers = [block for block in factors_fn.blocks if block.groups]
    assert [block.name for block in layers] == ["first", "grouped", "out", "twice"]
    for block, (a, g) in zip(layers, found.records, strict=True):
        matrix = jnp.einsum("ntka,cntko->kao", a, g) / a.shape[0]
        kernel = matrix[:, : block.rows - len(block.leaves) + 1]
        kernel = jnp.swapaxes(kernel, 0, 1).reshape(block.shapes[0])
        close(kernel, gradient[block.leaves[0]])
        if len(block.leaves) > 1:
            close(matrix[:, -1].reshape(-1), gradient[block.leaves[1]])


@both
def test_rest_is_diagonal_and_exact(case):
    factors_fn, params, state, loss_fn = CASES[case](fisher="empirical")
    found = measure(factors_fn, params, BATCH, jax.random.key(3), *state)
    one = lambda x, y: jax.grad(loss_fn)(params, (x[None], y[None]), *state)
    each = jax.tree.leaves(jax.jit(jax.vmap(one))(*BATCH))
    blocks = [block for block in factors_fn.blocks if not block.groups]
    assert [b.name for b in blocks] == ["norm/bias", "norm/scale", "shift"]
    for block, diagonal in zip(blocks, found.diagonal, strict=True):
        close(diagonal, jnp.mean(each[block.leaves[0]] ** 2, axis=0))


def test_both_apis_agree():
    fn, params, state, _ = nnx_case(fisher="ggn")
    other_fn, other, other_state, _ = linen_case(fisher="ggn")
    leaves = jax.tree.leaves(params)
    params_of_linen = jax.tree.unflatten(jax.tree.structure(other), leaves)
    found = measure(fn, params, BATCH, jax.random.key(4), *state)
    again = measure(other_fn, params_of_linen, BATCH, jax.random.key(5), *other_state)
    jax.tree.map(close, found.kronecker, again.kronecker)
    jax.tree.map(close, found.diagonal, again.diagonal)


def test_the_table_says_which_block_each_parameter_got():
    table = block_table(nnx_case()[0].blocks)
    assert "first       (3, 3, 4, 6), (6,)  Kronecker 37 x 6" in table
    assert "grouped     (2, 3, 3, 4)        Kronecker 18 x 2, 2 groups" in table
    assert "shift       (4,)                diagonal" in table


@both
def test_layers_are_chosen_by_name_pattern_or_function(case):
    names = lambda fn: [block.name for block in fn.blocks if block.groups]
    assert names(CASES[case](layers="out")[0]) == ["out"]
    assert names(CASES[case](layers=["*ou*"])[0]) == ["grouped", "out"]
    assert names(CASES[case](layers=lambda name: "w" in name)[0]) == ["twice"]
    with pytest.raises(
        ValueError, match=r"names 'encoder/\*', which matches none.*out"
    ):
        CASES[case](layers=["out", "encoder/*"])
    with pytest.raises(
        ValueError, match=r"layers matches none .*first, grouped, .*out"
    ):
        CASES[case](layers=lambda name: False)


@pytest.mark.slow
def test_attention_is_a_layer_with_places():
    attention = functools.partial(
        nnx.MultiHeadAttention, 2, 4, decode=False, rngs=nnx.Rngs(0), **double
    )
    model = attention()
    x = normal(6, 3, 5, 4)
    loss = lambda z, y: jnp.mean((z - y) ** 2)
    options = {"fisher": "empirical", "num_terms": 1}
    fn = nnx_factors(model, loss, **options)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    (state,) = rmtdamp.flax.loss_args(model)
    found = measure(fn, params, (x, x), jax.random.key(7), nnx.as_pure(state))

    linen = nn.MultiHeadDotProductAttention(2, **double)
    variables = linen.init(jax.random.key(8), x)
    model_fn = lambda p, x: linen.apply({"params": p}, x)
    other = linen_factors(model_fn, loss, variables["params"], x, **options)
    assert [b.rows for b in fn.blocks] == [b.rows for b in other.blocks] == [5] * 4
    gradient = jax.grad(lambda p: loss(model_fn(p, x), x))
    leaves = jax.tree.unflatten(
        jax.tree.structure(variables["params"]), jax.tree.leaves(params)
    )
    gradient = jax.tree.leaves(gradient(leaves))
    again = measure(other, leaves, (x, x), jax.random.key(9))
    for block, (a, g), factors, same in zip(
        fn.blocks, found.records, found.kronecker, again.kronecker, strict=True
    ):
        assert a.shape == (3, 5, 1, 5)
        matrix = jnp.einsum("ntka,cntko->kao", a, g)[0] / 3
        # Flax divides by the root of the head's size in float32.
        kernel = matrix[:-1].reshape(block.shapes[0])
        close(kernel, gradient[block.leaves[0]], rtol=1e-4, atol=1e-6)
        jax.tree.map(close, factors, same)


def test_what_cannot_be_tapped_stays_diagonal():
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.masked = nnx.Conv(2, 2, (3,), mask=jnp.ones((3, 2, 2)), rngs=rngs)
            self.crossed = nnx.LinearGeneral(5, 3, axis=1, rngs=rngs)
            self.tied = nnx.Linear(3, 3, rngs=rngs)
            self.tied.kernel = self.other = nnx.Param(jnp.eye(3))

    model = Odd(nnx.Rngs(0))
    fn = nnx_factors(model, cross_entropy)
    groups = {block.name: block.groups for block in fn.blocks}
    # The tied kernel has one name of two: it is a layer if that is the layer's.
    assert not any(groups[n] for n in groups if n.startswith(("masked", "crossed")))
    assert len(fn.blocks) >= 5


def linear(inputs, outputs, seed=0, **options):
    return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(seed), **options)


class Around(nnx.Module):
    """A model out of its parts and what is done with them."""

    def __init__(self, call, **parts):
        self.call = call
        self.parts = nnx.Dict(parts)

    def __call__(self, x):
        return self.call(x, **self.parts)


def tied(x, a, b):
    del b
    return a(jnp.tanh(a(x))) @ a.kernel[...].T


def standardised(x, a):
    kernel = a.kernel[...]
    copy = nnx.clone(a)
    copy.kernel = nnx.Param((kernel - kernel.mean(0)[None]) / kernel.std(0)[None])
    return copy(x)


def tripled(lhs, rhs, dimension_numbers, **options):
    return 3 * jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)


def hidden(x, a):
    copy = nnx.clone(a)
    copy.kernel = nnx.Param(jax.jit(lambda kernel: 3 * kernel)(a.kernel[...]))
    return copy(x)


def watched(x, a):
    jnp.linalg.norm(a.kernel[...])  # of no use to what is returned
    return a(x) + 0 * jnp.sum(jax.lax.stop_gradient(a.kernel[...]))


def test_a_kernel_that_is_only_looked_at_is_taken():
    model = Around(watched, a=linear(5, 3))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    batch = jnp.ones((8, 5)), jnp.ones((8, 3))
    found = nnx_factors(model, SQUARE, fisher="ggn")(params, batch, jax.random.key(0))
    assert len(found.kronecker) == 1


def unrolled(x, into, again, out):
    state = jnp.zeros((len(x), 4))
    for place in range(3):
        state = jnp.tanh(into(x + place) + again(state))
    return out(state)


SQUARE = lambda z, y: jnp.mean(jnp.sum((z - y) ** 2, axis=-1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Around(
                lambda x, norm: norm(x),
                norm=nnx.WeightNorm(linear(5, 3), rngs=nnx.Rngs(1)),
            ),
            "'parts/norm/layer_instance' does not multiply by its parameter",
        ),
        (
            lambda: Around(
                lambda x, norm: norm(x, update_stats=False),
                norm=nnx.SpectralNorm(linear(5, 3), rngs=nnx.Rngs(1)),
            ),
            "'parts/norm/layer_instance' does not multiply by its parameter",
        ),
        (lambda: Around(standardised, a=linear(5, 3)), "'parts/a' does not multiply"),
        (lambda: Around(hidden, a=linear(5, 3)), "'parts/a' does not multiply"),
        (
            lambda: Around(lambda x, a: a(x), a=linear(5, 3, dot_general=tripled)),
            "'parts/a' does more than multiply by its kernel",
        ),
        (
            lambda: Around(tied, a=linear(5, 5), b=linear(5, 3)),
            "'parts/a' shares its kernel with another part",
        ),
    ],
    ids=["weight norm", "spectral norm", "standardised", "jit", "hook", "tied"],
)
def test_a_kernel_that_is_not_the_parameter_alone_is_refused(model, message):
    """Its factors would be those of what is multiplied, its gradient another's."""
    model = model()
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    inputs = normal(14, 8, 5).astype(jnp.float32)
    batch = inputs, jnp.ones_like(model(inputs))
    fn = nnx_factors(model, SQUARE, fisher="ggn")
    state = rmtdamp.flax.loss_args(model)
    with pytest.raises(ValueError, match=f"{message}.*leave it to a diagonal block"):
        fn(params, batch, jax.random.key(16), *state)
    fn = nnx_factors(model, SQUARE, fisher="ggn", layers=())
    fn(params, batch, jax.random.key(16), *state)


def test_linen_weight_norm_is_refused():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(3, **double))(x)

    model, batch = Model(), (normal(17, 4, 5), normal(18, 4, 3))
    params = model.init(jax.random.key(19), batch[0])["params"]
    model_fn = lambda p, x: model.apply({"params": p}, x)
    fn = linen_factors(model_fn, SQUARE, params, batch[0], fisher="ggn")
    with pytest.raises(ValueError, match="'Dense_0' does not multiply by its param"):
        fn(params, batch, jax.random.key(20))


@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {}], ids=str)
def test_a_narrowed_kernel_and_a_first_state_of_zeros_are_taken(options):
    """Unrolled recurrences too: the first of a layer's calls may see no input."""
    layers = {"into": (5, 4), "again": (4, 4), "out": (4, 3)}
    model = Around(
        unrolled,
        **{name: linear(*shape, **options) for name, shape in layers.items()},
    )
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    batch = normal(21, 8, 5).astype(jnp.float32), normal(22, 8, 3).astype(jnp.float32)
    found = nnx_factors(model, SQUARE, fisher="empirical")(
        params, batch, jax.random.key(23)
    )
    assert len(found.kronecker) == 3


@pytest.mark.slow
def test_a_layer_under_checkpoint_is_refused_with_a_way_out():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, **double)(
                nn.remat(nn.Dense)(4, name="inner", **double)(x)
            )

    model = Model()
    x = normal(10, 4, 5)
    params = model.init(jax.random.key(11), x)["params"]
    model_fn = lambda p, x: model.apply({"params": p}, x)
    batch = x, jnp.arange(4) % 3
    fn = linen_factors(model_fn, cross_entropy, params, x)
    with pytest.raises(ValueError, match=r"layers inner sit inside .* \(layers=\)"):
        fn(params, batch, jax.random.key(12))
    fn = linen_factors(model_fn, cross_entropy, params, x, layers=["Dense_*"])
    assert len(fn(params, batch, jax.random.key(13)).kronecker) == 1


def test_a_forgotten_state_says_how_to_pass_it():
    fn, params, _, _ = nnx_case()
    with pytest.raises(ValueError, match=r"got 0: pass loss_args=rmtdamp.flax.loss"):
        fn(params, BATCH, jax.random.key(14))


# --- in training loops --------------------------------------------------------------

FLAT = normal(15, 32, 4, dtype=jnp.float32), jnp.arange(32) % 3


def flat_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs),
        nnx.LayerNorm(8, rngs=rngs),
        nnx.Linear(8, 3, rngs=rngs),
    )


def flat_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@nnx.jit
def nnx_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(flat_loss)(model, batch)
    state = rmtdamp.flax.loss_args(model)
    optimizer.update(model, grads, batch=batch, loss_args=state)
    return loss


def test_nnx_trains_with_a_learned_damping_and_refreshes_by_hand():
    model = flat_model()
    fn = nnx_factors(model, cross_entropy)
    learner = rmtdamp.DampingLearner(
        rmtdamp.flax.curvature_loss(model, flat_loss), floor=1e-2
    )
    measurer = rmtdamp.KroneckerMeasurer(fn, eigen_every=2)
    inner = kfac(0.3, measurer, refresh_every=None)
    tx = rmtdamp.auto_damping(inner, learner, refresh_every=None)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    value = lambda name: np.asarray(optax.tree.get(optimizer.opt_state, name)[...])
    losses = []
    for step in range(8):
        if step % 4 == 0:
            rmtdamp.flax.refresh(optimizer, measurer, model, FLAT)
            rmtdamp.flax.refresh(optimizer, learner, model, FLAT)
        losses.append(float(nnx_step(model, optimizer, FLAT)))
    assert losses[-1] < 0.9 * losses[0]
    assert value("kfac_measurements") == 2
    assert value("eigen_refreshes") == 1
    assert value("kfac_rejections") == 0
    assert value("refresh_attempts") == 2


@pytest.mark.slow
def test_linen_trains_through_train_state_and_restores_to_the_bit():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
    params = model.init(jax.random.key(16), FLAT[0])["params"]
    model_fn = lambda p, x: model.apply({"params": p}, x)
    loss_fn = lambda p, batch: cross_entropy(model_fn(p, batch[0]), batch[1])
    fn = linen_factors(model_fn, cross_entropy, params, FLAT[0])
    tx = rmtdamp.auto_damping(
        scale_by_kfac(
            rmtdamp.KroneckerMeasurer(fn, eigen_every=2, ekfac=True), refresh_every=2
        ),
        loss_fn,
        refresh_every=2,
    )
    tx = optax.chain(tx, optax.scale_by_learning_rate(0.05))
    create = lambda: rmtdamp.flax.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx
    )

    @jax.jit
    def step(state, batch):
        grads = jax.grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads, extra_args={"batch": batch})

    state = create()
    for _ in range(3):
        state = step(state, FLAT)
    restored = flax.serialization.from_bytes(
        create(), flax.serialization.to_bytes(state)
    )
    assert optax.tree.get(restored.opt_state, "kfac_measurements") == 2
    jax.tree.map(
        np.testing.assert_array_equal,
        step(restored, FLAT).params,
        step(state, FLAT).params,
    )
    assert loss_fn(state.params, FLAT) < loss_fn(params, FLAT)


def test_a_loss_of_the_model_in_place_of_a_criterion_is_named():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    factors_fn = nnx_factors(model, lambda model, batch: model(batch[0]).mean())
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    batch = jnp.ones((8, 4), jnp.float32), jnp.zeros(8, int)
    with pytest.raises(TypeError, match=r"outputs, targets\) fails: .*, not the model"):
        factors_fn(params, batch, jax.random.key(0))
