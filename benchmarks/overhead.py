"""What the damping costs: ratios measured side by side, in one run.

    python -m benchmarks.overhead [--quick]

Prints Markdown and writes benchmarks/results/overhead.json. Two programs are timed in
turn, A B A B ..., and the figure is the median of the ratios B/A of neighbours with a
95 % interval for the median from order statistics, so that a machine whose speed drifts
does not matter. A step is a gradient, `tx.update` and `apply_updates`, jitted.
"""

import argparse
import functools
import itertools
import json
import pathlib

import jax
import optax
from flax import nnx

import rmtdamp
from rmtdamp.hessian import moments

from ._timing import interleaved

RESULTS = pathlib.Path(__file__).parent / "results" / "overhead.json"
EVERY = 100


class Network(nnx.Module):
    """An MLP 784-512-512-10, or a CNN of three 3x3 convolutions on 32x32x3."""

    def __init__(self, kind, rngs):
        self.convolutional = kind == "cnn"
        if self.convolutional:
            sizes = [3, 32, 32, 32]
            self.layers = nnx.List(
                nnx.Conv(m, n, (3, 3), rngs=rngs) for m, n in itertools.pairwise(sizes)
            )
            self.out = nnx.Linear(32, 10, rngs=rngs)
        else:
            self.layers = nnx.List(
                [nnx.Linear(784, 512, rngs=rngs), nnx.Linear(512, 512, rngs=rngs)]
            )
            self.out = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.out(x.mean((1, 2)) if self.convolutional else x)


@functools.cache
def problem(kind, batch_size):
    """(loss_fn, params, batch) with random data: the cost does not depend on it."""
    graphdef, params = nnx.split(Network(kind, nnx.Rngs(0)), nnx.Param)
    shape = (32, 32, 3) if kind == "cnn" else (784,)
    key, other = jax.random.split(jax.random.key(0))
    batch = (
        jax.random.normal(key, (batch_size, *shape)),
        jax.random.randint(other, (batch_size,), 0, 10),
    )

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss_fn, nnx.as_pure(params), batch


def stepper(tx, loss_fn, params, batch, refresh=None):
    """A function that takes `num` jitted training steps and waits for the last."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    carry = params, tx.init(params)

    def run(num):
        nonlocal carry
        for i in range(num):
            if refresh is not None and i % EVERY == 0:
                carry = carry[0], refresh(carry[1], carry[0])
            carry = step(*carry, batch)
        jax.block_until_ready(carry)

    return run, step, carry


def adam_rows(pairs):
    """adam_shrinkage over optax.adam: XLA's counts, the update alone, a whole step."""
    for batch_size in (256, 1024):
        loss_fn, params, batch = problem("mlp", batch_size)
        runs, counts = [], []
        for tx in (optax.adam(1e-3), rmtdamp.adam_shrinkage(1e-3)):
            run, step, carry = stepper(tx, loss_fn, params, batch)
            analysis = step.lower(*carry, batch).compile().cost_analysis()
            counts.append((analysis["flops"], analysis["bytes accessed"]))
            runs.append(functools.partial(run, 20))
        row = interleaved(*runs, pairs, f"adam_shrinkage, batch {batch_size}")
        flops, memory = (b / a for a, b in zip(*counts, strict=True))
        yield {
            "what": "`adam_shrinkage` over `optax.adam`, step",
            "model": f"MLP, {batch_size}",
            "flops_ratio": flops,
            "bytes_ratio": memory,
        } | row


def auto_rows(pairs):
    """The learner in the step, at its defaults, over the same Adam without it."""
    inner = rmtdamp.adam_shrinkage(1e-3)
    for batch_size in (256, 1024):
        loss_fn, params, batch = problem("mlp", batch_size)
        plain, _, _ = stepper(inner, loss_fn, params, batch)
        learned, step, _ = stepper(
            rmtdamp.auto_damping(inner, loss_fn, every=EVERY), loss_fn, params, batch
        )
        name = f"auto_damping in the step, batch {batch_size}"
        yield {
            "what": "`auto_damping` in the step, 100 steps",
            "model": f"MLP, {batch_size}",
        } | interleaved(
            functools.partial(plain, EVERY),
            functools.partial(learned, EVERY),
            pairs,
            name,
        )
        assert step._cache_size() == 1, "the step compiled more than one program"
        # The same program with its refresh out of reach.
        quiet, _, _ = stepper(
            rmtdamp.auto_damping(inner, loss_fn, every=1_000_000),
            loss_fn,
            params,
            batch,
        )
        quiet(1)
        name = f"steps without a refresh, batch {batch_size}"
        yield {
            "what": "`auto_damping`, a step that does not refresh",
            "model": f"MLP, {batch_size}",
        } | interleaved(
            functools.partial(plain, 20), functools.partial(quiet, 20), 2 * pairs, name
        )


