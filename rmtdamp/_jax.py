"""Questions to JAX, and one setting: tracing, convolutions, dtypes, precision."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from ._types import Batch, LossFn, Params

_HALVES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)


def is_traced(*trees) -> bool:
    """Whether any leaf is being traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


def has_convolution(loss_fn: LossFn, params: Params, batch: Batch, loss_args) -> bool:
    """Whether the loss contains a convolution, read off its printed jaxpr."""
    jaxpr = jax.make_jaxpr(loss_fn)(params, batch, *loss_args)
    return "conv_general_dilated" in str(jaxpr)


def coarsest_epsilon(function: Callable, params: Params) -> float:
    """The largest epsilon of the dtypes of params and of those they are narrowed to.

    A model of float32 params may compute in bfloat16, which its printed jaxpr shows.

    Returns:
        A number.
    """
    text = str(jax.make_jaxpr(function)(params))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    dtypes |= {x for x in _HALVES if f"new_dtype={x.name}" in text}
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def depends(jaxpr: Any, given: Iterable[Any]) -> Iterator[bool]:
    """For each output of a jaxpr, whether it depends on one of `given`'s variables."""
    known = set(given)
    for equation in jaxpr.eqns:
        # Literals cannot be hashed, and depend on nothing.
        names = (x for x in equation.invars if not hasattr(x, "val"))
        if not known.isdisjoint(names):
            known.update(equation.outvars)
    return (not hasattr(x, "val") and x in known for x in jaxpr.outvars)


def matmul_precision(precision: str | None):
    """A context that sets the precision of matrix products; None leaves it alone."""
    if precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)
