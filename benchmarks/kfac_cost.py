"""What a KFAC step costs: its time over Adam's, beside its FLOPs, and beside kfac-jax.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.kfac_cost [--peer PYTHON] [--quick]

One thread for LAPACK, as OpenBLAS threads that wait for a busy core make an
eigendecomposition a hundred times slower. PYTHON is the interpreter of an environment
made as `benchmarks/peers.py` says; without it kfac-jax is left out. Prints Markdown and
writes results/kfac_cost.json; --quick is a rehearsal that writes nothing.

Default periods: factors every 10 steps, eigenbases every 100. In 100 steps 90 are
plain, 9 measure factors, and one renews the eigenbases too; the three kinds are timed
in turn with Adam's step and added up in these proportions. For the MLP at 256 whole
loops of 100 steps are timed too. The MLP measures inside the step; the CNN by hand, as
one does with convolutions on a CPU.

FLOPs are XLA's own count of the compiled programs, added up likewise. XLA does not
count eigendecompositions, which are LAPACK's: they are taken at 9 n^3 (Golub and Van
Loan, Matrix Computations, section 8.3), and both ratios are also given without them.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtdamp
import rmtdamp.flax
from rmtdamp.demo._train import cross_entropy

from . import peers
from .shared.tables import interval, label, table
from .shared.timing import (
    Effort,
    compare,
    compiled,
    interleaved,
    model_of,
    problem,
    rotate,
    timed,
)

RESULTS = pathlib.Path(__file__).parent / "results" / "kfac_cost.json"
FACTOR_EVERY, EIGEN_EVERY = 10, 100
# Small, as labels are random, and gradients vanish in a run that has fitted them.
RATE, PEER_RATE = 1e-6, 3e-4
CASES = (("mlp", 256), ("mlp", 4096), ("cnn", 128))
PEER_CASES = ((256, 7), (4096, 3))  # batch size, rounds of 100 steps each


def curvature(kind):
    """The factors of the network, and the state that it takes."""
    model = model_of(kind)
    state = nnx.as_pure(rmtdamp.flax.loss_args(model))
    return rmtdamp.flax.nnx_factors(model, cross_entropy), state


def stepper(tx, loss_fn, loss_args):
    """A training step, params, state, batch -> (params, state), loss."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        extra = {"batch": batch, "loss_args": loss_args}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    return step


def looped(step, params, state, batch):
    """A function that takes so many more steps, and returns the last loss."""
    step, carry = jax.jit(step), (params, state)

    def run(num):
        nonlocal carry
        loss = jnp.nan
        for _ in range(num):
            carry, loss = step(*carry, batch)
        jax.block_until_ready(carry)
        return float(loss)

    return run


def cost_row(effort, kind, batch_size):
    """Times and FLOPs of a KFAC step's parts, over a step of Adam."""
    loss_fn, params, batch = problem(kind, batch_size)
    factors_fn, loss_args = curvature(kind)
    by_hand, adam = kind == "cnn", optax.adam(RATE)
    plain = rmtdamp.kfac(RATE, factors_fn, factor_every=None)
    tx = plain if by_hand else rmtdamp.kfac(RATE, factors_fn)
    measure = functools.partial(
        rmtdamp.refresh_factors,
        factors_fn=factors_fn,
        params=params,
        batch=batch,
        loss_args=loss_args,
    )
    # The state of a run under way, which decomposes only when it is time.
    state = measure(plain.init(params))
    calls, flops = {}, {}
    for name, which, start in (
        ("adam", adam, adam.init(params)),
        ("plain", plain, state),
    ):
        step = stepper(which, loss_fn, loss_args)
        calls[name], flops[name], _ = compiled(step, params, start, batch)
    factors = lambda p, b, s: factors_fn(p, b, jax.random.key(0), *s)[:2]
    _, flops["factors"], _ = compiled(factors, params, batch, loss_args)
    layers = [block for block in factors_fn.blocks if block.groups]
    flops["eigen"] = sum(9 * b.groups * (b.rows**3 + b.columns**3) for b in layers)
    step = stepper(tx, loss_fn, loss_args)
    if by_hand:
        calls["factors"] = lambda: measure(state, eigen=False)
        calls["eigen"] = lambda: measure(state, eigen=True)
    else:  # one program, at three moments
        program = jax.jit(step).lower(params, state, batch).compile()
        for name, count in (("plain", 1), ("factors", 10), ("eigen", 100)):
            at = optax.tree.set(state, count=jnp.asarray(count, jnp.int32))
            calls[name] = functools.partial(program, params, at, batch)
    times = timed(calls, effort, f"{kind} {batch_size}")
    times["eigen"] = times["eigen"] - times["factors"]
    if not by_hand:
        times["factors"] = times["factors"] - times["plain"]
    row = {"model": kind, "batch": batch_size, "by_hand": by_hand, "flops": flops}
    row["seconds"] = {name: statistics.median(x) for name, x in times.items()}
    for name, eigen in (("all", 1), ("without_eigen", 0)):
        count, seconds = (
            x["plain"] + x["factors"] / FACTOR_EVERY + eigen * x["eigen"] / EIGEN_EVERY
            for x in (flops, times)
        )
        ratio = count / flops["adam"]
        over = compare(times["adam"] * ratio, seconds)
        row[name] = compare(times["adam"], seconds)
        row[name] |= {"flops_ratio": ratio, "over_flops": over}
    if (kind, batch_size) == CASES[0]:
        loops = [
            functools.partial(
                looped(stepper(x, loss_fn, loss_args), params, x.init(params), batch),
                EIGEN_EVERY,
            )
            for x in (adam, tx)
        ]
        pairs = min(effort.pairs, 7)
        row["loops"] = interleaved(*loops, pairs, "the same, 100 steps")
        row["loops_over_flops"] = row["loops"]["ratio"] / row["all"]["flops_ratio"]
    return row


