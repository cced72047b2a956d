"""Matvecs put together: over a data set, for a part of the params, as a difference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp.hessian import (
    _apply,
    dataset_matvec,
    eigsh,
    fisher_matvec,
    ggn_matvec,
    hessian_matvec,
    lanczos,
    largest_eigenvalue,
    noise_matvec,
    restrict,
    spectral_density,
    sum_matvec,
    trace,
)

PARAMS = mlp(jax.random.key(0))
WHOLE = mlp_batch(jax.random.key(1))
VECTOR = mlp(jax.random.key(2))


def pieces(*sizes):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda x, a=a, b=b: x[a:b], WHOLE)
        for a, b in zip(ends - sizes, ends, strict=True)
    ]


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def test_unequal_batches_are_weighted_by_their_sizes():
    hessian = dense_hessian(mlp_loss, PARAMS, WHOLE)
    matvec = dataset_matvec(mlp_loss, PARAMS, pieces(16, 13, 3))
    np.testing.assert_allclose(flat(matvec(VECTOR)), hessian @ flat(VECTOR), atol=1e-12)


@pytest.mark.slow
def test_every_algorithm_takes_a_data_set():
    batches, passes = pieces(16, 13, 3), []

    def count(batches):
        passes.append(None)
        return batches

    over = dataset_matvec(mlp_loss, PARAMS, batches, wrap=count)
    at_once = hessian_matvec(mlp_loss, PARAMS, WHOLE)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8)
    close(lanczos(over, VECTOR, 6).diagonal, lanczos(at_once, VECTOR, 6).diagonal)
    assert len(passes) == 6
    for find in (
        lambda m: eigsh(m, PARAMS, jax.random.key(1), k=2).eigenvalues,
        lambda m: trace(m, PARAMS, jax.random.key(3), num_probes=4).value,
        lambda m: largest_eigenvalue(m, PARAMS, jax.random.key(0)).value,
        lambda m: (
            spectral_density(
                m, PARAMS, jax.random.key(2), num_steps=5, num_probes=2
            ).nodes
        ),
    ):
        close(find(over), find(at_once))


def test_a_generator_and_a_trace_are_refused():
    once = dataset_matvec(mlp_loss, PARAMS, iter(pieces(16, 16)))
    once(VECTOR)
    with pytest.raises(ValueError, match=r"no batch on this pass: .* not a generator"):
        once(VECTOR)
    matvec = dataset_matvec(mlp_loss, PARAMS, pieces(16, 16))
    with pytest.raises(ValueError, match="cannot be traced: call it outside jit"):
        jax.jit(matvec)(VECTOR)


@pytest.mark.parametrize("over_data", [False, True])
def test_restrict_is_the_diagonal_block(over_data):
    if over_data:
        matvec = dataset_matvec(mlp_loss, PARAMS, pieces(16, 16))
    else:
        matvec = hessian_matvec(mlp_loss, PARAMS, WHOLE)
    block, part = restrict(matvec, PARAMS, r"\[1\]\['kernel'\]")
    assert [x.shape for x in jax.tree.leaves(part)] == [(8, 6)]
    index = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), PARAMS)
    index[1]["kernel"] = jnp.ones((8, 6), bool)
    rows = np.flatnonzero(flat(index))
    exact = dense_hessian(mlp_loss, PARAMS, WHOLE)[np.ix_(rows, rows)]
    vector = jax.tree.map(lambda x: 2 * x, part)
    np.testing.assert_allclose(flat(block(vector)), exact @ flat(vector), atol=1e-12)
    found = eigsh(block, part, jax.random.key(0), k=3)
    np.testing.assert_allclose(
        found.eigenvalues, np.linalg.eigvalsh(exact)[::-1][:3], atol=1e-6
    )


def test_one_batch_in_place_of_a_list_of_them_is_refused():
    inputs, labels = WHOLE
    with pytest.raises(ValueError, match=r"looks like one batch: hand over a list"):
        dataset_matvec(mlp_loss, PARAMS, (inputs, labels))
    loss = lambda params, batch: jnp.mean((batch @ params) ** 2)
    two = jnp.ones((3, 2)), jnp.zeros((1, 2))  # batches without targets
    assert dataset_matvec(loss, jnp.ones(2), two)(jnp.ones(2)).shape == (2,)


def test_restrict_takes_a_path_as_it_is_printed():
    """Its brackets are no regular expression, under which every leaf would match."""
    _, part = restrict(lambda v: v, PARAMS, "[1]['kernel']")
    assert [x.shape for x in jax.tree.leaves(part)] == [PARAMS[1]["kernel"].shape]


def test_restrict_by_function_and_by_nothing():
    matvec = hessian_matvec(mlp_loss, PARAMS, WHOLE)
    _, part = restrict(matvec, PARAMS, lambda path: path.endswith("['kernel']"))
    assert len(jax.tree.leaves(part)) == 2
    with pytest.raises(
        ValueError, match=r"matches 'conv': choose from \[0\]\['bias'\]"
    ):
        restrict(matvec, PARAMS, "conv")
    with pytest.raises(ValueError, match=r"no regular expression \(.*choose from"):
        restrict(matvec, PARAMS, "[w")
    with pytest.raises(TypeError, match=r"select is a list: .* lambda path"):
        restrict(matvec, PARAMS, ["kernel"])


def model(params, inputs):
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["kernel"] + layer["bias"][None])
    return inputs @ params[-1]["kernel"] + params[-1]["bias"][None]


def squared(outputs, targets):
    return jnp.mean((outputs - jax.nn.one_hot(targets, 6, dtype=outputs.dtype)) ** 2)


@pytest.mark.parametrize("matrix", [ggn_matvec, fisher_matvec])
def test_other_matrices_over_a_data_set(matrix):
    """Both are means over examples of what depends on one example only."""
    loss = squared if matrix is ggn_matvec else lambda z, y: 6 * squared(z, y)
    over = dataset_matvec(
        loss, PARAMS, pieces(16, 13, 3), matvec_fn=functools.partial(matrix, model)
    )
    at_once = matrix(model, loss, PARAMS, WHOLE)
    np.testing.assert_allclose(flat(over(VECTOR)), flat(at_once(VECTOR)), atol=1e-12)


COMPILED = []


@jax.monitoring.register_event_duration_secs_listener
def _listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


def compiled_by(call):
    """How many programs a call compiles."""
    before = len(COMPILED)
    jax.block_until_ready(call())
    return len(COMPILED) - before


ALGORITHMS = {
    "eigsh": lambda m, i: eigsh(m, PARAMS, jax.random.key(i), k=2)[:3],
    "lanczos": lambda m, i: lanczos(m, mlp(jax.random.key(i)), 6),
    "trace": lambda m, i: trace(m, PARAMS, jax.random.key(i), num_probes=4),
    "largest_eigenvalue": lambda m, i: largest_eigenvalue(m, PARAMS, jax.random.key(i)),
    "spectral_density": lambda m, i: spectral_density(
        m, PARAMS, jax.random.key(i), num_steps=5, num_probes=2
    )[:2],
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_matrix_of_equal_shapes_compiles_nothing(name):
    """Nor does a sum of such, but for the sum, whatever it is handed to first."""
    find = ALGORITHMS[name]
    first, second = (hessian_matvec(mlp_loss, PARAMS, x) for x in pieces(16, 16))
    find(first, 10)
    assert compiled_by(lambda: find(second, 11)) == 0
    mean = sum_matvec((first, second), (0.5, 0.5))
    assert compiled_by(lambda: find(mean, 12)) <= 1


@pytest.mark.slow
def test_algorithms_share_one_product():
    """A step more is a program more, the product is not: eigsh then compiles less than
    one program for each of the network's four leaves."""
    matvec = hessian_matvec(mlp_loss, PARAMS, WHOLE)
    jax.clear_caches()
    assert compiled_by(lambda: ALGORITHMS["trace"](matvec, 20)) <= 12
    assert compiled_by(lambda: ALGORITHMS["eigsh"](matvec, 21)) <= 10
    multiply = _apply._multiply
    size = multiply._cache_size()
    for number, find in enumerate(ALGORITHMS.values()):
        find(matvec, 30 + number)
    restricted, part = restrict(matvec, PARAMS, "kernel")
    eigsh(restricted, part, jax.random.key(40), k=1)
    assert multiply._cache_size() == size == 1


