"""KFAC as an optimiser: scale_by_kfac, weight decay, momentum, learning rate."""

from typing import Any

import jax
import optax

from rmtdamp.hessian._factors import Curvature

from ._kfac import scale_by_kfac
from ._kfac_state import Tikhonov


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    factors_fn: Curvature,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = False,
    kl_clip: jax.typing.ArrayLike | None = 0.01,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    factor_decay: jax.typing.ArrayLike = 0.95,
    factor_every: int | None = 10,
    eigen_every: int = 100,
    tikhonov: Tikhonov = "eigenvalues",
    ekfac: bool = False,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """KFAC as the paper's experiments ran it: KL clip, then momentum, then the rate.

    `scale_by_kfac`, weight decay, `optax.trace(momentum)` and the learning rate, in
    this order: what is decayed is not divided by the curvature. To learn the damping
    put it inside `auto_damping`.

    Args:
        learning_rate: alpha, a number or a schedule.
        factors_fn: measures the factors; made once.
        damping: delta, a number or a schedule, in the unit of a Hessian eigenvalue.
        momentum: decay of the sum of past steps; None for none.
        nesterov: Nesterov momentum.
        kl_clip: see `scale_by_kfac`; the learning rate is this one's.
        weight_decay: multiplied by the learning rate.
        mask: which params decay: a tree of bools or a function that makes one.
        factor_decay: weight of the past in the averages of the factors.
        factor_every: steps between measurements; None for `refresh_factors` by hand.
        eigen_every: steps between eigendecompositions.
        tikhonov: "eigenvalues" or "factored".
        ekfac: measure the diagonal in the eigenbasis.
        seed: of sampled labels.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: as `scale_by_kfac`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> from rmtdamp.hessian import FactorsFn, make_blocks
        >>> def model_fn(params, x, tape):
        ...     return tape.linear("dense", x, x @ params["w"])
        >>> def loss_fn(outputs, targets):
        ...     return 0.5 * jnp.mean((outputs - targets) ** 2)
        >>> params = {"w": jnp.zeros((2, 1))}
        >>> blocks = make_blocks(params, {"dense": {"kernel": "w"}})
        >>> factors_fn = FactorsFn(
        ...     model_fn=model_fn, loss_fn=loss_fn, blocks=blocks, fisher="ggn"
        ... )
        >>> inner = rmtdamp.transforms.kfac(1.0, factors_fn, momentum=None)
        >>> tx = rmtdamp.set_damping(inner, 1e-6)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 9.0]]), jnp.ones((2, 1))
        >>> state = tx.init(params)
        >>> def loss(params):
        ...     return loss_fn(batch[0] @ params["w"], batch[1])
        >>> for _ in range(20):
        ...     updates, state = tx.update(
        ...         jax.grad(loss)(params), state, params, batch=batch
        ...     )
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{loss(params):.3f}")
        0.000

    References:
        Granziol and Baskerville, section 7.
    """
    return optax.chain(
        scale_by_kfac(
            factors_fn,
            damping=damping,
            factor_decay=factor_decay,
            factor_every=factor_every,
            eigen_every=eigen_every,
            tikhonov=tikhonov,
            ekfac=ekfac,
            kl_clip=kl_clip,
            learning_rate=learning_rate,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
