"""A DampingLearner: how to measure, and how to decide. Both steps, no optax state."""

import dataclasses
import functools
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rmtdamp._basis import draw, normalised, unpack
from rmtdamp._checks import check_decays, check_mode, check_range
from rmtdamp._jax import is_traced, matmul_precision
from rmtdamp._parts import Labels, Parts, as_function, parts_of
from rmtdamp._sharding import regrouped
from rmtdamp._tree import accumulation_dtype, num_examples, scattered, vdot
from rmtdamp._types import Execution, LossFn, Mode, Params
from rmtdamp.damping import (
    MEASURED,
    SETTLED,
    DampingRule,
    Evidence,
    LearnedDamping,
    decide_damping,
    identity_target,
    initial_damping,
    learn_damping,
    needs_of,
)
from rmtdamp.hessian import HessianMoments, hvp, moments

from ._measurer import Context, training_loss, with_numbers


@with_numbers("floor", "decay", "min_shrinkage", "seed")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DampingLearner:
    """Measures the Hessian's moments on a batch and learns the damping from them.

    One refresh measures what the rule needs, `moments(loss_fn, params, batch, ...)` or
    the largest eigenvalue, by a power iteration that goes on where the last one ended
    (eight products at first, then one), and learns from it
    (`rmtdamp.damping.learn_damping`): moments averaged with `decay`, `rule` applied to
    what is known, `floor` added, the result cut where beta = 1 / (1 + delta/tau) would
    fall below `min_shrinkage`.

    A learner holds no state, and all its settings: hand the same one to `auto_damping`
    or `auto_adam` and to `rmtdamp.refresh`. It is a pytree; its numbers are leaves, the
    rest is static.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss in
            evaluation mode (no dropout, running averages) and without a loss scale; see
            `check_loss`. With BatchNorm moments are of this loss, and eigenvalues and a
            reduction ratio, which bound a step, of the loss whose gradient is taken:
            its attribute `in_training`, as `rmtdamp.flax.curvature_loss` sets it. Under
            a rule without moments your own `loss_fn` may be that loss itself.
        floor: delta*, the damping before the first measurement, added to what the rule
            decides, in the unit of the damping. The default, 1e-4, is small for KFAC
            and a large eps for Adam, which takes 1e-8. At 0 the damping may be 0, and a
            parameter whose gradient always was 0 then moves by 0/0.
        decay: weight of the past in the averages, in [0, 1).
        rule: what is known -> `Shrinkage`, see `rmtdamp.damping`: `identity_target`
            (eq. 15), `StabilityFloor`, `relative_target`, ..., or your own. What it
            `needs` is measured, and no more.
        num_microbatches: microbatches that a batch is cut into, at least 2.
        num_probes: probes to average in a refresh, each at full cost.
        batch_size: size of the batch whose noise is meant; default: that of `batch`,
            the training batch.
        min_shrinkage: lower bound of beta, in (0, 1): the weight that the measured
            curvature keeps whatever the rule says. Without unit, so it means the same
            whatever the scale of the loss.
        seed: of the probes, which are a function of the seed and the refresh's number:
            the same on every device and after a restart.
        execution: how microbatches run, see `rmtdamp.hessian.moments`; default: "eager"
            by hand on a CPU, "scan" in the step there, "vmap" on accelerators.
        precision: matmul precision of the measurement.
        mode: how products are differentiated, see `rmtdamp.hessian.hvp`.
        labels: a damping for each label, all from the same products: a pytree of names
            like params, or a prefix of one, or a function from params to one, as in
            `optax.partition`; `rmtdamp.damping.by_layer` names the layers. Numbers in
            the state then have an entry for each of `label_names`, and the damping
            travels inward as a tree like params, which `scale_by_adam_shrinkage` and
            `scale_by_kfac` take. The moments are those of a label's rows
            (`rmtdamp.hessian.moments`), the gradient's norm is the label's, and the
            power iteration keeps each part v_l of its vector at unit norm: lambda_l =
            ||(H v)_l||. Where it rests, H v = lambda_l v_l in each part, so the Hessian
            divided by the lambda_l has the eigenvalue 1 at v: its largest for a
            positive v, as for one label; a local maximum of v^T H v over such v else.

    Raises:
        ValueError: a number out of its range, or an unknown mode; from `init`, labels
            that are no prefix of params.
        TypeError: `loss_fn` or `rule` is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> learner = rmtdamp.DampingLearner(loss_fn, rule=rmtdamp.StabilityFloor())
        >>> sorted(learner.rule.needs)
        ['learning_rate', 'max_eigenvalue']
    """

    state_type: ClassVar[type] = LearnedDamping

    loss_fn: LossFn = dataclasses.field(kw_only=False)
    floor: Any = 1e-4
    decay: Any = 0.7
    rule: DampingRule = identity_target
    num_microbatches: int = 8
    num_probes: int = 1
    batch_size: int | None = None
    min_shrinkage: Any = 0.01
    seed: Any = 0
    execution: Execution | None = None
    precision: str | None = "highest"
    mode: Mode = "forward-over-reverse"
    labels: Labels | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", as_function(self.labels))
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn is {type(self.loss_fn).__name__}: hand over a function "
                "loss_fn(params, batch, *loss_args) that returns the mean loss"
            )
        if not callable(self.rule) or isinstance(self.rule, type):
            raise TypeError(
                f"rule is {self.rule!r}: hand over a function of what is known "
                "(Evidence) to Shrinkage, such as rmtdamp.identity_target, or an "
                "instance, rmtdamp.StabilityFloor()"
            )
        check_range("floor", self.floor, lambda x: x >= 0, "at least 0")
        check_decays(decay=self.decay)
        bound = self.min_shrinkage
        check_range("min_shrinkage", bound, lambda x: 0 < x < 1, "in (0, 1)")
        for name, least, why in (
            ("num_microbatches", 2, ", for a variance"),
            ("num_probes", 1, ""),
            ("batch_size", 1, ""),
        ):
            whole = lambda n, least=least: n >= least and n % 1 == 0
            bound = f"a whole number of at least {least}{why}"
            check_range(name, getattr(self, name), whole, bound)
        check_mode(self.mode)

    def init(self, params: Params) -> LearnedDamping:
        """The state before any measurement: the damping is `floor`."""
        needed, parts = needs_of(self.rule), self.parts(params)
        start = lambda name: (
            _start(draw(jax.random.key(self.seed), params, scattered), params, parts)
            if name in needed
            else None
        )
        learned = initial_damping(
            self.floor,
            accumulation_dtype(params),
            parts.shape,
            start("max_eigenvalue"),
            start("effective_eigenvalue"),
        )
        if needed & MEASURED:
            return learned
        return learned._replace(last_refresh=jnp.full((), -2, jnp.int32))

    def parts(self, params: Params) -> Parts:
        """Which leaves share a damping."""
        return parts_of(self.labels, params)

    def label_names(self, params: Params) -> tuple[str, ...] | None:
        """What to name the entries of the state.

        `dict(zip(learner.label_names(params), optax.tree.get(opt_state, "damping")))`
        is what to log.

        Returns:
            The labels, sorted; None without labels.
        """
        return self.parts(params).names

    def refresh(self, measured: LearnedDamping, context: Context) -> LearnedDamping:
        """Measure on the batch for the noise of `batch_size` examples, and learn.

        A batch that `num_microbatches` does not divide is measured on the largest part
        that it does divide; one smaller than `num_microbatches` gives microbatches of
        one example, and a single example changes nothing.

        Returns:
            The state after the refresh.
        """
        needed = needs_of(self.rule)
        held = measured.eigenvector is not None, measured.probe is not None
        if held != ("max_eigenvalue" in needed, "effective_eigenvalue" in needed):
            raise ValueError(
                f"the state is not that of a learner with the rule {self.rule!r}: it "
                "belongs to the transformation whose init made it, and refresh takes "
                "the very learner that this was given"
            )
        traced = is_traced(context, measured)
        learn = _learn if traced else _compiled_learn
        value = probe = None
        if "max_eigenvalue" in needed:
            value, vector, cosine = _powered(
                self, measured, measured.eigenvector, context
            )
            failures = _failures(measured.power_failures, cosine)
            measured = measured._replace(eigenvector=vector, power_failures=failures)
        if "effective_eigenvalue" in needed:
            scale, vector, cosine = _powered(
                self, measured, measured.probe.vector, context
            )
            probe = measured.probe._replace(vector=vector, scale=scale, cosine=cosine)
        ratio = jnp.nan
        if "reduction_ratio" in needed:
            reduction = _reduction if traced else _compiled_reduction
            ratio = reduction(self, context)
        count = num_examples(context.batch)
        if "moments" not in needed:
            learned = learn(self, measured, None, value, probe, ratio, context.step)
            return _with_mismatch(learned, self, context, count - count % 2, None)
        num = min(self.num_microbatches, count)
        if num < 2:
            warnings.warn(
                "a batch of one example has no variance, so no damping is learned from "
                "it: hand a curvature_batch of more to update or refresh",
                stacklevel=2,
            )
            return _refused(measured, context.step)
        batch = jax.tree.map(lambda x: x[: count - count % num], context.batch)
        execution = self.execution
        if execution is None and traced and jax.default_backend() == "cpu":
            # In a conditional XLA:CPU runs convolutions slowly, unrolled or not.
            execution = "scan"
        found = moments(
            self.loss_fn,
            context.params,
            batch,
            _probe_key(self.seed, measured.refresh_attempts),
            loss_args=context.loss_args,
            num_microbatches=num,
            num_probes=self.num_probes,
            batch_size=self.batch_size or context.batch_size,
            labels=self.labels,
            execution=execution,
            precision=self.precision,
            mode=self.mode,
            stderr=False,  # nobody reads it here, and it costs n vectors of memory
        )
        learned = learn(self, measured, found, value, probe, ratio, context.step)
        return _with_mismatch(learned, self, context, count - count % num, found.loss)

    def decide(
        self, measured: LearnedDamping, known: Evidence, counted: Any = False
    ) -> LearnedDamping:
        """What a rule that looks at the step makes of it; see `decide_damping`."""
        return decide_damping(
            measured,
            known,
            rule=self.rule,
            floor=self.floor,
            min_shrinkage=self.min_shrinkage,
            counted=counted,
        )


