"""Questions to JAX, and one setting: tracing, convolutions, precision of products."""

import contextlib

import jax
import jax.core

from ._types import Batch, LossFn, Params


def is_traced(*trees) -> bool:
    """Whether any leaf is being traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


def has_convolution(loss_fn: LossFn, params: Params, batch: Batch, loss_args) -> bool:
    """Whether the loss contains a convolution, read off its printed jaxpr."""
    jaxpr = jax.make_jaxpr(loss_fn)(params, batch, *loss_args)
    return "conv_general_dilated" in str(jaxpr)


def matmul_precision(precision: str | None):
    """A context that sets the precision of matrix products; None leaves it alone."""
    if precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)
