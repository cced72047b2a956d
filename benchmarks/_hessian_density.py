"""A spectral density end to end: ours, matfree's, and PyTorch's libraries, in turn."""

import math
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp
from matfree import decomp, stochtrace

from rmtdamp.hessian import hessian_matvec, spectral_density

from . import peers
from ._timing import compare, compiled, on_cpu, rotate, timed
from .models import normal_like, problem


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
    vector = normal_like(params)
    matvec = hessian_matvec(loss_fn, params, batch)
    calls = {
        "rmtdamp gradient": compiled(jax.grad(loss_fn), params, batch)[0],
        "rmtdamp": compiled(lambda m, v: m(v), matvec, vector)[0],
        "PyTorch gradient": lambda: call("gradient"),
        "hessian-eigenthings": lambda: call("hessian-eigenthings"),
        "curvlinops": lambda: call("curvlinops"),
    }
    names = ("hessian-eigenthings", "curvlinops")
    first, second = (calls[name]() for name in names)
    assert math.isclose(first, second, rel_tol=1e-3), "the peers differ"
    times = timed(calls, options, "products")
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
    key = jax.random.key(0)
    linearise = lambda: hessian_matvec(loss_fn, params, batch)
    given = lambda v, matvec, _: matvec(v)

    def forward_over_reverse(v, params, batch):
        gradient = lambda p: jax.grad(loss_fn)(p, batch)
        return jax.jvp(gradient, (params,), (v,))[1]

    def ours():
        found = spectral_density(
            linearise(), params, key, num_steps=steps, num_probes=probes
        )
        return found.nodes, found.weights

    calls, tops, limits = {"rmtdamp": ours}, {}, {}
    for batched in (False, True) if probes > 1 else (False,):
        how = ", probes in vmap" if batched else ""
        settings = steps, probes, batched, params
        plain = matfree_density(forward_over_reverse, *settings, params, batch)
        reuse = matfree_density(given, *settings, linearise(), None)
        calls["matfree, jvp(grad)" + how] = lambda f=plain: f(
            key, params, params, batch
        )
        calls["matfree, our matvec" + how] = lambda f=reuse: f(
            key, params, linearise(), None
        )
    if kind == "cnn" and on_cpu():
        # Its loop is in the graph, where XLA runs convolutions slowly: once is enough.
        limits = {name: 1 for name in calls if name.startswith("matfree")}
    limits |= dict.fromkeys(("hessian-eigenthings", "curvlinops"), 3)

    def waiting(name, call):
        def run():
            found = jax.block_until_ready(call())
            tops[name] = float(found[0].max())

        return run

    calls = {name: waiting(name, call) for name, call in calls.items()}
    calls["rmtdamp"]()
    nodes = ours()[0]
    stop, row = lambda: None, {}
    if options.peers:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "network.npz"
            peers.write(path, kind, params, batch)
            call, stop = peers.start(options.peers, path, options.threads)
            row = call("versions")
        row["products"] = peer_products(options, call, loss_fn, params, batch)
        ends = float(nodes.min()), float(nodes.max())

        def things():
            tops["hessian-eigenthings"] = call(
                "hessian-eigenthings density", steps, probes
            )

        calls["hessian-eigenthings"] = things
        calls["curvlinops"] = lambda: call("curvlinops density", steps, probes, *ends)
        # What a first call sets up is not part of it; ours and matfree's are compiled.
        call("hessian-eigenthings density", 2, 1)
        call("curvlinops density", 2, 1, *ends)
    times = rotate(calls, options.rounds, f"density, {kind} {batch_size}", limits)
    stop()
    row |= {"model": kind, "batch": batch_size, "probes": probes, "steps": steps}
    row["contenders"] = {
        name: compare(times["rmtdamp"], taken)
        | {"seconds": statistics.median(taken), "largest_node": tops.get(name)}
        for name, taken in times.items()
    }
    return row
