"""What the spectral tools cost: products, Lanczos steps, densities, against peers.

    python -m benchmarks.hessian [--quick] [--only SECTION] [--fresh] [--peers PYTHON]

PYTHON is the interpreter of an environment made as `benchmarks/peers.py` says; without
it PyTorch's libraries are left out. Rows go to results/hessian.json as they are
measured, under the device's name, and a row that is there is not measured again unless
--fresh; the tables (hessian.md) and the plot (hessian.png) are made from all of them.
--quick is a rehearsal of some minutes, written to a temporary folder.

Each figure compares programs of one row, timed in turn. FLOPs and temporary memory are
XLA's own counts for the compiled programs. Matrix products are at precision "highest",
the gradient's too; on a CPU that is what float32 is anyway.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp

from rmtdamp.hessian import hessian_matvec, hvp, lanczos

from . import _hessian_report as report
from ._hessian_density import density_row
from ._hessian_large import large_row
from ._timing import compare, compiled, on_cpu, timed
from .models import normal_like, problem

RESULTS = pathlib.Path(__file__).parent / "results"
# Two decades of batch sizes; on a CPU the largest takes a second or so.
SIZES = {
    "mlp": (16, 160, 1600),
    "cnn": (2, 20, 200),
    "resnet": (2, 20, 200),
    "transformer": (1, 10, 100),
}
DTYPES = ("float32", "bfloat16")
# kind, batch size, steps of a run
LANCZOS = (("mlp", 1024, 20), ("cnn", 128, 5))
# kind, batch size, probes, steps
DENSITIES = (("mlp", 1024, 4, 80), ("cnn", 16, 1, 10))
LARGE = 100_000_000


def held_bytes(matvec, *inputs):
    """Bytes of a matvec's leaves that are not buffers of its inputs."""
    seen = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(inputs)}
    leaves = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(matvec)}
    return sum(size for place, size in leaves.items() if place not in seen)


def matmul(dtype):
    """A large matrix product, what the machine can do, and its FLOPs."""
    n = 1536 if on_cpu() else 8192
    return jax.jit(jnp.matmul), (jnp.ones((n, n), dtype),) * 2, 2 * n**3


def product_row(options, kind, batch_size, dtype):
    """Both products and the gradient: time, FLOPs, memory, use of the machine."""
    loss_fn, params, batch = problem(kind, batch_size, dtype)
    vector = normal_like(params)
    matvec = hessian_matvec(loss_fn, params, batch)
    programs = {
        "gradient": compiled(jax.grad(loss_fn), params, batch),
        "hvp": compiled(functools.partial(hvp, loss_fn), params, batch, vector),
        "matvec": compiled(lambda m, v: m(v), matvec, vector),
    }
    multiply, square, square_flops = matmul(dtype)
    calls = {name: program[0] for name, program in programs.items()}
    calls["peak"] = lambda: multiply(*square)
    times = timed(calls, options, f"{kind} {dtype} {batch_size}")
    peak = square_flops / times.pop("peak")
    row = {
        "model": kind,
        "batch": batch_size,
        "dtype": dtype,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "peak_flops_per_second": statistics.median(peak),
        "residual_bytes": held_bytes(matvec, params, batch),
    }
    _, flops, memory = programs["gradient"]
    for name, (_, count, temp) in programs.items():
        found = compare(times["gradient"], times[name])
        row[name] = found | {
            "seconds": statistics.median(times[name]),
            "flops": count,
            "flops_ratio": count / flops,
            "over_flops": found["ratio"] / (count / flops),
            "of_peak": statistics.median(count / times[name] / peak),
            "temp_bytes": temp,
            "temp_ratio": temp / memory,
        }
    return row


def products(options):
    for kind, sizes in SIZES.items():
        for dtype in DTYPES:
            for n in sizes[: 1 if options.quick else None]:
                yield f"{kind}, {n}, {dtype}", product_row, (kind, n, dtype)


def lanczos_row(options, kind, batch_size, steps):
    """A step without reorthogonalisation, in gradients, over the product's FLOPs."""
    loss_fn, params, batch = problem(kind, batch_size)
    start = normal_like(params)
    matvec = hessian_matvec(loss_fn, params, batch)
    gradient, flops, _ = compiled(jax.grad(loss_fn), params, batch)
    product, count, _ = compiled(lambda m, v: m(v), matvec, start)
    calls = {
        "gradient": gradient,
        "product": product,
        "linearise": lambda: hessian_matvec(loss_fn, params, batch),
        "run": lambda: lanczos(matvec, start, steps, reorthogonalization="none"),
    }
    times = timed(calls, options, f"Lanczos, {kind} {batch_size}")
    step = times["run"] / steps
    over = lambda extra: compare(times["gradient"] * count / flops, step + extra)
    return {
        "model": kind,
        "batch": batch_size,
        "steps": steps,
        "flops_ratio": count / flops,
        "gradient_seconds": statistics.median(times["gradient"]),
        "linearise": compare(times["gradient"], times["linearise"]),
        "product": compare(times["gradient"], times["product"]),
        "step": compare(times["gradient"], step),
        "step_over_flops": over(0),
        "amortised_over_flops": over(times["linearise"] / 80),
    }


def lanczos_steps(options):
    for kind, n, steps in LANCZOS:
        n = n // 16 if options.quick else n
        yield f"{kind}, {n}", lanczos_row, (kind, n, steps)


def densities(options):
    for kind, n, probes, steps in DENSITIES:
        if options.quick:
            n, steps = n // 8, steps // 5
        yield f"{kind}, {n}", density_row, (kind, n, probes, steps)


def large(options):
    """A density at P = 100 million; memory is the host's, so on a CPU alone."""
    size = LARGE // 50 if options.quick else LARGE
    if on_cpu():
        yield f"{size}", large_row, (size, 20)


SECTIONS = {
    "products": products,
    "lanczos": lanczos_steps,
    "density": densities,
    "large": large,
}


def main():
    """Measure what is missing, then write the tables and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a rehearsal")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section")
    parser.add_argument("--fresh", action="store_true", help="measure rows again")
    parser.add_argument("--peers", metavar="PYTHON", help="the peers' interpreter")
    parser.add_argument("--out", type=pathlib.Path, help="folder for what is written")
    options = parser.parse_args()
    options.budget, options.rounds = (0.5, 3) if options.quick else (6, 5)
    options.least = 0.005 if options.quick else 0.02
    options.threads = len(os.sched_getaffinity(0))
    out = RESULTS
    if options.quick:
        out = pathlib.Path(tempfile.mkdtemp(prefix="hessian-"))
    out = options.out or out
    out.mkdir(parents=True, exist_ok=True)
    path = out / "hessian.json"
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices()[0].device_kind
    if on_cpu():
        device = f"{options.threads} CPU cores"
    everything = json.loads(path.read_text()) if path.exists() else {}
    rows = everything.setdefault(device, {})
    for section in options.only or SECTIONS:
        done = rows.setdefault(section, {})
        for name, measure, args in SECTIONS[section](options):
            if name not in done or options.fresh:
                done[name] = {"jax": jax.__version__} | measure(options, *args)
                path.write_text(json.dumps(everything, indent=1) + "\n")
    text = report.tables(everything)
    (out / "hessian.md").write_text(text)
    report.plot(everything, out / "hessian.png")
    print(f"{text}\n{out}")


if __name__ == "__main__":
    main()
