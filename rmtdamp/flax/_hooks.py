"""A Flax layer's own product -> the same, shown to the tape.

Both Flax APIs let the function that multiplies be exchanged, by a public attribute of
the layer. It sees inputs and kernel as they are multiplied: promoted, padded (circular
and causal padding are done before), batch axes folded.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp

from rmtdamp._types import Params
from rmtdamp.kronecker import Tape, leaf_names

Layers = Sequence[str] | Callable[[str], bool] | None


def taped_dot_general(tape: Tape, name: str, dot_general: Callable | None) -> Callable:
    """`dot_general` over the trailing axes of its inputs, shown to the tape."""
    dot_general = dot_general or jax.lax.dot_general

    def taped(lhs, rhs, dimension_numbers, *args, **kwargs):
        outputs = dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        contracted = len(dimension_numbers[0][0])
        features = math.prod(lhs.shape[lhs.ndim - contracted :])
        rows = jnp.reshape(lhs, (-1, features))
        return tape.linear(name, rows, outputs, kernel=rhs)

    return taped


def taped_convolution(tape: Tape, name: str, convolution: Callable | None) -> Callable:
    """`conv_general_dilated` with channels last, shown to the tape."""
    convolution = convolution or jax.lax.conv_general_dilated

    def taped(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=None,
        rhs_dilation=None,
        dimension_numbers=None,
        feature_group_count=1,
        **kwargs,
    ):
        outputs = convolution(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            **kwargs,
        )
        return tape.convolution(
            name,
            lhs,
            outputs,
            rhs.shape[:-2],
            window_strides,
            padding,
            input_dilation=lhs_dilation,
            kernel_dilation=rhs_dilation,
            groups=feature_group_count,
            kernel=rhs,
        )

    return taped


def refuse_attend(name: str) -> NoReturn:
    """An embedding's block sees what is looked up, and not its use as a kernel."""
    raise ValueError(
        f"embedding {name!r} is also the model's output layer (attend), which its "
        "Kronecker block does not see: leave it to a diagonal block (embeddings=)"
    )


def choose_layers(
    params: Params,
    found: dict[str, dict],
    layers: Layers,
    embeddings: Layers,
    full: Layers,
) -> tuple[dict[str, dict], set[str]]:
    """What `make_blocks` is to be told of, out of what the model has.

    Args:
        params: of the model.
        found: name -> entry of each linear layer, convolution and embedding.
        layers: which of the first two get a Kronecker block, None for all.
        embeddings: which of the third.
        full: of which modules the leaves that remain get a full block.

    Returns:
        Name -> entry of the chosen, sorted; and the names of those that show their
        inputs to the tape.
    """
    embedded = {name for name, entry in found.items() if "embedding" in entry}
    linear = [name for name in found if name not in embedded]
    taped = _chosen("layers", linear, layers)
    taped |= _chosen("embeddings", sorted(embedded), embeddings)
    entries = {name: found[name] for name in taped}
    taken = {leaf for entry in entries.values() for leaf in entry.values()}
    rest: dict[str, dict] = {}
    for leaf in leaf_names(params):
        if leaf not in taken:
            module = leaf.rpartition("/")[0] or "model"
            rest.setdefault(module, {"full": []})["full"].append(leaf)
    entries |= {name: rest[name] for name in _chosen("full", rest, full)}
    return dict(sorted(entries.items())), taped


_KINDS = {
    "layers": "linear layers and convolutions",
    "embeddings": "embeddings",
    "full": "modules with parameters of their own outside layers",
}


def _chosen(argument: str, found: Iterable[str], wanted: Layers) -> set[str]:
    """The names that a request matches: all, by pattern, or by a function.

    Returns:
        The names.

    Raises:
        ValueError: a name or pattern, or the function, matches none.
    """
    found = list(found)
    among = f"none of the model's {_KINDS[argument]}: {', '.join(found) or 'none'}"
    if wanted is None:
        return set(found)
    if callable(wanted):
        chosen = set(filter(wanted, found))
        if not chosen:
            raise ValueError(f"{argument} matches {among}")
        return chosen
    chosen = set()
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        matches = fnmatch.filter(found, pattern)
        if not matches:
            raise ValueError(f"{argument} names {pattern!r}, which matches {among}")
        chosen.update(matches)
    return chosen
