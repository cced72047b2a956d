"""Matvecs put together: over a data set, and for a part of the params."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp.hessian import (
    dataset_matvec,
    eigsh,
    hessian_matvec,
    lanczos,
    largest_eigenvalue,
    restrict,
    spectral_density,
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


def test_restrict_by_function_and_by_nothing():
    matvec = hessian_matvec(mlp_loss, PARAMS, WHOLE)
    _, part = restrict(matvec, PARAMS, lambda path: path.endswith("['kernel']"))
    assert len(jax.tree.leaves(part)) == 2
    with pytest.raises(
        ValueError, match=r"matches 'conv': choose from \[0\]\['bias'\]"
    ):
        restrict(matvec, PARAMS, "conv")
