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
        A scalar, or an array that multiplies the gradient.
    """
    if not all(isinstance(x, jax.Array | np.ndarray) for x in (outputs, targets)):
        return jnp.ones(())
    found, known = _recognised(criterion, outputs, targets)
    try:
        other = jnp.sqrt(_num_terms(criterion, outputs, targets, gradient))
    except (TypeError, ValueError) as error:
        # A mask of a fixed shape, say. In a compiled step nothing can be raised.
        if found is None or (not is_traced(known) and not known):
            raise ValueError(
                f"each example has targets of shape {targets.shape[1:]}, and whether "
                "the loss is their mean or sum cannot be tried with twice as many "
                f"({error}): hand over num_terms, their number if it is the mean, else "
                "1"
            ) from error
        other = jnp.full((), jnp.nan)
    if found is None:
        return other
    return jnp.where(known, found, other.astype(found.dtype))


def _recognised(criterion, outputs, targets) -> tuple:
    """`unweighted` for cross-entropies and squared errors with any weights.

    At outputs of zero a softmax cross-entropy of C classes and a target y, one-hot or
    any distribution, has the gradient c (1/C - y) and the Hessian c (I - 1/C) / C, half
    a squared error -c y and c I. Whatever c may be, that both are there tells these
    losses from others. Labels that the loss smooths by e make the gradient, and in the
    mean that of labels drawn, smaller by 1 - e: s in place of c.

    Returns:
        An array like the outputs, or with one column, and whether it is known, a
        scalar; None and False if it cannot be.
    """
    dtype, count, classes = accumulation_dtype(outputs), len(targets), outputs.shape[-1]
    labels = jnp.issubdtype(targets.dtype, jnp.integer)
    labels = labels and outputs.shape[:-1] == targets.shape and classes > 1
    values = jnp.issubdtype(targets.dtype, jnp.inexact)
    if not labels and not (values and outputs.shape == targets.shape):
        return None, False
    zeros = jnp.zeros(outputs.shape, dtype)
    slope = jax.grad(lambda z: count * criterion(z, targets).astype(dtype))
    direction = 1.25 - 0.5 * (np.arange(classes) % 2)
    along = jnp.broadcast_to(jnp.asarray(direction, dtype), zeros.shape)
    first, second = jax.jvp(slope, (zeros,), (along,))
    near = lambda a, b: (
        jnp.linalg.norm(jnp.ravel(a - b)) <= 0.01 * jnp.linalg.norm(jnp.ravel(a))
    )
    y = jax.nn.one_hot(targets, classes, dtype=dtype) if labels else targets
    y = y.astype(dtype)

    inner = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)
    over = lambda a, b, otherwise: jnp.where(
        b > 0, a / jnp.where(b > 0, b, 1), otherwise
    )
    centred = along - float(direction.mean())
    c = over(classes * inner(second, centred), inner(centred, centred), 0)
    u = 1 / classes - y
    s = over(inner(first, u), inner(u, u), c)
    entropies = near(first, s * u) & near(second, c / classes * centred)
    # Places that are left out have neither.
    entropies &= jnp.all((c > 0.4 * s) & (c < 2.5 * s) | (c == 0) & (s == 0))
    root = over(jnp.sqrt(jnp.maximum(c, 0)), s, 1)
    if labels:
        return root, entropies & jnp.any(c > 0)
    c_each = second / along
    squares = near(first, -c_each * y) & jnp.any(c_each > 0)
    of_squares = jax.lax.rsqrt(jnp.where(c_each > 0, c_each, 1))
    known = squares | (entropies & jnp.any(c > 0))
    return jnp.where(squares, of_squares, root), known


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
