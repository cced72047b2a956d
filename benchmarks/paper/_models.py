"""The paper's networks in Flax nnx: images (n, h, w, c) -> logits, float32.

| name | | parameters at width 1 |
|---|---|---|
| `logistic` | one linear layer from 0: convex | 7,850 on MNIST |
| `mlp` | two hidden layers of 256 | 269,322 on MNIST |
| `vgg16` | 13 convolutions, 3 linear layers | 15,291,300 on CIFAR-100 |
| `vgg16-bn` | with BatchNorm before each ReLU | 15,299,748 on CIFAR-100 |
| `resnet50` | 16 bottleneck blocks, CIFAR's stem | 23,705,252 on CIFAR-100 |
| `resnet50-imagenet` | the stem for 224 x 224 pixels | 25,557,032 on ImageNet |

VGG-16's head is 512-512-classes, that of the usual VGG for CIFAR without its dropout:
16 layers with weights. (The paper says "over 16 million" parameters and not which.)

Kernels before a ReLU are drawn by He's rule with fan-in, which keeps the size of the
activations: 16 layers train without BatchNorm. Biases begin at 0.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models import Transformer

from ._convolution import conv_general_dilated

NAMES = ("logistic", "mlp", "vgg16", "vgg16-bn", "resnet50", "resnet50-imagenet")
VGG16_STAGES = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4  # of a bottleneck block's channels
he_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
lecun_normal = nnx.initializers.lecun_normal()


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # PyTorch's momentum 0.1, which weights the new value.
    return nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)


def _conv(channels, out_channels, size, strides=1, *, rngs: nnx.Rngs) -> nnx.Conv:
    """A square convolution that BatchNorm follows: without bias.

    Returns:
        The layer.
    """
    return nnx.Conv(
        channels,
        out_channels,
        (size, size),
        strides,
        use_bias=False,
        kernel_init=he_normal,
        rngs=rngs,
    )


def _max_pool(x: jax.Array) -> jax.Array:
    """Largest of 2 x 2 pixels; unchanged if there is only one row or column.

    On a CPU the gradient is about eight times as fast as that of `nnx.max_pool`.

    Returns:
        Half the rows and columns.
    """
    n, h, w, c = x.shape
    if min(h, w) < 2:
        return x
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


class Dense(nnx.Module):
    """Linear layers with ReLU between, on flattened inputs."""

    def __init__(self, sizes: Sequence[int], out_init=lecun_normal, *, rngs: nnx.Rngs):
        *hidden, last = itertools.pairwise(sizes)
        self.hidden = nnx.List(
            nnx.Linear(*pair, kernel_init=he_normal, rngs=rngs) for pair in hidden
        )
        self.out = nnx.Linear(*last, kernel_init=out_init, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.out(x)


class VGG16(nnx.Module):
    """Thirteen 3 x 3 convolutions in five stages with max pooling after each.

    On 16 x 16 pixels the last stage sees 1 x 1: of its kernels only the centres get a
    gradient. It trains there too.
    """

    def __init__(self, num_classes, image_shape, width, norm, *, rngs: nnx.Rngs):
        h, w, channels = image_shape
        stages, norms = [], []
        for stage in VGG16_STAGES:
            convs = []
            for out in (_scaled(c, width) for c in stage):
                convs.append(
                    nnx.Conv(
                        channels,
                        out,
                        (3, 3),
                        kernel_init=he_normal,
                        conv_general_dilated=conv_general_dilated,
                        rngs=rngs,
                    )
                )
                channels = out
            stages.append(nnx.List(convs))
            if norm:
                norms.append(nnx.List(_norm(c.out_features, rngs) for c in convs))
            if min(h, w) >= 2:
                h, w = h // 2, w // 2
        self.stages, self.norms = nnx.List(stages), nnx.List(norms)
        hidden = _scaled(512, width)
        sizes = h * w * channels, hidden, hidden, num_classes
        self.head = Dense(sizes, rngs=rngs)

    def __call__(self, x):
        for i, convs in enumerate(self.stages):
            for j, conv in enumerate(convs):
                x = conv(x)
                x = nnx.relu(self.norms[i][j](x) if self.norms else x)
            x = _max_pool(x)
        return self.head(x)


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 (which has the stride) and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, channels, hidden, strides, *, rngs: nnx.Rngs):
        out = EXPANSION * hidden
        self.convs = nnx.List(
            [
                _conv(channels, hidden, 1, rngs=rngs),
                _conv(hidden, hidden, 3, strides, rngs=rngs),
                _conv(hidden, out, 1, rngs=rngs),
            ]
        )
        self.norms = nnx.List(_norm(conv.out_features, rngs) for conv in self.convs)
        self.project = strides != 1 or channels != out
        if self.project:
            self.shortcut = _conv(channels, out, 1, strides, rngs=rngs)
            self.shortcut_norm = _norm(out, rngs)

    def __call__(self, x):
        y = nnx.relu(self.norms[0](self.convs[0](x)))
        y = nnx.relu(self.norms[1](self.convs[1](y)))
        y = self.norms[2](self.convs[2](y))
        if self.project:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + y)


class ResNet50(nnx.Module):
    """A stem and sixteen bottleneck blocks in four stages, then the mean over places.

    The stem for ImageNet is 7 x 7 with stride 2 and 3 x 3 max pooling with stride 2,
    that for CIFAR 3 x 3 with stride 1.
    """

    def __init__(self, num_classes, channels, width, imagenet, *, rngs: nnx.Rngs):
        self.imagenet = imagenet
        first = _scaled(64, width)
        size, strides = (7, 2) if imagenet else (3, 1)
        self.stem = _conv(channels, first, size, strides, rngs=rngs)
        self.stem_norm = _norm(first, rngs)
        channels, blocks = first, []
        for stage, (hidden, num_blocks) in enumerate(RESNET50_STAGES):
            hidden = _scaled(hidden, width)
            for i in range(num_blocks):
                strides = 2 if stage > 0 and i == 0 else 1
                blocks.append(Bottleneck(channels, hidden, strides, rngs=rngs))
                channels = EXPANSION * hidden
        self.blocks = nnx.List(blocks)
        self.out = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        if self.imagenet:
            x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((1, 2)))


def build(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: float = 1.0,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A network by its name in `NAMES`; see the module's table.

    Args:
        name: which network.
        num_classes: number of logits.
        image_shape: height, width and channels.
        width: factor on all hidden channels; "logistic" has none.
        rngs: for the initial kernels.

    Returns:
        The module, in training mode: BatchNorm takes the batch's statistics.

    Raises:
        ValueError: an unknown name, or a size that is not positive.
    """
    if name not in NAMES:
        raise ValueError(f"no model is called {name!r}: {', '.join(NAMES)}")
    if width <= 0:
        raise ValueError(f"width is {width}, expected a positive factor")
    if num_classes < 1 or len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"num_classes is {num_classes} and image_shape {image_shape}, expected "
            "positive numbers, three for the shape: height, width, channels"
        )
    inputs = math.prod(image_shape)
    if name == "logistic":
        return Dense((inputs, num_classes), nnx.initializers.zeros, rngs=rngs)
    if name == "mlp":
        hidden = _scaled(256, width)
        return Dense((inputs, hidden, hidden, num_classes), rngs=rngs)
    if name.startswith("vgg16"):
        return VGG16(num_classes, image_shape, width, name == "vgg16-bn", rngs=rngs)
    imagenet = name == "resnet50-imagenet"
    return ResNet50(num_classes, image_shape[2], width, imagenet, rngs=rngs)


def build_transformer(
    vocabulary_size: int,
    length: int,
    width: int = 64,
    blocks: int = 2,
    heads: int = 4,
    *,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A causal transformer on tokens: (n, length) -> (n, length, vocabulary_size).

    Args:
        vocabulary_size: number of different tokens.
        length: the longest input.
        width: of the residual stream.
        blocks: number of blocks.
        heads: number of attention heads.
        rngs: for the initial kernels.

    Returns:
        The module.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if width % heads:
        raise ValueError(f"width is {width}, expected a multiple of {heads} heads")
    return Transformer(rngs, vocabulary_size, length, width, blocks, heads)
