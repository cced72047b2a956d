"""A loss of outputs and targets -> gradients whose squares have its Hessian's scale."""

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._jax import is_traced
from rmtdamp._tree import accumulation_dtype


def hessian_roots(criterion, outputs, targets, count):
    """u_c with sum_c u_c u_c^T the Hessian of each example's loss: (C, N, ...)."""
    if not isinstance(outputs, jax.Array):
        raise ValueError(
            f"fisher='ggn' needs a model with one array of outputs, and got a "
            f"{type(outputs).__name__}: take 'sampled' or 'empirical'"
        )
    flat = jnp.reshape(outputs, (count, -1))
    dtype = accumulation_dtype(outputs)
    flat = flat.astype(dtype)
    loss = lambda z: criterion(
        jnp.reshape(z, outputs.shape).astype(outputs.dtype), targets
    ).astype(dtype)

    def column(unit):
        tangent = jnp.broadcast_to(unit[None], flat.shape)
        return jax.jvp(jax.grad(loss), (flat,), (tangent,))[1]

    hessian = count * jax.vmap(column)(jnp.eye(flat.shape[1], dtype=dtype))
    hessian = jnp.moveaxis(hessian, 0, 2)
    values, vectors = jnp.linalg.eigh((hessian + jnp.swapaxes(hessian, 1, 2)) / 2)
    roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    roots = jnp.moveaxis(roots, 2, 0).astype(outputs.dtype)
    return jnp.reshape(roots, (-1, *outputs.shape))


def check_logits(outputs) -> None:
    """Refuse several outputs, and those of one column: there is nothing to draw."""
    if not isinstance(outputs, jax.Array):
        raise ValueError(
            f"model_fn's outputs are a {type(outputs).__name__}, and labels are drawn "
            "from one array of logits: hand over a sample_fn(key, outputs) that draws "
            "targets like the batch's, or take fisher='empirical'"
        )
    shapes = [jnp.shape(x) for x in jax.tree.leaves(outputs)]
    if any(shape[-1] == 1 for shape in shapes):
        raise ValueError(
            f"model_fn's outputs have shapes {shapes}, and among logits of length 1 "
            "there is one label to draw: for a single logit hand over a sample_fn such "
            "as lambda key, z: jax.random.bernoulli(key, jax.nn.sigmoid(z[:, 0])), of "
            "the targets' shape and dtype, or take fisher='ggn'"
        )


def unweighted(criterion, outputs, targets, gradient) -> jax.Array:
    """What brings the gradients' squares to the Hessian's scale, as its root.

    Where N times the loss is sum_i c_i l_i over targets i, l_i a negative logarithm of
    a likelihood, the Hessian is the sum of c_i F_i, and gradients of c_i l_i give
    c_i^2 F_i. So they are divided by the root of c_i.

    Returns:
        A scalar, or an array that multiplies the gradient, with an axis for classes.
    """
    if not all(isinstance(x, jax.Array | np.ndarray) for x in (outputs, targets)):
        return jnp.ones(())
    weights, known = _weights(criterion, outputs, targets)
    try:
        other = jnp.sqrt(_num_terms(criterion, outputs, targets, gradient))
    except (TypeError, ValueError) as error:
        # A mask of a fixed shape, say. In a compiled step nothing can be raised.
        if weights is None or (not is_traced(known) and not known):
            raise ValueError(
                f"each example has targets of shape {targets.shape[1:]}, and whether "
                "the loss is their mean or sum cannot be tried with twice as many "
                f"({error}): hand over num_terms, their number if it is the mean, else "
                "1"
            ) from error
        other = jnp.full((), jnp.nan)
    if weights is None:
        return other
    root = jax.lax.rsqrt(jnp.where(weights > 0, weights, 1))
    return jnp.where(known, root, other.astype(root.dtype))


def _weights(criterion, outputs, targets) -> tuple:
    """c, where N times the loss is sum_i c_i l_i of cross-entropies or squared errors.

    At outputs of zero a softmax cross-entropy of label y among C has the gradient
    c (1/C - e_y) and the Hessian c (I - 1/C) / C, half a squared error -c y and c I.
    Whatever c may be, that both agree tells these losses from others.

    Returns:
        c, of the outputs' number of axes, and whether it is known, a scalar; None and
        False if it cannot be.
    """
    dtype, count = accumulation_dtype(outputs), len(targets)
    zeros = jnp.zeros(outputs.shape, dtype)
    slope = jax.grad(lambda z: count * criterion(z, targets).astype(dtype))
    if outputs.shape == targets.shape:
        if not jnp.issubdtype(targets.dtype, jnp.inexact):
            return None, False
        first, c = jax.jvp(slope, (zeros,), (jnp.ones_like(zeros),))
        size = lambda x: jnp.linalg.norm(jnp.ravel(x))
        expected = c * targets.astype(dtype)
        return c, (size(first + expected) <= 0.01 * size(expected)) & jnp.any(c > 0)
    integers = jnp.issubdtype(targets.dtype, jnp.integer)
    classes = outputs.shape[-1]
    if outputs.shape[:-1] != targets.shape or not integers or classes < 2:
        return None, False
    signs = 1 - 2 * (np.arange(classes) % 2)
    signs = jnp.asarray(signs - signs.mean(), dtype)
    first, second = jax.jvp(slope, (zeros,), (jnp.broadcast_to(signs, zeros.shape),))
    c = classes * (second @ signs) / (signs @ signs)
    label = jnp.clip(targets, 0, classes - 1)[..., None]
    at_label = jnp.take_along_axis(first, label, axis=-1)[..., 0]
    by_slope = (jnp.mean(first, axis=-1) - at_label) / (1 - 1 / classes)
    # Smoothed labels make the slope smaller. Places left out have neither.
    agree = (c > 0.6 * by_slope) & (c < 1.7 * by_slope) | (c == 0) & (by_slope == 0)
    return c[..., None], jnp.all(agree) & jnp.any(c > 0)


def _num_terms(criterion, outputs, targets, gradient) -> jax.Array | float:
    """Targets per example, where the loss is their mean; 1 where it is their sum.

    Returns:
        A number, of those that have a gradient.
    """
    if targets.size == len(targets):
        return 1.0
    places = targets.ndim
    if outputs.shape[:places] != targets.shape:
        return 1.0
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    doubled = jax.grad(criterion)(twice(outputs), twice(targets))
    size = lambda x: jnp.linalg.norm(jnp.ravel(x).astype(jnp.float32))
    whole = size(gradient)
    share = size(doubled[:, : targets.shape[1]]) / jnp.where(whole > 0, whole, 1)
    rows = jnp.reshape(gradient, (*targets.shape, -1))
    count = jnp.count_nonzero(jnp.any(rows != 0, axis=-1)) / len(targets)
    return jnp.where(jnp.abs(share - 0.5) < 0.01, jnp.maximum(count, 1), 1)


def check_sampled(sampled, targets) -> None:
    describe = lambda tree: [
        (jnp.shape(x), jnp.issubdtype(jnp.result_type(x), jnp.floating))
        for x in jax.tree.leaves(tree)
    ]
    if describe(sampled) != describe(targets):
        shapes = [
            [jnp.shape(x) for x in jax.tree.leaves(t)] for t in (sampled, targets)
        ]
        raise ValueError(
            f"sampled targets have shapes {shapes[0]} and those of the batch "
            f"{shapes[1]}, or integers meet floats: hand over sample_fn(key, outputs) "
            "that draws targets of the batch's kind (the default draws integer labels "
            "from logits), or take fisher='ggn'"
        )
