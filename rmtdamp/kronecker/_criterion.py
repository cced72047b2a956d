"""A loss of outputs and targets -> gradients whose squares have its Hessian's scale."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._jax import is_traced
from rmtdamp._tree import accumulation_dtype, num_examples


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


def unweighted(criterion, outputs, targets, gradient):
    """What brings the gradients' squares to the Hessian's scale, as its root.

    Where N times the loss is sum_i c_i l_i over targets i, l_i a negative logarithm of
    a likelihood, the Hessian is the sum of c_i F_i, and gradients of c_i l_i give
    c_i^2 F_i. So they are divided by the root of c_i.

    Returns:
        A tree like the outputs, of scalars and arrays that multiply the gradient.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    given = jax.tree.leaves(targets)
    single = len(leaves) == len(given) == 1
    arrays = all(isinstance(x, jax.Array | np.ndarray) for x in given)
    if not arrays or not (single or jax.tree.structure(targets) == treedef):
        return jax.tree.map(lambda _: jnp.ones(()), outputs)
    found = _recognised(criterion, outputs, targets)
    others = [jnp.ones(())] * len(leaves)
    if single and isinstance(outputs, jax.Array) and given[0] is targets:
        try:
            others = [jnp.sqrt(_num_terms(criterion, outputs, targets, gradient))]
        except (TypeError, ValueError) as error:
            # A mask of a fixed shape, say. In a compiled step nothing can be raised.
            known = found[0][1]
            if not is_traced(known) and not known:
                raise ValueError(
                    f"each example has targets of shape {targets.shape[1:]}, and "
                    "whether the loss is their mean or sum cannot be tried with twice "
                    f"as many ({error}): hand over num_terms, their number if it is "
                    "the mean, else 1"
                ) from error
            others = [jnp.full((), jnp.nan)]
    pairs = zip(found, others, strict=True)
    roots = [jnp.where(known, x, other.astype(x.dtype)) for (x, known), other in pairs]
    return jax.tree.unflatten(treedef, roots)


def _recognised(criterion, outputs, targets) -> list[tuple]:
    """`unweighted` for cross-entropies and squared errors with any weights.

    Each shows its gradient and its Hessian at outputs of zero, whatever c may be, and
    that both are there tells it from other losses: for a target y, one-hot or any
    distribution,

        softmax cross-entropy of C classes    c (1/C - y)    c (I - 1/C) / C
        sigmoid cross-entropy                 c (1/2 - y)    c / 4
        half a squared error                  -c y           c

    Labels that the loss smooths by e make the first gradient, and in the mean that of
    labels drawn, smaller by 1 - e: s in place of c.

    Returns:
        For each leaf an array that broadcasts with it, and whether it is known.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    pairs = [
        _aligned(z, y) for z, y in zip(leaves, jax.tree.leaves(targets), strict=True)
    ]
    count = num_examples(outputs)

    def slope(z):
        value = lambda z: criterion(jax.tree.unflatten(treedef, z), targets)
        return jax.grad(lambda z: count * value(z).astype(accumulation_dtype(z)))(z)

    # Like the outputs: on an explicit mesh they lie where these do.
    zeros = [jnp.zeros_like(z, accumulation_dtype(z)) for z in leaves]
    along = [_direction(z, pair) for z, pair in zip(zeros, pairs, strict=True)]
    both = jax.jvp(slope, (zeros,), (along,))
    parts = zip(pairs, along, *both, strict=True)
    return [(jnp.ones(()), False) if p is None else _root(*p, *x) for p, *x in parts]


def _aligned(z, y) -> tuple | None:
    """Targets in the outputs' shape, the axis of the classes, and are they labels?"""
    integers = jnp.issubdtype(y.dtype, jnp.integer)
    last, dtype = z.ndim - 1, accumulation_dtype(z)
    if y.shape == (*z.shape[:-1], 1) and z.shape[-1] > 1:
        y = y[..., 0]
    if z.shape == (*y.shape, 1):
        y = y[..., None]
    if y.shape == z.shape and (integers or jnp.issubdtype(y.dtype, jnp.inexact)):
        return y.astype(dtype), last, False
    for axis in (last, 1):
        rest = z.shape[:axis] + z.shape[axis + 1 :]
        if integers and y.shape == rest and axis > 0 and z.shape[axis] > 1:
            return jax.nn.one_hot(y, z.shape[axis], dtype=dtype, axis=axis), axis, True
    return None


def _direction(z, aligned) -> jax.Array:
    """Zeros z -> 1.25 and 0.75 in turn over the classes: no loss is flat along it."""
    axis = z.ndim - 1 if aligned is None else aligned[1]
    shape = [1] * z.ndim
    shape[axis] = z.shape[axis]
    steps = 1.25 - 0.5 * (np.arange(math.prod(shape)) % 2)
    return z + jnp.asarray(steps.reshape(shape), z.dtype)


def _root(y, axis, labels, along, first, second) -> tuple:
    """`unweighted` for one leaf, and whether its loss is one of the three."""
    classes = y.shape[axis]
    size = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
    near = lambda a, b: size(a - b) <= 0.01 * size(a)
    inner = lambda a, b: jnp.sum(a * b, axis=axis, keepdims=True)
    over = lambda a, b, otherwise: jnp.where(
        b > 0, a / jnp.where(b > 0, b, 1), otherwise
    )
    of = lambda c: jax.lax.rsqrt(jnp.where(c > 0, c, 1))

    centred = along - jnp.mean(along, axis=axis, keepdims=True)
    c = over(classes * inner(second, centred), inner(centred, centred), 0)
    u = 1 / classes - y
    s = over(inner(first, u), inner(u, u), c)
    softmax = near(first, s * u) & near(second, c / classes * centred)
    # Places that are left out have neither.
    softmax &= jnp.all((c > 0.4 * s) & (c < 2.5 * s) | (c == 0) & (s == 0))
    softmax &= jnp.any(c > 0)
    root = over(jnp.sqrt(jnp.maximum(c, 0)), s, 1)
    if labels:
        return root, softmax
    each = second / along
    square = near(first, -each * y) & jnp.any(each > 0)
    sigmoid = near(first, 4 * each * (0.5 - y)) & jnp.any(each > 0)
    root = jnp.where(square, of(each), jnp.where(sigmoid, of(4 * each), root))
    return root, softmax | square | sigmoid


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
