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
import contextlib
import functools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from matfree import decomp, stochtrace

from rmtdamp.hessian import hessian_matvec, hvp, lanczos, spectral_density

from . import peers
from .shared.figures import Line, bars, curves, save_figure
from .shared.tables import NAMES, interval, label, table
from .shared.timing import (
    Effort,
    compare,
    compiled,
    normal_like,
    on_cpu,
    problem,
    rotate,
    timed,
)

RESULTS = pathlib.Path(__file__).parent / "results"
# Two decades of batch sizes; on a CPU the largest takes a second or so.
SIZES = {
    "mlp": (16, 160, 1600),
    "cnn": (2, 20, 200),
    "resnet": (2, 20, 200),
    "transformer": (1, 10, 100),
}
DTYPES = ("float32", "bfloat16")
LANCZOS = (("mlp", 1024, 20), ("cnn", 128, 5))  # kind, batch size, steps of a run
DENSITIES = (("mlp", 1024, 4, 80), ("cnn", 16, 1, 10))  # ..., probes, steps
LARGE = 100_000_000
THREADS = len(os.sched_getaffinity(0))


def held_bytes(matvec, *inputs):
    """Bytes of a matvec's leaves that are not buffers of its inputs."""
    seen = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(inputs)}
    leaves = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(matvec)}
    return sum(size for place, size in leaves.items() if place not in seen)


def product_row(options, kind, batch_size, dtype):
    """Both products and the gradient: time, FLOPs, memory, use of the machine."""
    loss_fn, params, batch = problem(kind, batch_size, dtype)
    vector, matvec = normal_like(params), hessian_matvec(loss_fn, params, batch)
    programs = {
        "gradient": compiled(jax.grad(loss_fn), params, batch),
        "hvp": compiled(functools.partial(hvp, loss_fn), params, batch, vector),
        "matvec": compiled(lambda m, v: m(v), matvec, vector),
    }
    n = 1536 if on_cpu() else 8192  # a matrix product: what the machine can do
    multiply, square = jax.jit(jnp.matmul), (jnp.ones((n, n), dtype),) * 2
    calls = {name: program[0] for name, program in programs.items()}
    calls["peak"] = lambda: multiply(*square)
    times = timed(calls, options.effort, f"{kind} {dtype} {batch_size}")
    peak = 2 * n**3 / times.pop("peak")
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


def lanczos_row(options, kind, batch_size, steps):
    """A step without reorthogonalisation, in gradients, over the product's FLOPs."""
    loss_fn, params, batch = problem(kind, batch_size)
    start, matvec = normal_like(params), hessian_matvec(loss_fn, params, batch)
    gradient, flops, _ = compiled(jax.grad(loss_fn), params, batch)
    product, count, _ = compiled(lambda m, v: m(v), matvec, start)
    calls = {
        "gradient": gradient,
        "product": product,
        "linearise": lambda: hessian_matvec(loss_fn, params, batch),
        "run": lambda: lanczos(matvec, start, steps, reorthogonalization="none"),
    }
    times = timed(calls, options.effort, f"Lanczos, {kind} {batch_size}")
    step, base = times["run"] / steps, times["gradient"]
    share = base * count / flops
    return {
        "model": kind,
        "batch": batch_size,
        "steps": steps,
        "flops_ratio": count / flops,
        "gradient_seconds": statistics.median(base),
        "linearise": compare(base, times["linearise"]),
        "product": compare(base, times["product"]),
        "step": compare(base, step),
        "step_over_flops": compare(share, step),
        "amortised_over_flops": compare(share, step + times["linearise"] / 80),
    }


def matfree_density(matvec, steps, probes, batched, *args):
    """matfree's Lanczos in one program per density: key -> (nodes, weights)."""
    tridiagonal = decomp.tridiag_sym(steps, reortho="none")

    def density(key, like, *args):
        def quadrature(vector):
            found = tridiagonal(matvec, vector, *args)
            nodes, vectors = jnp.linalg.eigh(found.J_small)
            return nodes, vectors[0] ** 2

        vectors = stochtrace.sampler_normal(like, num=probes)(key)
        if batched:
            return jax.vmap(quadrature)(vectors)
        return jax.lax.map(quadrature, vectors)

    return jax.jit(density).lower(jax.random.key(0), *args).compile()


