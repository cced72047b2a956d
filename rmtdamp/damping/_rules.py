"""What is known -> Shrinkage: the rules, each with its source."""

import dataclasses
import functools
import operator
from typing import ClassVar

import jax.numpy as jnp

from rmtdamp._checks import check_decays, check_range
from rmtdamp.hessian import HessianMoments
from rmtdamp.stability import stable_learning_rate

from ._evidence import DampingRule, Evidence, needs_of
from ._shrinkage import Shrinkage


def identity_target(moments: HessianMoments | Evidence) -> Shrinkage:
    """Eq. 15: delta = m, towards the unit matrix.

    Leading order for a Hessian of low rank. The exact minimiser divides m by
    1 - 2 nu + P^-1 Tr H^2, which was 0.99 to 1.005 on real networks. Not equivariant:
    a loss multiplied by c has c^2 times the damping and c times the curvature.

    Args:
        moments: what `rmtdamp.hessian.moments` measured.

    Returns:
        `Shrinkage(damping=m, target=1)`.

    Example:
        >>> from rmtdamp import identity_target
        >>> from rmtdamp.hessian import HessianMoments
        >>> identity_target(HessianMoments(0.1, 0.5, 0.02))
        Shrinkage(damping=0.02, target=1.0, relative=0.0)

    References:
        Granziol and Baskerville, eq. 15.
    """
    return Shrinkage(moments.variance, 1.0)


def scaled_identity_target(moments: HessianMoments | Evidence) -> Shrinkage:
    """Ledoit and Wolf's form: delta = nu m / d^2, towards nu I.

    nu is the mean eigenvalue and d^2 = P^-1 ||H - nu I||_F^2. Scale-equivariant: a loss
    multiplied by c has c times the damping, as it has c times the curvature.

    Args:
        moments: what `rmtdamp.hessian.moments` measured. With few probes d^2 is noisy
            and a mean of ratios is far off: average moments, not dampings, as
            `DampingLearner` does.

    Returns:
        `Shrinkage(damping, target=nu)`; damping is infinite where d^2 <= 0 (nothing but
        noise) and NaN where nu <= 0 (no such target makes sense).

    Example:
        >>> from rmtdamp import scaled_identity_target
        >>> from rmtdamp.hessian import HessianMoments
        >>> rule = scaled_identity_target(HessianMoments(0.1, 0.51, 0.02))
        >>> print(f"{rule.damping:.3f} {rule.target:.1f}")
        0.004 0.1

    References:
        Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance
        matrices, 2004, with the target of Granziol and Baskerville's section 7
        replaced by the best multiple of the unit matrix.
    """
    nu, d2 = moments.mean, moments.dispersion
    signal = d2 > 0
    damping = jnp.where(
        signal, nu * moments.variance / jnp.where(signal, d2, 1), jnp.inf
    )
    return Shrinkage(jnp.where(nu > 0, damping, jnp.nan), nu)


