"""A layer's inputs and output gradients -> Kronecker factors -> their eigenbasis.

    Block          which leaves of the params one block of the curvature covers; static
    LayerRecord    what a layer saw: its inputs a and the gradients g of its outputs
    KroneckerFactors   A = E[a a^T], G = E[g g^T]; the block of the curvature is A x G
    Eigenbasis     A = Q_A diag(l_A) Q_A^T and the same for G

Convention. A layer is a matrix W of shape (rows, columns) acting from the right,
y = a W, as Flax stores its kernels; a bias is a last row of W, and a then ends in a 1.
Convolutions are the same with a patch of the image for a, kernels reshaped to
(prod(window) * inputs, outputs). Vectorised row by row, W has the curvature
kron(A, G). Every matrix has a leading axis of feature groups, 1 but for grouped
convolutions, whose groups are layers of their own.

N is the number of examples, T the number of places (pixels, time steps, calls) where an
example meets the same weights, C the number of gradients that an example brings (1 for
a Fisher matrix from labels, the number of outputs for the exact Gauss-Newton matrix).
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._tree import accumulation_dtype
from rmtdamp._types import Params

Sharing = Literal["expand", "reduce"]


class Block(NamedTuple):
    """The leaves of the params that one block of the curvature covers. Static."""

    name: str  # of the layer or leaf
    leaves: tuple[int, ...]  # places in jax.tree.leaves(params): kernel, bias; or one
    shapes: tuple[tuple[int, ...], ...]  # of these leaves
    groups: int = 0  # feature groups; 0: the block is diagonal
    num_outputs: int = 0  # output features of all groups

    @property
    def rows(self) -> int:
        """Rows of the weight matrix of a group, with the bias."""
        return math.prod(self.shapes[0]) // self.num_outputs + len(self.leaves) - 1

    @property
    def columns(self) -> int:
        """Columns of the weight matrix of a group."""
        return self.num_outputs // self.groups


class LayerRecord(NamedTuple):
    """What a layer saw of a batch; each g is that of one example's own loss."""

    inputs: jax.Array  # (N, T, groups, rows), with the 1 of the bias
    gradients: jax.Array  # (C, N, T, groups, columns)


class KroneckerFactors(NamedTuple):
    """The two factors of a layer's block."""

    inputs: jax.Array  # (groups, rows, rows), A
    outputs: jax.Array  # (groups, columns, columns), G


class Eigenbasis(NamedTuple):
    """Eigenvectors, as columns, and eigenvalues of both factors, clipped at 0."""

    inputs: jax.Array  # (groups, rows, rows), Q_A
    outputs: jax.Array  # (groups, columns, columns), Q_G
    input_values: jax.Array  # (groups, rows), l_A, ascending
    output_values: jax.Array  # (groups, columns), l_G, ascending


class Factors(NamedTuple):
    """The curvature of all params, block by block."""

    kronecker: tuple[KroneckerFactors, ...]  # per Kronecker block, in order
    diagonal: tuple[jax.Array, ...]  # per diagonal block, shaped like its leaf
    records: tuple[LayerRecord, ...] = ()  # per Kronecker block; for EKFAC alone


def leaf_names(params: Params) -> list[str]:
    """The path of each leaf, its keys joined by slashes: "dense/kernel".

    A box around a leaf (a variable of Flax with its `value`) adds nothing to its name.

    Returns:
        One name per leaf.
    """
    names = []
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        if path and getattr(path[-1], "name", None) == "value":
            path = path[:-1]
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return names


