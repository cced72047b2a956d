"""What a run learns: measurements averaged, a rule asked, a damping in force."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rmtdamp._jax import is_traced
from rmtdamp._parts import WHOLE, Parts
from rmtdamp._types import Params
from rmtdamp.hessian import HessianMoments

from ._evidence import DampingRule, Evidence, decides_in_the_step
from ._shrinkage import Shrinkage, damping_from_shrinkage
from ._state import LearnedDamping, Probe

# Repetitions of one measurement scatter by half; ten times as much is another matter.
_JUMP = 10.0

# Steps in which an eigenvalue is let go by a factor of e where less is measured after
# it; fewer at first, when curvature falls by orders.
_LIFE = 100.0

# The cosine of a vector and its product from which on an iteration has settled.
SETTLED = 0.9


def _near(x, y) -> jax.Array:
    """Within a factor `_JUMP` of each other; false for NaN and infinity."""
    return (x <= _JUMP * y) & (y <= _JUMP * x) & jnp.isfinite(x)


def _kept(learned, step, early) -> jax.Array:
    """What is left of an eigenvalue since the last measurement.

    At first it lives for a share `early` of the run so far.

    Returns:
        A scalar.
    """
    step = jnp.asarray(step)
    dtype = learned.damping.dtype
    steps = jnp.maximum(step - learned.last_refresh, 0).astype(dtype)
    return jnp.exp(-steps / jnp.clip(early * step.astype(dtype), 1, _LIFE))


def _held(old, new, kept) -> jax.Array:
    """What is new, at most `_JUMP` times the old; see `learn_damping` if it is less."""
    return jnp.where(jnp.isnan(old), new, jnp.clip(new, kept * old, _JUMP * old))


def learn_damping(
    learned: LearnedDamping,
    measured: HessianMoments | None,
    step: jax.typing.ArrayLike,
    *,
    rule: DampingRule,
    floor: jax.typing.ArrayLike,
    decay: jax.typing.ArrayLike,
    min_shrinkage: jax.typing.ArrayLike,
    eigenvalue: Any = None,
    probe: Probe | None = None,
    reduction_ratio: Any = jnp.nan,
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

    Batches differ, and it is the sharpest of them that a step must survive. So a
    largest eigenvalue x that is smaller than the last one, lambda, is followed slowly,
    lambda <- max(x, lambda e^(-k/h)) after k steps, however often they were measured
    in: h is 100 steps, or half of the run so far where that is less. It grows at most
    tenfold in a measurement.

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
        probe: with the new product of a power iteration that goes on in `settle_probe`;
            None where the rule does without.
        reduction_ratio: of the last step, NaN where there was none.

    Returns:
        The state after it, in the same dtypes.

    Example:
        >>> from rmtdamp import identity_target
        >>> from rmtdamp.damping import initial_damping, learn_damping
        >>> from rmtdamp.hessian import HessianMoments
        >>> learned, options = (
        ...     initial_damping(0.5, "float32"),
        ...     {"decay": 0.75, "floor": 0.5},
        ... )
        >>> for step, m in enumerate((1.0, 2.0)):
        ...     learned = learn_damping(
        ...         learned,
        ...         HessianMoments(0.0, 1.0, m),
        ...         step,
        ...         rule=identity_target,
        ...         min_shrinkage=0.01,
        ...         **options,
        ...     )
        >>> print(learned.damping)
        1.75
    """
    like = lambda new, old: jnp.asarray(new).astype(old.dtype)
    usable = jnp.asarray(True)
    found = learned
    if eigenvalue is not None:
        old, new = learned.max_eigenvalue, like(eigenvalue, learned.max_eigenvalue)
        usable &= jnp.isfinite(new) & (new > 0)
        held = _held(old, new, _kept(learned, step, early=0.5))
        found = found._replace(max_eigenvalue=jnp.where(usable, held, old))
    if probe is not None:
        good = jnp.isfinite(probe.scale) & (probe.scale > 0)
        usable &= good
        probe = probe._replace(kept=_kept(learned, step, early=1.0), waits=good)
        first = jnp.isnan(learned.effective_eigenvalue) & good
        value = jnp.where(first, probe.scale, learned.effective_eigenvalue)
        probe = jax.tree.map(like, probe, learned.probe)
        found = found._replace(effective_eigenvalue=value, probe=probe)
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
        known = Evidence(
            reduction_ratio=reduction_ratio,
            damping=jnp.where(
                learned.refresh_attempts > learned.refresh_rejections,
                jnp.maximum(learned.damping - floor, 0),
                jnp.nan,
            ),
        )
        found, good = _decided(found, known, usable, rule=rule, **options)
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
            # What a preconditioner sees may be newer, and sharper.
            max_eigenvalue=jnp.fmax(learned.max_eigenvalue, known.max_eigenvalue),
            effective_eigenvalue=learned.effective_eigenvalue,
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
    floor: jax.typing.ArrayLike,
    min_shrinkage: jax.typing.ArrayLike,
    counted: Any = False,
) -> LearnedDamping:
    """What a rule that looks at the step decides in it.

    Args:
        learned: the state, with what is measured and averaged.
        known: what else the rule needs: learning rate, preconditioner, gradient.
        rule: what is known -> `Shrinkage`.
        floor: added to what the rule decides.
        min_shrinkage: lower bound of beta = 1 / (1 + delta/tau).
        counted: whether a damping that is not valid is a rejection: in the first step
            after a measurement.

    Returns:
        The state with the damping in force: the one before where the rule finds none.

    Example:
        >>> from rmtdamp.damping import (
        ...     Evidence,
        ...     GradientNorm,
        ...     decide_damping,
        ...     initial_damping,
        ... )
        >>> learned = decide_damping(
        ...     initial_damping(0.5, "float32"),
        ...     Evidence(gradient_norm=8.0),
        ...     rule=GradientNorm(0.5),
        ...     floor=0.5,
        ...     min_shrinkage=0.01,
        ... )
        >>> print(learned.damping)
        2.5
    """
    options = {"floor": floor, "min_shrinkage": min_shrinkage}
    decided, accepted = _decided(
        learned, known, jnp.asarray(True), rule=rule, **options
    )
    # One that is rejected for want of a measurement has been counted as that.
    tried, rejections = learned.refresh_attempts, learned.refresh_rejections
    known_enough = (tried == 0) | (rejections < tried)
    rejected = jnp.asarray(counted) & ~accepted & known_enough
    return decided._replace(refresh_rejections=rejections + rejected.astype(jnp.int32))


