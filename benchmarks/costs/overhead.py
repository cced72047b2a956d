"""What a damping that learns itself costs, and KFAC: whole steps, over plain ones.

A step is a gradient, `tx.update` and `apply_updates`, jitted.
"""

import functools

import jax
import optax
from flax import nnx

import rmtdamp
import rmtdamp.flax
from rmtdamp.demo._train import cross_entropy
from rmtdamp.hessian import moments

from .timing import interleaved, model_of, problem

EVERY, NEVER = 100, 1_000_000
COLUMNS = "ratio baseline_seconds flops_ratio bytes_ratio"


class Steps:
    """So many jitted training steps on one batch, waited for at their end.

    `by_hand(count, state, params)` measures between them.
    """

    def __init__(self, tx, loss_fn, params, batch, by_hand=None, loss_args=()):
        tx = optax.with_extra_args_support(tx)
        self.by_hand, self.batch = by_hand, batch
        self.carry = params, tx.init(params)

        @jax.jit
        def step(params, state, batch):
            grads = jax.grad(loss_fn)(params, batch)
            extra = {"batch": batch, "loss_args": loss_args}
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        self.step = step

    def __call__(self, num):
        for i in range(num):
            params, state = self.carry
            state = self.by_hand(i, state, params) if self.by_hand else state
            self.carry = self.step(params, state, self.batch)
        jax.block_until_ready(self.carry)

    def counts(self):
        """XLA's FLOPs and bytes of a step."""
        found = self.step.lower(*self.carry, self.batch).compile().cost_analysis()
        return found["flops"], found["bytes accessed"]


def over(effort, what, baseline, other, num, pairs=25):
    """So many steps of the one over those of the other."""
    calls = (functools.partial(steps, num) for steps in (baseline, other))
    return interleaved(*calls, min(effort.pairs, pairs), what)


def step_row(effort, what, batch_size):
    """Adam with shrinkage over optax.adam; the learner in the step over that."""
    case, inner = problem("mlp", batch_size), rmtdamp.adam_shrinkage(1e-3)
    plain = Steps(inner, *case)
    if what == "adam_shrinkage":
        adam = Steps(optax.adam(1e-3), *case)
        counts = zip(adam.counts(), plain.counts(), strict=True)
        flops, memory = (b / a for a, b in counts)
        found = over(effort, what, adam, plain, 20)
        return found | {"flops_ratio": flops, "bytes_ratio": memory}
    every = EVERY if what == "auto_damping" else NEVER  # the refresh out of reach
    learned = Steps(rmtdamp.auto_damping(inner, case[0], every=every), *case)
    learned(1)
    found = over(effort, what, plain, learned, EVERY if every == EVERY else 20)
    assert learned.step._cache_size() == 1, "the step compiled two programs"
    return found


def refresh_row(effort, how, kind, batch_size):
    """A refresh in gradients of the same batch, by how the microbatches run."""
    loss_fn, params, batch = problem(kind, batch_size)
    gradient, key = jax.jit(jax.grad(loss_fn)), jax.random.key(0)
    options = {"execution": how, "stderr": False}
    return interleaved(
        lambda: jax.block_until_ready(gradient(params, batch)),
        lambda: jax.block_until_ready(moments(loss_fn, params, batch, key, **options)),
        min(effort.pairs, 3 if kind == "cnn" and how != "unroll" else 25),
        f"refresh, {how}, {kind} {batch_size}",
    )


def convolution_row(effort, what, steps):
    """The CNN by hand or in the step: one refresh in few steps, restated for 100."""
    case = problem("cnn", 128)
    inner, learner = rmtdamp.adam_shrinkage(1e-3), rmtdamp.DampingLearner(case[0])
    refresh = lambda count, state, params: (
        state if count else rmtdamp.refresh_damping(state, learner, params, case[2])
    )
    learned = lambda every, by_hand=None: Steps(
        rmtdamp.auto_damping(inner, learner, every=every), *case, by_hand
    )
    if what == "by hand":
        found = over(
            effort, what, Steps(inner, *case), learned(None, refresh), steps, 7
        )
    else:
        quiet = learned(NEVER)
        quiet(1)
        found = over(effort, what, quiet, learned(steps), steps, 3)
    restated = ("ratio", "low", "high")
    return found | {k: 1 + (found[k] - 1) * steps / EVERY for k in restated}


def kfac_row(effort, kind, batch_size):
    """100 steps of KFAC at its default periods over 100 of Adam.

    The MLP measures inside the step; the CNN by hand, as one does with convolutions on
    a CPU. The rate is small, as labels are random, and gradients vanish in a run that
    has fitted them.
    """
    case = loss_fn, params, batch = problem(kind, batch_size)
    model = model_of(kind)
    loss_args = nnx.as_pure(rmtdamp.flax.loss_args(model))
    factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
    tx, by_hand = rmtdamp.kfac(1e-6, factors_fn), None
    if kind == "cnn":
        tx = rmtdamp.kfac(1e-6, factors_fn, factor_every=None)
        here = functools.partial(rmtdamp.refresh_factors, loss_args=loss_args)

        def by_hand(count, state, params):
            due = {"eigen": count % 100 == 0}
            return (
                here(state, factors_fn, params, batch, **due)
                if count % 10 == 0
                else state
            )

    ours = Steps(tx, loss_fn, params, batch, by_hand, loss_args)
    title = f"KFAC, {kind} {batch_size}"
    return over(effort, title, Steps(optax.adam(1e-6), *case), ours, EVERY, 5)


WHAT = ("adam_shrinkage", "auto_damping", "auto_damping without a refresh")
SIZES = (("mlp", 256), ("mlp", 1024), ("cnn", 128))
HOW = ("scan", "unroll", "vmap")
# Section -> cases, what measures one, columns of its table.
SECTIONS = {
    "steps": ([(what, n) for n in (256, 1024) for what in WHAT], step_row, COLUMNS),
    "refreshes": ([(how, *n) for n in SIZES for how in HOW], refresh_row, COLUMNS),
    "by-hand": ([("by hand", 10), ("in the step", 2)], convolution_row, COLUMNS),
    "kfac": ([("mlp", 256), ("mlp", 4096), ("cnn", 128)], kfac_row, COLUMNS),
}
