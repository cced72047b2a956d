"""Vector-space operations on pytrees, and the checks on what comes from outside.

Reductions accumulate in float32, or in the leaves' dtype where that is wider. What a
bfloat16 or float16 model rounds on the way to a gradient is rounded all the same.
"""

import functools
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ._sharding import placed, whole
from ._types import Batch, Key, Params

# Leaves of at most so many elements are joined, larger ones are worked on where they
# lie: as a float32, a quarter of a megabyte.
SMALL = 2**16


def leaf_names(params: Params) -> list[str]:
    """The path of each leaf, its keys joined by slashes: "dense/kernel".

    A box around a leaf (a variable of Flax with its `value`) adds nothing to its name.

    Returns:
        One name per leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import leaf_names
        >>> leaf_names({"dense": {"bias": jnp.zeros(3), "kernel": jnp.zeros((4, 3))}})
        ['dense/bias', 'dense/kernel']
    """
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [name(without_box(path)) for path, _ in paths]


def without_box(path: tuple) -> tuple:
    """A leaf's path without the box around it, Flax's variable, if there is one."""
    boxed = bool(path) and getattr(path[-1], "name", None) == "value"
    return path[:-1] if boxed else path


def accumulation_dtype(tree: Params) -> jnp.dtype:
    """Float32, or float64 where a leaf of `tree` has it."""
    # Not jnp.promote_types: strict promotion, a setting of the user's, forbids it.
    wide = any(
        getattr(leaf, "dtype", None) == jnp.float64 for leaf in jax.tree.leaves(tree)
    )
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def size(tree: Params) -> int:
    """P, the number of elements in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def vdot(x: Params, y: Params) -> jax.Array:
    """sum_j x_j y_j over all leaves, a scalar in the accumulation dtype."""
    dtype = accumulation_dtype(x)
    # A product and a sum rather than a dot: no TF32 on recent GPUs, and no reshape
    # that would gather a sharded leaf.
    return sum(
        (
            jnp.sum(a.astype(dtype) * b.astype(dtype))
            for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        ),
        start=jnp.zeros((), dtype),
    )


def norm(x: Params) -> jax.Array:
    """Euclidean norm over all leaves, a scalar in the accumulation dtype."""
    return jnp.sqrt(vdot(x, x))


def mean(x: Params) -> jax.Array:
    """The mean over all elements of all leaves, a scalar; 0 where there are none."""
    total = sum(map(jnp.sum, jax.tree.leaves(x)), jnp.zeros(()))
    return total / max(size(x), 1)


def scale(factor: jax.Array, x: Params) -> Params:
    """`factor` times `x`, each leaf in its own dtype."""
    return jax.tree.map(lambda a: a * factor.astype(a.dtype), x)


def random_like(key: Key, like: Params, sampler, where: tuple | None = None) -> Params:
    """An independent draw of `sampler(key, shape, dtype)` for each element of `like`.

    Small leaves of one dtype are cut out of a single draw: each call of a generator
    takes half a second to compile on a CPU, several times what a small network's
    gradient takes. Large leaves of one shape are drawn as a stack, whose parts need not
    be on one device.

    Args:
        key: a key of `jax.random`.
        like: pytree of arrays.
        sampler: `sampler(key, shape, dtype)`, such as `jax.random.normal`.
        where: the placement of `like`, in traced code; see `rmtdamp._sharding`.

    Returns:
        A pytree like `like`, where it lies.
    """
    leaves, treedef = jax.tree.flatten(like)
    together: dict[tuple, list[int]] = {}
    for place, leaf in enumerate(leaves):
        large = math.prod(leaf.shape) > SMALL
        together.setdefault((leaf.dtype, leaf.shape if large else None), []).append(
            place
        )
    draws = list(leaves)
    keys = jax.random.split(key, max(len(together), 1))
    for k, ((dtype, shape), places) in zip(keys, together.items(), strict=False):
        if shape is not None:
            stack = sampler(k, (len(places), *shape), dtype)
            parts = [stack[i] for i in range(len(places))]
        else:
            shapes = [leaves[place].shape for place in places]
            ends = list(itertools.accumulate(map(math.prod, shapes), initial=0))
            flat = sampler(k, (ends[-1],), dtype)
            cuts = zip(itertools.pairwise(ends), shapes, strict=True)
            pieces = [jnp.reshape(flat[i:j], shape) for (i, j), shape in cuts]
            parts = [whole(x, leaves) for x in pieces]
        for place, part in zip(places, parts, strict=True):
            draws[place] = part
    return placed(jax.tree.unflatten(treedef, draws), like, where)


def rademacher(key: Key, shape: tuple[int, ...], dtype) -> jax.Array:
    """Independent signs, +1 or -1 with equal probability; one word gives 32 of them."""
    *lead, last = shape or (1,)
    words = jax.random.bits(key, (*lead, -(-last // 32)), jnp.uint32)
    shifts = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
    bits = (jnp.broadcast_to(words[..., None], shifts.shape) >> shifts) & 1
    signs = jnp.reshape(bits, (*lead, 32 * words.shape[-1]))[..., :last]
    return jnp.reshape(1 - 2 * signs.astype(dtype), shape)


def scattered(key: Key, shape: tuple[int, ...], dtype) -> jax.Array:
    """Numbers in [-1, 1) that follow no pattern: where an iteration may start.

    A start need only not be orthogonal to what is looked for. A hash of each element's
    place compiles in a tenth of the time of a draw of `jax.random`, and is no worse at
    that; what is averaged over needs the latter.

    Returns:
        The array.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    # The finaliser of MurmurHash3, once for each word of the key.
    for word in jnp.ravel(jax.random.key_data(key)):
        place = (place ^ word) * np.uint32(0x9E3779B1)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            place = (place ^ (place >> shift)) * np.uint32(factor)
        place ^= place >> 16
    return ((place >> 8).astype(jnp.float32) / 2**23 - 1).astype(dtype)


