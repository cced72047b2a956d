"""loss_fn, params, batch -> matvec.

A product is the derivative of the gradient along v (forward over reverse): no matrix is
formed. `hvp` pays for the gradient each time; `hessian_matvec` linearises the gradient
once, after which a product costs about two gradients' FLOPs instead of three. Where a
part of the loss has no derivative forward (`jax.custom_vjp`), the product is the
gradient of <grad L, v> (reverse over reverse), by the symmetry of H.

Curvature is computed at matmul precision "highest" unless told otherwise, because the
default on recent GPUs rounds float32 inputs to ten bits (TF32), and noise measured at
that precision is in part the noise of the arithmetic.
"""

import functools

import jax
import jax.numpy as jnp

from rmtdamp._checks import FORWARD, REVERSE, check_mode, check_scalar
from rmtdamp._jax import matmul_precision
from rmtdamp._tree import aligned, check_params
from rmtdamp._types import Batch, LossFn, Matvec, Mode, Params


def check_differentiable(
    loss_fn: LossFn, params: Params, batch: Batch, loss_args, mode: Mode
) -> None:
    """Refuse a loss without derivatives in this mode; costs a trace of its gradient.

    Raises:
        TypeError: the loss has a custom VJP where a derivative forward is needed.
        ValueError: its gradient has a loop of unknown length, and is to be reversed.
    """
    gradient = jax.grad(loss_fn)
    try:
        if mode == REVERSE:
            back = lambda p, *rest: jax.vjp(lambda q: gradient(q, *rest), p)[1](p)
            jax.eval_shape(back, params, batch, *loss_args)
        elif "custom_vjp" in str(jax.make_jaxpr(gradient)(params, batch, *loss_args)):
            # What the missing rule belongs to may not depend on params; only lowering
            # tells.
            forward = lambda p, *rest: jax.jvp(lambda q: gradient(q, *rest), (p,), (p,))
            shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
            jax.jit(forward).lower(*jax.tree.map(shape, (params, batch, *loss_args)))
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "a part of the loss has a custom VJP and no derivative forward, which "
            f'mode="{FORWARD}" needs: pass mode="{REVERSE}"'
        ) from error
    except ValueError as error:
        if "Reverse-mode differentiation" not in str(error):
            raise
        raise ValueError(
            "the gradient contains a loop of unknown length, through which "
            f'mode="{REVERSE}" cannot go back: pass mode="{FORWARD}"'
        ) from error


def derivative_of_gradient(
    loss_fn: LossFn, params: Params, batch: Batch, loss_args, mode: Mode
):
    """V -> H v, linearised, without checks: for use inside traced code."""
    gradient = lambda p: jax.grad(loss_fn)(p, batch, *loss_args)
    if mode == REVERSE:
        return jax.tree_util.Partial(_only, jax.vjp(gradient, params)[1])
    return jax.linearize(gradient, params)[1]


def _only(pullback, vector):
    (found,) = pullback(vector)
    return found


def loss_and_product(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    vector: Params,
    loss_args,
    mode: Mode,
):
    """The loss and H v, once, without checks: for use inside traced code."""
    value_and_grad = lambda p: jax.value_and_grad(loss_fn)(p, batch, *loss_args)
    if mode == REVERSE:
        _, back, loss = jax.vjp(lambda p: value_and_grad(p)[::-1], params, has_aux=True)
        return loss, _only(back, vector)
    (loss, _), (_, product) = jax.jvp(value_and_grad, (params,), (vector,))
    return loss, product


@functools.partial(jax.jit, static_argnames=("loss_fn", "precision", "mode"))
def _hvp(loss_fn, params, batch, vector, loss_args, precision, mode):
    check_scalar(loss_fn, params, batch, loss_args)
    check_differentiable(loss_fn, params, batch, loss_args, mode)
    with matmul_precision(precision):
        return loss_and_product(loss_fn, params, batch, vector, loss_args, mode)[1]


