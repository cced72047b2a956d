"""kind, batch size, dtype -> (loss_fn, params, batch) for the Hessian benchmark.

The data are random: costs do not depend on them. Params and compute are in one dtype;
logits are widened to float32 before the cross-entropy, as training code does.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .overhead import Network

WIDTH, LENGTH, TOKENS, BLOCKS = 128, 64, 256, 2


class ResNet(nnx.Module):
    """A strided stem and three residual blocks of 32 channels, BatchNorm in each."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 32, (3, 3), strides=2, rngs=rngs)
        self.convs = nnx.List(nnx.Conv(32, 32, (3, 3), rngs=rngs) for _ in range(6))
        self.norms = nnx.List(nnx.BatchNorm(32, rngs=rngs) for _ in range(6))
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for i in range(0, 6, 2):
            y = nnx.relu(self.norms[i](self.convs[i](x)))
            x = nnx.relu(x + self.norms[i + 1](self.convs[i + 1](y)))
        return self.out(x.mean((1, 2)))


class Transformer(nnx.Module):
    """Pre-norm blocks, causal; by default two of width 128 with four heads."""

    def __init__(
        self, rngs, tokens=TOKENS, length=LENGTH, width=WIDTH, blocks=BLOCKS, heads=4
    ):
        norm = lambda: nnx.LayerNorm(width, rngs=rngs)
        self.embed = nnx.Embed(tokens, width, rngs=rngs)
        self.position = nnx.Embed(length, width, rngs=rngs)
        self.attend = nnx.List(
            nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
            for _ in range(blocks)
        )
        self.rise = nnx.List(
            nnx.Linear(width, 4 * width, rngs=rngs) for _ in range(blocks)
        )
        self.fall = nnx.List(
            nnx.Linear(4 * width, width, rngs=rngs) for _ in range(blocks)
        )
        self.norms = nnx.List(norm() for _ in range(2 * blocks + 1))
        self.out = nnx.Linear(width, tokens, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[-1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for i, attend in enumerate(self.attend):
            x = x + attend(self.norms[2 * i](x), mask=mask)
            y = nnx.gelu(self.rise[i](self.norms[2 * i + 1](x)))
            x = x + self.fall[i](y)
        return self.out(self.norms[-1](x))


IMAGE, CLASSES = (32, 32, 3), 10
MODELS = {
    "mlp": (functools.partial(Network, "mlp"), (784,)),
    "cnn": (functools.partial(Network, "cnn"), IMAGE),
    "resnet": (ResNet, IMAGE),
    "transformer": (Transformer, None),
}


@functools.cache
def problem(kind, batch_size, dtype="float32"):
    """(loss_fn, params, batch); the batch is (inputs, labels)."""
    make, shape = MODELS[kind]
    # BatchNorm uses the batch's statistics: its running ones are updated in a copy.
    graphdef, params, rest = nnx.split(make(rngs=nnx.Rngs(0)), nnx.Param, ...)
    key, other = jax.random.split(jax.random.key(0))
    if shape is None:
        inputs = jax.random.randint(key, (batch_size, LENGTH), 0, TOKENS)
        labels = jnp.roll(inputs, -1, axis=1)
    else:
        inputs = jax.random.normal(key, (batch_size, *shape), dtype)
        labels = jax.random.randint(other, (batch_size,), 0, CLASSES)

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params, rest, copy=True)(batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch[1]
        )
        return losses.mean()

    params = jax.tree.map(lambda x: x.astype(dtype), nnx.as_pure(params))
    return loss_fn, params, (inputs, labels)


def normal_like(params, seed=1):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [
        jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, draws)