def relative_target(moments: HessianMoments | Evidence) -> Shrinkage:
    r"""Ledoit and Wolf's intensity, towards the mean of the preconditioner itself.

    1 - beta = m / (m + d^2), the share of noise in the measured curvature, is a number
    without unit. A preconditioner B (KFAC's eigenvalues, Adam's sqrt(v)) is shrunk by
    it towards its own mean eigenvalue tau_B: delta = kappa tau_B, kappa = m / d^2.
    Multiplying the loss by c changes delta as it changes B, and parameters that the
    loss ignores change nothing.

    Args:
        moments: what `rmtdamp.hessian.moments` measured, averaged as for
            `scaled_identity_target`.

    Returns:
        `Shrinkage(0, 1, relative=kappa)`; infinite where d^2 <= 0.

    Example:
        >>> from rmtdamp.damping import relative_target
        >>> from rmtdamp.hessian import HessianMoments
        >>> print(f"{relative_target(HessianMoments(0.1, 0.51, 0.25)).relative:.1f}")
        0.5

    References:
        Ledoit and Wolf, 2004, and eq. 13, with B in place of H.
    """
    d2 = moments.dispersion
    signal = d2 > 0
    ratio = moments.variance / jnp.where(signal, d2, 1)
    return Shrinkage(0.0, 1.0, jnp.where(signal, ratio, jnp.inf))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityFloor:
    r"""The least damping at which no direction runs away: delta = c alpha lambda/(2 f).

    A direction that the preconditioner believes flat (B near 0 there) moves at
    alpha / delta. Gradient descent with the same momentum is stable up to a rate of
    2 f / lambda_max(H) (`stable_learning_rate`), f = 1 + rho for momentum that sums,
    (1 + b1) / (1 - b1) for one that averages. So delta = alpha lambda_max / (2 f) is
    the smallest damping that is safe wherever B is blind, and c = `safety` times it
    leaves room for a lambda_max that changes between measurements and from batch to
    batch, and for the steps of KFAC, which are long wherever B sees little. A curvature
    that scatters by a relative variance v between batches is stable in mean square
    where c > 1 + v (1 + rho) / (1 - rho), so c grows with momentum that sums.

    It does not see ahead. A deep network without normalisation, whose lambda_max grows
    tenfold and more in its first tens of steps, may be lost in them; a larger c helps,
    and `rmtdamp.trust_region`, which looks at every step. Of a network with BatchNorm
    lambda_max must be that of the loss in training mode
    (`rmtdamp.flax.curvature_loss` knows it).

    Momentum that sums keeps steps that were divided with the damping of their own time,
    and multiplies them with the learning rate of now. While the rate rises they would
    be too long, from 0 without bound. So alpha is the larger of the schedule's value of
    now and rho / (1 - rho) steps on, which `auto_damping(..., learning_rate=schedule)`
    can see; of a rate that is handed to `update`, begin a warm-up at a tenth.

    It follows the learning rate and the scale of the loss, and does not depend on the
    number of parameters. Its unit is that of a Hessian eigenvalue, right for KFAC and
    Lanczos-Newton, times the learning rate; in Adam that is a gradient.

    With `preconditioned` lambda is what the preconditioner leaves of lambda_max,
    mu = delta max |lambda((B + delta)^-1 H)|, measured with the damping in force. At
    the delta that it leads to, alpha times the sharpest curvature of the preconditioned
    loss is 2 f / c: no more damping than stability needs where B is not blind. This is
    `auto_adam`'s rule, which costs Adam nothing where Adam is stable. KFAC, whose B
    follows the noise of its batches closely, did better with lambda_max itself, and a
    B that is measured anew in each step (`scale_by_lanczos`) leaves the iteration no
    time. It takes a transformation that gives its product (`scale_by_adam_shrinkage`,
    `scale_by_kfac`, `scale_by_lanczos`, and the optimisers made of them).

    Args:
        safety: c. None is 8, and for momentum that sums 12/19 (1 + rho) / (1 - rho)
            where that is more: 12 at 0.9, which is v = 0.6, 25 at 0.95, 126 at 0.99. It
            was chosen for KFAC with lambda_max(H): less loses runs of deep networks,
            more costs small ones. `for_adam` takes 4, preconditioned: more
            costs where Adam trains best near its own threshold (a transformer), less
            reaches fewer learning rates. `for_lanczos` takes 1 without momentum: the
            largest |Ritz value| of the step before takes the place of a lambda_max
            below it (`auto_damping`), and what is sharpest is among the Ritz vectors,
            where a step is short anyway.
        momentum: rho or b1 of the optimiser, in [0, 1).
        averaged: whether momentum averages, as Adam's does, or sums.
        preconditioned: whether lambda is that of the preconditioned Hessian, or of H.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> from rmtdamp.damping import Evidence, StabilityFloor
        >>> rule = StabilityFloor(safety=2.0)
        >>> known = Evidence(max_eigenvalue=19.0, learning_rate=0.01)
        >>> print(f"{rule(known).damping:.3f}")
        0.100

    References:
        Granziol and Baskerville, section 8, eq. 17, read as a rule.
    """

    safety: float | None = None
    momentum: float = 0.9
    averaged: bool = False
    preconditioned: bool = False

    def __post_init__(self) -> None:
        if self.safety is not None:
            check_range("safety", self.safety, lambda x: x > 0, "above 0")
        check_decays(momentum=self.momentum)

    @classmethod
    def for_adam(cls, b1: float = 0.9) -> "StabilityFloor":
        """`auto_adam`'s: four times what the preconditioned Hessian needs."""
        return cls(safety=4.0, momentum=b1, averaged=True, preconditioned=True)

    @classmethod
    def for_lanczos(cls, momentum: float = 0.9) -> "StabilityFloor":
        """For `lanczos_newton`: what the Hessian needs at the rate that momentum makes.

        Returns:
            The rule delta = alpha / (1 - rho) lambda / 2, so c = (1 + rho) / (1 - rho).
            That momentum doubles the stable rate holds of one Hessian, and not of one
            that is another in each batch: c = 1 with rho = 0.9 diverged on matrix
            factorisation and state-space models.
        """
        return cls(safety=(1 + momentum) / (1 - momentum), momentum=momentum)

    @property
    def _factor(self) -> float:
        if self.safety is not None:
            return self.safety
        summed = 0.0 if self.averaged else self.momentum
        return max(8.0, 12 / 19 * (1 + summed) / (1 - summed))

    @property
    def _eigenvalue(self) -> str:
        return "effective_eigenvalue" if self.preconditioned else "max_eigenvalue"

    @property
    def needs(self) -> frozenset[str]:
        """The learning rate and one of the two eigenvalues."""
        return frozenset({self._eigenvalue, "learning_rate"})

    @property
    def steps_ahead(self) -> int:
        """How far to look ahead in a schedule: as long as past steps are summed."""
        return 0 if self.averaged else round(self.momentum / (1 - self.momentum))

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """The damping, towards the largest eigenvalue itself."""
        value = getattr(evidence, self._eigenvalue)
        stable = stable_learning_rate(
            value, momentum=self.momentum, averaged=self.averaged
        )
        return Shrinkage(self._factor * evidence.learning_rate / stable, value)