@jax.jit
def _failures(counted, cosine):
    return counted + (~(cosine > SETTLED)).astype(counted.dtype)


# Products before the first eigenvalue; later ones start where the last has ended.
_FIRST_PRODUCTS = 8


@functools.partial(jax.jit, static_argnames="parts")
def _start(drawn, params, parts):
    # Apart from the draw, which XLA would make anew for each leaf that is cut out.
    if parts.names is None:
        return unpack(normalised(drawn)[0], params)
    return parts.normalised(unpack(drawn, params))[0]


@jax.jit
def _power_step(learner, context, vector):
    """One product of a power iteration: ||H v||, the next v, its cosine with v."""
    found = hvp(
        training_loss(learner.loss_fn),
        context.params,
        context.batch,
        vector,
        loss_args=context.loss_args,
        precision=learner.precision,
        mode=learner.mode,
    )
    found = jax.tree.map(lambda x, v: x.astype(v.dtype), found, vector)
    parts = learner.parts(context.params)
    following, value = parts.normalised(found)
    good = jnp.isfinite(value) & (value > 0)
    agreement = jnp.abs(parts.vdot(vector, following))
    return (
        jnp.where(good, value, jnp.nan),
        jax.tree.map(jnp.where, parts.spread(good, vector), following, vector),
        agreement,
    )


