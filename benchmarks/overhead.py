"""What the damping costs: ratios measured side by side, in one run.

    python -m benchmarks.overhead [--quick]

Prints Markdown and writes benchmarks/results/overhead.json. Two programs are timed in
turn, A B A B ..., and the figure is the median of the ratios B/A of neighbours with a
95 % interval for the median from order statistics, so that a machine whose speed drifts
does not matter. A step is a gradient, `tx.update` and `apply_updates`, jitted.
"""

import argparse
import functools
import json
import pathlib

import jax
import optax

import rmtdamp
from rmtdamp.hessian import moments

from .shared.tables import table
from .shared.timing import interleaved, problem

RESULTS = pathlib.Path(__file__).parent / "results" / "overhead.json"
EVERY, NEVER = 100, 1_000_000


class Steps:
    """So many jitted training steps on one batch, waited for at their end."""

    def __init__(self, tx, loss_fn, params, batch, refresh=None):
        tx = optax.with_extra_args_support(tx)
        self.refresh, self.batch = refresh, batch
        self.carry = params, tx.init(params)

        @jax.jit
        def step(params, state, batch):
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        self.step = step

    def __call__(self, num):
        for i in range(num):
            if self.refresh is not None and i % EVERY == 0:
                params, state = self.carry
                self.carry = params, self.refresh(state, params)
            self.carry = self.step(*self.carry, self.batch)
        jax.block_until_ready(self.carry)

    def counts(self):
        """XLA's FLOPs and bytes of a step."""
        found = self.step.lower(*self.carry, self.batch).compile().cost_analysis()
        return found["flops"], found["bytes accessed"]


def measured(pairs):
    """Rows, as they are measured."""

    def row(what, model, baseline, other, pairs=pairs, **more):
        found = interleaved(baseline, other, pairs, f"{what}, {model}")
        return {"what": what, "model": model, **more, **found}

    of = functools.partial
    inner = rmtdamp.adam_shrinkage(1e-3)
    for batch_size in (256, 1024):
        case, model = problem("mlp", batch_size), f"MLP, {batch_size}"
        learner = lambda every, case=case: rmtdamp.auto_damping(
            inner, case[0], every=every
        )
        adam, plain = Steps(optax.adam(1e-3), *case), Steps(inner, *case)
        counts = zip(adam.counts(), plain.counts(), strict=True)
        names = "flops_ratio", "bytes_ratio"
        ratios = {n: b / a for n, (a, b) in zip(names, counts, strict=True)}
        what = "`adam_shrinkage` over `optax.adam`, step"
        yield row(what, model, of(adam, 20), of(plain, 20), **ratios)
        learned, quiet = Steps(learner(EVERY), *case), Steps(learner(NEVER), *case)
        what = f"`auto_damping` in the step, {EVERY} steps"
        yield row(what, model, of(plain, EVERY), of(learned, EVERY))
        assert learned.step._cache_size() == 1, "the step compiled two programs"
        quiet(1)  # the same program with its refresh out of reach
        what = "`auto_damping`, a step that does not refresh"
        yield row(what, model, of(plain, 20), of(quiet, 20), 2 * pairs)
    for kind, batch_size in (("mlp", 256), ("mlp", 1024), ("cnn", 128)):
        loss_fn, params, batch = problem(kind, batch_size)
        gradient = jax.jit(jax.grad(loss_fn))
        for how in ("scan", "unroll", "vmap"):
            refresh = of(moments, loss_fn, params, batch, jax.random.key(0),
                         execution=how, stderr=False)  # fmt: skip
            yield row(
                f"a refresh, {how}, in gradients",
                f"{kind.upper()}, {batch_size}",
                lambda f=gradient, p=params, b=batch: jax.block_until_ready(f(p, b)),
                lambda f=refresh: jax.block_until_ready(f()),
                min(pairs, 3) if kind == "cnn" and how != "unroll" else pairs,
            )
    # The CNN, by hand and in the step, from the cost of one refresh in few steps.
    case = loss_fn, params, batch = problem("cnn", 128)
    learner = rmtdamp.DampingLearner(loss_fn)
    refresh = lambda state, params: rmtdamp.refresh_damping(
        state, learner, params, batch
    )
    learned = lambda every, by_hand=None: Steps(
        rmtdamp.auto_damping(inner, learner, every=every), *case, by_hand
    )
    plain, quiet = Steps(inner, *case), learned(NEVER)
    quiet(1)
    for what, baseline, other, steps, count in (
        (
            "`refresh_damping` by hand",
            plain,
            learned(None, refresh),
            10,
            pairs // 4 + 1,
        ),
        ("`auto_damping` in the step", quiet, learned(2), 2, 3),
    ):
        what = f"{what}, {EVERY} steps (from one refresh in {steps})"
        found = row(what, "CNN, 128", of(baseline, steps), of(other, steps), count)
        # One refresh in `steps` steps, restated for one in a hundred.
        restated = ("ratio", "low", "high")
        yield found | {k: 1 + (found[k] - 1) * steps / EVERY for k in restated}


COLUMNS = {
    "what": lambda row: row["what"],
    "model, batch": lambda row: row["model"],
    "ratio": lambda row: f"{row['ratio']:.3f}",
    "95 % interval": lambda row: f"{row['low']:.3f} to {row['high']:.3f}",
    "FLOPs": lambda row: f"{row['flops_ratio']:.5f}" if "flops_ratio" in row else "",
    "bytes": lambda row: f"{row['bytes_ratio']:.5f}" if "bytes_ratio" in row else "",
}


def main():
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="five pairs per row")
    found = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rows": []}
    RESULTS.parent.mkdir(exist_ok=True)
    for row in measured(5 if parser.parse_args().quick else 25):
        found["rows"].append(row)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + "\n".join(table(COLUMNS, found["rows"])))


if __name__ == "__main__":
    main()
