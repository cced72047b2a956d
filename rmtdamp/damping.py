r"""DECIDE: numbers in, numbers out. No autodiff, no optax.

    Hessian moments  ->  damping

The idea, in three lines. Adding a damping delta to curvature s is linear shrinkage of
s towards a target tau, with intensity beta, at a lower learning rate (eq. 13):

    alpha / (s + delta) = alpha beta / (beta s + (1 - beta) tau),
    beta = 1 / (1 + delta/tau).

The curvature is measured on a batch, so it is the true one plus noise of variance m;
the beta of least expected error || beta H + (1 - beta) tau - H_true ||^2 is

    delta = tau m / (P^-1 ||H_true - tau I||_F^2),

which the paper takes at tau = 1 for a Hessian of low rank (eq. 15: delta = m), and
Ledoit and Wolf at the tau that fits best, the mean eigenvalue nu.

That says how noisy the curvature is, and not how fast a step moves. A direction that
the preconditioner believes flat moves at alpha / delta; it does not run away as long as
that is less than plain gradient descent could do in the sharpest direction of H,

    delta >= alpha lambda_max(H) / (2 f),    f of the momentum

(`StabilityFloor`). A rule is a function of what is known to a `Shrinkage`; everything
below is rules, and the averaging along a training run of what they are told.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._checks import check_range
from rmtdamp._types import Params
from rmtdamp.hessian import HessianMoments
from rmtdamp.stability import stable_learning_rate


class Shrinkage(NamedTuple):
    """What a rule decides: shrink the curvature towards `target` by `damping`.

    Both have the unit that the rule gives them: that of a Hessian eigenvalue for
    `scaled_identity_target`; for `identity_target` the target is the number 1. To them
    comes what has no unit: a transformation with preconditioner B adds `relative` times
    the mean eigenvalue of B.
    """

    damping: jax.Array | float  # (), delta
    target: jax.Array | float = 1.0  # (), tau
    relative: jax.Array | float = 0.0  # (), kappa

    @property
    def intensity(self) -> jax.Array:
        """beta, the weight that the measured curvature keeps."""
        return shrinkage_from_damping(self.damping, self.target)


class Evidence(NamedTuple):
    """What is known when a damping is decided; what nobody measured or gave is NaN.

    The first three are averaged over measurements, as in `HessianMoments`, whose place
    it can take. [H]: the unit of a Hessian eigenvalue.
    """

    mean: Any = jnp.nan  # (), nu = P^-1 Tr H, in [H]
    square: Any = jnp.nan  # (), P^-1 Tr H^2, in [H]^2
    variance: Any = jnp.nan  # (), m = P^-1 Tr Var(H), in [H]^2
    max_eigenvalue: Any = jnp.nan  # (), largest |lambda| of H, see `learn_damping`
    learning_rate: Any = jnp.nan  # (), alpha of this step
    gradient_norm: Any = jnp.nan  # (), Euclidean, of this step's gradient
    damping: Any = jnp.nan  # (), delta in force

    @property
    def dispersion(self) -> jax.Array:
        """d^2 = P^-1 ||H - nu I||_F^2."""
        return self.square - self.mean**2


DampingRule = Callable[[Evidence], Shrinkage]

MEASURED = frozenset({"moments", "max_eigenvalue"})
_KNOWN = MEASURED | {"learning_rate", "gradient_norm"}


def needs(*names: str) -> Callable[[Callable], Callable]:
    """A decorator that says what a rule needs to be told; without it, "moments".

    Only what is needed is measured. "moments" and "max_eigenvalue" are measured at a
    refresh, "learning_rate" and "gradient_norm" are known at each step, and a rule that
    needs one of these decides at each step.

    Args:
        *names: of these four.

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
    """What a rule needs to be told, see `needs`."""
    return getattr(rule, "needs", frozenset({"moments"}))


def decides_in_the_step(rule: DampingRule) -> bool:
    """Whether a rule is asked in each step; one that is told moments alone is not."""
    needed = needs_of(rule)
    return not needed or not needed <= MEASURED


def is_relative(rule: DampingRule) -> bool:
    """Whether a rule decides on a `Shrinkage.relative`; it is asked, of nothing."""
    found: list[Any] = []
    jax.eval_shape(lambda: found.append(rule(Evidence())))
    relative = getattr(found[0], "relative", 0.0)
    return not (isinstance(relative, float) and relative == 0)


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