@dataclasses.dataclass(frozen=True)
class MeanFraction:
    """A fraction of the preconditioner's mean eigenvalue, delta = c tau_B.

    Args:
        fraction: c; 0.1 is what influence functions for large models take.

    Example:
        >>> from rmtdamp.damping import Evidence, MeanFraction
        >>> print(MeanFraction(0.25)(Evidence()).relative)
        0.25

    References:
        Grosse et al., Studying large language model generalization with influence
        functions, 2023.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    fraction: float = 0.1

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """The fraction."""
        del evidence
        return Shrinkage(0.0, 1.0, self.fraction)


@dataclasses.dataclass(frozen=True)
class LargestFraction:
    """A fraction of the Hessian's largest eigenvalue, delta = c lambda_max(H).

    For a preconditioner that is the Hessian's own size the damped one has a condition
    number of at most 1 + 1/c, whatever the scale of the loss. lambda_max is measured by
    a power iteration, one product a measurement.

    Args:
        fraction: c.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> from rmtdamp.damping import Evidence, LargestFraction
        >>> print(LargestFraction(0.25)(Evidence(max_eigenvalue=8.0)).damping)
        2.0

    References:
        Nocedal and Wright, Numerical optimization, 2006, section 3.4, on multiples of
        the identity added to the Hessian.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"max_eigenvalue"})

    fraction: float = 0.01

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, lambda x: x > 0, "above 0")

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """The damping, towards the largest eigenvalue itself."""
        value = evidence.max_eigenvalue
        return Shrinkage(self.fraction * value, value)


