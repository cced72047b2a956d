"""Small problems with known answers, shared by the tests."""

import contextlib
import functools
import logging

import jax
import jax.numpy as jnp


def quadratic_loss(params, batch):
    """Mean over examples of x^T A_i x / 2: the Hessian is the mean of the A_i."""
    x = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return 0.5 * jnp.mean(jnp.einsum("p,npq,q->n", x, batch, x))


def symmetric(key, count, size, mean=0.0, dtype=jnp.float64):
    """`count` independent symmetric Gaussian matrices around mean * I."""
    draws = jax.random.normal(key, (count, size, size), dtype)
    return (draws + jnp.swapaxes(draws, 1, 2)) / 2 + mean * jnp.eye(size, dtype=dtype)[
        None
    ]


def mlp(key, sizes=(4, 8, 6), dtype=jnp.float64):
    """Weights and biases of a small network; P = 94 at the default sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(k, (m, n), dtype) / m**0.5,
            "bias": jnp.zeros(n, dtype),
        }
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp_loss(params, batch):
    """Mean softmax cross-entropy of a tanh network on (inputs, integer labels)."""
    x, labels = batch
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"][None]
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def mlp_batch(key, count=32, sizes=(4, 8, 6), dtype=jnp.float64):
    """Gaussian inputs with random labels."""
    first, second = jax.random.split(key)
    inputs = jax.random.normal(first, (count, sizes[0]), dtype)
    return inputs, jax.random.randint(second, (count,), 0, sizes[-1])


@functools.partial(jax.jit, static_argnames="loss_fn")
def dense_hessian(loss_fn, params, batch):
    """The Hessian as a (P, P) matrix, by JAX's own jax.hessian."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda x: loss_fn(unravel(x), batch))(flat)


@contextlib.contextmanager
def log_compilations():
    """What JAX says of each program that it compiles meanwhile."""
    found, handler, logger = [], logging.Handler(), logging.getLogger("jax")
    finished = lambda log: "Finished XLA compilation" in log.getMessage()
    handler.emit = lambda record: found.append(record) if finished(record) else None
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)
