"""MEASURE: how flat a minimum is, by the trace of its Hessian, and how to ask for it.

    loss_fn, params, batch, key  ->  an estimate of Tr H to add to the loss

The trace over solutions is not an arbitrary measure: for deep linear networks on random
measurements, the flattest solution is the one of the smallest nuclear norm, of low rank
(`linear_network_trace`, `least_linear_network_trace`).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rmtdamp._checks import check_range, check_scalar
from rmtdamp._tree import aligned, check_params, rademacher, random_like
from rmtdamp._types import Batch, Key, LossFn, Params


def trace_penalty(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key,
    *,
    loss_args: tuple[Any, ...] = (),
    num_probes: int = 1,
) -> jax.Array:
    r"""An unbiased estimate of Tr H, differentiable, to add to a loss.

    For n = `num_probes` random sign vectors v,

        n^-1 sum_v v^T H v,    v^T H v = d^2/dt^2 L(w + t v) at t = 0,

    whose expectation over v is Tr H and whose variance is 2 n^-1 sum_(i != j) H_ij^2.
    Its gradient is unbiased for that of Tr H, a third derivative of the loss. Draw a
    new key in each step.

    Cost of the gradient: v^T H v is two derivatives forward, one within the other, so
    that a single one goes back. With one probe, over the loss's own gradient on a CPU
    (`python -m benchmarks.costs penalties`), convolutions take 4.1 times the FLOPs, 2.3
    times the memory and 3.2 times as long, an MLP 2.5, 4.4 and 2.6. (That of v^T (H v),
    H v forward over reverse: 4.2, 2.8 and 7.6, and 2.4, 3.4 and 2.2.) Probes run at
    once.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`.
        params: pytree of real floating arrays, w.
        batch: pytree of arrays that the loss understands.
        key: a key of `jax.random`, typed or raw.
        loss_args: further arguments of the loss.
        num_probes: n, at least 1.

    Returns:
        The estimate, a scalar in the dtype of the loss and the unit of an eigenvalue.

    Raises:
        TypeError: params that are not real floats, a loss that is not a scalar, or one
            with a custom VJP and no derivative forward.
        ValueError: `num_probes` below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.flatness import trace_penalty
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["u"]) ** 2 * params["v"] ** 2)
        >>> def flat_loss(params, batch, key):
        ...     penalty = trace_penalty(loss_fn, params, batch, key, num_probes=4)
        ...     return loss_fn(params, batch) + 1e-2 * penalty
        >>> params, batch = {"u": jnp.ones(3), "v": jnp.ones(())}, jnp.eye(3)
        >>> grads = jax.jit(jax.grad(flat_loss))(params, batch, jax.random.key(0))

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989.
        Gatmiry et al., The inductive bias of flatness regularization for deep matrix
        factorization, 2023, for what a small trace brings.
    """
    check_params(params)
    check_range("num_probes", num_probes, lambda n: n >= 1, "at least 1")
    check_scalar(loss_fn, params, batch, loss_args)
    loss = lambda w: loss_fn(w, batch, *loss_args)

    def curvature(key):
        probe = aligned(random_like(key, params, rademacher), params)
        along = lambda f: lambda w: jax.jvp(f, (w,), (probe,))[1]
        return along(along(loss))(params)

    try:
        return jnp.mean(jax.vmap(curvature)(jax.random.split(key, num_probes)))
    except (TypeError, NotImplementedError) as error:
        if not any(name in str(error) for name in ("custom_vjp", "custom_lin")):
            raise
        raise TypeError(
            "a part of the loss has a custom VJP and no derivative forward, and "
            "trace_penalty takes two: give it a custom JVP (jax.custom_jvp), or leave "
            "that part out of the loss whose trace is asked for"
        ) from error


def linear_network_trace(
    weights: Sequence[jax.Array], measurements: jax.Array
) -> jax.Array:
    r"""Tr H of a deep linear network on linear measurements, where it fits them.

    The network is the product M = W_L ... W_1 and its loss the mean over n measurements
    (<A_i, M> - y_i)^2. Wherever <A_i, M> = y_i,

        Tr H = 2 n^-1 sum_i sum_l ||(W_L ... W_(l+1))^T A_i (W_(l-1) ... W_1)^T||_F^2;

    elsewhere it is the trace of the Gauss-Newton matrix.

    Args:
        weights: W_1 to W_L, each (d_l, d_(l-1)), the first one to be applied first.
        measurements: (n, d_L, d_0), the A_i.

    Returns:
        The trace, a scalar.

    Raises:
        ValueError: shapes that do not fit each other, or no weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.flatness import linear_network_trace
        >>> weights = [jnp.eye(2), 3 * jnp.eye(2)]
        >>> print(linear_network_trace(weights, jnp.ones((1, 2, 2))))
        80.0

    References:
        Gatmiry et al., The inductive bias of flatness regularization for deep matrix
        factorization, 2023.
    """
    shapes = [w.shape for w in weights]
    fits = all(w[0] == after[1] for w, after in itertools.pairwise(shapes))
    if (
        not shapes
        or not fits
        or measurements.shape[1:] != (shapes[-1][0], shapes[0][1])
    ):
        raise ValueError(
            f"weights of shapes {shapes} and measurements of shape "
            f"{measurements.shape} do not fit: W_l is (d_l, d_(l-1)), from W_1 on, and "
            "each measurement (d_L, d_0)"
        )
    eye = functools.partial(jnp.eye, dtype=measurements.dtype)
    before = itertools.accumulate(
        weights[:-1], lambda x, w: w @ x, initial=eye(shapes[0][1])
    )
    after = itertools.accumulate(
        weights[:0:-1], lambda x, w: x @ w, initial=eye(shapes[-1][0])
    )
    seen = [
        jnp.einsum("ka,nkm,bm->nab", left, measurements, right)
        for left, right in zip(reversed(list(after)), before, strict=True)
    ]
    total = functools.reduce(jnp.add, (jnp.sum(jnp.square(x)) for x in seen))
    return 2 * total / len(measurements)


def least_linear_network_trace(matrix: jax.Array, depth: int) -> jax.Array:
    r"""The least Tr H over all deep linear networks with one product.

    With Gaussian measurements (of independent entries of unit variance) the expected
    trace of `linear_network_trace` is 2 sum_l ||W_L ... W_(l+1)||_F^2
    ||W_(l-1) ... W_1||_F^2, and its minimum over W_L ... W_1 = M, with hidden layers at
    least as wide as the rank of M, is

        2 L (d_0 d_L)^(1/L) ||M||_*^(2 (L-1)/L),

    with ||M||_* the nuclear norm (Schatten 1-norm): of the networks that fit, the
    flattest has the least nuclear norm.

    Args:
        matrix: M, (d_L, d_0).
        depth: L, at least 1.

    Returns:
        The minimum, a scalar.

    Raises:
        ValueError: `depth` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.flatness import least_linear_network_trace
        >>> print(least_linear_network_trace(jnp.diag(jnp.array([3.0, 1.0])), 2))
        32.0

    References:
        Gatmiry et al., 2023; the constant is ours (the inequality of arithmetic and
        geometric means over the layers).
    """
    check_range("depth", depth, lambda n: n >= 1, "at least 1")
    nuclear = jnp.sum(jnp.linalg.svd(matrix, compute_uv=False))
    sizes = matrix.shape[0] * matrix.shape[1]
    return 2 * depth * sizes ** (1 / depth) * nuclear ** (2 * (depth - 1) / depth)
