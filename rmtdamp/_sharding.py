"""Where arrays lie on a mesh of devices, as far as it is known before compilation.

On an explicit mesh the type of an array says how it is split, in traced code too. On an
automatic one the type names the mesh alone: an array that is not traced knows more, and
what it knows is handed to compiled code as a static argument, its `placement`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._types import Params


def may_be_split(x) -> bool:
    """Whether a leaf may be split over devices; for a traced one, to be told or not."""
    where = jax.typeof(x).sharding
    return any(where.spec) or AxisType.Auto in where.mesh.axis_types


def placement(tree: Params) -> tuple[NamedSharding | None, ...]:
    """The sharding of each leaf, None where it is traced or not on a mesh."""

    def sharding(x):
        known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        found = x.sharding if known else None
        return found if isinstance(found, NamedSharding) else None

    return tuple(map(sharding, jax.tree.leaves(tree)))


def placed(tree: Params, like: Params, where: Sequence | None = None) -> Params:
    """Leaves where those of `like` lie, or some with leading axes before theirs.

    Args:
        tree: pytree of arrays, traced.
        like: pytree of the same structure.
        where: the placement of `like`, for an automatic mesh.

    Returns:
        The tree.
    """
    leaves, treedef = jax.tree.flatten(tree)
    others = jax.tree.leaves(like)
    where = where or (None,) * len(others)
    found = [_placed(*each) for each in zip(leaves, others, where, strict=True)]
    return treedef.unflatten(found)


def _placed(x, leaf, sharding) -> jax.Array:
    typed = jax.typeof(leaf).sharding
    rows = (None,) * (x.ndim - leaf.ndim)
    at = lambda s: NamedSharding(s.mesh, PartitionSpec(*rows, *s.spec))
    if any(typed.spec):
        return jax.sharding.reshard(x, at(typed))
    if sharding is not None:
        return jax.lax.with_sharding_constraint(x, at(sharding))
    return x


def whole(x: jax.Array, like: Any) -> jax.Array:
    """An array that each device has all of, where `like` lies on a mesh.

    Of small arrays that are cut out of one: what is cut where it is split has to change
    devices, a part of what is whole has not.

    Returns:
        The array.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(like)]
    for mesh in meshes:
        if {AxisType.Auto, AxisType.Explicit} & set(mesh.axis_types):
            sharding = NamedSharding(mesh, PartitionSpec())
            if any(jax.typeof(x).sharding.spec):
                return jax.sharding.reshard(x, sharding)
            return jax.lax.with_sharding_constraint(x, sharding)
    return x


def in_unchecked_shards(*trees: Any) -> bool:
    """Whether this is inside `pmap` or `shard_map(check_vma=False)`.

    Where JAX does not track over which axes arrays vary, the derivative of a `pmean` is
    that of a device's own part. Nor can this be told from arrays none of which vary.

    Returns:
        A bool.
    """
    if not getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()):
        return False
    return not varies(*trees)


def varies(*trees: Any) -> bool:
    """Whether JAX knows of a leaf that it differs between the shards of a `shard_map`.

    Returns:
        A bool.
    """

    def of(x):
        kind = jax.typeof(x)  # whose attribute was renamed after jax 0.7
        tracked = getattr(kind, "manual_axis_type", None)
        return bool(getattr(tracked, "varying", None) or getattr(kind, "vma", None))

    return any(map(of, jax.tree.leaves(trees)))


def explicitly_split(tree: Params) -> NamedSharding | None:
    """Whole on the explicit mesh that a leaf is split over; None if none is."""
    for leaf in jax.tree.leaves(tree):
        typed = jax.typeof(leaf).sharding
        if any(typed.spec):
            return NamedSharding(typed.mesh, PartitionSpec())
    return None


def typed_like(tree: Params) -> Params:
    """The type's sharding of each leaf, of arrays one of which is split explicitly."""
    everywhere = explicitly_split(tree)

    def sharding(leaf):
        typed = jax.typeof(leaf).sharding
        return typed if any(typed.spec) else everywhere

    return jax.tree.map(sharding, tree)


def automatic(function: Callable, out: Callable, *args) -> Any:
    """`function(*args)`, split within as XLA sees fit where `args` are explicitly so.

    Args:
        function: of arrays.
        out: () -> the shardings of what it returns, for an explicit mesh.
        *args: pytrees of arrays.

    Returns:
        What the function returns.
    """
    if explicitly_split(args) is None:
        return function(*args)
    return jax.sharding.auto_axes(function, out_sharding=out())(*args)


def spread(
    function: Callable, items: Sequence, costs: Sequence[float], mesh: Mesh | None
) -> list:
    """`[function(x) for x in items]`, each on one device; what is found is on all.

    Without a mesh each device makes all of them.

    Args:
        function: of a pytree of arrays that every device holds whole, to arrays.
        items: what it is called with.
        costs: of the calls, to share them out evenly: the dearest first, each to the
            device that has the least.
        mesh: of devices.

    Returns:
        A list.
    """
    if mesh is None:
        return list(map(function, items))
    loads, owners = [0.0] * mesh.size, [0] * len(items)
    for i in sorted(range(len(items)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]

    def on_each(items):
        device = jax.lax.axis_index(mesh.axis_names)
        found = []
        for owner, x in zip(owners, items, strict=True):
            like = jax.eval_shape(function, x)
            zeros = lambda x, like=like: jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like
            )
            found.append(jax.lax.cond(device == owner, function, zeros, x))
        return jax.lax.psum(found, mesh.axis_names)

    whole = PartitionSpec()
    return jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=whole,
        out_specs=whole,
        check_vma=False,  # each device takes a branch of its own
    )(list(items))


def regrouped(x: jax.Array, num: int) -> jax.Array:
    """Rows (b num, ...) as (b, num, ...), where the rows were: `[:, i]` is x[i::num].

    Returns:
        The array; on an explicit mesh whose devices do not divide b, whole on each.
    """
    shape = (x.shape[0] // num, num, *x.shape[1:])
    if explicitly_split(x) is None:
        return jnp.reshape(x, shape)
    typed = jax.typeof(x).sharding
    rows, *rest = typed.spec
    axes = rows if isinstance(rows, tuple) else (rows,) if rows else ()
    if shape[0] % math.prod(typed.mesh.shape[axis] for axis in axes):
        rows = None
    out = NamedSharding(typed.mesh, PartitionSpec(rows, None, *rest))
    return jax.lax.reshape(x, shape, out_sharding=out)