@dataclasses.dataclass(frozen=True)
class StabilityFloor:
    r"""The least damping at which no direction runs away: delta = c alpha lambda/(2 f).

    A direction that the preconditioner believes flat (B near 0 there) moves at
    alpha / delta. Gradient descent with the same momentum is stable up to a rate of
    2 f / lambda_max(H) (`stable_learning_rate`), f = 1 + rho for momentum that sums,
    (1 + b1) / (1 - b1) for one that averages. So delta = alpha lambda_max / (2 f) is
    the smallest damping that is safe wherever B is blind, and c = `safety` times it
    leaves room for a lambda_max that changes between measurements and from batch to
    batch: with KFAC on digits, 8 trained at all rates from 0.001 to 0.3, and 2 at some.

    It follows the learning rate and the scale of the loss, and does not depend on the
    number of parameters. Its unit is that of a Hessian eigenvalue, right for KFAC and
    Lanczos-Newton, times the learning rate; in Adam that is a gradient.

    Args:
        safety: c.
        momentum: rho or b1 of the optimiser, in [0, 1).
        averaged: whether momentum averages, as Adam's does, or sums.

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

    needs: ClassVar[frozenset[str]] = frozenset({"max_eigenvalue", "learning_rate"})

    safety: float = 8.0
    momentum: float = 0.9
    averaged: bool = False

    def __post_init__(self):
        check_range("safety", self.safety, lambda x: x > 0, "above 0")
        check_range("momentum", self.momentum, lambda x: 0 <= x < 1, "in [0, 1)")

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """The damping, towards the largest eigenvalue itself."""
        stable = stable_learning_rate(
            evidence.max_eigenvalue, momentum=self.momentum, averaged=self.averaged
        )
        damping = self.safety * evidence.learning_rate / stable
        return Shrinkage(damping, evidence.max_eigenvalue)


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


@dataclasses.dataclass(frozen=True, init=False)
class Sum:
    """Several rules' dampings added, towards the first one's target.

    Args:
        *rules: of one unit; what two of them need is measured once.

    Example:
        >>> from rmtdamp.damping import Evidence, GradientNorm, MeanFraction, Sum
        >>> rule = Sum(GradientNorm(0.5), MeanFraction(0.1))
        >>> found = rule(Evidence(gradient_norm=8.0))
        >>> print(found.damping, found.relative)
        2.0 0.1
    """

    rules: tuple[DampingRule, ...]

    def __init__(self, *rules: DampingRule):
        object.__setattr__(self, "rules", rules)

    @property
    def needs(self) -> frozenset[str]:
        """All that one of them needs."""
        return frozenset().union(*map(needs_of, self.rules))

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

    Example:
        >>> from rmtdamp.damping import Evidence, GradientNorm, Maximum
        >>> rule = Maximum(GradientNorm(0.5), GradientNorm(2.0))
        >>> print(rule(Evidence(gradient_norm=8.0)).damping)
        4.0
    """

    def __call__(self, evidence: Evidence) -> Shrinkage:
        """Their maximum."""
        return self._combined(evidence, jnp.maximum)


# Repetitions of one measurement scatter by half; ten times as much is another matter.
_JUMP = 10.0


class LearnedDamping(NamedTuple):
    """The damping in force and what led to it; every field but the last is a scalar.

    Field names are distinctive, so that `optax.tree.get(opt_state, "damping")` finds
    each of them in any chain.
    """

    damping: jax.Array  # delta in force
    damping_target: jax.Array  # tau in force
    relative_damping: jax.Array  # kappa in force, in units of the preconditioner's mean
    measured_variance: jax.Array  # m as last measured, NaN before
    average_mean: jax.Array  # decayed average of nu over refreshes, NaN before
    average_dispersion: jax.Array  # decayed average of d^2, NaN before
    average_variance: jax.Array  # decayed average of m, NaN before
    max_eigenvalue: jax.Array  # largest |lambda| of H, see `learn_damping`, NaN before
    last_refresh: jax.Array  # int32, step of the last attempt, -1 before
    refresh_attempts: jax.Array  # int32, measurements made
    refresh_rejections: jax.Array  # int32, of which changed nothing
    refresh_caps: jax.Array  # int32, of which met the bound of the shrinkage
    loss_mismatches: jax.Array  # int32, of which found a loss that is no mean
    power_failures: jax.Array  # int32, of which the power iteration had not settled
    eigenvector: Params = None  # where the power iteration is; None where none is asked

    def problems(self) -> list[str]:
        """What a user should know of a run, in words; eager."""
        found = []
        if self.loss_mismatches > 0:
            found.append(
                "the loss of a batch is not the mean of its microbatches' losses, so "
                "the measured variance is not that of a batch: a sum in place of a "
                "mean, dropout, batch statistics? rmtdamp.check_loss(loss_fn, params, "
                "batch) tells"
            )
        tried = self.refresh_attempts
        if tried > 1 and self.refresh_rejections == tried:
            found.append(
                "no measurement of the damping could be used "
                '(optax.tree.get(opt_state, "refresh_rejections")): it stays at its '
                "floor; the Hessian is not finite, a batch holds one example, or the "
                "rule finds no valid damping"
            )
        if self.refresh_caps > 0:
            found.append(
                "the learned damping meets the bound of its learner, min_shrinkage: "
                "the noise outweighs the target a hundredfold at the default; under "
                "eq. 15 a loss of large scale does that, for which there is "
                "scaled_identity_target"
            )
        return found


