"""What a KFAC step costs: its time over Adam's, beside its FLOPs, and beside kfac-jax.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.kfac_cost [--peer PYTHON] [--quick]

One thread for LAPACK, as OpenBLAS threads that wait for a busy core make an
eigendecomposition a hundred times slower. PYTHON is the interpreter of an environment
made as `benchmarks/_kfac_peer.py` says; without it kfac-jax is left out. Prints
Markdown and writes results/kfac_cost.json; --quick is a rehearsal that writes nothing.

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
import subprocess
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtdamp
import rmtdamp.flax
from rmtdamp.demo._train import cross_entropy
from rmtdamp.transforms import refresh_factors

from ._hessian_report import interval, label, table
from ._timing import compare, compiled, interleaved, rotate, timed
from .overhead import Network, problem

RESULTS = pathlib.Path(__file__).parent / "results" / "kfac_cost.json"
PEER = pathlib.Path(__file__).with_name("_kfac_peer.py")
FACTOR_EVERY, EIGEN_EVERY = 10, 100
# Small, as labels are random, and gradients vanish in a run that has fitted them.
RATE, PEER_RATE = 1e-6, 3e-4
CASES = (("mlp", 256), ("mlp", 4096), ("cnn", 128))
# Batch size, rounds of 100 steps each.
PEER_CASES = ((256, 7), (4096, 3))


def curvature(kind):
    """The factors of the network, and the state that it takes."""
    model = Network(kind, nnx.Rngs(0))
    state = nnx.as_pure(rmtdamp.flax.loss_args(model))
    return rmtdamp.flax.nnx_factors(model, cross_entropy), state


def stepper(tx, loss_fn, loss_args):
    """A training step, (params, state), batch -> (params, state), loss."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, batch=batch, loss_args=loss_args
        )
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


def amortised(plain, factors, eigen):
    """A step of the mean, from a plain one and what either measurement adds to it."""
    return plain + factors / FACTOR_EVERY + eigen / EIGEN_EVERY


def eigh_flops(blocks):
    """9 n^3 for each factor of each layer."""
    layers = (block for block in blocks if block.groups)
    return sum(9 * b.groups * (b.rows**3 + b.columns**3) for b in layers)


def cost_row(options, kind, batch_size):
    """Times and FLOPs of a KFAC step's parts, over a step of Adam."""
    loss_fn, params, batch = problem(kind, batch_size)
    factors_fn, loss_args = curvature(kind)
    by_hand = kind == "cnn"
    plain_tx = rmtdamp.kfac(RATE, factors_fn, factor_every=None)
    tx = plain_tx if by_hand else rmtdamp.kfac(RATE, factors_fn)
    measure = functools.partial(
        refresh_factors,
        factors_fn=factors_fn,
        params=params,
        batch=batch,
        loss_args=loss_args,
    )
    adam = optax.adam(RATE)
    steps = {
        name: stepper(which, loss_fn, loss_args)
        for name, which in (("adam", adam), ("plain", plain_tx), ("kfac", tx))
    }
    # The state of a run under way, which decomposes only when it is time.
    state = measure(plain_tx.init(params))
    calls, flops = {}, {}
    calls["adam"], flops["adam"], _ = compiled(
        steps["adam"], params, adam.init(params), batch
    )
    calls["plain"], flops["plain"], _ = compiled(steps["plain"], params, state, batch)
    _, flops["factors"], _ = compiled(
        lambda p, b, s: factors_fn(p, b, jax.random.key(0), *s)[:2],
        params,
        batch,
        loss_args,
    )
    flops["eigen"] = eigh_flops(factors_fn.blocks)
    if by_hand:
        calls["factors"] = lambda: measure(state, eigen=False)
        calls["eigen"] = lambda: measure(state, eigen=True)
    else:
        # One program, at three moments.
        program = jax.jit(steps["kfac"]).lower(params, state, batch).compile()
        for name, count in (("plain", 1), ("factors", 10), ("eigen", 100)):
            at = optax.tree.set(state, count=jnp.asarray(count, jnp.int32))
            calls[name] = functools.partial(program, params, at, batch)
    times = timed(calls, options, f"{kind} {batch_size}")
    times["eigen"] = times["eigen"] - times["factors"]
    if not by_hand:
        times["factors"] = times["factors"] - times["plain"]
    row = {"model": kind, "batch": batch_size, "by_hand": by_hand, "flops": flops}
    row["seconds"] = {name: statistics.median(x) for name, x in times.items()}
    for name, eigen in (("all", 1), ("without_eigen", 0)):
        count, seconds = (
            amortised(x["plain"], x["factors"], eigen * x["eigen"])
            for x in (flops, times)
        )
        ratio = count / flops["adam"]
        row[name] = compare(times["adam"], seconds) | {
            "flops_ratio": ratio,
            "over_flops": compare(times["adam"] * ratio, seconds),
        }
    if (kind, batch_size) == CASES[0]:
        loops = (
            looped(steps["adam"], params, adam.init(params), batch),
            looped(steps["kfac"], params, tx.init(params), batch),
        )
        row["loops"] = interleaved(
            *(functools.partial(run, EIGEN_EVERY) for run in loops),
            2 if options.quick else 7,
            "the same, 100 steps",
        )
        row["loops_over_flops"] = row["loops"]["ratio"] / row["all"]["flops_ratio"]
    return row


