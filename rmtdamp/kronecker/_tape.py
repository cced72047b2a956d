"""A layer's inputs and outputs, as the model runs -> rows to make factors from.

Each call of a layer is kept as rows (N * T, groups, features), the examples outermost,
beside its outputs; an embedding's as the indices of its ones, (N * T,). A second call
of a layer is a further place of weight sharing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


class Tape:
    """Keeps the inputs of layers while a model runs, and taps their outputs.

    `linear`, `embedding` and `convolution` return the outputs, which the model must go
    on with.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import Tape
        >>> tape, inputs, kernel = Tape(), jnp.ones((8, 4)), jnp.ones((4, 3))
        >>> outputs = tape.linear("layer", inputs, inputs @ kernel)
        >>> outputs.shape, list(tape.calls)
        ((8, 3), ['layer'])
    """

    def __init__(
        self, taps: dict[str, list[jax.Array]] | None = None, *, keep: bool = True
    ):
        # Zeros to be added to the outputs, per layer and call; whether inputs are kept.
        self.taps: dict[str, list[jax.Array]] | None = taps
        self.keep: bool = keep
        self.calls: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
        # What inputs were multiplied with, where it was shown.
        self.kernels: dict[str, list[jax.Array]] = {}

    def linear(
        self,
        name: str,
        inputs: jax.Array,
        outputs: jax.Array,
        *,
        kernel: jax.Array | None = None,
    ) -> jax.Array:
        """A layer whose kernel acts on the last axis of `inputs`.

        Args:
            name: of the layer's block.
            inputs: (N, ..., features); the examples may be folded with axes that
                follow, (N * T, features).
            outputs: of the layer, before or after its bias.
            kernel: that the inputs were multiplied with, to be held against the
                layer's parameter: a kernel that is computed from it, as weight
                normalisation does, has other factors.

        Returns:
            `outputs`, tapped.
        """
        if not self.keep:
            return outputs
        rows = jnp.reshape(inputs, (-1, 1, inputs.shape[-1]))
        return self._add(name, rows, outputs, kernel)

    def embedding(self, name: str, indices: jax.Array, outputs: jax.Array) -> jax.Array:
        """A table of embeddings, whose rows are looked up.

        Args:
            name: of the layer's block.
            indices: (N, ...), integers.
            outputs: (*indices.shape, features).

        Returns:
            `outputs`, tapped.
        """
        if not self.keep:
            return outputs
        return self._add(name, jnp.ravel(indices), outputs)

    def convolution(
        self,
        name: str,
        inputs: jax.Array,
        outputs: jax.Array,
        window: tuple[int, ...],
        strides: tuple[int, ...],
        padding: Any,
        *,
        input_dilation: tuple[int, ...] | None = None,
        kernel_dilation: tuple[int, ...] | None = None,
        groups: int = 1,
        kernel: jax.Array | None = None,
    ) -> jax.Array:
        """A convolution, channels last; arguments as `jax.lax.conv_general_dilated`.

        `kernel` is as for `linear`.

        Returns:
            `outputs`, tapped.
        """
        if not self.keep:
            return outputs
        patches = convolution_patches(
            inputs,
            window,
            strides,
            padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            groups=groups,
        )
        rows = jnp.reshape(patches, (-1, *patches.shape[2:]))
        return self._add(name, rows, outputs, kernel)

    def _add(self, name, rows, outputs, kernel=None):
        calls = self.calls.setdefault(name, [])
        calls.append((rows, outputs))
        if kernel is not None:
            self.kernels.setdefault(name, []).append(kernel)
        if len(calls) > 1 and outputs.shape != calls[0][1].shape:
            raise ValueError(
                f"layer {name!r} is called twice with different shapes, its outputs "
                f"are {calls[0][1].shape} and {outputs.shape}: the places where "
                "weights are shared must be alike; leave the layer to a diagonal block "
                "(layers=)"
            )
        if self.taps is None:
            # An operation, by which what the model goes on with is told from what it
            # showed.
            return jax.lax.optimization_barrier(outputs)
        return outputs + self.taps[name][len(calls) - 1]


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