def peer_products(options, call, loss_fn, params, batch):
    """A product over its own library's gradient, ours and theirs, in one rotation."""
    vector, matvec = normal_like(params), hessian_matvec(loss_fn, params, batch)
    names = ("hessian-eigenthings", "curvlinops")
    calls = {
        "rmtdamp gradient": compiled(jax.grad(loss_fn), params, batch)[0],
        "rmtdamp": compiled(lambda m, v: m(v), matvec, vector)[0],
        "PyTorch gradient": lambda: call("gradient"),
        **{name: functools.partial(call, name) for name in names},
    }
    first, second = (calls[name]() for name in names)
    assert math.isclose(first, second, rel_tol=1e-3), "the peers differ"
    times = timed(calls, options.effort, "products")
    own = dict.fromkeys(names, "PyTorch gradient") | {"rmtdamp": "rmtdamp gradient"}
    return {
        name: compare(times[base], times[name])
        | {"seconds": statistics.median(times[name])}
        | {"gradient_seconds": statistics.median(times[base])}
        for name, base in own.items()
    }


def density_row(options, kind, batch_size, probes, steps):
    """A density from the loss to nodes and weights, ours and everybody's."""
    loss_fn, params, batch = problem(kind, batch_size)
    key, sizes = jax.random.key(0), {"num_steps": steps, "num_probes": probes}
    linearise = lambda: hessian_matvec(loss_fn, params, batch)
    given = lambda v, matvec, _: matvec(v)
    gradient = lambda p, batch: jax.grad(loss_fn)(p, batch)
    over = lambda v, p, batch: jax.jvp(lambda p: gradient(p, batch), (p,), (v,))[1]

    def ours():
        found = spectral_density(linearise(), params, key, **sizes)
        return found.nodes, found.weights

    calls, tops, row = {"rmtdamp": ours}, {}, {}
    for batched in (False, True) if probes > 1 else (False,):
        how = ", probes in vmap" if batched else ""
        settings = steps, probes, batched, params
        plain = matfree_density(over, *settings, params, batch)
        reuse = matfree_density(given, *settings, linearise(), None)
        calls["matfree, jvp(grad)" + how] = functools.partial(
            plain, key, params, params, batch
        )
        calls["matfree, our matvec" + how] = lambda f=reuse: f(
            key, params, linearise(), None
        )
    # Its loop is in the graph, where XLA:CPU runs convolutions slowly: once is enough.
    slow = [n for n in calls if n.startswith("matfree") and kind == "cnn" and on_cpu()]
    limits = dict.fromkeys(slow, 1)

    def waiting(name, call):
        def run():
            tops[name] = float(jax.block_until_ready(call())[0].max())

        return run

    calls = {name: waiting(name, call) for name, call in calls.items()}
    calls["rmtdamp"]()
    with contextlib.ExitStack() as stack:
        if options.peers:
            settings = {"threads": THREADS}
            call = stack.enter_context(
                peers.start(options.peers, "torch", params, batch, settings)
            )
            row = call("versions")
            row["products"] = peer_products(options, call, loss_fn, params, batch)
            nodes = ours()[0]
            ends = float(nodes.min()), float(nodes.max())

            def things():
                name = "hessian-eigenthings"
                tops[name] = call(f"{name} density", steps, probes)

            calls["hessian-eigenthings"] = things
            calls["curvlinops"] = lambda: call(
                "curvlinops density", steps, probes, *ends
            )
            limits |= dict.fromkeys(("hessian-eigenthings", "curvlinops"), 3)
            # What a first call sets up is not part of it; the others are compiled.
            call("hessian-eigenthings density", 2, 1)
            call("curvlinops density", 2, 1, *ends)
        title = f"density, {kind} {batch_size}"
        times = rotate(calls, options.effort.rounds, title, limits)
    row |= {"model": kind, "batch": batch_size, "probes": probes, "steps": steps}
    row["contenders"] = {
        name: compare(times["rmtdamp"], taken)
        | {"seconds": statistics.median(taken), "largest_node": tops.get(name)}
        for name, taken in times.items()
    }
    return row


def uniform_loss(params, batch):
    """sum_j c_j w_j^2 / 2 with c_j even over [0, 1] in each leaf: c is the spectrum."""

    def part(w):
        rows, columns = (jax.lax.broadcasted_iota(w.dtype, w.shape, i) for i in (0, 1))
        return jnp.sum((rows + columns / w.shape[1]) / w.shape[0] * w**2) / 2

    return sum(part(w) for w in jax.tree.leaves(params))


