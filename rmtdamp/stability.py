"""DECIDE: how large a learning rate can be, and how biased towards flat directions.

    largest eigenvalue, diagonal or preconditioner  ->  a learning rate, a ratio

Eqs. 5, 17 and 19 of the paper: arithmetic on what `rmtdamp.hessian` has measured.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rmtdamp._types import Params


def curvature_ratio(curvature: Params, damping: jax.typing.ArrayLike) -> jax.Array:
    """Eq. 5: learning rate in the flattest over that in the sharpest direction.

    R = (max s + delta) / (min s + delta) over all elements s of `curvature`. It is 1
    for SGD and at infinite damping, and grows without bound as the damping of a
    singular curvature goes to 0: the bias towards flat directions that the paper
    blames for the generalisation gap.

    Args:
        curvature: pytree of the preconditioner's eigenvalues, >= 0. For Adam the tree
            of sqrt(v), bias-corrected: units of a gradient.
        damping: delta, in the unit of `curvature`.

    Returns:
        R >= 1, a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.stability import curvature_ratio
        >>> print(curvature_ratio({"w": jnp.array([0.0, 9.0])}, 1.0))
        10.0

    References:
        Granziol and Baskerville, eq. 5 and section 6.1.
    """
    leaves = jax.tree.leaves(curvature)
    largest = jnp.stack([jnp.max(x) for x in leaves]).max()
    smallest = jnp.stack([jnp.min(x) for x in leaves]).min()
    return (largest + damping) / (smallest + damping)


def stable_learning_rate(
    max_eigenvalue: jax.typing.ArrayLike,
    *,
    momentum: Any = 0.0,
    averaged: bool = False,
) -> jax.Array:
    r"""The largest learning rate at which a quadratic does not diverge.

    The step is x <- x - alpha D^-1 g with D = B + delta. With lambda the largest
    eigenvalue of D^-1/2 H D^-1/2 (of H for SGD), the bound is 2 / lambda, times

    - 1 + rho for heavy-ball momentum rho (`optax.trace`);
    - (1 + b1) / (1 - b1) for momentum that averages gradients with decay b1 (Adam).

    Args:
        max_eigenvalue: lambda, from `rmtdamp.hessian.largest_eigenvalue` with
            `preconditioner` D, or any other source.
        momentum: rho or b1, in [0, 1).
        averaged: whether momentum averages, as Adam's does, or sums.

    Returns:
        The bound; infinite where lambda <= 0, since no curvature limits the step.

    Raises:
        ValueError: momentum outside [0, 1).
        TypeError: a tuple for the eigenvalue.

    Example:
        >>> from rmtdamp.stability import stable_learning_rate
        >>> print(f"{stable_learning_rate(4.0):.2f}")
        0.50
        >>> print(f"{stable_learning_rate(4.0, momentum=0.9, averaged=True):.2f}")
        9.50

    References:
        Granziol and Baskerville, section 8, eq. 17; the momentum factors are the
        classical stability bounds of a two-term recursion.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}, and must lie in [0, 1)")
    if isinstance(max_eigenvalue, tuple):
        raise TypeError(
            f"max_eigenvalue is {type(max_eigenvalue).__name__}, a tuple: hand over "
            "its number, largest_eigenvalue(...).value"
        )
    factor = (1 + momentum) / (1 - momentum) if averaged else 1 + momentum
    eigenvalue = jnp.asarray(max_eigenvalue)
    positive = eigenvalue > 0
    bound = 2 * factor / jnp.where(positive, eigenvalue, 1)
    return jnp.where(positive | jnp.isnan(eigenvalue), bound + 0 * eigenvalue, jnp.inf)


def stable_learning_rate_bound(
    hessian_diagonal: Params, preconditioner: Params
) -> jax.Array:
    """Eq. 19: an upper bound of the largest stable learning rate.

    2 / max_i (|phi_i^T H phi_i| / (eta_i + delta)), for a preconditioner that is
    diagonal in the parameters (Adam's): the phi_i are the unit vectors, and the
    quadratic forms are the diagonal of H. It is only an upper bound, 1.6 to 8 times too
    large in small examples; `stable_learning_rate` gives the rate itself.

    Args:
        hessian_diagonal: pytree of the diagonal of H.
        preconditioner: pytree of eta + delta > 0, of the same shapes; for Adam
            sqrt(v) + damping.

    Returns:
        The bound without momentum, a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.stability import stable_learning_rate_bound
        >>> diagonal, damped = jnp.array([8.0, 1.0]), jnp.array([2.0, 1.0])
        >>> print(stable_learning_rate_bound(diagonal, damped))
        0.5

    References:
        Granziol and Baskerville, eq. 19.
    """
    ratios = jax.tree.map(
        lambda h, d: jnp.max(jnp.abs(h) / d), hessian_diagonal, preconditioner
    )
    return 2 / jnp.stack(jax.tree.leaves(ratios)).max()
