"""Params in parts: a label for each leaf, and a number for each label.

    tree  --split-->  {label: leaves}  --a number each-->  (labels,)  --spread-->  tree

Without labels params are one part and its numbers are scalars, so that what is written
for parts is written for the whole.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._basis import normalised
from ._tree import leaf_names, size, vdot
from ._types import Params

Labels = Any  # a pytree of names like params or a prefix, or a function to one


class _Given(NamedTuple):
    """A tree of labels as a function, which can be compared and hashed."""

    leaves: tuple[Hashable, ...]
    treedef: Any

    def __call__(self, params: Params) -> Any:
        del params
        return jax.tree.unflatten(self.treedef, self.leaves)


def as_function(labels: Labels | None) -> Callable[[Params], Any] | None:
    """Labels as a function of params, fit to be static under `jax.jit`."""
    if labels is None or callable(labels):
        return labels
    leaves, treedef = jax.tree.flatten(labels)
    return _Given(tuple(leaves), treedef)


class Parts(NamedTuple):
    """Which leaves belong to which label; static."""

    names: tuple[str, ...] | None = None  # sorted; None for the whole in one part
    place: tuple[int, ...] = ()  # of each leaf: where its label stands among the names

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a number for each label."""
        return () if self.names is None else (len(self.names),)

    def split(self, tree: Params) -> list[list[jax.Array]]:
        """The leaves of each label."""
        leaves = jax.tree.leaves(tree)
        pairs = list(zip(self.place, leaves, strict=True))
        return [[x for i, x in pairs if i == k] for k in range(len(self.names or ()))]

    def sizes(self, params: Params) -> int | tuple[int, ...]:
        """The number of elements of each label."""
        return (
            size(params) if self.names is None else tuple(map(size, self.split(params)))
        )

    def vdot(self, x: Params, y: Params) -> jax.Array:
        """sum_j x_j y_j over the leaves of each label."""
        if self.names is None:
            return vdot(x, y)
        pairs = zip(self.split(x), self.split(y), strict=True)
        return jnp.stack([vdot(a, b) for a, b in pairs])

    def spread(self, values: jax.Array, like: Params) -> Params:
        """The number of its label for each leaf: the same array at all its leaves."""
        leaves, treedef = jax.tree.flatten(like)
        if self.names is None:
            return jax.tree.unflatten(treedef, [values] * len(leaves))
        each = [values[k] for k in range(len(self.names))]
        return jax.tree.unflatten(treedef, [each[i] for i in self.place])

    def normalised(self, vector: Params) -> tuple[Params, jax.Array]:
        """The vector, each part of it at unit norm, and the norms."""
        if self.names is None:
            return normalised(vector)
        found = [normalised(part) for part in self.split(vector)]
        rest = [iter(leaves) for leaves, _ in found]
        leaves = [next(rest[i]) for i in self.place]
        joined = jax.tree.unflatten(jax.tree.structure(vector), leaves)
        return joined, jnp.stack([length for _, length in found])


WHOLE = Parts()


def spread_prefix(name: str, prefix: Any, tree: Params) -> Params:
    """A tree like `tree` with what `prefix` has for each leaf, or its subtree.

    Args:
        name: of the argument, for the message.
        prefix: pytree whose leaves stand for subtrees of `tree`.
        tree: pytree.

    Returns:
        The tree.

    Raises:
        ValueError: it is no prefix.
    """
    spread = lambda value, part: jax.tree.map(lambda _: value, part)
    try:
        return jax.tree.map(spread, prefix, tree)
    except ValueError as error:
        raise ValueError(
            f"{name} is a tree {jax.tree.structure(prefix)} and params one "
            f"{jax.tree.structure(tree)}: give each leaf of params, or each subtree, "
            "one of its own"
        ) from error


def parts_of(labels: Callable[[Params], Any] | None, params: Params) -> Parts:
    """The parts of params.

    Args:
        labels: function from params to a pytree of names like params, or to a prefix of
            one; None for the whole in one part.
        params: pytree.

    Returns:
        The parts.

    Raises:
        ValueError: the labels are no prefix of params.
        TypeError: a label is no string.
    """
    if labels is None:
        return WHOLE
    found = jax.tree.leaves(spread_prefix("labels", labels(params), params))
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"a label is {name!r}: take strings, which can be sorted")
    names = tuple(sorted(set(found)))
    return Parts(names, tuple(map(names.index, found)))


def by_layer(params: Params) -> Params:
    """A label for each layer: the path of a leaf, without its last key.

    For `labels`: what lies side by side in `params`, a layer's kernel and its bias, has
    one label. A leaf at the top has the empty path.

    Args:
        params: pytree.

    Returns:
        A pytree of strings like params.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.damping import by_layer
        >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        >>> by_layer(params)
        {'dense': {'bias': 'dense', 'kernel': 'dense'}}
    """
    layers = [name.rpartition("/")[0] for name in leaf_names(params)]
    return jax.tree.unflatten(jax.tree.structure(params), layers)