def _powered(learner, measured, vector, context):
    """Of the last product: ||H v||, H v / ||H v||, its cosine with v."""
    take = lambda _, carry: _power_step(learner, context, carry[1])
    if is_traced(measured, context):
        count = jnp.where(measured.refresh_attempts == 0, _FIRST_PRODUCTS, 1)
        zero = jnp.zeros_like(measured.max_eigenvalue)
        return jax.lax.fori_loop(0, count, take, (zero, vector, zero))
    carry = None, vector, None
    for i in range(1 if int(measured.refresh_attempts) else _FIRST_PRODUCTS):
        carry = take(i, carry)
    return carry


def _reduction(learner, context) -> jax.Array:
    """How far the loss fell in the last step, over what its quadratic model says.

    Returns:
        A scalar: minus infinity where the loss is no longer finite or the model says
        that it rises, NaN where there was no step.
    """
    start, batch, args = context.previous_params, context.batch, context.loss_args
    step = jax.tree.map(jnp.subtract, context.params, start)
    loss_fn = training_loss(learner.loss_fn)
    loss = lambda x: loss_fn(x, batch, *args)
    with matmul_precision(learner.precision):
        before, slope = jax.value_and_grad(loss)(start)
        after = loss(context.params)
    bend = hvp(
        loss_fn,
        start,
        batch,
        step,
        loss_args=args,
        precision=learner.precision,
        mode=learner.mode,
    )
    predicted = vdot(slope, step) + vdot(step, bend) / 2
    falls = predicted < 0
    ratio = (after - before).astype(predicted.dtype) / jnp.where(falls, predicted, -1)
    ratio = jnp.where(falls & jnp.isfinite(after), ratio, -jnp.inf)
    return jnp.where(vdot(step, step) == 0, jnp.nan, ratio)


