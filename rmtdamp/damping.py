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
Ledoit and Wolf at the tau that fits best, the mean eigenvalue nu. Everything below is
this algebra and its averaging along a training run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp.hessian import HessianMoments


class Shrinkage(NamedTuple):
    """What a rule decides: shrink the curvature towards `target` by `damping`.

    Both have the unit that the rule gives them: that of a Hessian eigenvalue for
    `scaled_identity_target`; for `identity_target` the target is the number 1.
    """

    damping: jax.Array  # (), delta
    target: jax.Array | float  # (), tau

    @property
    def intensity(self) -> jax.Array:
        """beta, the weight that the measured curvature keeps."""
        return shrinkage_from_damping(self.damping, self.target)


DampingRule = Callable[[HessianMoments], Shrinkage]


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


def identity_target(moments: HessianMoments) -> Shrinkage:
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
        Shrinkage(damping=0.02, target=1.0)

    References:
        Granziol and Baskerville, eq. 15.
    """
    return Shrinkage(moments.variance, 1.0)


def scaled_identity_target(moments: HessianMoments) -> Shrinkage:
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


# Repetitions of one measurement scatter by half; ten times as much is another matter.
_JUMP = 10.0


class LearnedDamping(NamedTuple):
    """The damping in force and what led to it; every field is a scalar.

    Field names are distinctive, so that `optax.tree.get(opt_state, "damping")` finds
    each of them in any chain.
    """

    damping: jax.Array  # delta in force
    damping_target: jax.Array  # tau in force
    measured_variance: jax.Array  # m as last measured, NaN before
    average_mean: jax.Array  # decayed average of nu over refreshes, NaN before
    average_dispersion: jax.Array  # decayed average of d^2, NaN before
    average_variance: jax.Array  # decayed average of m, NaN before
    last_refresh: jax.Array  # int32, step of the last attempt, -1 before
    refresh_attempts: jax.Array  # int32, measurements made
    refresh_rejections: jax.Array  # int32, of which changed nothing
    refresh_caps: jax.Array  # int32, of which met the bound of the shrinkage
    loss_mismatches: jax.Array  # int32, of which found a loss that is no mean

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


def initial_damping(damping, dtype) -> LearnedDamping:
    """Before any measurement: `damping` in force, towards 1."""
    # Copies, one per field: a training step may donate the state, which deletes its
    # buffers and refuses to see one of them twice.
    number = lambda x: jnp.array(x, dtype, copy=True)
    count = lambda x: jnp.array(x, jnp.int32)
    return LearnedDamping(
        damping=number(damping),
        damping_target=number(1),
        measured_variance=number(jnp.nan),
        average_mean=number(jnp.nan),
        average_dispersion=number(jnp.nan),
        average_variance=number(jnp.nan),
        last_refresh=count(-1),
        refresh_attempts=count(0),
        refresh_rejections=count(0),
        refresh_caps=count(0),
        loss_mismatches=count(0),
    )


def _near(x, y) -> jax.Array:
    """Within a factor `_JUMP` of each other; false for NaN and infinity."""
    return (x <= _JUMP * y) & (y <= _JUMP * x) & jnp.isfinite(x)


def learn_damping(
    learned: LearnedDamping,
    measured: HessianMoments,
    step,
    *,
    rule: DampingRule,
    floor,
    decay,
    min_shrinkage,
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

    Values cannot raise inside a compiled step, so what cannot be used is counted. A
    measurement that is not finite or not confirmed changes nothing; one after which the
    rule gives no valid damping (NaN, negative, or a target that is not positive) enters
    the averages and leaves the damping as it was. A damping that would leave the
    measured curvature a weight beta below `min_shrinkage` is cut there.

    Args:
        learned: the state so far.
        measured: the new moments.
        step: int32 scalar, the step to note as that of the last attempt.
        rule: averaged moments -> `Shrinkage`.
        floor: added to what the rule decides.
        decay: weight of the past in the averages.
        min_shrinkage: lower bound of beta = 1 / (1 + delta/tau), without unit.

    Returns:
        The state after it, in the same dtypes.
    """
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

    nu = average(learned.average_mean, measured.mean)
    d2 = average(learned.average_dispersion, measured.dispersion)
    m = average(learned.average_variance, measured.variance)
    decision = rule(HessianMoments(nu, d2 + nu**2, m))
    if not isinstance(decision, Shrinkage):
        raise TypeError(
            f"rule returned a {type(decision).__name__}: a rule is a function from "
            "HessianMoments to Shrinkage(damping, target)"
        )
    damping = decision.damping + floor
    target = decision.target
    # Comparisons with NaN are false, so a NaN in either is rejected.
    accepted = usable & (damping >= 0) & (target > 0) & jnp.isfinite(target)
    bound = damping_from_shrinkage(min_shrinkage, target)
    capped = accepted & (damping > bound)
    choose = lambda new, old: jnp.where(accepted, like(new, old), old)
    return learned._replace(
        damping=choose(jnp.minimum(damping, bound), learned.damping),
        damping_target=choose(target, learned.damping_target),
        measured_variance=variance,
        average_mean=nu,
        average_dispersion=d2,
        average_variance=m,
        last_refresh=like(step, learned.last_refresh),
        refresh_attempts=learned.refresh_attempts + 1,
        refresh_rejections=learned.refresh_rejections + (~accepted).astype(jnp.int32),
        refresh_caps=learned.refresh_caps + capped.astype(jnp.int32),
    )