def aligned(vector: Params, params: Params) -> Params:
    """Bring a vector into the tree structure and dtypes of `params`.

    Structures are compared leaf by leaf, by name and shape and not by treedef:
    `flax.nnx` hands out the same params once as variables and once as arrays.

    Returns:
        The same numbers, a pytree like `params`.

    Raises:
        ValueError: the leaves differ in number, name or shape.
    """
    leaves, treedef = jax.tree.flatten(params)
    given = jax.tree.leaves(vector)
    if len(given) != len(leaves):
        raise ValueError(
            f"the vector has {len(given)} leaves and params have {len(leaves)}: a "
            "vector in parameter space is a pytree like params "
            "(jax.tree.map over params builds one)"
        )
    if jax.tree.structure(vector) != treedef:
        pairs = zip(leaf_names(vector), leaf_names(params), strict=True)
        if differ := [pair for pair in pairs if pair[0] != pair[1]]:
            raise ValueError(
                f"the vector has a leaf {differ[0][0]!r} where params have "
                f"{differ[0][1]!r}: a vector in parameter space is a pytree like "
                "params, its leaves in the same order"
            )
    for i, (leaf, other) in enumerate(zip(leaves, given, strict=True)):
        if jnp.shape(other) != leaf.shape:
            path = jax.tree_util.keystr(
                jax.tree_util.tree_leaves_with_path(params)[i][0]
            )
            raise ValueError(
                f"the vector has shape {jnp.shape(other)} where params{path} has shape "
                f"{leaf.shape}: a vector in parameter space has the shapes of params"
            )
    # Eagerly, a cast that changes nothing would take longer than a small product.
    cast = lambda x, dtype: (
        x
        if isinstance(x, jax.Array) and x.dtype == dtype
        else jnp.asarray(x).astype(dtype)
    )
    return jax.tree.unflatten(
        treedef, [cast(x, leaf.dtype) for x, leaf in zip(given, leaves, strict=True)]
    )


def check_params(params: Params) -> None:
    """Refuse params without a real-valued Hessian.

    Raises:
        TypeError: a leaf is not an array of a real floating dtype, or is state of an
            nnx model that nobody trains; they are a function.
        ValueError: there is no element at all.
    """
    if isinstance(params, jax.tree_util.Partial):
        raise TypeError(
            "params are a function, such as hessian_matvec makes one, and have to be a "
            "pytree of arrays: the function comes first, trace(matvec, params, key)"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if any(without_box(path) != path for path, _ in leaves):
        _refuse_nnx_state(params)
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is "
                f"{dtype if dtype is not None else type(leaf).__name__}, and curvature "
                "needs arrays of a real floating dtype: hand what is not trained to "
                "the loss through loss_args"
            )
    if size(params) == 0:
        raise ValueError("params hold no elements, so there is no Hessian to measure")


def _refuse_nnx_state(params: Params) -> None:
    """An nnx module is a pytree, and its running averages would pass for params."""
    nnx = sys.modules.get("flax.nnx")  # who hands over such a thing has imported it
    if nnx is None:
        return
    state = nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate
    is_variable = lambda x: isinstance(x, nnx.Variable)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    for path, leaf in leaves:
        if isinstance(leaf, state):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is a {type(leaf).__name__} of an "
                "nnx model, which is not trained: hand over nnx.state(model, "
                "nnx.Param) for the params, rmtdamp.flax.curvature_loss(model, "
                "model_loss) for the loss and rmtdamp.flax.loss_args(model) for its "
                "loss_args"
            )


def num_examples(batch: Batch, name: str = "batch") -> int:
    """The length of the leading axis that all leaves of `batch` share.

    Returns:
        The number of examples, at least 1.

    Raises:
        ValueError: no leaves, a leaf without axes, unequal leading axes, or no example.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(
            f"{name} holds no arrays: hand over a pytree of arrays that share a "
            "leading axis of examples"
        )
    sizes = {}
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is a scalar without an axis of "
                "examples: what is not split among microbatches belongs in loss_args, "
                "and a list of numbers becomes an array, jnp.array(...)"
            )
        sizes[f"{name}{jax.tree_util.keystr(path)}"] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{path}: {n}" for path, n in sizes.items())
        raise ValueError(
            f"the leaves of {name} have unequal leading axes ({listing}): each must "
            "hold one row per example; what does not belongs in loss_args"
        )
    count = next(iter(sizes.values()))
    if count == 0:
        raise ValueError(f"{name} holds no examples: its leading axis has length 0")
    return count