def peer_row(options, batch_size, rounds):
    """Loops of 100 steps, ours and kfac-jax's, at the same fixed settings."""
    settings = {
        "learning_rate": PEER_RATE,
        "momentum": 0.9,
        "damping": 0.1,
        "factor_every": FACTOR_EVERY,
        "eigen_every": EIGEN_EVERY,
    }
    loss_fn, params, batch = problem("mlp", batch_size)
    factors_fn, loss_args = curvature("mlp")
    tx = rmtdamp.kfac(factors_fn=factors_fn, kl_clip=None, **settings)
    run = looped(stepper(tx, loss_fn, loss_args), params, tx.init(params), batch)
    gradient = jax.jit(jax.value_and_grad(loss_fn))

    def gradients(num):
        for _ in range(num):
            jax.block_until_ready(gradient(params, batch))

    arrays = dict(zip(("inputs", "labels"), batch, strict=True))
    for i, layer in enumerate([*params["layers"].values(), params["out"]]):
        arrays |= {f"{name}{i}": layer[name] for name in ("kernel", "bias")}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "network.npz"
        np.savez(path, **arrays)
        with subprocess.Popen(
            [options.peer, PEER, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as peer:
            answers = peer.stdout
            assert answers is not None

            def ask(*question):
                print(json.dumps(question), file=peer.stdin, flush=True)
                answer = answers.readline()
                if not answer:
                    raise RuntimeError(f"the peer's process ended at {question}")
                return json.loads(answer)

            print(json.dumps(settings), file=peer.stdin, flush=True)
            loops = {
                "rmtdamp": run,
                "kfac-jax, exact inverses": functools.partial(ask, "exact"),
                "kfac-jax": functools.partial(ask, "inverses"),
            }
            bases = {
                "rmtdamp": gradients,
                "kfac-jax": functools.partial(ask, "gradient"),
            }
            row = {"batch": batch_size, "versions": ask("versions")}
            # Everything compiles here, and the losses show that they do one thing.
            losses = {name: loop(EIGEN_EVERY) for name, loop in loops.items()}
            for base in bases.values():
                base(2)
            calls = {k: functools.partial(f, EIGEN_EVERY) for k, f in loops.items()}
            calls |= {
                f"{name} gradient": functools.partial(base, EIGEN_EVERY // 5)
                for name, base in bases.items()
            }
            rounds = 2 if options.quick else rounds
            times = rotate(calls, rounds, f"loops of 100 steps, {batch_size}")
    row["contenders"] = {}
    for name in loops:
        step = np.array(times[name]) / EIGEN_EVERY
        own = np.array(times[f"{name.split(',')[0]} gradient"]) / (EIGEN_EVERY // 5)
        row["contenders"][name] = compare(times["rmtdamp"], times[name]) | {
            "seconds": statistics.median(step),
            "gradient_seconds": statistics.median(own),
            "times_gradient": compare(own, step),
            "loss": losses[name],
        }
    return row


def cost_table(rows):
    """Markdown lines."""
    head = ["model, batch", "Adam", "KFAC, plain", "factors", "eigenbases"]
    head += ["time over Adam's", "FLOPs", "time over FLOPs"]
    head += ["the same without eigendecompositions"]
    lines = []
    for row in rows:
        seconds, everything, rest = (
            row[x] for x in ("seconds", "all", "without_eigen")
        )
        cells = [label(row) + ", by hand" * row["by_hand"]]
        cells += [f"{1e3 * seconds[name]:.1f} ms" for name in seconds]
        cells += [interval(everything), f"{everything['flops_ratio']:.2f}"]
        cells += [interval(everything["over_flops"])]
        cells += [
            f"{rest['ratio']:.2f}, {rest['flops_ratio']:.2f}, "
            f"{interval(rest['over_flops'])}"
        ]
        lines.append(cells)
        if "loops" in row:
            whole = [""] * len(head)
            whole[0] = "the same, whole loops of 100 steps"
            whole[5] = interval(row["loops"])
            whole[6] = f"{everything['flops_ratio']:.2f}"
            whole[7] = f"{row['loops_over_flops']:.2f}"
            lines.append(whole)
    return table(head, lines)


def peer_table(rows):
    """Markdown lines."""
    head = ["MLP, batch", "by", "a step of 100", "times ours", "own gradient"]
    head += ["times own gradient", "loss after 100 steps"]
    lines = []
    for row in rows:
        for name, found in row["contenders"].items():
            lines.append(
                [
                    str(row["batch"]),
                    name,
                    f"{1e3 * found['seconds']:.1f} ms",
                    interval(found),
                    f"{1e3 * found['gradient_seconds']:.1f} ms",
                    interval(found["times_gradient"]),
                    f"{found['loss']:.4f}",
                ]
            )
    return table(head, lines)


def main():
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a rehearsal")
    parser.add_argument("--peer", metavar="PYTHON", help="kfac-jax's interpreter")
    args = parser.parse_args()
    options = types.SimpleNamespace(
        **vars(args), least=0.02, budget=1 if args.quick else 15, rounds=3
    )
    found = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "lapack_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "cost": [cost_row(options, *case) for case in CASES],
    }
    lines = cost_table(found["cost"])
    if options.peer:
        cases = PEER_CASES[: 1 if options.quick else None]
        found["peer"] = [peer_row(options, *case) for case in cases]
        lines += ["", *peer_table(found["peer"])]
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