def refresh_rows(pairs):
    """A refresh in gradients of the same batch, by how the microbatches run."""
    cases = [("mlp", 256), ("mlp", 1024), ("cnn", 128)]
    for kind, batch_size in cases:
        loss_fn, params, batch = problem(kind, batch_size)
        gradient = jax.jit(jax.grad(loss_fn))

        def baseline(f=gradient, p=params, b=batch):
            jax.block_until_ready(f(p, b))

        for execution in ("scan", "unroll", "vmap"):
            slow = kind == "cnn" and execution != "unroll"

            def refresh(loss=loss_fn, p=params, b=batch, how=execution):
                key = jax.random.key(0)
                jax.block_until_ready(
                    moments(loss, p, b, key, execution=how, stderr=False)
                )

            yield {
                "what": f"a refresh, {execution}, in gradients",
                "model": f"{kind.upper()}, {batch_size}",
            } | interleaved(
                baseline,
                refresh,
                min(pairs, 3) if slow else pairs,
                f"refresh, {kind} {batch_size}, {execution}",
            )


def convolution_rows(pairs):
    """The CNN, by hand and in the step, from the cost of one refresh in few steps."""
    loss_fn, params, batch = problem("cnn", 128)
    inner = rmtdamp.adam_shrinkage(1e-3)
    learner = rmtdamp.DampingLearner(loss_fn)

    def refresh(state, params):
        return rmtdamp.refresh_damping(state, learner, params, batch)

    def run(every, by_hand=None):
        tx = rmtdamp.auto_damping(inner, learner, every=every)
        return stepper(tx, loss_fn, params, batch, by_hand)[0]

    plain, quiet = stepper(inner, loss_fn, params, batch)[0], run(1_000_000)
    quiet(1)
    cases = [
        ("`refresh_damping` by hand", plain, run(None, refresh), 10, pairs // 4 + 1),
        ("`auto_damping` in the step", quiet, run(2), 2, 3),
    ]
    for what, baseline, other, steps, count in cases:
        row = interleaved(
            functools.partial(baseline, steps),
            functools.partial(other, steps),
            count,
            f"{what}, cnn",
        )
        # One refresh in `steps` steps, restated for one in a hundred.
        restate = lambda ratio, steps=steps: 1 + (ratio - 1) * steps / EVERY
        yield (
            {
                "what": f"{what}, 100 steps (from one refresh in {steps})",
                "model": "CNN, 128",
            }
            | row
            | {name: restate(row[name]) for name in ("ratio", "low", "high")}
        )


def main():
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="five pairs per row")
    pairs = 5 if parser.parse_args().quick else 25
    rows = []
    RESULTS.parent.mkdir(exist_ok=True)
    device = jax.devices()[0].device_kind
    for make in (adam_rows, auto_rows, refresh_rows, convolution_rows):
        for row in make(pairs):
            rows.append(row)
            RESULTS.write_text(
                json.dumps(
                    {"jax": jax.__version__, "device": device, "rows": rows}, indent=1
                )
                + "\n"
            )
    print("\n| what | model, batch | ratio | 95 % interval | FLOPs | bytes |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        count = lambda name, row=row: f"{row[name]:.5f}" if name in row else ""
        print(
            f"| {row['what']} | {row['model']} | {row['ratio']:.3f} "
            f"| {row['low']:.3f} to {row['high']:.3f} "
            f"| {count('flops_ratio')} | {count('bytes_ratio')} |"
        )


if __name__ == "__main__":
    main()
