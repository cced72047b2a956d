"""A model to try the spectrum command on, and a pattern for one of your own.

    python -m rmtdamp spectrum rmtdamp.demo.spectrum_example:digits

The command wants a function without arguments that returns `(loss_fn, params,
batches)`: the mean loss over a batch, the trained parameters, and batches that can be
read again and again. A fourth item, if there is one, measures Kronecker factors: with
`--layers` it tells which share of a layer's sharp directions KFAC sees. Needs the extra
`rmtdamp[demo]`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmtdamp._types import Batch, Params
from rmtdamp.kronecker import ModelFactors, Tape, make_blocks

from ._data import load_digits

SIZES = (64, 64, 10)
BATCH_SIZE = 256
NUM_STEPS = 150


def model_fn(params: Params, x: jax.Array, tape: Tape) -> jax.Array:
    """Logits of a tanh network on flat images; shows its layers to the tape."""
    for i, (name, layer) in enumerate(params.items()):
        x = jnp.tanh(x) if i else x
        x = tape.linear(name, x, x @ layer["kernel"] + layer["bias"])
    return x


def criterion(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    """Mean cross-entropy of the network on a batch of images and labels."""
    return criterion(model_fn(params, batch[0], Tape(keep=False)), batch[1])


def _initial(rng):
    kernel = lambda m, n: rng.normal(scale=m**-0.5, size=(m, n))
    params = {
        f"layer{i}": {"kernel": kernel(m, n), "bias": np.zeros(n)}
        for i, (m, n) in enumerate(itertools.pairwise(SIZES))
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


@jax.jit
def _train(params, data, order):
    optimiser = optax.adam(1e-3)

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[rows], data))
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), order)[0][0]


def digits() -> tuple[Any, ...]:
    """A small network after 150 steps of Adam on digits, with its data in five batches.

    Returns:
        `(loss_fn, params, batches, factors_fn)`.
    """
    images, labels = data = load_digits().train
    rng = np.random.default_rng(0)  # draws without a compiler
    order = rng.integers(len(labels), size=(NUM_STEPS, BATCH_SIZE), dtype=np.int32)
    params = _train(_initial(rng), data, order)
    starts = range(0, len(labels), BATCH_SIZE)
    batches = [(images[i : i + BATCH_SIZE], labels[i : i + BATCH_SIZE]) for i in starts]
    batches = jax.device_put(batches)
    layers = {n: {"kernel": f"{n}/kernel", "bias": f"{n}/bias"} for n in params}
    factors_fn = ModelFactors(
        model_fn=model_fn,
        criterion=criterion,
        blocks=make_blocks(params, layers),
        fisher="ggn",
    )
    return loss_fn, params, batches, factors_fn
