"""lanczos_newton: the one-liner; and refresh_lanczos, the subspace measured by hand."""

from collections.abc import Callable

import jax
import optax

from rmtdamp._types import Batch, LossFn, Matvec, Params
from rmtdamp.hessian import hessian_matvec

from ._by_hand import only_state, replaced
from ._krylov import Cleaning, Start
from ._lanczos import (
    LanczosTransformation,
    ScaleByLanczosState,
    checked_data,
    remembering,
    scale_by_lanczos,
)


def refresh_lanczos(
    opt_state: optax.OptState,
    newton: optax.GradientTransformation,
    params: Params,
    batch: Batch,
    *,
    grads: Params | None = None,
    loss_args: tuple = (),
) -> optax.OptState:
    """Measure the subspace now: the by-hand twin of `scale_by_lanczos`'s refresh.

    Outside the training step, a compiled call for each Lanczos step, so convolutions on
    a CPU keep their fast form; nothing waits for the device.

    Args:
        opt_state: the optimiser's state, with one `scale_by_lanczos` in any chain.
        newton: what `scale_by_lanczos` or `lanczos_newton` returned.
        params: pytree of real floating arrays.
        batch: the batch to measure on.
        grads: for a start at the gradient, or one that is a function of it.
        loss_args: further arguments of the loss.

    Returns:
        `opt_state` with the new subspace and its counters; all else is untouched.

    Raises:
        TypeError: `newton` is something else.
        ValueError: none or several `scale_by_lanczos` states, a bad batch, or a start
            that needs `grads`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params**2) / 2
        >>> newton = rmtdamp.scale_by_lanczos(
        ...     loss_fn, num_steps=2, damping=1.0, every=None
        ... )
        >>> params, batch = jnp.ones(2), jnp.array([[4.0, 1.0]])
        >>> state = newton.init(params)
        >>> state = rmtdamp.refresh_lanczos(state, newton, params, batch)
        >>> print([round(float(x), 3) for x in optax.tree.get(state, "ritz_values")])
        [1.0, 4.0]
    """
    if not isinstance(newton, LanczosTransformation):
        raise TypeError(
            f"newton is a {type(newton).__name__}: hand over what scale_by_lanczos "
            "returned, which knows how to measure; a chain around it does not"
        )
    krylov = newton.krylov
    if krylov.start != "random" and grads is None:
        raise ValueError(
            "this start of Lanczos' iteration is made from the gradient: pass grads"
        )
    state = only_state(
        opt_state,
        ScaleByLanczosState,
        "scale_by_lanczos",
        "refresh_lanczos needs exactly one",
    )
    data = checked_data(params, batch, None)
    subspace = krylov.refresh(state.subspace, params, data, loss_args, grads)
    return replaced(opt_state, state, state._replace(subspace=subspace))


def lanczos_newton(
    learning_rate: optax.ScalarOrSchedule,
    loss_fn: LossFn,
    *,
    num_steps: int,
    damping: optax.ScalarOrSchedule,
    sharp_divisor: jax.typing.ArrayLike = 1.0,
    every: int | None = 1,
    start: Start = "random",
    matvec_fn: Callable[..., Matvec] = hessian_matvec,
    cleaning: Cleaning | None = None,
    variance: jax.typing.ArrayLike | None = None,
    seed: jax.typing.ArrayLike = 0,
    precision: str | None = "highest",
) -> LanczosTransformation:
    """`scale_by_lanczos` followed by the learning rate: the paper's LanczosOPT.

    Args:
        learning_rate: alpha, a number or a schedule.
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss.
        num_steps: m, Lanczos steps.
        damping: delta > 0, a number or a schedule, in the unit of an eigenvalue.
        sharp_divisor: eta > 0.
        every: steps between refreshes; None: by `refresh_lanczos` alone.
        start: "random", "gradient" or a function.
        matvec_fn: another matrix in place of the Hessian.
        cleaning: None or "rotationally_invariant".
        variance: s^2 for the cleaning.
        seed: of the random start.
        precision: matmul precision of the products.

    Returns:
        A gradient transformation. Under `optax.inject_hyperparams` name `loss_fn`,
        `matvec_fn`, `num_steps` and a `start` that is a function in `static_args`.

    Raises:
        ValueError: as `scale_by_lanczos`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(jnp.log(jnp.cosh(batch @ params - 1.0)))
        >>> tx = rmtdamp.lanczos_newton(
        ...     1.0, loss_fn, num_steps=3, damping=1e-3, start="gradient"
        ... )
        >>> params, batch = jnp.zeros(3), jnp.diag(jnp.array([1.0, 2.0, 3.0]))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     grads = jax.grad(loss_fn)(params, batch)
        ...     updates, state = tx.update(grads, state, params, batch=batch)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{loss_fn(params, batch):.4f}")
        0.0000

    References:
        Granziol and Baskerville, section 5.
    """
    newton = scale_by_lanczos(
        loss_fn,
        num_steps=num_steps,
        damping=damping,
        sharp_divisor=sharp_divisor,
        every=every,
        start=start,
        matvec_fn=matvec_fn,
        cleaning=cleaning,
        variance=variance,
        seed=seed,
        precision=precision,
    )
    rate = optax.scale_by_learning_rate(learning_rate)
    return remembering(optax.chain(newton, rate), newton.krylov)
