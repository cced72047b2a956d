"""A layer's inputs and outputs, as the model runs -> rows to make factors from.

Each call of a layer is kept as rows (N * T, groups, features), the examples outermost,
beside its outputs. A second call of a layer is a further place of weight sharing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ._kronecker import convolution_patches


class Tape:
    """Keeps the inputs of layers while a model runs, and taps their outputs.

    `linear` and `convolution` return the outputs, which the model must go on with.
    """

    def __init__(
        self, taps: dict[str, list[jax.Array]] | None = None, *, keep: bool = True
    ):
        # Zeros to be added to the outputs, per layer and call; whether inputs are kept.
        self.taps, self.keep = taps, keep
        self.calls: dict[str, list[tuple[jax.Array, jax.Array]]] = {}

    def linear(self, name: str, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
        """A layer whose kernel acts on the last axis of `inputs`.

        Args:
            name: of the layer's block.
            inputs: (N, ..., features); the examples may be folded with axes that
                follow, (N * T, features).
            outputs: of the layer, before or after its bias.

        Returns:
            `outputs`, tapped.
        """
        if not self.keep:
            return outputs
        rows = jnp.reshape(inputs, (-1, 1, inputs.shape[-1]))
        return self._add(name, rows, outputs)

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
    ) -> jax.Array:
        """A convolution, channels last; arguments as `jax.lax.conv_general_dilated`.

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
        return self._add(name, rows, outputs)

    def _add(self, name, rows, outputs):
        calls = self.calls.setdefault(name, [])
        calls.append((rows, outputs))
        if len(calls) > 1 and outputs.shape != calls[0][1].shape:
            raise ValueError(
                f"layer {name!r} is called twice with different shapes, its outputs "
                f"are {calls[0][1].shape} and {outputs.shape}: the places where "
                "weights are shared must be alike; leave the layer to a diagonal block "
                "(layers=)"
            )
        if self.taps is None:
            return outputs
        return outputs + self.taps[name][len(calls) - 1]