def hvp(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    vector: Params,
    *,
    loss_args: tuple = (),
    precision: str | None = "highest",
    mode: Mode = "forward-over-reverse",
) -> Params:
    """The Hessian of the batch loss times a vector, H v.

    H = d^2 L / d params^2 for L = `loss_fn(params, batch, *loss_args)`, computed as the
    derivative of the gradient along v. Compiled once per loss function, shapes and
    dtypes. About three gradients' FLOPs; for many products at one point take
    `hessian_matvec`.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss. A static
            argument: define it once, because a function made anew compiles anew.
        params: pytree of real floating arrays.
        batch: pytree of arrays that the loss understands.
        vector: v, a pytree with the shapes of `params`; cast to their dtypes.
        loss_args: further arguments of the loss (batch statistics, keys), traced.
        precision: matmul precision, a name that `jax.default_matmul_precision` takes;
            None leaves the global setting.
        mode: "forward-over-reverse", or "reverse-over-reverse" for a loss with a custom
            VJP and nothing else (`jax.custom_vjp`, most attention kernels), at about
            half as much again in FLOPs and memory.

    Returns:
        H v, a pytree like `params`.

    Raises:
        TypeError: params that are not real floats, a loss that is not a scalar, or one
            that cannot be differentiated in this mode.
        ValueError: `vector` does not have the shapes of `params`, or an unknown mode.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import hvp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(hvp(loss_fn, jnp.zeros(2), batch, jnp.ones(2)))
        [1. 4.]
    """
    check_params(params)
    check_mode(mode)
    vector = aligned(vector, params)
    return _hvp(loss_fn, params, batch, vector, loss_args, precision, mode)


@functools.partial(jax.jit, static_argnames=("loss_fn", "precision", "mode"))
def _linearize(loss_fn, params, batch, loss_args, precision, mode):
    check_scalar(loss_fn, params, batch, loss_args)
    check_differentiable(loss_fn, params, batch, loss_args, mode)
    with matmul_precision(precision):
        return derivative_of_gradient(loss_fn, params, batch, loss_args, mode)


@jax.jit
def _apply(product, params, vector):
    return product(aligned(vector, params))


def hessian_matvec(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    loss_args: tuple = (),
    precision: str | None = "highest",
    mode: Mode = "forward-over-reverse",
) -> Matvec:
    """The Hessian at one point as a function v -> H v, linearised once.

    The gradient is evaluated and linearised here; each product then costs about two
    gradients' FLOPs (MLP 784-512-512-10: 1.3 gradients in time). The residuals of one
    backward pass over `batch` stay alive as long as the matvec does.

    The result is a `jax.tree_util.Partial`, a pytree whose leaves are those residuals:
    it passes through `jit` as an argument, and a matvec for new params or data of the
    same shapes reuses the compiled programs, its own and those it was handed to.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss; static,
            so define it once.
        params: pytree of real floating arrays, the point.
        batch: pytree of arrays that the loss understands.
        loss_args: further arguments of the loss, traced.
        precision: matmul precision; None leaves the global setting.
        mode: "forward-over-reverse", or "reverse-over-reverse" for a loss with a custom
            VJP and nothing else (`jax.custom_vjp`, most attention kernels).

    Returns:
        A function from a pytree like `params` to a pytree like `params`.

    Raises:
        TypeError: params that are not real floats, a loss that is not a scalar, or one
            that cannot be differentiated in this mode.
        ValueError: an unknown mode, or (when called) a vector that does not have the
            shapes of `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import hessian_matvec
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> matvec = hessian_matvec(loss_fn, jnp.zeros(2), batch)
        >>> print(matvec(jnp.array([1.0, 0.0])), matvec(jnp.array([0.0, 1.0])))
        [1. 0.] [0. 4.]
    """
    check_params(params)
    check_mode(mode)
    product = _linearize(loss_fn, params, batch, loss_args, precision, mode)
    return jax.tree_util.Partial(_apply, product, params)
