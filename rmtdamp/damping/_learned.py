"""What a run learns: measurements averaged, a rule asked, a damping in force."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._types import Params
from rmtdamp.hessian import HessianMoments

from ._rules import DampingRule, Evidence, decides_in_the_step
from ._shrinkage import Shrinkage, damping_from_shrinkage

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