def make_blocks(params: Params, layers: dict[str, dict]) -> tuple[Block, ...]:
    """The blocks of all params: Kronecker for the given layers, else diagonal.

    Args:
        params: pytree of real floating arrays, for shapes.
        layers: name of the layer -> its `kernel` (name of a leaf, as `leaf_names`
            gives it), `bias` (the same, optional), `groups` (feature groups,
            default 1) and `num_outputs` (default: the last axis of the kernel).

    Returns:
        One block per layer, and one per leaf that belongs to none, in the order of
        `jax.tree.leaves(params)`.

    Raises:
        ValueError: a name that no leaf has, a leaf in two layers, or shapes that do
            not make a weight matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import make_blocks
        >>> params = {"b": jnp.zeros(3), "scale": jnp.ones(4), "w": jnp.zeros((4, 3))}
        >>> layers = {"layer": {"kernel": "w", "bias": "b"}}
        >>> [(block.name, block.leaves) for block in make_blocks(params, layers)]
        [('layer', (2, 0)), ('scale', (1,))]
    """
    names = leaf_names(params)
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    taken: dict[int, str] = {}
    blocks = []
    for layer, spec in layers.items():
        parts = [spec["kernel"]] + ([spec["bias"]] if spec.get("bias") else [])
        for part in parts:
            if part not in names:
                raise ValueError(
                    f"layer {layer!r} names {part!r}, and no leaf of params has that "
                    f"name: choose from {', '.join(names)}"
                )
        places = tuple(map(names.index, parts))
        for place in places:
            if place in taken:
                raise ValueError(
                    f"{names[place]!r} belongs to layers {taken[place]!r} and "
                    f"{layer!r}: name it once, a tied layer is one that is called twice"
                )
            taken[place] = layer
        kernel = shapes[places[0]]
        groups = spec.get("groups", 1)
        num_outputs = spec.get("num_outputs", kernel[-1] if kernel else 0)
        fits = len(kernel) >= 2 and num_outputs and math.prod(kernel) % num_outputs == 0
        fits = fits and num_outputs % groups == 0
        if not fits or any(math.prod(shapes[p]) != num_outputs for p in places[1:]):
            raise ValueError(
                f"layer {layer!r} has shapes {[shapes[p] for p in places]} for "
                f"{num_outputs} outputs in {groups} groups: its kernel must be "
                "(..., outputs), its bias (outputs,), and groups divide the outputs"
            )
        block_shapes = tuple(shapes[p] for p in places)
        blocks.append(Block(layer, places, block_shapes, groups, num_outputs))
    for place, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        if place not in taken:
            blocks.append(Block(name, (place,), (shape,)))
    return tuple(sorted(blocks, key=lambda block: min(block.leaves)))


def block_table(blocks: tuple[Block, ...]) -> str:
    """Which block each parameter got, as a text table.

    Args:
        blocks: from `make_blocks`, or the attribute of a `FactorsFn`.

    Returns:
        Lines of name, shapes of the leaves, kind and size of the block.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import block_table, make_blocks
        >>> params = {"b": jnp.zeros(3), "scale": jnp.ones(4), "w": jnp.zeros((4, 3))}
        >>> layers = {"layer": {"kernel": "w", "bias": "b"}}
        >>> print(block_table(make_blocks(params, layers)))
        layer  params        block
        layer  (4, 3), (3,)  Kronecker 5 x 3
        scale  (4,)          diagonal
    """
    rows = [("layer", "params", "block")]
    for block in blocks:
        kind = "diagonal"
        if block.groups:
            copies = f", {block.groups} groups" if block.groups > 1 else ""
            kind = f"Kronecker {block.rows} x {block.columns}{copies}"
        rows.append((block.name, ", ".join(map(str, block.shapes)), kind))
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def to_matrix(block: Block, leaves: list[jax.Array]) -> jax.Array:
    """Kernel and bias of a layer as (groups, rows, columns)."""
    kernel, *bias = [
        jnp.reshape(leaf, (-1, block.groups, block.columns)) for leaf in leaves
    ]
    return jnp.swapaxes(jnp.concatenate([kernel, *bias]), 0, 1)


def from_matrix(block: Block, matrix: jax.Array) -> list[jax.Array]:
    """Kernel and bias of a layer, from (groups, rows, columns)."""
    bias = len(block.leaves) - 1
    matrix = jnp.swapaxes(matrix, 0, 1)
    parts = [matrix[: block.rows - bias], matrix[block.rows - bias :]]
    return [
        jnp.reshape(part, shape)
        for part, shape in zip(parts[: 1 + bias], block.shapes, strict=True)
    ]


