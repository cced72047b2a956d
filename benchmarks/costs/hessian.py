"""What the spectral tools cost: products, Lanczos steps, densities, beside matfree's.

FLOPs and temporary memory are XLA's own counts for the compiled programs.
"""

import functools
import statistics

import jax
import jax.numpy as jnp

from rmtdamp.hessian import hessian_matvec, hvp, lanczos, spectral_density

from .timing import compare, compiled, normal_like, on_cpu, problem, rotate, timed


def product_row(effort, kind, batch_size, dtype):
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
    times = timed(calls, effort, f"{kind} {dtype} {batch_size}")
    peak, row = 2 * n**3 / times.pop("peak"), {}
    _, flops, memory = programs["gradient"]
    for name, (_, count, temp) in programs.items():
        found = compare(times["gradient"], times[name])
        row[name] = found | {
            "seconds": statistics.median(times[name]),
            "flops_ratio": count / flops,
            "over_flops": found["ratio"] / (count / flops),
            "of_peak": statistics.median(count / times[name] / peak),
            "temp_ratio": temp / memory,
        }
    return row


def lanczos_row(effort, kind, batch_size, steps):
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
    times = timed(calls, effort, f"Lanczos, {kind} {batch_size}")
    step, base = times["run"] / steps, times["gradient"]
    share = base * count / flops
    return {
        "flops_ratio": count / flops,
        "gradient_seconds": statistics.median(base),
        "product": compare(base, times["product"]),
        "step": compare(base, step),
        "step_over_flops": compare(share, step),
        "linearising_over_80": compare(share, step + times["linearise"] / 80),
    }


def matfree_density(matvec, steps, probes, *args):
    """matfree's Lanczos in one program per density: key -> (nodes, weights)."""
    from matfree import decomp, stochtrace

    tridiagonal = decomp.tridiag_sym(steps, reortho="none")

    def density(key, like, *args):
        def quadrature(vector):
            found = tridiagonal(matvec, vector, *args)
            nodes, vectors = jnp.linalg.eigh(found.J_small)
            return nodes, vectors[0] ** 2

        vectors = stochtrace.sampler_normal(like, num=probes)(key)
        return jax.lax.map(quadrature, vectors)

    return jax.jit(density).lower(jax.random.key(0), *args).compile()


def density_row(effort, kind, batch_size, probes, steps):
    """A density from the loss to nodes and weights, ours and matfree's."""
    loss_fn, params, batch = problem(kind, batch_size)
    key, sizes = jax.random.key(0), {"num_steps": steps, "num_probes": probes}
    linearise = lambda: hessian_matvec(loss_fn, params, batch)
    gradient = lambda p, batch: jax.grad(loss_fn)(p, batch)
    product = lambda v, p, batch: jax.jvp(lambda p: gradient(p, batch), (p,), (v,))[1]
    given = lambda v, matvec, _: matvec(v)
    plain = matfree_density(product, steps, probes, params, params, batch)
    reuse = matfree_density(given, steps, probes, params, linearise(), None)
    calls = {
        "rmtdamp": lambda: spectral_density(linearise(), params, key, **sizes)[:2],
        "matfree, jvp(grad)": lambda: plain(key, params, params, batch),
        "matfree, our matvec": lambda: reuse(key, params, linearise(), None),
    }
    waiting = lambda call: lambda: float(jax.block_until_ready(call())[0].max())
    calls = {name: waiting(call) for name, call in calls.items()}
    calls["rmtdamp"]()
    # Its loop is in the graph, where XLA:CPU runs convolutions slowly: once is enough.
    limits = dict.fromkeys(list(calls)[1:], 1) if kind == "cnn" and on_cpu() else {}
    times = rotate(calls, effort.rounds, f"density, {kind} {batch_size}", limits)
    return {
        name: compare(times["rmtdamp"], taken) | {"seconds": statistics.median(taken)}
        for name, taken in times.items()
    }


# Two decades of batch sizes; on a CPU the largest takes a second or so.
SIZES = {"mlp": (16, 160, 1600), "cnn": (2, 20, 200), "transformer": (1, 10, 100)}
PRODUCTS = [
    (kind, n, dtype)
    for kind, sizes in SIZES.items()
    for dtype in ("float32", "bfloat16")
    for n in sizes
]
DENSITIES = (("mlp", 1024, 4, 80), ("cnn", 16, 1, 10))  # batch size, probes, steps
SECTIONS = {
    "products": (PRODUCTS, product_row, "gradient.seconds matvec matvec.flops_ratio "
                 "matvec.over_flops matvec.of_peak matvec.temp_ratio hvp "
                 "hvp.flops_ratio hvp.over_flops hvp.of_peak hvp.temp_ratio"),
    "lanczos": ((("mlp", 1024, 20), ("cnn", 128, 5)), lanczos_row, "gradient_seconds "
                "flops_ratio product step step_over_flops linearising_over_80"),
    "density": (DENSITIES, density_row, "rmtdamp.seconds matfree,jvp(grad) "
                "matfree,our_matvec"),
}  # fmt: skip