def initial_damping(damping, dtype, eigenvector: Params = None) -> LearnedDamping:
    """Before any measurement: `damping` in force, towards 1."""
    # Copies, one per field: a training step may donate the state, which deletes its
    # buffers and refuses to see one of them twice.
    number = lambda x: jnp.array(x, dtype, copy=True)
    count = lambda x: jnp.array(x, jnp.int32)
    return LearnedDamping(
        damping=number(damping),
        damping_target=number(1),
        relative_damping=number(0),
        measured_variance=number(jnp.nan),
        average_mean=number(jnp.nan),
        average_dispersion=number(jnp.nan),
        average_variance=number(jnp.nan),
        max_eigenvalue=number(jnp.nan),
        last_refresh=count(-1),
        refresh_attempts=count(0),
        refresh_rejections=count(0),
        refresh_caps=count(0),
        loss_mismatches=count(0),
        power_failures=count(0),
        eigenvector=eigenvector,
    )


def _near(x, y) -> jax.Array:
    """Within a factor `_JUMP` of each other; false for NaN and infinity."""
    return (x <= _JUMP * y) & (y <= _JUMP * x) & jnp.isfinite(x)


# What a step leaves of the largest eigenvalue so far, where less is measured after it.
_RELEASE = 0.99


def learn_damping(
    learned: LearnedDamping,
    measured: HessianMoments | None,
    step,
    *,
    rule: DampingRule,
    floor,
    decay,
    min_shrinkage,
    eigenvalue: Any = None,
) -> LearnedDamping:
    """One measurement's worth of learning.

    The moments nu, d^2 and m are averaged, a <- decay a + (1 - decay) x from the first
    one on, the rule decides on the averages, and `floor` is added. For eq. 15 this is
    the authors' delta <- 0.7 delta + 0.3 (floor + m), because the rule is linear there;
    for a ratio of moments, averaging first is what keeps it from being far off.

    An m more than ten times above or below the average is not believed until the next
    one, within ten times of it, confirms it; then the averages begin anew from there. A
    blow-up of a few steps, which an average would carry along for thousands, so leaves
    no trace, and one that lasts is followed, and forgotten, at the second measurement.

    The largest eigenvalue is held for a while, lambda <- max(x, 0.99^k lambda) after k
    steps: batches differ, and it is the sharpest of them that a step must survive.

    Values cannot raise inside a compiled step, so what cannot be used is counted. A
    measurement that is not finite or not confirmed changes nothing; one after which the
    rule gives no valid damping (NaN, negative, or a target that is not positive) enters
    the averages and leaves the damping as it was. A damping that would leave the
    measured curvature a weight beta below `min_shrinkage` is cut there.

    Args:
        learned: the state so far.
        measured: the new moments; None where the rule does without.
        step: int32 scalar, the step to note as that of the last attempt.
        rule: what is known -> `Shrinkage`. One that needs more than is measured (the
            learning rate, ...) is asked in each step, by `decide_damping`.
        floor: added to what the rule decides.
        decay: weight of the past in the averages.
        min_shrinkage: lower bound of beta = 1 / (1 + delta/tau), without unit.
        eigenvalue: the new largest |lambda|; None where the rule does without.

    Returns:
        The state after it, in the same dtypes.
    """
    like = lambda new, old: jnp.asarray(new).astype(old.dtype)
    usable = jnp.asarray(True)
    found = learned
    if eigenvalue is not None:
        old, new = learned.max_eigenvalue, like(eigenvalue, learned.max_eigenvalue)
        usable &= jnp.isfinite(new) & (new > 0)
        steps = jnp.asarray(step) - learned.last_refresh
        kept = old * jnp.asarray(_RELEASE, old.dtype) ** jnp.maximum(steps, 0)
        held = jnp.where(jnp.isnan(old), new, jnp.maximum(new, kept))
        found = found._replace(max_eigenvalue=jnp.where(usable, held, old))
    if measured is not None:
        found, good = _averaged(found, measured, decay)
        usable &= good
    found = found._replace(
        last_refresh=like(step, learned.last_refresh),
        refresh_attempts=learned.refresh_attempts + 1,
    )
    accepted = usable
    if not decides_in_the_step(rule):
        options = {"floor": floor, "min_shrinkage": min_shrinkage}
        found, good = _decided(found, Evidence(), usable, rule=rule, **options)
        accepted &= good
    rejections = learned.refresh_rejections + (~accepted).astype(jnp.int32)
    return found._replace(refresh_rejections=rejections)


