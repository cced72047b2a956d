"""The networks of all benchmarks in Flax nnx: images (n, h, w, c) -> logits, float32.

Parameters at width 1: `logistic` 7,850 and `mlp` 269,322 on MNIST, `vgg16` 15,291,300
and `vgg16-bn` 15,299,748 on CIFAR-100 (the usual VGG for CIFAR without its dropout),
`lenet` 107,786 on MNIST (LeCun's with ReLU, maximum pooling and padding throughout).
Kernels before a ReLU are drawn by He's rule with fan-in in `mlp` and VGG, so that 16
layers train without BatchNorm.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

VGG16_STAGES = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
SMALLEST = 3  # pixels a side from which on XLA's own convolution is as fast
he_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
lecun_normal = nnx.initializers.lecun_normal()


def conv_general_dilated(x, kernel, strides, padding, **options):
    """`jax.lax.conv_general_dilated`; on a few pixels, the same as one matrix product.

    XLA:CPU's own takes 20 to 60 times its FLOPs' share on 2 x 2 pixels. The product is
    taken for 3 x 3 kernels of stride 1 and "SAME" padding, channels last.
    """
    h, w = x.shape[1:3]
    plain = kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1)
    if max(h, w) >= SMALLEST or not plain or padding != "SAME":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    patches, flat = jnp.concatenate(taps, -1), kernel.reshape(-1, kernel.shape[-1])
    over = (((3,), (0,)), ((), ()))
    return jax.lax.dot_general(patches, flat, over, precision=options.get("precision"))


def max_pool(x: jax.Array) -> jax.Array:
    """Largest of 2 x 2 pixels, if there are; eight times as fast as nnx's on a CPU."""
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
    """Thirteen 3 x 3 convolutions in five stages with max pooling after each."""

    def __init__(self, num_classes, image_shape, width, norm, *, rngs: nnx.Rngs):
        h, w, channels = image_shape
        options = {"kernel_init": he_normal, "rngs": rngs}
        options["conv_general_dilated"] = conv_general_dilated
        stages, norms = [], []
        for stage in VGG16_STAGES:
            sizes = [channels, *(max(1, round(c * width)) for c in stage)]
            channels = sizes[-1]
            convs = [nnx.Conv(*p, (3, 3), **options) for p in itertools.pairwise(sizes)]
            stages.append(nnx.List(convs))
            if norm:  # PyTorch's momentum 0.1, which weights the new value
                layers = (nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in sizes[1:])
                norms.append(nnx.List(layers))
            if min(h, w) >= 2:
                h, w = h // 2, w // 2
        self.stages, self.norms = nnx.List(stages), nnx.List(norms)
        hidden = max(1, round(512 * width))
        self.head = Dense((h * w * channels, hidden, hidden, num_classes), rngs=rngs)

    def __call__(self, x):
        for i, convs in enumerate(self.stages):
            for j, conv in enumerate(convs):
                x = conv(x)
                x = nnx.relu(self.norms[i][j](x) if self.norms else x)
            x = max_pool(x)
        return self.head(x)


class ConvNet(nnx.Module):
    """Three 3 x 3 convolutions of 32 channels, then the mean over places."""

    def __init__(self, num_classes, channels, *, rngs: nnx.Rngs):
        sizes = itertools.pairwise((channels, 32, 32, 32))
        self.hidden = nnx.List(nnx.Conv(*pair, (3, 3), rngs=rngs) for pair in sizes)
        self.out = nnx.Linear(32, num_classes, rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.out(x.mean((1, 2)))


class LeNet(nnx.Module):
    """Two 5 x 5 convolutions with max pooling after each, then three linear layers."""

    def __init__(self, num_classes, image_shape, *, rngs: nnx.Rngs):
        h, w, channels = image_shape
        sizes = itertools.pairwise((channels, 6, 16))
        options = {"kernel_init": he_normal, "rngs": rngs}
        self.hidden = nnx.List(nnx.Conv(*pair, (5, 5), **options) for pair in sizes)
        self.head = Dense((h // 4 * (w // 4) * 16, 120, 84, num_classes), rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden:
            x = max_pool(nnx.relu(layer(x)))
        return self.head(x)


class Transformer(nnx.Module):
    """Pre-norm blocks, causal: tokens (n, length) -> logits (n, length, tokens)."""

    def __init__(self, tokens, length, width, blocks=2, heads=4, *, rngs: nnx.Rngs):
        each = lambda make, n=blocks: nnx.List(make() for _ in range(n))
        linear = lambda m, n: nnx.Linear(m, n, rngs=rngs)
        self.embed = nnx.Embed(tokens, width, rngs=rngs)
        self.position = nnx.Embed(length, width, rngs=rngs)
        self.attend = each(
            lambda: nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        )
        self.rise = each(lambda: linear(width, 4 * width))
        self.fall = each(lambda: linear(4 * width, width))
        self.norms = each(lambda: nnx.LayerNorm(width, rngs=rngs), 2 * blocks + 1)
        self.out = linear(width, tokens)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[-1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for i, attend in enumerate(self.attend):
            x = x + attend(self.norms[2 * i](x), mask=mask)
            y = nnx.gelu(self.rise[i](self.norms[2 * i + 1](x)))
            x = x + self.fall[i](y)
        return self.out(self.norms[-1](x))


def build(name, num_classes, shape, width=1.0, seed=0) -> nnx.Module:
    """A network by its name, in training mode.

    `shape` is an input's; `width` a factor on the hidden sizes, where these vary.
    """
    rngs = nnx.Rngs(seed)
    zeros, inputs = nnx.initializers.zeros, math.prod(shape)
    hidden = (max(1, round(256 * width)),) * 2
    make = {
        "logistic": lambda: Dense((inputs, num_classes), zeros, rngs=rngs),
        "mlp": lambda: Dense((inputs, *hidden, num_classes), rngs=rngs),
        "vgg16": lambda: VGG16(num_classes, shape, width, False, rngs=rngs),
        "vgg16-bn": lambda: VGG16(num_classes, shape, width, True, rngs=rngs),
        "lenet": lambda: LeNet(num_classes, shape, rngs=rngs),
        "cnn": lambda: ConvNet(num_classes, shape[-1], rngs=rngs),
        "transformer": lambda: Transformer(
            num_classes, inputs, round(64 * width), rngs=rngs
        ),
        "transformer-1m": lambda: Transformer(num_classes, inputs, 144, 4, rngs=rngs),
    }
    return make[name]()