def settle_probe(
    learned: LearnedDamping,
    solve: Callable[[Params], Params],
    parts: Parts = WHOLE,
) -> LearnedDamping:
    """The half of a power iteration on D^-1 H, D = B + delta, that the step knows.

    With w = H v the measured product of a unit vector v, D symmetric and positive,

        mu = delta min(w^T D^-1 w / |v^T w|, ||D^-1 w||)  ->  delta max |lambda(D^-1 H)|

    as v <- D^-1 w / ||D^-1 w|| goes on. The first is u^T A^2 u / |u^T A u| of A =
    D^-1/2 H D^-1/2 along u = D^1/2 v: exact for an H of rank one, and not above the
    largest eigenvalue of a positive A. The second bounds it by ||H v|| where H curves
    both ways along v. Neither needs v, of which a step knows the product alone, nor a D
    of before. mu is the largest eigenvalue of H as the preconditioner leaves it: the
    same where B is zero, smaller where B is as large as H in its sharp directions. It
    is held as the largest eigenvalue is (`learn_damping`), from that of H at the first
    measurement on, but h is 100 steps, or all of the run so far where that is less: a
    damping that falls takes mu with it, and the first steps at a large learning rate
    need theirs. With labels all this is done in each part: mu_l, v_l, w_l.

    Args:
        learned: the state, with a probe in it.
        solve: x -> D^-1 x, B the preconditioner and delta the damping in force.
        parts: of the params.

    Returns:
        The state with the eigenvalue in it. The same if no product waits, or where D is
        not finite and positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.damping import initial_damping, settle_probe
        >>> learned = initial_damping(1.0, "float32", probe=jnp.array([1.0, 0.0]))
        >>> same = settle_probe(learned, lambda x: x / 2)  # no product waits
        >>> print(same.effective_eigenvalue)
        nan
    """

    def settled(learned):
        probe = learned.probe
        found = solve(probe.vector)
        squared = parts.vdot(probe.vector, found)  # of w / ||w||
        vector, length = parts.normalised(found)
        waits, quotient = probe.waits > 0, squared / probe.cosine
        value = learned.damping * probe.scale * jnp.minimum(quotient, length)
        good = waits & jnp.isfinite(value) & (value > 0)
        # Where v is an eigenvector of D^-1 H both are its eigenvalue.
        near = (quotient > SETTLED * length) & (length > SETTLED * quotient)
        failed = waits & ~near
        held = _held(learned.effective_eigenvalue, value, probe.kept)
        keep = lambda new, old: jnp.where(good, new.astype(old.dtype), old)
        return learned._replace(
            effective_eigenvalue=keep(held, learned.effective_eigenvalue),
            power_failures=learned.power_failures + failed.astype(jnp.int32),
            probe=probe._replace(
                # Where D is not valid the iteration begins anew, with H alone.
                vector=jax.tree.map(
                    lambda good, new, old: jnp.where(good, new.astype(old.dtype), old),
                    parts.spread(good, vector),
                    vector,
                    probe.vector,
                ),
                waits=jnp.zeros_like(probe.waits),
            ),
        )

    assert learned.probe is not None
    waits = (learned.probe.waits > 0).any()
    if not is_traced(waits):  # an eager cond is compiled at every call
        return settled(learned) if waits else learned
    return jax.lax.cond(waits, settled, lambda x: x, learned)