def large_density(size, steps):
    """The density of `uniform_loss` in a process of its own, whose peak is known."""

    def peak():
        # Not getrusage's ru_maxrss, which a process inherits from the one it came from.
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    def run(size, density):
        columns = math.isqrt(size // 4)
        rows = 3 * size // 4 // columns
        params = {
            "embedding": jnp.zeros((rows, columns)),
            "out": jnp.zeros((columns, size // columns - rows)),
        }
        product = functools.partial(hvp, uniform_loss)
        matvec = jax.tree_util.Partial(product, params, None)
        if not density:
            ones = jax.tree.map(jnp.ones_like, params)
            return jax.block_until_ready(matvec(ones)), params
        sizes = {"num_steps": steps, "num_probes": 1}
        found = spectral_density(matvec, params, jax.random.key(0), **sizes)
        return jax.block_until_ready(found)

    run(10_000, True)
    empty = peak()
    params = run(size, False)[1]
    count = sum(x.size for x in jax.tree.leaves(params))
    vectors = lambda: (peak() - empty) / 4 / count - 1
    del params
    after_product, start = vectors(), time.perf_counter()
    found = run(size, True)
    taken = time.perf_counter() - start
    # Lanczos' nodes for a uniform spectrum are those of Gauss and Legendre.
    exact = (np.polynomial.legendre.leggauss(steps)[0] + 1) / 2
    return {
        "parameters": count,
        "steps": steps,
        "seconds": taken,
        "vectors_of_a_product": after_product,
        "vectors_of_the_density": vectors(),
        "largest_node_error": float(np.abs(np.asarray(found.nodes[0]) - exact).max()),
        "moments": [float(found.moment(i)[0]) for i in (1, 2, 3)],
    }


def large_row(options, size, steps):
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(large_density, (size, steps))


def cases(quick):
    """Section -> row -> (how it is measured, with what)."""
    products = {
        f"{kind}, {n}, {dtype}": (product_row, kind, n, dtype)
        for kind, sizes in SIZES.items()
        for dtype in DTYPES
        for n in sizes[: 1 if quick else None]
    }
    small = [(kind, n // 16 if quick else n, steps) for kind, n, steps in LANCZOS]
    steps = {f"{kind}, {n}": (lanczos_row, kind, n, k) for kind, n, k in small}
    densities = {}
    for kind, n, probes, num in DENSITIES:
        n, num = (n // 8, num // 5) if quick else (n, num)
        densities[f"{kind}, {n}"] = density_row, kind, n, probes, num
    # Memory is the host's, so on a CPU alone.
    size = LARGE // 50 if quick else LARGE
    large = {f"{size}": (large_row, size, 20)} if on_cpu() else {}
    return {
        "products": products,
        "lanczos": steps,
        "density": densities,
        "large": large,
    }


def _products(rows):
    """Both products of each row."""
    return [
        {**row, "what": what, "of": row[name]}
        for row in rows
        for name, what in (("matvec", "linearised"), ("hvp", "`hvp`"))
    ]


def _densities(rows):
    """The contenders of each row."""
    return [
        {**row, "by": by, "of": found, "own": row.get("products", {}).get(by)}
        for row in rows
        for by, found in row["contenders"].items()
    ]


def _held(row):
    residuals = row["residual_bytes"] / row["gradient"]["temp_bytes"]
    return f"{residuals:.2f}" if row["what"] == "linearised" else ""


# Section -> title, its lines, their columns.
SECTIONS = {
    "products": (
        "Products",
        _products,
        {
            "model, batch": label,
            "dtype": lambda row: row["dtype"],
            "gradient": lambda row: f"{1e3 * row['gradient']['seconds']:.1f} ms",
            "product": lambda row: row["what"],
            "per second": lambda row: f"{1 / row['of']['seconds']:.3g}",
            "times gradient": lambda row: interval(row["of"]),
            "FLOPs": lambda row: f"{row['of']['flops_ratio']:.2f}",
            "time over FLOPs": lambda row: f"{row['of']['over_flops']:.2f}",
            "FLOP/s of peak": lambda row: f"{row['of']['of_peak']:.0%}",
            "temporary memory": lambda row: f"{row['of']['temp_ratio']:.2f}",
            "residuals": _held,
        },
    ),
    "lanczos": (
        "A Lanczos step, in gradients",
        list,
        {
            "model, batch": label,
            "gradient": lambda row: f"{1e3 * row['gradient_seconds']:.1f} ms",
            "FLOPs": lambda row: f"{row['flops_ratio']:.2f}",
            "product": lambda row: interval(row["product"]),
            "step": lambda row: interval(row["step"]),
            "step over FLOPs": lambda row: interval(row["step_over_flops"]),
            "the same, linearising shared by 80": lambda row: interval(
                row["amortised_over_flops"]
            ),
        },
    ),
    "density": (
        "Spectral density",
        _densities,
        {
            "model, batch, density": lambda row: (
                f"{label(row)}, {row['probes']} x {row['steps']}"
            ),
            "by": lambda row: row["by"],
            "time": lambda row: f"{row['of']['seconds']:.2f} s",
            "times ours": lambda row: interval(row["of"]),
            "product, times own gradient": lambda row: (
                interval(row["own"]) if row["own"] else ""
            ),
            "largest node": lambda row: (
                f"{row['of']['largest_node']:.4g}" if row["of"]["largest_node"] else ""
            ),
        },
    ),
    "large": (
        "A hundred million parameters",
        list,
        {
            "P": lambda row: f"{row['parameters']:,}",
            "steps": lambda row: str(row["steps"]),
            "time": lambda row: f"{row['seconds']:.1f} s",
            "vectors, one product": lambda row: f"{row['vectors_of_a_product']:.1f}",
            "vectors, density": lambda row: f"{row['vectors_of_the_density']:.1f}",
            "largest error of a node": lambda row: f"{row['largest_node_error']:.1e}",
            "moments (1/2, 1/3, 1/4)": lambda row: ", ".join(
                f"{x:.5f}" for x in row["moments"]
            ),
        },
    ),
}


def tables(everything):
    """Markdown lines, a table per device and section."""
    lines = []
    for device, sections in everything.items():
        for section, (title, rows_of, columns) in SECTIONS.items():
            if found := list(sections.get(section, {}).values()):
                lines += [f"**{title}, {device}**", ""]
                lines += [*table(columns, rows_of(found)), ""]
    return "\n".join(lines)


def panels(sections):
    """Products in either dtype, then the densities."""
    rows = list(sections.get("products", {}).values())
    found = []
    for dtype in DTYPES:
        lines = []
        for kind, name in NAMES.items():
            own = [r for r in rows if (r["model"], r["dtype"]) == (kind, dtype)]
            sizes = [r["batch"] for r in own]
            for which, style in (("matvec", "o-"), ("hvp", "s:")):
                ratios = [r[which]["ratio"] for r in own]
                lines.append(Line(f"{name}, {which}", sizes, ratios, style))
        axes = {"xscale": "log", "xlabel": "batch size", "ylim": (0, None)}
        title = f"product / own gradient, {dtype}"
        found.append(curves(lines, **axes, title=title))
    times = {}
    for row in _densities(sections.get("density", {}).values()):
        of = row["of"]
        error = (of["high"] - of["low"]) / 3.92
        times.setdefault(row["by"], {})[NAMES[row["model"]]] = of["ratio"], error
    return [*found, bars(times, 1.0, yscale="log", title="density, time / ours")]


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
    options.effort = Effort(0.005, 0.5, 3) if options.quick else Effort()
    out = options.out or RESULTS
    if options.quick and not options.out:
        out = pathlib.Path(tempfile.mkdtemp(prefix="hessian-"))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "hessian.json"
    jax.config.update("jax_default_matmul_precision", "highest")
    device = f"{THREADS} CPU cores" if on_cpu() else jax.devices()[0].device_kind
    everything = json.loads(path.read_text()) if path.exists() else {}
    rows = everything.setdefault(device, {})
    for section, wanted in cases(options.quick).items():
        done = rows.setdefault(section, {})
        for name, (measure, *args) in wanted.items():
            if section in (options.only or SECTIONS) and (
                name not in done or options.fresh
            ):
                done[name] = {"jax": jax.__version__} | measure(options, *args)
                path.write_text(json.dumps(everything, indent=1) + "\n")
    text = tables(everything)
    (out / "hessian.md").write_text(text)
    save_figure(out / "hessian.png", panels(rows))
    print(f"{text}\n{out}")


if __name__ == "__main__":
    main()