def convolution_patches(
    inputs: jax.Array,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding,
    *,
    input_dilation: tuple[int, ...] | None = None,
    kernel_dilation: tuple[int, ...] | None = None,
    groups: int = 1,
) -> jax.Array:
    """What a convolution multiplies its kernel with, place by place.

    Cut axis by axis out of the padded image: exact in every dtype, where
    `jax.lax.conv_general_dilated_patches` is a convolution itself.

    Args:
        inputs: (N, *space, features), channels last as Flax has them.
        window: shape of the kernel in space.
        strides: of the window.
        padding: as `jax.lax.conv_general_dilated` takes it.
        input_dilation: holes between pixels.
        kernel_dilation: holes in the kernel.
        groups: feature groups.

    Returns:
        (N, places, groups, prod(window) * features / groups); the last axis in the
        order of a kernel reshaped to (-1, outputs).
    """
    rank = len(window)
    input_dilation = input_dilation or (1,) * rank
    kernel_dilation = kernel_dilation or (1,) * rank
    stretch = lambda lengths, dilation: [
        (n - 1) * d + 1 for n, d in zip(lengths, dilation, strict=True)
    ]
    space = stretch(inputs.shape[1:-1], input_dilation)
    extent = stretch(window, kernel_dilation)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(space, extent, strides, padding)
    holes = [d - 1 for d in input_dilation]
    config = [(*pad, hole) for pad, hole in zip(padding, holes, strict=True)]
    zero = jnp.zeros((), inputs.dtype)
    x = jax.lax.pad(inputs, zero, [(0, 0, 0), *config, (0, 0, 0)])
    for axis in range(1, 1 + rank):
        i = axis - 1
        places = (x.shape[axis] - extent[i]) // strides[i] + 1
        reach = (places - 1) * strides[i] + 1
        starts = [k * kernel_dilation[i] for k in range(window[i])]
        cut = [jax.lax.slice_in_dim(x, s, s + reach, strides[i], axis) for s in starts]
        x = jnp.stack(cut, axis=-2)  # (N, *places, *space, *window, features)
    count, *places = x.shape[: 1 + rank]
    x = jnp.reshape(x, (count, math.prod(places), math.prod(window), groups, -1))
    return jnp.reshape(jnp.swapaxes(x, 2, 3), (count, math.prod(places), groups, -1))


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
        inputs: (N, T, groups, rows without bias).
        gradients: (C, N, T, groups, columns), each of an example's own loss.
        bias: whether to append the 1 that the bias is multiplied with.
        sharing: "expand" keeps the T places; "reduce" takes the mean of the inputs
            and the sum of the gradients over them first.
        dtype: of the record; default float32 or wider.

    Returns:
        The record.

    References:
        Eschenhagen, Immer, Turner, Schneider and Hennig, Kronecker-factored approximate
        curvature for modern neural network architectures, 2023, sections 3.2 and 3.3.
    """
    dtype = dtype or accumulation_dtype((inputs, gradients))
    inputs, gradients = inputs.astype(dtype), gradients.astype(dtype)
    if bias:
        ones = jnp.ones((*inputs.shape[:-1], 1), dtype)
        inputs = jnp.concatenate([inputs, ones], axis=-1)
    if sharing == "reduce":
        inputs = jnp.mean(inputs, axis=1, keepdims=True)
        gradients = jnp.sum(gradients, axis=2, keepdims=True)
    return LayerRecord(inputs, gradients)


def kronecker_factors(record: LayerRecord) -> KroneckerFactors:
    """A = (NT)^-1 sum a a^T and G = N^-1 sum g g^T, over examples, places, gradients.

    `A x G` is the block exactly for one example with T = 1 and C = 1, for a G that does
    not vary over examples (the Gauss-Newton matrix of a linear network under squared
    error); else it supposes inputs and gradients independent.

    Args:
        record: of the layer.

    Returns:
        The two factors.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored
        approximate curvature, 2015, section 3. Grosse and Martens, A Kronecker-factored
        approximate Fisher matrix for convolution layers, 2016, section 3.
    """
    a, g = record
    count, places = a.shape[:2]
    inputs = jnp.einsum("ntka,ntkb->kab", a, a, precision="highest")
    outputs = jnp.einsum("cntko,cntkp->kop", g, g, precision="highest")
    return KroneckerFactors(inputs / (count * places), outputs / count)


def eigenbasis(factors: KroneckerFactors) -> Eigenbasis:
    """Eigendecomposition of both factors; rounding below 0 is cut."""
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

    References:
        George, Laurent, Bouthillier, Ballas and Vincent, Fast approximate natural
        gradient descent in a Kronecker-factored eigenbasis, 2018, section 3.
    """
    project = lambda x, q: jnp.einsum("...kx,kxy->...ky", x, q, precision="highest")
    a = project(record.inputs, basis.inputs)
    g = project(record.gradients, basis.outputs)
    count, places = a.shape[:2]
    if places == 1:
        squares = jnp.sum(g[:, :, 0] ** 2, axis=0)
        total = jnp.einsum("nka,nko->kao", a[:, 0] ** 2, squares, precision="highest")
    else:
        per_example = jnp.einsum("ntka,cntko->cnkao", a, g, precision="highest")
        total = jnp.sum(per_example**2, axis=(0, 1))
    return total / count