_compiled_reduction = jax.jit(_reduction)


@jax.jit
def _probe_key(seed, number):
    return jax.random.fold_in(jax.random.key(seed), number)


def _learn(
    learner, before, found: HessianMoments | None, value, probe, ratio, step
) -> LearnedDamping:
    return learn_damping(
        before,
        found,
        step,
        rule=learner.rule,
        floor=learner.floor,
        decay=learner.decay,
        min_shrinkage=learner.min_shrinkage,
        eigenvalue=value,
        probe=probe,
        reduction_ratio=ratio,
    )


def _with_mismatch(learned, learner, context, count: int, mean_loss) -> LearnedDamping:
    """Counted if the first `count` examples show a loss that is no mean.

    Looked at in the first measurement alone: the loss stays what it is.

    Returns:
        The state with the count.
    """
    counted = learned.loss_mismatches
    look = lambda: _mismatches(counted, learner, context, count, mean_loss)
    if count < 2:
        return learned
    if is_traced(learned, context):
        first = learned.refresh_attempts == 1
        mismatches = jax.lax.cond(first, look, lambda: counted)
    elif int(learned.refresh_attempts) != 1:
        return learned
    else:
        mismatches = look()
    return learned._replace(loss_mismatches=mismatches)


@functools.partial(jax.jit, static_argnames="count")
def _mismatches(counted, learner, context, count: int, mean_loss) -> jax.Array:
    """One more if a batch's loss differs from the mean of its parts' losses.

    It does for a sum, for batch statistics and for dropout; a loss that is not finite
    says nothing. With no `mean_loss` there are no moments to go wrong: batch statistics
    and dropout may be meant, and the losses of two halves show a sum alone.

    Returns:
        The count.
    """
    batch = jax.tree.map(lambda x: x[:count], context.batch)
    loss_of = lambda part: learner.loss_fn(context.params, part, *context.loss_args)
    with matmul_precision(learner.precision):
        loss = loss_of(batch)
        allowed = 1e-4 + 16 * float(jnp.finfo(loss.dtype).eps)
        if mean_loss is None:
            allowed = 0.25  # half for a sum
            # At once: XLA on a CPU runs convolutions slowly in a loop.
            parts = jax.tree.map(lambda x: regrouped(x, 2), batch)
            mean_loss = jnp.mean(jax.vmap(loss_of, in_axes=1)(parts))
    dtype = accumulation_dtype(context.params)
    loss, mean_loss = loss.astype(dtype), mean_loss.astype(dtype)
    scale = jnp.maximum(jnp.abs(loss), jnp.abs(mean_loss))
    differ = jnp.isfinite(scale) & (jnp.abs(loss - mean_loss) > allowed * scale)
    return counted + differ.astype(counted.dtype)


_compiled_learn = jax.jit(_learn)


@jax.jit
def _refused(learned: LearnedDamping, step) -> LearnedDamping:
    return learned._replace(
        last_refresh=jnp.asarray(step).astype(learned.last_refresh.dtype),
        refresh_attempts=learned.refresh_attempts + 1,
        refresh_rejections=learned.refresh_rejections + 1,
    )
