"""A layer's inputs and output gradients -> Kronecker factors -> their eigenbasis.

    LayerRecord        what a layer saw: its inputs a and the gradients g of its outputs
    KroneckerFactors   A = E[a a^T], G = E[g g^T]; the block of the curvature is A x G
    Eigenbasis         A = Q_A diag(l_A) Q_A^T and the same for G

Vectorised row by row, a layer's weight matrix has the curvature kron(A, G). N is the
number of examples, T the number of places (pixels, time steps, calls) where an example
meets the same weights, C the number of gradients that an example brings (1 for a Fisher
matrix from labels, the number of outputs for the exact Gauss-Newton matrix).

The A of an embedding is diagonal, and stands as its diagonal: (groups, rows) where
others are (groups, rows, rows). Its eigenvectors stand as ones.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._sharding import automatic, explicitly_split
from rmtdamp._tree import accumulation_dtype

Sharing = Literal["expand", "reduce"]


class LayerRecord(NamedTuple):
    """What a layer saw of a batch; each g is that of one example's own loss.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import LayerRecord
        >>> record = LayerRecord(
        ...     2 * jnp.ones((8, 1, 1, 1)), 3 * jnp.ones((1, 8, 1, 1, 1))
        ... )
        >>> print(
        ...     len(record.inputs), "examples,", len(record.gradients), "gradient each"
        ... )
        8 examples, 1 gradient each
    """

    inputs: jax.Array  # (N, T, groups, rows), with the 1 of the bias; indices (N, T)
    gradients: jax.Array  # (C, N, T, groups, columns)


class KroneckerFactors(NamedTuple):
    """The two factors of a layer's block.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import KroneckerFactors
        >>> factors = KroneckerFactors(2 * jnp.eye(2)[None], 3 * jnp.eye(4)[None])
        >>> print(jnp.kron(factors.inputs[0], factors.outputs[0])[0, 0])
        6.0
    """

    inputs: jax.Array  # (groups, rows, rows), A; its diagonal for an embedding
    outputs: jax.Array  # (groups, columns, columns), G


class Eigenbasis(NamedTuple):
    """Eigenvectors, as columns, and eigenvalues of both factors, clipped at 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import KroneckerFactors, eigenbasis
        >>> factors = KroneckerFactors(2 * jnp.eye(2)[None], 3 * jnp.eye(4)[None])
        >>> basis = eigenbasis(factors)  # one group: two rows, four columns
        >>> basis.input_values.shape, basis.output_values.shape
        ((1, 2), (1, 4))
    """

    inputs: jax.Array  # (groups, rows, rows), Q_A; ones for an embedding
    outputs: jax.Array  # (groups, columns, columns), Q_G
    input_values: jax.Array  # (groups, rows), l_A, ascending but for an embedding
    output_values: jax.Array  # (groups, columns), l_G, ascending


class Factors(NamedTuple):
    """The curvature of all params, block by block.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.kronecker import ModelFactors, make_blocks
        >>> params = {"w": jnp.ones((4, 3))}
        >>> factors_fn = ModelFactors(
        ...     model_fn=lambda params, x, tape: tape.linear(
        ...         "layer", x, x @ params["w"]
        ...     ),
        ...     criterion=lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
        ...     blocks=make_blocks(params, {"layer": {"kernel": "w"}}),
        ...     fisher="ggn",
        ... )
        >>> batch = jnp.eye(4), jnp.ones((4, 3))
        >>> factors = factors_fn(params, batch, jax.random.key(0))
        >>> len(factors.kronecker), len(factors.diagonal)
        (1, 0)
    """

    kronecker: tuple[KroneckerFactors, ...]  # per Kronecker block, in order
    diagonal: tuple[jax.Array, ...]  # per diagonal block, shaped like its leaf
    records: tuple[LayerRecord, ...] = ()  # per Kronecker block; for EKFAC alone


def layer_record(
    inputs: jax.Array,
    gradients: jax.Array,
    *,
    bias: bool,
    sharing: Sharing = "expand",
    dtype: jnp.dtype | None = None,
) -> LayerRecord:
    """Bring inputs and output gradients into the form that factors are made from.

    Args:
        inputs: (N, T, groups, rows without bias), or the indices (N, T) of an
            embedding.
        gradients: (C, N, T, groups, columns), each of an example's own loss.
        bias: whether to append the 1 that the bias is multiplied with.
        sharing: "expand" keeps the T places; "reduce" takes the mean of the inputs
            and the sum of the gradients over them first. Embeddings keep them: the
            mean of ones at different rows would fill A.
        dtype: of the record; default float32 or wider.

    Returns:
        The record.

    References:
        Eschenhagen, Immer, Turner, Schneider and Hennig, Kronecker-factored approximate
        curvature for modern neural network architectures, 2023, sections 3.2 and 3.3.
    """
    floats = gradients if _is_lookup(inputs) else (inputs, gradients)
    dtype = dtype or accumulation_dtype(floats)
    gradients = gradients.astype(dtype)
    if _is_lookup(inputs):
        return LayerRecord(inputs, gradients)
    inputs = inputs.astype(dtype)
    if bias:
        ones = jnp.ones_like(inputs[..., :1])
        inputs = jnp.concatenate([inputs, ones], axis=-1)
    if sharing == "reduce":
        inputs = jnp.mean(inputs, axis=1, keepdims=True)
        gradients = jnp.sum(gradients, axis=2, keepdims=True)
    return LayerRecord(inputs, gradients)


def _is_lookup(inputs: jax.Array) -> bool:
    return jnp.issubdtype(inputs.dtype, jnp.integer)


def kronecker_factors(record: LayerRecord, rows: int) -> KroneckerFactors:
    """A = (NT)^-1 sum a a^T and G = N^-1 sum g g^T, over examples, places, gradients.

    `A x G` is the block exactly for one example with T = 1 and C = 1, for a G that does
    not vary over examples (the Gauss-Newton matrix of a linear network under squared
    error); else it supposes inputs and gradients independent.

    Args:
        record: of the layer.
        rows: of its weight matrix, which the indices of an embedding do not tell.

    Returns:
        The two factors.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored
        approximate curvature, 2015, section 3. Grosse and Martens, A Kronecker-factored
        approximate Fisher matrix for convolution layers, 2016, section 3.
    """
    return automatic(
        functools.partial(_kronecker_factors, rows),
        lambda: explicitly_split(record),
        record,
    )


def _kronecker_factors(rows: int, record: LayerRecord) -> KroneckerFactors:
    a, g = record
    count, places = a.shape[:2]
    if _is_lookup(a):
        inputs = jnp.zeros((1, rows), g.dtype).at[0, jnp.ravel(a)].add(1)
    else:
        inputs = jnp.einsum("ntka,ntkb->kab", a, a, precision="highest")
    outputs = jnp.einsum("cntko,cntkp->kop", g, g, precision="highest")
    return KroneckerFactors(inputs / (count * places), outputs / count)


def eigenbasis(factors: KroneckerFactors) -> Eigenbasis:
    """Eigendecomposition of both factors; rounding below 0 is cut.

    Returns:
        `Eigenbasis`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import KroneckerFactors, eigenbasis
        >>> factors = KroneckerFactors(2 * jnp.eye(2)[None], 3 * jnp.eye(4)[None])
        >>> basis = eigenbasis(factors)
        >>> print(basis.input_values, basis.output_values)
        [[2. 2.]] [[3. 3. 3. 3.]]
    """
    if factors.inputs.ndim == 2:
        input_values, inputs = factors.inputs, jnp.ones_like(factors.inputs)
    else:
        input_values, inputs = jnp.linalg.eigh(factors.inputs)
    output_values, outputs = jnp.linalg.eigh(factors.outputs)
    clip = lambda values: jnp.maximum(values, 0)
    return Eigenbasis(inputs, outputs, clip(input_values), clip(output_values))


def second_moments(record: LayerRecord, basis: Eigenbasis) -> jax.Array:
    """The diagonal of the block in the eigenbasis, exact: EKFAC's rescaling.

    Args:
        record: of the layer.
        basis: of its factors.

    Returns:
        (groups, rows, columns): mean over examples of the squared entries of
        Q_A^T (sum over places of a g^T) Q_G, summed over the C gradients.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import (
        ...     KroneckerFactors,
        ...     LayerRecord,
        ...     eigenbasis,
        ...     second_moments,
        ... )
        >>> record = LayerRecord(
        ...     2 * jnp.ones((8, 1, 1, 1)), 3 * jnp.ones((1, 8, 1, 1, 1))
        ... )
        >>> one = jnp.ones((1, 1, 1))
        >>> print(second_moments(record, eigenbasis(KroneckerFactors(one, one))))
        [[[36.]]]

    References:
        George, Laurent, Bouthillier, Ballas and Vincent, Fast approximate natural
        gradient descent in a Kronecker-factored eigenbasis, 2018, section 3.
    """
    project = lambda x, q: jnp.einsum("...kx,kxy->...ky", x, q, precision="highest")
    g = project(record.gradients, basis.outputs)
    count, places = record.inputs.shape[:2]
    if _is_lookup(record.inputs):
        return _lookup_moments(record.inputs, g[:, :, :, 0], basis.inputs.shape[1])
    a = project(record.inputs, basis.inputs)
    if places == 1:
        squares = jnp.sum(g[:, :, 0] ** 2, axis=0)
        total = jnp.einsum("nka,nko->kao", a[:, 0] ** 2, squares, precision="highest")
    else:
        per_example = jnp.einsum("ntka,cntko->cnkao", a, g, precision="highest")
        total = jnp.sum(per_example**2, axis=(0, 1))
    return total / count


def _lookup_moments(indices: jax.Array, g: jax.Array, rows: int) -> jax.Array:
    """`second_moments` of an embedding, from indices (N, T) and g (C, N, T, columns).

    The square of a sum over the places of one token is a sum over them of g times it.

    Returns:
        (1, rows, columns).
    """
    same = (indices[:, :, None] == indices[:, None, :]).astype(g.dtype)
    sums = jnp.einsum("nts,cnso->cnto", same, g, precision="highest")
    per_place = jnp.reshape(jnp.sum(g * sums, axis=0), (-1, g.shape[-1]))
    total = jnp.zeros((1, rows, g.shape[-1]), g.dtype)
    return total.at[0, jnp.ravel(indices)].add(per_place) / len(indices)