@pytest.mark.slow
def test_a_sum_of_matrices():
    parts = pieces(16, 16)
    matvec = sum_matvec(
        [hessian_matvec(mlp_loss, PARAMS, x) for x in parts], [0.25, -2.0]
    )
    a, b = (np.asarray(dense_hessian(mlp_loss, PARAMS, x)) for x in parts)
    exact = (a / 4 - 2 * b) @ flat(VECTOR)
    np.testing.assert_allclose(flat(matvec(VECTOR)), exact, atol=1e-12)
    np.testing.assert_allclose(flat(jax.jit(matvec)(VECTOR)), exact, atol=1e-12)
    traced = jax.jit(lambda m: lanczos(m, VECTOR, 4).diagonal)(matvec)
    np.testing.assert_allclose(traced, lanczos(matvec, VECTOR, 4).diagonal, rtol=1e-9)
    with pytest.raises(ValueError, match="there are 1 matvecs and 2 factors: hand"):
        sum_matvec([matvec], [1.0, 2.0])


def test_noise_of_halves_and_of_a_batch_against_its_data_set():
    first, second = pieces(16, 16)
    a, b, whole = (
        dense_hessian(mlp_loss, PARAMS, batch) for batch in (first, second, WHOLE)
    )
    matvec = lambda batch: hessian_matvec(mlp_loss, PARAMS, batch)
    half = noise_matvec(matvec(first), matvec(second))
    np.testing.assert_allclose(
        flat(half(VECTOR)), (a - b) @ flat(VECTOR) / 2, atol=1e-12
    )
    # Eq. 6: the batch less the data set; with a data set the noise is eager, too.
    data = dataset_matvec(mlp_loss, PARAMS, [first, second])
    noise = noise_matvec(matvec(first), data, factor=1.0)
    np.testing.assert_allclose(
        flat(noise(VECTOR)), (a - whole) @ flat(VECTOR), atol=1e-12
    )
    block, part = restrict(noise, PARAMS, "bias")
    assert len(jax.tree.leaves(block(part))) == 2
    found = eigsh(noise, PARAMS, jax.random.key(4), k=1, which="LM")
    exact = np.linalg.eigvalsh(a - whole)
    np.testing.assert_allclose(abs(found.eigenvalues[0]), abs(exact).max(), rtol=1e-6)
