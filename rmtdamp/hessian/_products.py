"""loss_fn, params, batch -> matvec.

A product is the derivative of the gradient along v (forward over reverse): no matrix is
formed. `hvp` pays for the gradient each time; `hessian_matvec` linearises the gradient
once, after which a product costs about two gradients' FLOPs instead of three. Where a
part of the loss has no derivative forward (`jax.custom_vjp`), the product is the
gradient of <grad L, v> (reverse over reverse), by the symmetry of H. Where the gradient
has no derivative at all, it is a centred difference of two gradients.

Curvature is computed at matmul precision "highest" unless told otherwise, because the
default on recent GPUs rounds float32 inputs to ten bits (TF32), and noise measured at
that precision is in part the noise of the arithmetic.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rmtdamp._basis import magnitude
from rmtdamp._checks import (
    DIFFERENCE,
    FORWARD,
    REVERSE,
    check_loss_args,
    check_mode,
    check_scalar,
)
from rmtdamp._jax import coarsest_epsilon, matmul_precision
from rmtdamp._tree import accumulation_dtype, aligned, check_params, norm, size, vdot
from rmtdamp._types import Batch, LossFn, Matvec, Mode, Params


@contextlib.contextmanager
def _explained(mode: Mode) -> Iterator[None]:
    """Say which mode gives what this one cannot."""
    try:
        yield
    except Exception as error:
        if mode == FORWARD and "custom_vjp" in str(error):
            raise TypeError(
                "a part of the loss has a custom VJP and no derivative forward, which "
                f'mode="{FORWARD}" needs: pass mode="{REVERSE}", or "{DIFFERENCE}" if '
                "its backward pass has no derivative either"
            ) from error
        if mode == REVERSE and "Reverse-mode differentiation" in str(error):
            raise ValueError(
                "the gradient contains a loop of unknown length, through which "
                f'mode="{REVERSE}" cannot go back: pass mode="{FORWARD}", or '
                f'"{DIFFERENCE}"'
            ) from error
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise TypeError(
            f'the gradient of the loss has no derivative with mode="{mode}" ({what}): '
            f'pass mode="{DIFFERENCE}", which needs none'
        ) from error


def check_differentiable(
    loss_fn: LossFn, params: Params, batch: Batch, loss_args, mode: Mode
) -> None:
    """Refuse a loss without derivatives in this mode; costs a trace of its gradient.

    Raises:
        TypeError: the gradient has no derivative, or no derivative forward.
        ValueError: it has a loop of unknown length, and is to be reversed.
    """
    gradient = jax.grad(loss_fn)
    # What this raises is about the loss, and no mode would help.
    jaxpr = jax.make_jaxpr(gradient)(params, batch, *loss_args)
    with _explained(mode):
        if mode == REVERSE:
            back = lambda p, *rest: jax.vjp(lambda q: gradient(q, *rest), p)[1](p)
            jax.eval_shape(back, params, batch, *loss_args)
        elif mode == FORWARD and "custom_vjp" in str(jaxpr):
            # What the missing rule belongs to may not depend on params; only lowering
            # tells.
            forward = lambda p, *rest: jax.jvp(lambda q: gradient(q, *rest), (p,), (p,))
            shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
            jax.jit(forward).lower(*jax.tree.map(shape, (params, batch, *loss_args)))


def _difference(loss_fn, precision, params, batch, loss_args, vector):
    """(g(w + h v) - g(w - h v)) / (2 h), with g the gradient of the loss."""
    dtype = accumulation_dtype(params)
    gradient = lambda p: jax.grad(loss_fn)(p, batch, *loss_args)
    widened = lambda x: x.astype(dtype)
    # The largest entry of v moves a parameter by a relative eps^(1/3), which balances
    # truncation, h^2, and rounding, eps / h; a sharp direction, whose entries are
    # unequal, is thereby moved less far than a random one, as it has to be.
    scale = norm(params) / size(params) ** 0.5
    scale = jnp.where(scale > 0, scale, 1)
    with matmul_precision(precision):
        eps = coarsest_epsilon(gradient, params)
        step = eps ** (1 / 3) * scale / magnitude(jax.tree.map(widened, vector))
        moved = lambda h: jax.tree.map(
            lambda w, v: (widened(w) + h * widened(v)).astype(w.dtype), params, vector
        )
        above, below = gradient(moved(step)), gradient(moved(-step))
    return jax.tree.map(
        lambda a, b: ((widened(a) - widened(b)) / (2 * step)).astype(a.dtype),
        above,
        below,
    )


def _derivative_of_gradient(loss_fn, params, batch, loss_args, precision, mode):
    """V -> H v, linearised where the gradient is differentiated."""
    gradient = lambda p: jax.grad(loss_fn)(p, batch, *loss_args)
    if mode == DIFFERENCE:
        difference = functools.partial(_difference, loss_fn, precision)
        return jax.tree_util.Partial(difference, params, batch, loss_args)
    with matmul_precision(precision):
        if mode == REVERSE:
            return jax.tree_util.Partial(_only, jax.vjp(gradient, params)[1])
        with _explained(mode):
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
    if mode == DIFFERENCE:
        product = _difference(loss_fn, None, params, batch, loss_args, vector)
        return loss_fn(params, batch, *loss_args), product
    value_and_grad = lambda p: jax.value_and_grad(loss_fn)(p, batch, *loss_args)
    if mode == REVERSE:
        _, back, loss = jax.vjp(lambda p: value_and_grad(p)[::-1], params, has_aux=True)
        return loss, _only(back, vector)
    with _explained(mode):
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
    loss_args: tuple[Any, ...] = (),
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
        mode: how the gradient is differentiated.

            - "forward-over-reverse";
            - "reverse-over-reverse" for a loss with a custom VJP and nothing else
              (`jax.custom_vjp`, most attention kernels), at about half as much again in
              FLOPs and memory;
            - "finite-difference" for a gradient without a derivative (a custom VJP that
              ends in a kernel or a callback, as flash attention's): (g(w + h v) -
              g(w - h v)) / 2h, two gradients' FLOPs. With h = eps^(1/3) rms(w) /
              max_j abs(v_j), the relative error is a few times eps^(2/3): 4e-11 in
              float64, 2e-5 in float32, 1 % in float16, 4 % in bfloat16; a hundred times
              that where the gradient is what large parts leave of each other, as where
              a network fits its data. eps is that of the coarsest dtype that params
              are in or the loss narrows to. The loss must be smooth: across the kinks
              of ReLU a difference sees the gradient jump, which derivatives leave out.

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
    check_loss_args(loss_args)
    check_mode(mode)
    vector = aligned(vector, params)
    return _hvp(loss_fn, params, batch, vector, loss_args, precision, mode)


@functools.partial(jax.jit, static_argnames=("loss_fn", "precision", "mode"))
def _quadratic_form(loss_fn, params, batch, vector, loss_args, precision, mode):
    check_scalar(loss_fn, params, batch, loss_args)
    along = lambda f: lambda p: jax.jvp(f, (p,), (vector,))[1]
    loss = lambda p: loss_fn(p, batch, *loss_args)
    if mode == FORWARD:
        try:
            with matmul_precision(precision):
                return along(along(loss))(params)
        except (TypeError, NotImplementedError) as error:
            if not any(x in str(error) for x in ("custom_vjp", "custom_lin")):
                raise
    product = _hvp(loss_fn, params, batch, vector, loss_args, precision, mode)
    return vdot(vector, product)


def quadratic_form(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    vector: Params,
    *,
    loss_args: tuple[Any, ...] = (),
    precision: str | None = "highest",
    mode: Mode = "forward-over-reverse",
) -> jax.Array:
    """The curvature of the batch loss along a vector, v^T H v.

    The second derivative of L(params + t v) in t, both taken forward: nothing is kept
    for a backward pass, and it is half the work of a product and of its compilation.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss; static,
            so define it once.
        params: pytree of real floating arrays.
        batch: pytree of arrays that the loss understands.
        vector: v, a pytree with the shapes of `params`; cast to their dtypes.
        loss_args: further arguments of the loss, traced.
        precision: matmul precision; None leaves the global setting.
        mode: in another than the default, and of a loss with a custom VJP, it is
            <v, H v> of `hvp` in that mode.

    Returns:
        A scalar.

    Raises:
        TypeError: params that are not real floats, a loss that is not a scalar, or one
            that cannot be differentiated in this mode.
        ValueError: `vector` does not have the shapes of `params`, or an unknown mode.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import quadratic_form
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(quadratic_form(loss_fn, jnp.zeros(2), batch, jnp.ones(2)))
        5.0
    """
    check_params(params)
    check_loss_args(loss_args)
    check_mode(mode)
    vector = aligned(vector, params)
    return _quadratic_form(loss_fn, params, batch, vector, loss_args, precision, mode)


@functools.partial(jax.jit, static_argnames=("loss_fn", "precision", "mode"))
def _linearize(loss_fn, params, batch, loss_args, precision, mode):
    check_scalar(loss_fn, params, batch, loss_args)
    check_differentiable(loss_fn, params, batch, loss_args, mode)
    return _derivative_of_gradient(loss_fn, params, batch, loss_args, precision, mode)


@jax.jit
def _apply(product, params, vector):
    return product(aligned(vector, params))


def hessian_matvec(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    loss_args: tuple[Any, ...] = (),
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
        mode: how the gradient is differentiated, see `hvp`. With "finite-difference"
            nothing is linearised: a product is two gradients, and what stays alive are
            `params` and `batch`.

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
    check_loss_args(loss_args)
    check_mode(mode)
    product = _linearize(loss_fn, params, batch, loss_args, precision, mode)
    return jax.tree_util.Partial(_apply, product, params)
