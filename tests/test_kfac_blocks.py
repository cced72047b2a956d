"""Blocks of embeddings and full blocks, from factors to steps, and in Flax models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rmtdamp import KroneckerMeasurer, scale_by_kfac
from rmtdamp.flax import linen_factors, nnx_factors
from rmtdamp.kronecker import (
    ModelFactors,
    Tape,
    block_table,
    eigenbasis,
    from_matrix,
    make_blocks,
    second_moments,
    to_matrix,
    top_eigenpairs,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")
SILENT = Tape(keep=False)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)

TOKENS, WIDTH, CLASSES = 5, 3, 4
# Every token another number of times, so that the eigenvectors of A are its axes.
INDICES = jnp.array([[0, 1, 1, 3], [1, 4, 1, 1], [2, 4, 2, 1], [3, 3, 3, 4]])
BATCH = INDICES, jnp.array([0, 3, 1, 1])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- the factors, against a one-hot layer and against dense derivatives --------------

PARAMS = {
    "bias": normal(0, CLASSES),
    "kernel": normal(1, WIDTH, CLASSES),
    "scale": normal(2, WIDTH),
    "shift": normal(3, WIDTH),
    "table": normal(4, TOKENS, WIDTH),
}
DENSE = {"kernel": "kernel", "bias": "bias"}
FULL = {"full": ["scale", "shift"]}


def model_fn(params, indices, tape, *, one_hot=False):
    table = params["table"]
    if one_hot:
        x = jax.nn.one_hot(indices, TOKENS, dtype=table.dtype)
        h = tape.linear("embed", x, x @ table)
    else:
        h = tape.embedding("embed", indices, table[indices])
    h = jnp.tanh(h * params["scale"][None, None] + params["shift"][None, None])
    h = jnp.mean(h, axis=1)
    return tape.linear("dense", h, h @ params["kernel"] + params["bias"][None])


def factors_fn(*, one_hot=False, fisher="ggn", **options):
    embed = {"kernel" if one_hot else "embedding": "table"}
    layers = {"embed": embed, "dense": DENSE, "norm": FULL}
    return ModelFactors(
        model_fn=functools.partial(model_fn, one_hot=one_hot),
        criterion=cross_entropy,
        blocks=make_blocks(PARAMS, layers),
        fisher=fisher,
        **options,
    )


@functools.partial(jax.jit, static_argnums=0)
def measure(fn, params, batch, key):
    return fn(params, batch, key)


def found_of(fn):
    """Block, factors and record, by the name of the block."""
    found = measure(fn, PARAMS, BATCH, jax.random.key(5))
    layers = [block for block in fn.blocks if block.groups]
    each = zip(layers, found.kronecker, found.records, strict=True)
    return {of_block[0].name: of_block for of_block in each}


def test_an_embedding_has_the_factors_of_a_one_hot_layer():
    block, factors, record = found_of(factors_fn())["embed"]
    _, expected, dense_record = found_of(factors_fn(one_hot=True))["embed"]
    assert factors.inputs.shape == (1, TOKENS)
    counts = np.bincount(np.ravel(INDICES), minlength=TOKENS)
    close(factors.inputs[0], counts / INDICES.size)
    close(jnp.diag(factors.inputs[0]), expected.inputs[0])
    close(factors.outputs, expected.outputs)
    assert (block.rows, block.columns) == (TOKENS, WIDTH)
    # The one-hot layer's diagonal in a basis of the same vectors.
    basis = eigenbasis(factors)
    close(basis.input_values, factors.inputs)
    eye = basis._replace(inputs=jnp.eye(TOKENS)[None])
    moments = second_moments(record, basis)
    assert moments.shape == (1, TOKENS, WIDTH)
    close(moments, second_moments(dense_record, eye), atol=1e-7)


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
def test_a_full_block_is_the_mean_of_the_outer_products(fisher):
    block, factors, record = found_of(factors_fn(fisher=fisher))["norm"]
    loss = lambda leaves, x, z: model_fn(PARAMS | leaves, x[None], SILENT)[0] @ z
    leaves = {name: PARAMS[name] for name in ("scale", "shift")}

    def gradient(x, z):
        return jax.flatten_util.ravel_pytree(jax.grad(loss)(leaves, x, z))[0]

    expected = 0
    for x, label in zip(*BATCH, strict=True):
        logits = model_fn(PARAMS, x[None], SILENT)[0]
        p = jax.nn.softmax(logits)
        if fisher == "ggn":
            jacobian = jax.vmap(functools.partial(gradient, x))(jnp.eye(CLASSES))
            curvature = jnp.diag(p) - jnp.outer(p, p)
            expected += jacobian.T @ curvature @ jacobian / len(INDICES)
        else:
            v = gradient(x, p - jax.nn.one_hot(label, CLASSES))
            expected += jnp.outer(v, v) / len(INDICES)
    assert (block.rows, block.columns) == (1, 2 * WIDTH)
    close(factors.inputs, jnp.ones((1, 1, 1)))
    close(factors.outputs[0], expected, atol=1e-7)
    values = np.linalg.eigvalsh(factors.outputs[0])
    moments = second_moments(record, eigenbasis(factors))
    close(moments[0, 0], values, rtol=1e-4, atol=1e-6)


def test_leaves_become_matrices_and_come_back():
    for block in factors_fn().blocks:
        leaves = [jax.tree.leaves(PARAMS)[place] for place in block.leaves]
        matrix = to_matrix(block, leaves)
        assert matrix.shape == (1, block.rows, block.columns)
        jax.tree.map(close, from_matrix(block, matrix), leaves)


def test_the_top_of_an_embedding_is_that_of_its_one_hot_layer():
    block, factors, _ = found_of(factors_fn())["embed"]
    _, dense, _ = found_of(factors_fn(one_hot=True))["embed"]
    found = top_eigenpairs(block, eigenbasis(factors), PARAMS, k=4)
    matrix = jnp.kron(dense.inputs[0], dense.outputs[0])
    close(found.eigenvalues, np.linalg.eigvalsh(matrix)[::-1][:4], rtol=1e-4)
    for value, vector in zip(
        found.eigenvalues, found.eigenvectors["table"], strict=True
    ):
        v = jnp.ravel(vector)
        close(matrix @ v, value * v, atol=1e-6)
        close(v @ v, 1.0)


def test_the_table_says_what_they_are():
    lines = block_table(factors_fn().blocks).splitlines()
    assert any(line.endswith("Kronecker 5 x 3, the first diagonal") for line in lines)
    assert any(line.endswith("full 6 x 6") for line in lines)


# --- steps ----------------------------------------------------------------------------


@functools.cache
def stepped(one_hot, tikhonov, ekfac, damping):
    measurer = KroneckerMeasurer(factors_fn(one_hot=one_hot), ekfac=ekfac)
    tx = scale_by_kfac(measurer, damping=damping, tikhonov=tikhonov, refresh_every=2)

    @jax.jit
    def step(gradient, state):
        return tx.update(gradient, state, PARAMS, batch=BATCH)

    state = tx.init(PARAMS)
    for seed in range(3):
        gradient = jax.tree.map(lambda x, s=seed: normal(20 + s, *x.shape), PARAMS)
        updates, state = step(gradient, state)
    return gradient, updates, state


@pytest.mark.parametrize(
    ("tikhonov", "ekfac"),
    [("eigenvalues", False), ("factored", False), ("eigenvalues", True)],
    ids=["eigenvalues", "factored", "ekfac"],
)
def test_an_embedding_steps_like_its_one_hot_layer(tikhonov, ekfac):
    _, updates, state = stepped(False, tikhonov, ekfac, 0.03)
    _, expected, _ = stepped(True, tikhonov, ekfac, 0.03)
    jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-6), updates, expected)
    assert int(state.measured.kfac_rejections) == 0


def test_a_full_block_is_solved():
    gradient, updates, state = stepped(False, "eigenvalues", False, 0.03)
    layers = [block for block in factors_fn().blocks if block.groups]
    place = [block.name for block in layers].index("norm")
    matrix = state.measured.factors[place].outputs[0]
    flat = lambda tree: jnp.concatenate([tree["scale"], tree["shift"]])
    basis = state.measured.bases[place]
    values = jnp.diag(basis.output_values[0])
    close(basis.outputs[0] @ values @ basis.outputs[0].T, matrix, atol=1e-7)
    expected = jnp.linalg.solve(matrix + 0.03 * jnp.eye(2 * WIDTH), flat(gradient))
    close(flat(updates), expected, rtol=1e-4, atol=1e-7)


# --- Flax -----------------------------------------------------------------------------

LENGTH = INDICES.shape[1]


class NNX(nnx.Module):
    def __init__(self, rngs, *, tied=False):
        make = {"rngs": rngs, "param_dtype": jnp.float64}
        self.embed = nnx.Embed(TOKENS, WIDTH, **make)
        self.norm = nnx.LayerNorm(WIDTH, **make)
        self.position = nnx.Embed(LENGTH, WIDTH, **make)
        self.out = nnx.Linear(WIDTH, CLASSES, **make)
        self.tied = tied

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(LENGTH))[None]
        x = jnp.mean(nnx.tanh(self.norm(x)), axis=1)
        return self.embed.attend(x) if self.tied else self.out(x)


class Linen(nn.Module):
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        make = {"param_dtype": jnp.float64}
        embed = nn.Embed(TOKENS, WIDTH, name="embed", **make)
        position = nn.Embed(LENGTH, WIDTH, name="position", **make)
        x = embed(tokens) + position(jnp.arange(LENGTH))[None]
        x = jnp.mean(nn.tanh(nn.LayerNorm(name="norm", **make)(x)), axis=1)
        return (
            embed.attend(x) if self.tied else nn.Dense(CLASSES, name="out", **make)(x)
        )


def nnx_case(tied=False, **options):
    model = NNX(nnx.Rngs(0), tied=tied)
    graphdef, params, _ = nnx.split(model, nnx.Param, ...)
    fn = nnx_factors(model, cross_entropy, fisher="empirical", **options)
    return fn, nnx.as_pure(params), lambda p, x: nnx.merge(graphdef, p)(x)


def linen_case(tied=False, **options):
    model = Linen(tied)
    params = model.init(jax.random.key(6), INDICES)["params"]
    apply = lambda p, x: model.apply({"params": p}, x)
    options |= {"fisher": "empirical"}
    fn = linen_factors(apply, cross_entropy, params, INDICES, **options)
    return fn, params, apply


both = pytest.mark.parametrize("case", [nnx_case, linen_case], ids=["nnx", "linen"])


@both
def test_flax_embeddings_and_norms_have_the_gradients_of_the_model(case):
    fn, params, apply = case(embeddings="embed", full=["norm"])
    kinds = {block.name: block.kind if block.groups else "" for block in fn.blocks}
    assert kinds == {
        "embed": "embedding",
        "norm": "full",
        "out": "layer",
        "position/embedding": "",
    }
    found = measure(fn, params, BATCH, jax.random.key(7))
    loss = lambda p: cross_entropy(apply(p, BATCH[0]), BATCH[1])
    gradient = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    layers = [block for block in fn.blocks if block.groups]
    for block, (a, g) in zip(layers, found.records, strict=True):
        if block.kind == "embedding":
            a = jax.nn.one_hot(a, block.rows, dtype=g.dtype)[:, :, None]
        matrix = jnp.einsum("ntka,cntko->kao", a, g) / len(a)
        expected = [gradient[place] for place in block.leaves]
        jax.tree.map(close, from_matrix(block, matrix), expected)


def test_a_layer_inside_a_layer_is_found():
    """A subclass of a layer that is left out may have layers of its own."""

    class Outer(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return nn.Dense(CLASSES, name="inner")(super().__call__(inputs))

    model, inputs = Outer(3), jnp.ones((4, 2))
    params = model.init(jax.random.key(0), inputs)["params"]
    apply = lambda p, x: model.apply({"params": p}, x)
    fn = linen_factors(apply, cross_entropy, params, inputs, layers=["inner"])
    assert [block.name for block in fn.blocks if block.groups] == ["inner"]
    batch = inputs, jnp.arange(4)
    assert len(fn(params, batch, jax.random.key(1)).kronecker) == 1


@both
def test_by_default_they_are_diagonal(case):
    fn, *_ = case()
    assert [block.name for block in fn.blocks if block.groups] == ["out"]


@both
def test_an_embedding_that_is_the_output_layer_too_is_refused(case):
    fn, params, _ = case(tied=True, layers=(), embeddings=["embed"])
    with pytest.raises(ValueError, match=r"'embed' is also the model's output layer"):
        fn(params, BATCH, jax.random.key(8))


@both
def test_positions_that_the_examples_share_are_refused(case):
    # As many positions as examples, so that their number says nothing.
    assert len(INDICES) == LENGTH
    fn, params, _ = case(embeddings=["position"])
    with pytest.raises(ValueError, match=r"'position' has outputs .* share them"):
        fn(params, BATCH, jax.random.key(9))


def test_positions_spread_over_the_examples_are_none_of_these():
    def model(params, indices, tape):
        positions = jnp.broadcast_to(jnp.arange(LENGTH), indices.shape)
        h = tape.embedding("embed", positions, params["table"][positions])
        return jnp.mean(h, axis=1) + jnp.mean(indices, axis=1, keepdims=True)

    params = {"table": PARAMS["table"]}
    fn = ModelFactors(
        model_fn=model,
        criterion=cross_entropy,
        blocks=make_blocks(params, {"embed": {"embedding": "table"}}),
    )
    (found,) = fn(params, BATCH, jax.random.key(10)).kronecker
    close(found.inputs[0], [0.25] * LENGTH + [0.0])


@both
def test_names_that_match_nothing_are_refused(case):
    with pytest.raises(ValueError, match=r"embeddings names 'x', .* embed, position"):
        case(embeddings=["x"])
    with pytest.raises(ValueError, match=r"full names 'out', .* embed, norm, position"):
        case(full=["out"])
    with pytest.raises(ValueError, match=r"full matches none of the model's modules"):
        case(full=lambda name: False)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"'l' has the entries \['groups'\]: name its"):
        make_blocks(PARAMS, {"l": {"groups": 1}})
    with pytest.raises(ValueError, match=r"embedding of layer 'l' has shape \(4,\)"):
        make_blocks(PARAMS, {"l": {"embedding": "bias"}})
    with pytest.raises(ValueError, match=r"full blocks of norm need each example's"):
        factors_fn(diagonal="signs")


def test_an_embedding_of_a_sharded_batch_is_that_of_one_device():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.device_put(BATCH, jax.NamedSharding(mesh, jax.P("data")))
    found = measure(factors_fn(), PARAMS, batch, jax.random.key(5))
    expected = measure(factors_fn(), PARAMS, BATCH, jax.random.key(5))
    jax.tree.map(
        lambda x, y: close(np.asarray(x), np.asarray(y), atol=1e-7),
        found.kronecker,
        expected.kronecker,
    )
