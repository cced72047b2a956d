"""The decoupling estimate of a layer's Hessian, and the overlap of eigenspaces."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian

from rmtdamp import hessian
from rmtdamp.hessian import EigenPairs, hessian_matvec, subspace_overlap
from rmtdamp.kronecker import (
    KroneckerFactors,
    ModelFactors,
    Tape,
    dataset_factors,
    eigenbasis,
    from_matrix,
    make_blocks,
    restrict_to_block,
    to_matrix,
    top_eigenpairs,
)

KEY = jax.random.key(0)
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def model(params, x, tape):
    """One linear layer, or two with a ReLU between."""
    for i, (name, layer) in enumerate(sorted(params.items())):
        x = jax.nn.relu(x) if i else x
        y = x @ layer["kernel"] + layer["bias"][None]
        x = tape.linear(name, x, y)
    return x


def weighted_square(outputs, targets):
    weights = jnp.array([1.0, 3.0])[None]
    return 0.5 * jnp.mean(jnp.sum(weights * (outputs - targets) ** 2, axis=1))


def cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


@functools.cache
def problem(criterion, *sizes):
    """(params, factors_fn, loss_fn) of a network of these sizes."""
    pairs = itertools.pairwise(sizes)
    params = {
        f"layer{i}": {"kernel": normal(i, m, n), "bias": normal(10 + i, n)}
        for i, (m, n) in enumerate(pairs)
    }
    specs = {n: {"kernel": f"{n}/kernel", "bias": f"{n}/bias"} for n in params}
    factors_fn = ModelFactors(
        model_fn=model,
        criterion=criterion,
        blocks=make_blocks(params, specs),
        fisher="ggn",
    )

    def loss_fn(params, batch):
        return criterion(model(params, batch[0], Tape(keep=False)), batch[1])

    return params, factors_fn, loss_fn


def as_dense(pairs):
    """sum_i lambda_i v_i v_i^T, in the order of the flat leaves."""
    leaves = jax.tree.leaves(pairs.eigenvectors)
    rows = np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)
    close(rows @ rows.T, np.eye(len(rows)))
    return rows.T @ np.diag(pairs.eigenvalues) @ rows


def test_estimate_is_the_hessian_of_a_linear_model_with_squared_error():
    """Over a data set of unequal batches, to the last eigenpair."""
    params, factors_fn, loss_fn = problem(weighted_square, 3, 2)
    x, y = normal(20, 7, 3), normal(21, 7, 2)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    (factors,) = dataset_factors(factors_fn, params, batches, KEY)
    (block,) = factors_fn.blocks
    found = top_eigenpairs(block, eigenbasis(factors), params, k=8)
    assert np.all(np.diff(found.eigenvalues) <= 0)
    close(as_dense(found), dense_hessian(loss_fn, params, (x, y)))


def test_estimate_is_each_layers_hessian_for_one_example_of_a_relu_network():
    params, factors_fn, loss_fn = problem(cross_entropy, 3, 4, 3)
    batch = normal(22, 1, 3), jnp.array([1])
    factors = dataset_factors(factors_fn, params, [batch], KEY)
    matvec = hessian_matvec(loss_fn, params, batch)
    for block, each in zip(factors_fn.blocks, factors, strict=True):
        layer, part = restrict_to_block(matvec, params, block)
        size = block.rows * block.columns
        found = top_eigenpairs(block, eigenbasis(each), params, k=size)
        close(as_dense(found), hessian.to_dense(layer, part))


def test_overlap_of_estimate_and_truth_is_that_of_the_dense_matrices():
    params, factors_fn, loss_fn = problem(cross_entropy, 3, 4, 3)
    batch = normal(23, 9, 3), jnp.arange(9) % 3
    block, k = factors_fn.blocks[0], 3
    (factors, _) = dataset_factors(factors_fn, params, [batch], KEY)
    found = top_eigenpairs(block, eigenbasis(factors), params, k=k)
    matvec = hessian_matvec(loss_fn, params, batch)
    layer, part = restrict_to_block(matvec, params, block)
    matrix = hessian.to_dense(layer, part)
    true = hessian.eigh(matrix, part).leading(k)
    vectors = np.linalg.eigh(matrix)[1][:, -k:]
    # Flat leaves: the bias, then the kernel row by row. Dense: the bias a last row.
    dense = np.kron(factors.inputs[0], factors.outputs[0])
    dense = np.roll(np.linalg.eigh(dense)[1][:, -k:], 4, axis=0)
    expected = np.sum((vectors.T @ dense) ** 2) / k
    close(subspace_overlap(true, found), expected)
    assert k / 16 < expected < 1 - 1e-3


def test_groups_are_blocks_of_their_own():
    params = {"kernel": jnp.zeros((3, 4), jnp.float64)}
    spec = {"kernel": "kernel", "groups": 2}
    (block,) = make_blocks(params, {"layer": spec})
    a, g = normal(24, 2, 3, 3), normal(25, 2, 2, 2)
    factors = KroneckerFactors(a @ a.mT, g @ g.mT)
    found = top_eigenpairs(block, eigenbasis(factors), params, k=12)

    @jax.vmap
    def multiply(kernel):
        matrix = factors.inputs @ to_matrix(block, [kernel]) @ factors.outputs
        return from_matrix(block, matrix)[0]

    kernels = found.eigenvectors["kernel"]
    close(jax.jit(multiply)(kernels), found.eigenvalues[:, None, None] * kernels)
    trace = np.trace(factors.inputs, axis1=1, axis2=2)
    trace = trace * np.trace(factors.outputs, axis1=1, axis2=2)
    close(np.sum(found.eigenvalues), np.sum(trace))


def test_random_spaces_overlap_as_their_dimensions_say():
    """Mean k / P; its variance is that of Tr(P_U P_V) over rotations of V."""
    p, k, draws = 12, 3, 400
    pairs = lambda basis: EigenPairs(np.ones(k), {"w": basis.T}, np.zeros(k), 0)
    fixed = pairs(np.eye(p)[:, :k])
    bases = np.linalg.qr(np.random.default_rng(26).normal(size=(draws, p, k)))[0]
    seen = [subspace_overlap(fixed, pairs(basis)) for basis in bases]
    variance = 2 * (p - k) ** 2 / (p**2 * (p - 1) * (p + 2))
    assert abs(np.mean(seen) - k / p) < 4 * (variance / draws) ** 0.5
    # The variance of a variance of 400 draws, were they normal: 7 %.
    assert np.var(seen) == pytest.approx(variance, rel=0.3)
    assert subspace_overlap(fixed, fixed) == 1
    rest = pairs(np.eye(p)[:, k : 2 * k])
    assert subspace_overlap(fixed, rest) == 0


def test_a_larger_space_holds_a_smaller_one():
    basis = np.linalg.qr(np.random.default_rng(27).normal(size=(6, 6)))[0].T
    pairs = lambda rows: EigenPairs(np.ones(len(rows)), rows, np.zeros(len(rows)), 0)
    small, large = pairs(basis[1:3]), pairs(basis[:4])
    assert subspace_overlap(small, large) == pytest.approx(1)
    assert subspace_overlap(large, small) == pytest.approx(0.5)


def test_what_is_refused():
    params = {"kernel": jnp.zeros((3, 4)), "scale": jnp.zeros(2)}
    block, other = make_blocks(params, {"layer": {"kernel": "kernel"}})
    basis = eigenbasis(KroneckerFactors(jnp.eye(3)[None], jnp.eye(4)[None]))
    for k in (0, 13):
        message = rf"k is {k}, and must lie between 1 and the 12 param.*layer 'layer'"
        with pytest.raises(ValueError, match=message):
            top_eigenpairs(block, basis, params, k=k)
    with pytest.raises(ValueError, match=r"block 'scale' is diagonal and has no fact"):
        top_eigenpairs(other, basis, params, k=1)
    _, factors_fn, _ = problem(weighted_square, 3, 2)
    with pytest.raises(ValueError, match=r"batches is empty, and at least one batch"):
        dataset_factors(factors_fn, params, [], KEY)
    pairs = EigenPairs(jnp.ones(1), {"w": jnp.ones((1, 2))}, jnp.zeros(1), 0)
    wrong = pairs._replace(eigenvectors={"w": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match=r"\[\(2,\)\] and \[\(3,\)\] cannot be compa"):
        subspace_overlap(pairs, wrong)
