"""Eq. 13: a damping is linear shrinkage of the curvature towards a target."""

from typing import Any, NamedTuple

import jax


class Shrinkage(NamedTuple):
    """What a rule decides: shrink the curvature towards `target` by `damping`.

    Both have the unit that the rule gives them: that of a Hessian eigenvalue for
    `scaled_identity_target`; for `identity_target` the target is the number 1. To them
    comes what has no unit: a transformation with preconditioner B adds `relative` times
    the mean eigenvalue of B.

    Example:
        >>> from rmtdamp import Shrinkage
        >>> Shrinkage(damping=0.25, target=1.0).intensity
        0.8
    """

    damping: jax.Array | float  # (), delta
    target: jax.Array | float = 1.0  # (), tau
    relative: jax.Array | float = 0.0  # (), kappa

    @property
    def intensity(self) -> jax.Array:
        """beta, the weight that the measured curvature keeps."""
        return shrinkage_from_damping(self.damping, self.target)


def shrinkage_from_damping(damping: Any, target: Any = 1.0) -> Any:
    """Beta = 1 / (1 + delta/tau), the shrinkage that a damping amounts to (eq. 13).

    Args:
        damping: delta >= 0, in the unit of `target`; a number or an array.
        target: tau > 0.

    Returns:
        beta in (0, 1], the weight of the measured curvature. Its complement is
        `damping_weight`, which keeps its digits when the damping is small.

    Example:
        >>> from rmtdamp import shrinkage_from_damping
        >>> shrinkage_from_damping(0.25)
        0.8
    """
    return 1 / (1 + damping / target)


def damping_weight(damping: Any, target: Any = 1.0) -> Any:
    """1 - beta = (delta/tau) / (1 + delta/tau), the weight of the target (eq. 13).

    In float32 the difference 1 - beta loses every damping below 6e-8; this form does
    not.

    Args:
        damping: delta >= 0, in the unit of `target`; a number or an array.
        target: tau > 0.

    Returns:
        1 - beta in [0, 1).

    Example:
        >>> from rmtdamp.damping import damping_weight
        >>> print(f"{damping_weight(1e-9):.1e}")
        1.0e-09
    """
    ratio = damping / target
    return ratio / (1 + ratio)


def damping_from_shrinkage(shrinkage: Any, target: Any = 1.0) -> Any:
    """Delta = tau (1 - beta) / beta, the inverse of `shrinkage_from_damping` (eq. 13).

    Args:
        shrinkage: beta in (0, 1]; a number or an array. In float32 a beta that rounds
            to 1 has lost its damping: keep the damping where it is small.
        target: tau > 0.

    Returns:
        delta >= 0, in the unit of `target`.

    Example:
        >>> from rmtdamp import damping_from_shrinkage
        >>> print(f"{damping_from_shrinkage(0.8):.2f}")
        0.25
    """
    return target * (1 - shrinkage) / shrinkage