def peer_row(python, batch_size, rounds):
    """Loops of 100 steps, ours and kfac-jax's, at the same fixed settings."""
    settings = {"learning_rate": PEER_RATE, "momentum": 0.9, "damping": 0.1}
    settings |= {"factor_every": FACTOR_EVERY, "eigen_every": EIGEN_EVERY}
    loss_fn, params, batch = problem("mlp", batch_size)
    factors_fn, loss_args = curvature("mlp")
    tx = rmtdamp.kfac(factors_fn=factors_fn, kl_clip=None, **settings)
    run = looped(stepper(tx, loss_fn, loss_args), params, tx.init(params), batch)
    gradient = jax.jit(jax.value_and_grad(loss_fn))

    def gradients(num):
        for _ in range(num):
            jax.block_until_ready(gradient(params, batch))

    with peers.start(python, "kfac-jax", params, batch, settings) as ask:
        loops = {
            "rmtdamp": run,
            "kfac-jax, exact inverses": functools.partial(ask, "exact"),
            "kfac-jax": functools.partial(ask, "inverses"),
        }
        bases = {"rmtdamp": gradients, "kfac-jax": functools.partial(ask, "gradient")}
        row = {"batch": batch_size, "versions": ask("versions"), "contenders": {}}
        # Everything compiles here, and the losses show that they do one thing.
        losses = {name: loop(EIGEN_EVERY) for name, loop in loops.items()}
        for base in bases.values():
            base(2)
        calls = {k: functools.partial(f, EIGEN_EVERY) for k, f in loops.items()}
        num = EIGEN_EVERY // 5
        calls |= {f"{k} gradient": functools.partial(f, num) for k, f in bases.items()}
        times = rotate(calls, rounds, f"loops of 100 steps, {batch_size}")
    for name in loops:
        step = np.array(times[name]) / EIGEN_EVERY
        own = np.array(times[f"{name.split(',')[0]} gradient"]) / num
        row["contenders"][name] = compare(times["rmtdamp"], times[name]) | {
            "seconds": statistics.median(step),
            "gradient_seconds": statistics.median(own),
            "times_gradient": compare(own, step),
            "loss": losses[name],
        }
    return row


def ms(seconds):
    return f"{1e3 * seconds:.1f} ms"


def _without(row):
    rest = row["without_eigen"]
    ratios = f"{rest['ratio']:.2f}, {rest['flops_ratio']:.2f}"
    return f"{ratios}, {interval(rest['over_flops'])}"


COST_COLUMNS = {
    "model, batch": lambda row: label(row) + ", by hand" * row["by_hand"],
    "Adam": lambda row: ms(row["seconds"]["adam"]),
    "KFAC, plain": lambda row: ms(row["seconds"]["plain"]),
    "factors": lambda row: ms(row["seconds"]["factors"]),
    "eigenbases": lambda row: ms(row["seconds"]["eigen"]),
    "time over Adam's": lambda row: interval(row["all"]),
    "FLOPs": lambda row: f"{row['all']['flops_ratio']:.2f}",
    "time over FLOPs": lambda row: interval(row["all"]["over_flops"]),
    "the same without eigendecompositions": _without,
    "whole loops of 100 steps": lambda row: (
        f"{interval(row['loops'])}, {row['loops_over_flops']:.2f}"
        if "loops" in row
        else ""
    ),
}
PEER_COLUMNS = {
    "MLP, batch": lambda row: str(row["batch"]),
    "by": lambda row: row["name"],
    "a step of 100": lambda row: ms(row["seconds"]),
    "times ours": interval,
    "own gradient": lambda row: ms(row["gradient_seconds"]),
    "times own gradient": lambda row: interval(row["times_gradient"]),
    "loss after 100 steps": lambda row: f"{row['loss']:.4f}",
}


def tables(found):
    """Markdown lines."""
    contenders = [
        {"batch": row["batch"], "name": name, **x}
        for row in found.get("peer", ())
        for name, x in row["contenders"].items()
    ]
    lines = table(COST_COLUMNS, found["cost"])
    return lines + (["", *table(PEER_COLUMNS, contenders)] if contenders else [])


def main():
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a rehearsal")
    parser.add_argument("--peer", metavar="PYTHON", help="kfac-jax's interpreter")
    args = parser.parse_args()
    effort = Effort(budget=1, rounds=3, pairs=3) if args.quick else Effort(0.02, 15, 3)
    found = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "lapack_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "cost": [cost_row(effort, *case) for case in CASES],
    }
    if args.peer:
        cases = ((256, 2),) if args.quick else PEER_CASES
        found["peer"] = [peer_row(args.peer, *case) for case in cases]
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + "\n".join(tables(found)))


if __name__ == "__main__":
    main()
