"""What a rule is told, and how it says what it needs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._shrinkage import Shrinkage


class Evidence(NamedTuple):
    """What is known when a damping is decided; what nobody measured or gave is NaN.

    The first three are averaged over measurements, as in `HessianMoments`, whose place
    it can take. [H]: the unit of a Hessian eigenvalue.

    Example:
        >>> from rmtdamp.damping import Evidence
        >>> known = Evidence(mean=0.1, square=0.26, learning_rate=1e-3)
        >>> print(f"{known.dispersion:.2f} {known.max_eigenvalue}")
        0.25 nan
    """

    mean: Any = jnp.nan  # (), nu = P^-1 Tr H, in [H]
    square: Any = jnp.nan  # (), P^-1 Tr H^2, in [H]^2
    variance: Any = jnp.nan  # (), m = P^-1 Tr Var(H), in [H]^2
    max_eigenvalue: Any = jnp.nan  # (), largest |lambda| of H, see `learn_damping`
    effective_eigenvalue: Any = jnp.nan  # (), delta times that of (B + delta)^-1 H
    learning_rate: Any = jnp.nan  # (), alpha of this step
    gradient_norm: Any = jnp.nan  # (), Euclidean, of this step's gradient
    reduction_ratio: Any = jnp.nan  # (), see `LevenbergMarquardt`
    damping: Any = jnp.nan  # (), delta as last decided, without the learner's floor

    @property
    def dispersion(self) -> jax.Array:
        """d^2 = P^-1 ||H - nu I||_F^2."""
        return self.square - self.mean**2


DampingRule = Callable[[Evidence], Shrinkage]

MEASURED = frozenset(
    {"moments", "max_eigenvalue", "effective_eigenvalue", "reduction_ratio"}
)
_KNOWN = MEASURED | {"learning_rate", "gradient_norm"}


def needs(*names: str) -> Callable[[Callable], Callable]:
    """A decorator that says what a rule needs to be told; without it, "moments".

    Only what is named is measured, the moments too; all else is NaN. "moments",
    "max_eigenvalue", "effective_eigenvalue" and "reduction_ratio" are measured at a
    refresh, "learning_rate" and "gradient_norm" are known at each step, and a rule that
    needs one of these decides at each step.

    Args:
        *names: of these six.

    Returns:
        The decorator.

    Raises:
        ValueError: another name.

    Example:
        >>> from rmtdamp.damping import Shrinkage, needs
        >>> @needs("learning_rate")
        ... def proportional(evidence):
        ...     return Shrinkage(10 * evidence.learning_rate)
        >>> sorted(proportional.needs)
        ['learning_rate']
    """
    for name in names:
        if name not in _KNOWN:
            raise ValueError(
                f"a rule cannot need {name!r}: choose from {', '.join(sorted(_KNOWN))}"
            )

    def mark(rule):
        rule.needs = frozenset(names)
        return rule

    return mark


def needs_of(rule: DampingRule) -> frozenset[str]:
    """What a rule needs to be told, see `needs`.

    Returns:
        The names; those of a rule that says nothing are the moments.

    Example:
        >>> from rmtdamp.damping import LargestFraction, identity_target, needs_of
        >>> sorted(needs_of(identity_target)), sorted(needs_of(LargestFraction()))
        (['moments'], ['max_eigenvalue'])
    """
    return getattr(rule, "needs", frozenset({"moments"}))


def decides_in_the_step(rule: DampingRule) -> bool:
    """Whether a rule is asked in each step; one that is told moments alone is not.

    Returns:
        A bool.

    Example:
        >>> from rmtdamp import StabilityFloor, identity_target
        >>> from rmtdamp.damping import decides_in_the_step
        >>> decides_in_the_step(identity_target), decides_in_the_step(StabilityFloor())
        (False, True)
    """
    needed = needs_of(rule)
    return not needed or not needed <= MEASURED


def is_relative(rule: DampingRule) -> bool:
    """Whether a rule decides on a `Shrinkage.relative`; it is asked, of nothing.

    Returns:
        A bool.

    Example:
        >>> from rmtdamp import identity_target
        >>> from rmtdamp.damping import MeanFraction, is_relative
        >>> is_relative(identity_target), is_relative(MeanFraction())
        (False, True)
    """
    found: list[bool] = []

    def ask():
        # Nothing that is traced leaves: JAX can be told to look for such leaks.
        relative = getattr(rule(Evidence()), "relative", 0.0)
        found.append(not (isinstance(relative, float) and relative == 0))

    jax.eval_shape(ask)
    return found[0]
