"""A Flax layer's own product -> the same, shown to the tape.

Both Flax APIs let the function that multiplies be exchanged, by a public attribute of
the layer. It sees inputs and kernel as they are multiplied: promoted, padded (circular
and causal padding are done before), batch axes folded.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from rmtdamp.kronecker import Tape

Layers = Sequence[str] | Callable[[str], bool] | None


def taped_dot_general(tape: Tape, name: str, dot_general: Callable | None) -> Callable:
    """`dot_general` over the trailing axes of its inputs, shown to the tape."""
    dot_general = dot_general or jax.lax.dot_general

    def taped(lhs, rhs, dimension_numbers, *args, **kwargs):
        outputs = dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        contracted = len(dimension_numbers[0][0])
        features = math.prod(lhs.shape[lhs.ndim - contracted :])
        return tape.linear(name, jnp.reshape(lhs, (-1, features)), outputs)

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
        )

    return taped


def choose(found: Iterable[str], layers: Layers) -> set[str]:
    """The layers that a request matches: all, by name or pattern, or by a function.

    Returns:
        Their names.

    Raises:
        ValueError: a name or pattern, or the function, matches none.
    """
    found = list(found)
    listing = ", ".join(found) or "none"
    if layers is None:
        return set(found)
    if callable(layers):
        chosen = set(filter(layers, found))
        if not chosen:
            raise ValueError(
                f"layers matches none of the model's linear layers and convolutions: "
                f"{listing}"
            )
        return chosen
    chosen = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        matches = fnmatch.filter(found, pattern)
        if not matches:
            raise ValueError(
                f"layers names {pattern!r}, which matches none of the model's linear "
                f"layers and convolutions: {listing}"
            )
        chosen.update(matches)
    return chosen
