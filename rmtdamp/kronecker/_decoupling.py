"""A layer's factors -> the top of their Kronecker product, to hold beside its Hessian.

    factors_fn, params, batches  ->  A, G  ->  top eigenpairs of A x G
    matvec, params               ->  the layer's Hessian  (-> `eigsh`)

In a piecewise linear network the Hessian of a layer y = a W is E[a a^T x M], with M
that of an example's loss in y. The decoupling conjecture is that its top eigenspace is
that of E[a a^T] x E[M]; KFAC supposes as much of all of it. `fisher="ggn"` measures
G = E[M] exactly. `rmtdamp.hessian.subspace_overlap` tells how far both agree.

References: Wu, Zhu, Wu, Wang and Ge, Dissecting Hessian: understanding common structure
of Hessian in neural networks, 2020 (arXiv 2010.04261).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._tree import num_examples
from rmtdamp._types import Batch, Key, Matvec, Params
from rmtdamp.hessian import EigenPairs, restrict

from ._blocks import Block, from_matrix
from ._factors import Eigenbasis, KroneckerFactors
from ._model import FactorsFn


@functools.partial(jax.jit, static_argnums=0)
def _kronecker(factors_fn, params, batch, key, loss_args):
    return factors_fn(params, batch, key, *loss_args).kronecker


def dataset_factors(
    factors_fn: FactorsFn,
    params: Params,
    batches: Iterable[Batch],
    key: Key,
    *,
    loss_args: tuple[Any, ...] = (),
) -> tuple[KroneckerFactors, ...]:
    """The factors of each layer over a data set. Eager.

    A = sum_i (n_i / N) A_i over batches of n_i examples, N in all, and G likewise. One
    compiled call per batch.

    Args:
        factors_fn: measures a batch's factors, such as `ModelFactors`.
        params: pytree of real floating arrays, the point.
        batches: pairs (inputs, targets), read once.
        key: a key of `jax.random`.
        loss_args: further arguments of the model.

    Returns:
        The factors, one for each Kronecker block of `factors_fn.blocks`, in order.

    Raises:
        ValueError: there is no batch.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.kronecker import ModelFactors, dataset_factors, make_blocks
        >>> params = {"w": jnp.zeros((1, 1))}
        >>> factors_fn = ModelFactors(
        ...     model_fn=lambda p, x, tape: tape.linear("dense", x, x @ p["w"]),
        ...     criterion=lambda z, y: 0.5 * jnp.mean((z - y) ** 2),
        ...     blocks=make_blocks(params, {"dense": {"kernel": "w"}}),
        ...     fisher="ggn",
        ... )
        >>> batches = [
        ...     (jnp.full((n, 1), x), jnp.zeros((n, 1)))
        ...     for n, x in ((3, 2.0), (1, 0.0))
        ... ]
        >>> (found,) = dataset_factors(factors_fn, params, batches, jax.random.key(0))
        >>> print(found.inputs[0])
        [[3.]]
    """
    total, seen = None, 0
    for i, batch in enumerate(batches):
        found = _kronecker(
            factors_fn, params, batch, jax.random.fold_in(key, i), loss_args
        )
        count = num_examples(batch)
        found = jax.tree.map(functools.partial(jnp.multiply, float(count)), found)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        seen += count
    if total is None:
        raise ValueError("batches is empty, and at least one batch is needed")
    return jax.tree.map(lambda x: x / seen, total)


def restrict_to_block(
    matvec: Matvec, params: Params, block: Block
) -> tuple[Matvec, Params]:
    """The diagonal block of a matrix that belongs to a layer: its kernel and bias.

    Args:
        matvec: v -> A v for vectors like `params`, such as `hessian_matvec` gives.
        params: the whole params, a pytree.
        block: one of `factors_fn.blocks`.

    Returns:
        The block's matvec and its part of `params`, as `rmtdamp.hessian.restrict`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import make_blocks, restrict_to_block
        >>> params = {"a": {"w": jnp.ones((1, 1))}, "b": jnp.ones(1)}
        >>> first, _ = make_blocks(params, {"a": {"kernel": "a/w"}})
        >>> restrict_to_block(lambda v: v, params, first)[1]
        {'a': {'w': Array([[1.]], dtype=float32)}, 'b': None}
    """
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    return restrict(matvec, params, {paths[i] for i in block.leaves}.__contains__)


def top_eigenpairs(
    block: Block, basis: Eigenbasis, params: Params, *, k: int
) -> EigenPairs:
    """The k largest eigenvalues of a layer's A x G, with their eigenvectors.

    Eigenvalues are the products l_A l_G of the factors', eigenvectors the matrices
    q_A q_G^T, so each has rank one.

    Args:
        block: the layer's, one of `factors_fn.blocks`.
        basis: of the layer's factors, from `eigenbasis`.
        params: the whole params, a pytree.
        k: how many, from 1 to the layer's number of parameters.

    Returns:
        `EigenPairs`, descending, with vectors like the part of `params` that
        `restrict_to_block` gives. Residuals are rounding's.

    Raises:
        ValueError: a diagonal block, or k out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import (
        ...     KroneckerFactors,
        ...     eigenbasis,
        ...     make_blocks,
        ...     top_eigenpairs,
        ... )
        >>> params = {"w": jnp.zeros((2, 1))}
        >>> (block,) = make_blocks(params, {"dense": {"kernel": "w"}})
        >>> factors = KroneckerFactors(
        ...     jnp.diag(jnp.array([1.0, 5.0]))[None], jnp.full((1, 1, 1), 2.0)
        ... )
        >>> found = top_eigenpairs(block, eigenbasis(factors), params, k=2)
        >>> print(found.eigenvalues)
        [10.  2.]
        >>> print(jnp.abs(found.eigenvectors["w"][0, :, 0]))
        [0. 1.]
    """
    if not block.groups:
        raise ValueError(
            f"block {block.name!r} is diagonal and has no factors: take a layer's, "
            "block_table shows which these are"
        )
    size = basis.input_values.size * block.columns
    if not 1 <= k <= size:
        raise ValueError(
            f"k is {k}, and must lie between 1 and the {size} parameters of layer "
            f"{block.name!r}"
        )
    top, found = _top(block, basis, k)
    leaves = [None] * len(jax.tree.leaves(params))
    for place, leaf in zip(block.leaves, found, strict=True):
        leaves[place] = leaf
    vectors = jax.tree.unflatten(jax.tree.structure(params), leaves)
    rounding = np.full(k, np.finfo(top.dtype).eps * top[0], top.dtype)
    return EigenPairs(top, vectors, jnp.asarray(rounding), 0)


@functools.partial(jax.jit, static_argnames=("block", "k"))
def _top(block: Block, basis: Eigenbasis, k: int) -> tuple[jax.Array, list]:
    """The k largest products, and a leading axis of k on each leaf of the layer."""
    values = basis.input_values[:, :, None] * basis.output_values[:, None, :]
    top, places = jax.lax.top_k(jnp.ravel(values), k)
    group, i, j = jnp.unravel_index(places, values.shape)
    if basis.inputs.ndim == 2:
        left = jax.nn.one_hot(i, block.rows, dtype=basis.inputs.dtype)
    else:
        left = basis.inputs[group, :, i]
    right = basis.outputs[group, :, j]
    ones = jax.nn.one_hot(group, block.groups, dtype=left.dtype)
    matrices = jnp.einsum("kg,ka,ko->kgao", ones, left, right, precision="highest")
    return top, jax.vmap(functools.partial(from_matrix, block))(matrices)