def _averaged(learned, measured: HessianMoments, decay):
    """The averages with new moments in them, and whether these could be used."""
    like = lambda new, old: jnp.asarray(new).astype(old.dtype)
    finite = (
        jnp.isfinite(measured.mean)
        & jnp.isfinite(measured.square)
        & jnp.isfinite(measured.variance)
    )
    variance = like(measured.variance, learned.average_variance)
    first = jnp.isnan(learned.average_variance)
    expected = first | _near(variance, learned.average_variance)
    confirmed = _near(variance, learned.measured_variance)
    usable = finite & (expected | confirmed)

    def average(old, new):
        new = like(new, old)
        blend = decay * old + (1 - decay) * new
        blend = jnp.where(first | ~expected, new, blend)
        return jnp.where(usable, blend, old)

    averaged = learned._replace(
        measured_variance=variance,
        average_mean=average(learned.average_mean, measured.mean),
        average_dispersion=average(learned.average_dispersion, measured.dispersion),
        average_variance=average(learned.average_variance, measured.variance),
    )
    return averaged, usable


def _decided(learned, known: Evidence, usable, *, rule, floor, min_shrinkage):
    """The state with the rule's damping in force, and whether it was a valid one."""
    like = lambda new, old: jnp.asarray(new).astype(old.dtype)
    decision = rule(
        known._replace(
            mean=learned.average_mean,
            square=learned.average_dispersion + learned.average_mean**2,
            variance=learned.average_variance,
            max_eigenvalue=learned.max_eigenvalue,
            damping=learned.damping,
        )
    )
    if not isinstance(decision, Shrinkage):
        raise TypeError(
            f"rule returned a {type(decision).__name__}: a rule is a function from "
            "what is known (Evidence) to Shrinkage(damping, target)"
        )
    damping = decision.damping + floor
    target = decision.target
    relative = decision.relative
    # Comparisons with NaN are false, so a NaN in any is rejected.
    accepted = usable & (damping >= 0) & (target > 0) & jnp.isfinite(target)
    accepted &= relative >= 0
    bound = damping_from_shrinkage(min_shrinkage, target)
    most = damping_from_shrinkage(min_shrinkage)
    capped = accepted & ((damping > bound) | (relative > most))
    choose = lambda new, old: jnp.where(accepted, like(new, old), old)
    decided = learned._replace(
        damping=choose(jnp.minimum(damping, bound), learned.damping),
        damping_target=choose(target, learned.damping_target),
        relative_damping=choose(jnp.minimum(relative, most), learned.relative_damping),
        refresh_caps=learned.refresh_caps + capped.astype(jnp.int32),
    )
    return decided, accepted


def decide_damping(
    learned: LearnedDamping,
    known: Evidence,
    *,
    rule: DampingRule,
    floor,
    min_shrinkage,
) -> LearnedDamping:
    """What a rule that looks at the step decides in it.

    Args:
        learned: the state, with what is measured and averaged.
        known: what else the rule needs: learning rate, preconditioner, gradient.
        rule: what is known -> `Shrinkage`.
        floor: added to what the rule decides.
        min_shrinkage: lower bound of beta = 1 / (1 + delta/tau).

    Returns:
        The state with the damping in force: the one before where the rule finds none.
    """
    options = {"floor": floor, "min_shrinkage": min_shrinkage}
    return _decided(learned, known, jnp.asarray(True), rule=rule, **options)[0]
