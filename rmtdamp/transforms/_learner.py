"""A DampingLearner: how to measure, and how to decide. Both steps, no optax state."""

import dataclasses

import jax
import numpy as np

from rmtdamp._tree import accumulation_dtype, num_examples
from rmtdamp._types import Batch, Execution, LossFn, Mode, Params
from rmtdamp.damping import (
    DampingRule,
    LearnedDamping,
    identity_target,
    initial_damping,
    learn_damping,
)
from rmtdamp.hessian import moments

from ._by_hand import warn_of_slow_convolutions


@dataclasses.dataclass(frozen=True, kw_only=True)
class DampingLearner:
    """Measures the Hessian's moments on a batch and learns the damping from them.

    One refresh is `moments(loss_fn, params, batch, ...)` followed by
    `learn_damping(...)`: moments averaged with `decay`, `rule` applied to the averages,
    `floor` added, the result cut at `max_damping`.

    A learner holds no state and is a pytree: its numbers are leaves, the rest is
    static. Hand the same one to `auto_damping` and to `refresh_damping`.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss in
            evaluation mode (no dropout, running averages); see `check_loss`.
        floor: delta*, the damping before the first measurement, added to what the rule
            decides, in the unit of the damping.
        decay: weight of the past in the averages, in [0, 1).
        rule: `HessianMoments -> Shrinkage`: `identity_target` (eq. 15),
            `scaled_identity_target` (scale-equivariant), or your own.
        num_microbatches: microbatches that a batch is cut into, at least 2.
        num_probes: probes to average in a refresh, each at full cost.
        batch_size: size of the batch whose noise is meant; default: that of `batch`,
            the training batch.
        max_damping: upper bound of the damping.
        seed: of the probes, which are a function of the seed and the refresh's number:
            the same on every device and after a restart.
        execution: how microbatches run, see `rmtdamp.hessian.moments`.
        precision: matmul precision of the measurement.
        mode: how products are differentiated, see `rmtdamp.hessian.hvp`.

    Raises:
        ValueError: a number out of its range.
        TypeError: `loss_fn` or `rule` is not callable.
    """

    loss_fn: LossFn = dataclasses.field(kw_only=False)
    floor: jax.typing.ArrayLike = 1e-4
    decay: jax.typing.ArrayLike = 0.7
    rule: DampingRule = identity_target
    num_microbatches: int = 8
    num_probes: int = 1
    batch_size: int | None = None
    max_damping: jax.typing.ArrayLike = 1.0
    seed: jax.typing.ArrayLike = 0
    execution: Execution | None = None
    precision: str | None = "highest"
    mode: Mode = "forward-over-reverse"

    def __post_init__(self):
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn is {type(self.loss_fn).__name__}: hand over a function "
                "loss_fn(params, batch, *loss_args) that returns the mean loss"
            )
        if not callable(self.rule):
            raise TypeError(
                f"rule is {self.rule!r}: hand over a function from HessianMoments to "
                "Shrinkage, such as rmtdamp.identity_target"
            )
        _check_range("floor", self.floor, lambda x: x >= 0, "at least 0")
        _check_range("decay", self.decay, lambda x: 0 <= x < 1, "in [0, 1)")
        _check_range("max_damping", self.max_damping, lambda x: x > 0, "above 0")
        _check_range("num_microbatches", self.num_microbatches, lambda x: x >= 2,
                     "at least 2, since they give a variance")  # fmt: skip
        _check_range("num_probes", self.num_probes, lambda x: x >= 1, "at least 1")
        if self.batch_size is not None:
            _check_range("batch_size", self.batch_size, lambda x: x >= 1, "at least 1")

    def init(self, params: Params) -> LearnedDamping:
        """The state before any measurement: the damping is `floor`."""
        return initial_damping(self.floor, accumulation_dtype(params))

    def refresh(
        self,
        learned: LearnedDamping,
        step: jax.Array,
        params: Params,
        batch: Batch,
        loss_args: tuple,
        batch_size: int,
    ) -> LearnedDamping:
        """Measure on `batch` for the noise of `batch_size` examples, and learn.

        A batch that `num_microbatches` does not divide is measured on the largest part
        that it does divide; one smaller than `num_microbatches` gives microbatches of
        one example, and a single example changes nothing.

        Returns:
            The state after the refresh.
        """
        count = num_examples(batch)
        num = min(self.num_microbatches, count)
        if num < 2:
            return learned
        measured = moments(
            self.loss_fn,
            params,
            jax.tree.map(lambda x: x[: count - count % num], batch),
            jax.random.fold_in(jax.random.key(self.seed), learned.refresh_attempts),
            loss_args=loss_args,
            num_microbatches=num,
            num_probes=self.num_probes,
            batch_size=self.batch_size or batch_size,
            execution=self.execution,
            precision=self.precision,
            mode=self.mode,
            stderr=False,  # nobody reads it here, and it costs n vectors of memory
        )
        return learn_damping(
            learned,
            measured,
            step,
            rule=self.rule,
            floor=self.floor,
            decay=self.decay,
            max_damping=self.max_damping,
        )

    def warn_of_slow_convolutions(self, params, batch, loss_args) -> None:
        """Warn where XLA:CPU would run this refresh some thirty times slower."""
        warn_of_slow_convolutions(
            self.loss_fn,
            params,
            batch,
            loss_args,
            subject="loss",
            place="the conditional of a training step",
            way_out="every=None to auto_damping and call refresh_damping by hand every "
            "100 steps",
            stacklevel=2,
        )


def _check_range(name, value, inside, bound):
    # Traced values (inject_hyperparams, a learner passed through jit) cannot be judged.
    if isinstance(value, int | float | np.number) and not inside(value):
        raise ValueError(f"{name} is {value}, and must be {bound}")


jax.tree_util.register_dataclass(
    DampingLearner,
    data_fields=["floor", "decay", "max_damping", "seed"],
    meta_fields=[
        "loss_fn", "rule", "num_microbatches", "num_probes", "batch_size",
        "execution", "precision", "mode",
    ],
)  # fmt: skip
