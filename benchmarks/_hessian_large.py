"""A basis-free density of a hundred million parameters, and the memory it takes."""

import functools
import math
import multiprocessing
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp.hessian import hvp, spectral_density


def uniform_loss(params, batch):
    """sum_j c_j w_j^2 / 2 with c_j even over [0, 1] in each leaf: c is the spectrum."""
    del batch

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
        matvec = jax.tree_util.Partial(
            functools.partial(hvp, uniform_loss), params, None
        )
        if not density:
            ones = jax.tree.map(jnp.ones_like, params)
            return jax.block_until_ready(matvec(ones)), params
        return jax.block_until_ready(
            spectral_density(
                matvec, params, jax.random.key(0), num_steps=steps, num_probes=1
            )
        )

    run(10_000, True)
    empty = peak()
    params = run(size, False)[1]
    count = sum(x.size for x in jax.tree.leaves(params))
    vectors = lambda: (peak() - empty) / 4 / count - 1
    del params
    after_product = vectors()
    start = time.perf_counter()
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
    del options
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(large_density, (size, steps))
