"""model, loss, batch -> products with the Gauss-Newton and Fisher matrices.

A model z = f(params, x) followed by a loss of its outputs has the Gauss-Newton matrix
J^T B J, with J the derivative of the outputs and B the curvature of the loss in them:

    Hessian of the loss      generalised Gauss-Newton, positive semidefinite if convex
    gradient times itself    Fisher: labels sampled from the model, or as given

J is linearised once and J^T is its transpose, so a product costs one derivative forward
and one back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rmtdamp._checks import check_loss_args, check_outputs, check_scalar, pair
from rmtdamp._jax import matmul_precision
from rmtdamp._tree import aligned, check_params
from rmtdamp._types import Batch, Criterion, Key, Matvec, ModelFn, Params, SampleFn


@functools.partial(jax.jit, static_argnames=("model_fn", "precision"))
def _linearize_model(model_fn, params, inputs, loss_args, precision):
    with matmul_precision(precision):
        return jax.linearize(lambda p: model_fn(p, inputs, *loss_args), params)


@functools.partial(jax.jit, static_argnames=("criterion", "precision"))
def _loss_hessian(criterion, outputs, targets, precision):
    with matmul_precision(precision):
        return jax.linearize(lambda z: jax.grad(criterion)(z, targets), outputs)[1]


@functools.partial(jax.jit, static_argnames=("criterion", "precision"))
def _loss_gradient(criterion, outputs, targets, precision):
    with matmul_precision(precision):
        return jax.grad(criterion)(outputs, targets)


@jax.jit
def _sandwich(model, middle, params, vector):
    vector = aligned(vector, params)
    (back,) = jax.linear_transpose(model, vector)(middle(model(vector)))
    return back


def _outer(gradient, tangent):
    """N u_i (u_i . t_i) for each example i, with u the gradient of the mean loss."""
    leaves = jax.tree.leaves(gradient)
    count = leaves[0].shape[0]
    per_example = lambda a, b: jnp.sum(
        jnp.reshape(a, (count, -1)) * jnp.reshape(b, (count, -1)), axis=1
    )
    dots = sum(map(per_example, leaves, jax.tree.leaves(tangent)))
    spread = lambda u: jnp.reshape(dots, (count,) + (1,) * (u.ndim - 1)) * u * count
    return jax.tree.map(spread, gradient)


def ggn_matvec(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    batch: Batch,
    *,
    loss_args: tuple[Any, ...] = (),
    precision: str | None = "highest",
) -> Matvec:
    """The generalised Gauss-Newton matrix at one point as a function v -> G v.

    G = J^T B J with J = d outputs / d params and B the Hessian of the loss in the
    outputs. It is the Hessian less the curvature of the model itself, and positive
    semidefinite where the loss is convex in its outputs.

    Cost: a product is a derivative forward and one back, about 4/3 of a gradient's
    FLOPs. The residuals of a forward pass stay alive as long as the matvec does.

    Args:
        model_fn: `model_fn(params, inputs, *loss_args) -> outputs`; static, so define
            it once.
        criterion: `criterion(outputs, targets) -> scalar`, the mean loss; static.
        params: pytree of real floating arrays, the point.
        batch: a pair (inputs, targets) of pytrees with one leading axis.
        loss_args: further arguments of the model (batch statistics, keys), traced.
        precision: matmul precision; None leaves the global setting.

    Returns:
        A function from a pytree like `params` to one, a `jax.tree_util.Partial`.

    Raises:
        TypeError: params that are not real floats, or a loss that is not a scalar.
        ValueError: a batch that is not a pair, or is empty or unequal.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import ggn_matvec
        >>> def model_fn(params, inputs):
        ...     return inputs @ params
        >>> def criterion(outputs, targets):
        ...     return jnp.mean((outputs - targets) ** 2)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2)
        >>> matvec = ggn_matvec(model_fn, criterion, jnp.zeros(2), batch)
        >>> print(matvec(jnp.ones(2)))
        [1. 4.]

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient
        descent, 2002. Martens, New insights and perspectives on the natural gradient
        method, 2014, section 8.
    """
    check_params(params)
    check_loss_args(loss_args)
    inputs, targets = pair(batch)
    outputs, model = _linearize_model(model_fn, params, inputs, loss_args, precision)
    check_scalar(criterion, outputs, targets, ())
    middle = _loss_hessian(criterion, outputs, targets, precision)
    return jax.tree_util.Partial(_sandwich, model, middle, params)


def fisher_matvec(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    batch: Batch,
    key: Key | None = None,
    *,
    sample_fn: SampleFn | None = None,
    loss_args: tuple[Any, ...] = (),
    precision: str | None = "highest",
) -> Matvec:
    """The Fisher matrix at one point as a function v -> F v.

    F = N^-1 sum_i g_i g_i^T, with g_i the gradient of example i's loss. With targets
    drawn from the model's own distribution (`sample_fn`) this is an unbiased estimate
    of the Fisher matrix, which for a loss that is a negative log-likelihood of an
    exponential family in its natural parameters is the Gauss-Newton matrix. With the
    targets as given it is the empirical Fisher, which is not (it vanishes where all
    losses do).

    Cost: as `ggn_matvec`; no gradient of a single example is formed.

    Args:
        model_fn: `model_fn(params, inputs, *loss_args) -> outputs`, one row per
            example; static, so define it once.
        criterion: `criterion(outputs, targets) -> scalar`, the mean of the examples'
            losses; static.
        params: pytree of real floating arrays, the point.
        batch: a pair (inputs, targets) of pytrees with one leading axis.
        key: a key of `jax.random` for `sample_fn`.
        sample_fn: `sample_fn(key, outputs) -> targets` drawn from the model, such as
            `jax.random.categorical` for logits; None for the empirical Fisher.
        loss_args: further arguments of the model, traced.
        precision: matmul precision; None leaves the global setting.

    Returns:
        A function from a pytree like `params` to one, a `jax.tree_util.Partial`.

    Raises:
        TypeError: params that are not real floats, or a loss that is not a scalar.
        ValueError: a batch that is not a pair, or is empty or unequal; outputs without
            a row per example; `sample_fn` without `key` or the other way round.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from rmtdamp.hessian import fisher_matvec
        >>> def model_fn(params, inputs):
        ...     return inputs @ params
        >>> def criterion(logits, labels):
        ...     losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        ...     return losses.mean()
        >>> params, batch = jnp.zeros((2, 3)), (jnp.eye(2), jnp.array([0, 1]))
        >>> sampled = fisher_matvec(
        ...     model_fn,
        ...     criterion,
        ...     params,
        ...     batch,
        ...     jax.random.key(0),
        ...     sample_fn=jax.random.categorical,
        ... )
        >>> sampled(jnp.ones((2, 3))).shape
        (2, 3)

    References:
        Martens, New insights and perspectives on the natural gradient method, 2014,
        sections 5 and 11. Kunstner, Hennig and Balles, Limitations of the empirical
        Fisher approximation, 2019.
    """
    check_params(params)
    check_loss_args(loss_args)
    inputs, targets = pair(batch)
    if (key is None) != (sample_fn is None):
        raise ValueError(
            "key and sample_fn go together: both for the Fisher matrix with sampled "
            "targets, neither for the empirical Fisher"
        )
    outputs, model = _linearize_model(model_fn, params, inputs, loss_args, precision)
    check_outputs(outputs, inputs)
    if sample_fn is not None and key is not None:
        targets = sample_fn(key, outputs)
    check_scalar(criterion, outputs, targets, ())
    gradient = _loss_gradient(criterion, outputs, targets, precision)
    middle = jax.tree_util.Partial(_outer, gradient)
    return jax.tree_util.Partial(_sandwich, model, middle, params)
