"""Which leaves of the params one block of the curvature covers.

Convention. A layer is a matrix W of shape (rows, columns) acting from the right,
y = a W, as Flax stores its kernels; a bias is a last row of W, and a then ends in a 1.
Convolutions are the same with a patch of the image for a, kernels reshaped to
(prod(window) * inputs, outputs). Every matrix has a leading axis of feature groups, 1
but for grouped convolutions, whose groups are layers of their own.

A table of embeddings is a layer whose a is one-hot, so that A is diagonal. A full
block, such as a norm's scale and bias together, is a layer whose a is 1: one row, W its
leaves end to end.
"""

import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._tree import leaf_names
from rmtdamp._types import Params


class Block(NamedTuple):
    """The leaves of the params that one block of the curvature covers. Static.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import make_blocks
        >>> params = {"b": jnp.zeros(3), "w": jnp.ones((4, 3))}
        >>> (block,) = make_blocks(params, {"layer": {"kernel": "w", "bias": "b"}})
        >>> block.rows, block.columns
        (5, 3)
    """

    name: str  # of the layer or leaf
    leaves: tuple[int, ...]  # places in jax.tree.leaves(params): kernel, bias; or one
    shapes: tuple[tuple[int, ...], ...]  # of these leaves
    groups: int = 0  # feature groups; 0: the block is diagonal
    num_outputs: int = 0  # output features of all groups
    kind: Literal["layer", "embedding", "full"] = "layer"  # unless it is diagonal

    @property
    def rows(self) -> int:
        """Rows of the weight matrix of a group, with the bias."""
        if self.kind == "full":
            return 1
        return math.prod(self.shapes[0]) // self.num_outputs + len(self.leaves) - 1

    @property
    def columns(self) -> int:
        """Columns of the weight matrix of a group."""
        return self.num_outputs // self.groups


def make_blocks(params: Params, layers: dict[str, dict[str, Any]]) -> tuple[Block, ...]:
    """The blocks of all params: Kronecker for the given layers, else diagonal.

    Args:
        params: pytree of real floating arrays, for shapes.
        layers: name of the layer -> its `kernel` (name of a leaf, as `leaf_names`
            gives it), `bias` (the same, optional), `groups` (feature groups,
            default 1) and `num_outputs` (default: the last axis of the kernel); or
            its `embedding`, a leaf of shape (tokens, features); or `full`, a list of
            leaves that get one full block, of as many rows as they have entries.

    Returns:
        One block per layer, and one per leaf that belongs to none, in the order of
        `jax.tree.leaves(params)`.

    Raises:
        ValueError: a name that no leaf has, a leaf in two layers, or shapes that do
            not make a weight matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import make_blocks
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
        parts = _parts(layer, spec)
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
        block_shapes = tuple(shapes[p] for p in places)
        blocks.append(_block(layer, spec, places, block_shapes))
    for place, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        if place not in taken:
            blocks.append(Block(name, (place,), (shape,)))
    return tuple(sorted(blocks, key=lambda block: min(block.leaves)))


def _parts(layer: str, spec: dict[str, Any]) -> list[str]:
    """The names of a layer's leaves."""
    if "kernel" in spec:
        return [spec["kernel"]] + ([spec["bias"]] if spec.get("bias") else [])
    if "embedding" in spec:
        return [spec["embedding"]]
    if spec.get("full"):
        return list(spec["full"])
    raise ValueError(
        f"layer {layer!r} has the entries {sorted(spec)}: name its 'kernel', its "
        "'embedding', or the leaves of a 'full' block"
    )


def _block(layer: str, spec: dict[str, Any], places, shapes) -> Block:
    """The block of a layer, whose shapes must make its weight matrix."""
    if "kernel" not in spec and "embedding" not in spec:
        return Block(layer, places, shapes, 1, sum(map(math.prod, shapes)), "full")
    kernel = shapes[0]
    if "embedding" in spec:
        if len(kernel) != 2:
            raise ValueError(
                f"the embedding of layer {layer!r} has shape {kernel}, and must be "
                "(tokens, features)"
            )
        return Block(layer, places, shapes, 1, kernel[1], "embedding")
    groups = spec.get("groups", 1)
    num_outputs = spec.get("num_outputs", kernel[-1] if kernel else 0)
    fits = len(kernel) >= 2 and num_outputs and math.prod(kernel) % num_outputs == 0
    fits = fits and num_outputs % groups == 0
    if not fits or any(math.prod(shape) != num_outputs for shape in shapes[1:]):
        raise ValueError(
            f"layer {layer!r} has shapes {list(shapes)} for {num_outputs} outputs in "
            f"{groups} groups: its kernel must be (..., outputs), its bias "
            "(outputs,), and groups divide the outputs"
        )
    return Block(layer, places, shapes, groups, num_outputs)


def block_table(blocks: tuple[Block, ...]) -> str:
    """Which block each parameter got, as a text table.

    Args:
        blocks: from `make_blocks`, or the attribute of a `FactorsFn`.

    Returns:
        Lines of name, shapes of the leaves, kind and size of the block.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import block_table, make_blocks
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
            if block.kind == "embedding":
                kind += ", the first diagonal"
            elif block.kind == "full":
                kind = f"full {block.columns} x {block.columns}"
        rows.append((block.name, ", ".join(map(str, block.shapes)), kind))
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def to_matrix(block: Block, leaves: list[jax.Array]) -> jax.Array:
    """Kernel and bias of a layer as (groups, rows, columns).

    Returns:
        The matrix, a group each; the bias is the last row.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import make_blocks, to_matrix
        >>> params = {"b": jnp.zeros(3), "w": jnp.ones((4, 3))}
        >>> (block,) = make_blocks(params, {"layer": {"kernel": "w", "bias": "b"}})
        >>> print(to_matrix(block, [params["w"], params["b"]])[0, :, 0])
        [1. 1. 1. 1. 0.]
    """
    if block.kind == "full":
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])[None, None]
    kernel, *bias = [
        jnp.reshape(leaf, (-1, block.groups, block.columns)) for leaf in leaves
    ]
    return jnp.swapaxes(jnp.concatenate([kernel, *bias]), 0, 1)


def from_matrix(block: Block, matrix: jax.Array) -> list[jax.Array]:
    """Kernel and bias of a layer, from (groups, rows, columns).

    Returns:
        The arrays, of the shapes of the leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import from_matrix, make_blocks
        >>> params = {"b": jnp.zeros(3), "w": jnp.ones((4, 3))}
        >>> (block,) = make_blocks(params, {"layer": {"kernel": "w", "bias": "b"}})
        >>> kernel, bias = from_matrix(block, jnp.ones((1, 5, 3)))
        >>> kernel.shape, bias.shape
        ((4, 3), (3,))
    """
    if block.kind == "full":
        ends = itertools.accumulate(map(math.prod, block.shapes[:-1]))
        parts = jnp.split(matrix[0, 0], list(ends))
        return [
            jnp.reshape(part, shape)
            for part, shape in zip(parts, block.shapes, strict=True)
        ]
    bias = len(block.leaves) - 1
    matrix = jnp.swapaxes(matrix, 0, 1)
    parts = [matrix[: block.rows - bias], matrix[block.rows - bias :]]
    return [
        jnp.reshape(part, shape)
        for part, shape in zip(parts[: 1 + bias], block.shapes, strict=True)
    ]