@dataclasses.dataclass(frozen=True)
class GradientNorm:
    """Delta = (c ||g||)^1/2, the regularised Newton method's.

    Args:
        constant: c, half the Lipschitz constant of the Hessian where that is known.

    Example:
        >>> from rmtdamp.damping import Evidence, GradientNorm
        >>> print(GradientNorm(0.5)(Evidence(gradient_norm=8.0)).damping)
        2.0

    References:
        Mishchenko, Regularized Newton method with global O(1/k^2) convergence, 2021.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient_norm"})

    constant: float = 0.1

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """The damping, towards 1."""
        return Shrinkage(jnp.sqrt(self.constant * evidence.gradient_norm), 1.0)


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Less damping where the quadratic model holds, more where it does not.

    With d the last step, L the loss of the batch at hand and m the quadratic model of L
    at the params before that step,

        ratio = (L(w + d) - L(w)) / (m(d) - m(0)),   m(d) - m(0) = g.d + d.H d / 2,

    delta is multiplied by `factor` where the ratio is above 3/4 and divided by it where
    it is below 1/4, or the model predicts that the loss rises. In a measurement, so the
    right factor depends on `refresh_every`: the usual one is meant for every fifth
    step. Unit: that of the damping it begins with. Measured on the next batch, where
    kfac-jax takes the batch of the step itself, and with the Hessian in place of the
    Fisher; two losses, a gradient and a product a measurement, and one more copy of the
    params in the state.

    Args:
        initial: delta at first.
        factor: in (0, 1).

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> from rmtdamp.damping import Evidence, LevenbergMarquardt
        >>> rule = LevenbergMarquardt(factor=0.5)
        >>> print(rule(Evidence(damping=2.0, reduction_ratio=0.9)).damping)
        1.0

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored
        approximate curvature, 2015, section 6.5.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reduction_ratio"})

    initial: float = 1.0
    factor: float = 0.95**5

    def __post_init__(self) -> None:
        check_range("initial", self.initial, lambda x: x > 0, "above 0")
        check_range("factor", self.factor, lambda x: 0 < x < 1, "in (0, 1)")

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """The damping, towards 1; the initial one where none was decided before."""
        ratio, delta = evidence.reduction_ratio, evidence.damping
        delta = jnp.where(ratio > 0.75, delta * self.factor, delta)
        delta = jnp.where(ratio < 0.25, delta / self.factor, delta)
        return Shrinkage(jnp.where(jnp.isnan(delta), self.initial, delta), 1.0)


@dataclasses.dataclass(frozen=True, init=False)
class Sum:
    """Several rules' dampings added, towards the first one's target.

    Args:
        *rules: of one unit; what two of them need is measured once.

    Raises:
        TypeError: one of them is no rule, or there is none.

    Example:
        >>> from rmtdamp.damping import Evidence, GradientNorm, MeanFraction, Sum
        >>> rule = Sum(GradientNorm(0.5), MeanFraction(0.1))
        >>> found = rule(Evidence(gradient_norm=8.0))
        >>> print(found.damping, found.relative)
        2.0 0.1
    """

    rules: tuple[DampingRule, ...]

    def __init__(self, *rules: DampingRule):
        for rule in rules:
            if not callable(rule) or isinstance(rule, type):
                raise TypeError(
                    f"a rule is {rule!r}: hand over rules one by one, each a function "
                    f"or an instance, {type(self).__name__}(identity_target, "
                    "StabilityFloor())"
                )
        if not rules:
            raise TypeError(f"{type(self).__name__} needs at least one rule")
        object.__setattr__(self, "rules", rules)

    @property
    def needs(self) -> frozenset[str]:
        """All that one of them needs."""
        return frozenset().union(*map(needs_of, self.rules))

    @property
    def steps_ahead(self) -> int:
        """The furthest that one of them looks ahead in a schedule."""
        return max(getattr(rule, "steps_ahead", 0) for rule in self.rules)

    def _combined(self, evidence: Evidence, combine) -> Shrinkage:
        found = [rule(evidence) for rule in self.rules]
        return Shrinkage(
            functools.reduce(combine, [x.damping for x in found]),
            found[0].target,
            functools.reduce(combine, [x.relative for x in found]),
        )

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """Their sum."""
        return self._combined(evidence, operator.add)


class Maximum(Sum):
    """The largest of several rules' dampings, towards the first one's target.

    Dampings with a unit and relative ones are compared among themselves.

    Args:
        *rules: of one unit; what two of them need is measured once.

    Raises:
        TypeError: one of them is no rule, or there is none.

    Example:
        >>> from rmtdamp.damping import Evidence, GradientNorm, Maximum
        >>> rule = Maximum(GradientNorm(0.5), GradientNorm(2.0))
        >>> print(rule(Evidence(gradient_norm=8.0)).damping)
        4.0
    """

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """Their maximum."""
        return self._combined(evidence, jnp.maximum)
