"""What the library costs: ratios measured side by side, in one run.

    python -m benchmarks.costs [SECTION...] [--quick] [--fresh] [--compare]

Sections, all of them by default: steps, refreshes (of the damping); kfac; regions (what
a trust region adds to Adam and to it); kfac-jax (beside it, in an environment of its
own: benchmarks/costs/peer.py); eigenbases (its eigendecompositions on one device each,
over all on each of two); products, density (of Hessians); penalties (on their trace);
vocabulary (a large one: its cross-entropy in chunks); precision (of measurements, by
dtype: errors, not costs);
first calls (compiling included); scaling (over devices: counts in compiled programs);
big (a transformer of 100 million parameters). Each has a process of its own.
Rows go to benchmarks/results/costs.json as they are measured, under the device's name,
and one that is there is not measured again unless --fresh; costs.md has them as tables.
--quick is a rehearsal that writes nothing. --compare measures everything again, writes
nothing, lists what has become worse than in costs.json and what only one of the two
has, and fails if anything is worse. Set OPENBLAS_NUM_THREADS=1 for kfac: threads that
wait for a busy core make an eigendecomposition a hundred times slower.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from rich.progress import Progress
from scipy.stats import wasserstein_distance

import rmtdamp
import rmtdamp.flax
from benchmarks.shared.models import Transformer
from benchmarks.shared.report import cost_table, markdown
from rmtdamp.demo._data import load_digits
from rmtdamp.demo._train import cross_entropy
from rmtdamp.flatness import trace_penalty
from rmtdamp.hessian import (
    dataset_matvec,
    eigsh,
    ggn_matvec,
    hessian_matvec,
    hvp,
    lanczos,
    moments,
    spectral_density,
)
from rmtdamp.losses import chunked_softmax_cross_entropy

from . import timing
from .peer import peer
from .regressions import unmatched, worse
from .scaling import LAYOUTS, PROGRAMS, scaling_row
from .timing import compare, compiled, interleaved, on_cpu, problem, rotate

RESULTS = pathlib.Path(__file__).parents[1] / "results"
QUICK = timing.Effort(least=0.005, budget=0.5, rounds=2, pairs=3, steps=3)
EVERY, NEVER = 100, 1_000_000
KFAC_JAX = os.environ.get("KFAC_JAX_PYTHON")  # see peer.py


class Steps:
    """So many jitted training steps on one batch; `by_hand` measures between them.

    They donate params and state, which would be copied otherwise.
    """

    def __init__(self, tx, loss_fn, params, batch, by_hand=None, loss_args=()):
        tx = optax.with_extra_args_support(tx)
        self.by_hand, self.batch = by_hand, batch
        self.carry = jax.tree.map(jnp.copy, params), tx.init(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
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
    num = min(num, effort.steps)
    calls = (functools.partial(steps, num) for steps in (baseline, other))
    return interleaved(*calls, min(effort.pairs, pairs), what)


def step_row(effort, what, kind, batch_size):
    """Adam with shrinkage over optax.adam; with a learned damping over that."""
    case, inner = problem(kind, batch_size), rmtdamp.adam_shrinkage(1e-3)
    plain = Steps(inner, *case)
    if what == "adam_shrinkage":
        adam = Steps(optax.adam(1e-3), *case)
        counts = zip(adam.counts(), plain.counts(), strict=True)
        flops, memory = (b / a for a, b in counts)
        found = over(effort, what, adam, plain, 20)
        return found | {"flops_ratio": flops, "bytes_ratio": memory}
    learner, every = rmtdamp.DampingLearner(case[0]), EVERYS[what]
    refresh = lambda count, state, params: (
        state if count else rmtdamp.refresh(state, learner, params, case[2])
    )
    by_hand = None if every else refresh
    tx = rmtdamp.auto_damping(inner, learner, refresh_every=every)
    learned = Steps(tx, *case, by_hand)
    learned(1)
    num, pairs = EVERY, 25 if every else 5
    if every == NEVER:  # past the early refreshes of a period
        num, (params, state) = 20, learned.carry
        count = jnp.full((), NEVER + 1, jnp.int32)
        learned.carry = params, optax.tree.set(state, count=count)
    found = over(effort, what, plain, learned, num, pairs)
    assert learned.step._cache_size() == 1, "the step compiled two programs"
    return found


def refresh_row(effort, how, kind, batch_size):
    """A refresh over a gradient of the same batch, by how the microbatches run."""
    loss_fn, params, batch = problem(kind, batch_size)
    gradient, key = jax.jit(jax.grad(loss_fn)), jax.random.key(0)
    options = {"execution": how, "stderr": False}
    return interleaved(
        lambda: jax.block_until_ready(gradient(params, batch)),
        lambda: jax.block_until_ready(moments(loss_fn, params, batch, key, **options)),
        effort.pairs,
        f"refresh, {how}, {kind} {batch_size}",
    )


def kfac_steps(kind, batch_size, with_region=False, **options):
    """Steps of KFAC; the CNN, on a CPU, measures by hand."""
    loss_fn, params, batch = problem(kind, batch_size)
    model = timing.model_of(kind)
    loss_args = nnx.as_pure(rmtdamp.flax.loss_args(model))
    factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
    measurer = rmtdamp.KroneckerMeasurer(factors_fn)
    every = None if kind == "cnn" else 10
    options |= {"damping": 1e-3, "refresh_every": every}
    options |= {"kl_clip": None} if with_region else {}
    tx = rmtdamp.kfac(1e-6, measurer, **options)
    if with_region:
        # What the model hands to its factors is nothing to this loss.
        whole = lambda params, batch, *loss_args: loss_fn(params, batch)
        tx = rmtdamp.trust_region(tx, whole)

    def refresh(count, state, params):
        if count % 10:
            return state
        return rmtdamp.refresh(state, measurer, params, batch, loss_args=loss_args)

    return Steps(tx, loss_fn, params, batch, None if every else refresh, loss_args)


def kfac_row(effort, kind, batch_size, tikhonov="eigenvalues"):
    """100 steps of KFAC over 100 of Adam."""
    ours = kfac_steps(kind, batch_size, tikhonov=tikhonov)
    # The rate is small, for gradients of fitted labels vanish.
    adam = Steps(optax.adam(1e-6), *problem(kind, batch_size))
    what = f"KFAC, {tikhonov}, {kind} {batch_size}"
    return over(effort, what, adam, ours, EVERY, 5)


def region_row(effort, what, kind, batch_size):
    """Steps in a trust region over as many without."""
    if what == "KFAC":
        both = (kfac_steps(kind, batch_size, with_region=x) for x in (False, True))
    else:
        case, adam = problem(kind, batch_size), optax.adam(1e-6)
        within = rmtdamp.trust_region(adam, case[0])
        both = (Steps(tx, *case) for tx in (adam, within))
    num, pairs = (10, 3) if kind == "cnn" else (20, 9)
    what = f"trust region, {what}, {kind} {batch_size}"
    return over(effort, what, *both, num, pairs)


def kfac_jax_row(effort, batch_size):
    """100 steps of KFAC over 100 of kfac-jax, in both forms of the damping."""
    settings = {"learning_rate": 3e-4, "momentum": 0.9, "damping": 0.1}
    # In steps, as kfac-jax counts them; a measurer counts measurements.
    settings |= {"decay": 0.95, "refresh_every": 10, "eigen_every": 100}
    loss_fn, params, batch = problem("mlp", batch_size)
    model = timing.model_of("mlp")
    factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
    own = dict(settings)
    measurer = rmtdamp.KroneckerMeasurer(
        factors_fn,
        decay=own.pop("decay"),
        eigen_every=own.pop("eigen_every") // own["refresh_every"],
    )
    loss_args = nnx.as_pure(rmtdamp.flax.loss_args(model))
    gradient = jax.jit(jax.value_and_grad(loss_fn))
    layers = [
        (layer["kernel"], layer["bias"])
        for layer in [*params["hidden"].values(), params["out"]]
    ]

    def gradients(num):
        for _ in range(num):
            jax.block_until_ready(gradient(params, batch))

    forms, num = ("eigenvalues", "factored"), min(effort.steps, EVERY)
    with peer(KFAC_JAX, layers, batch, settings) as ask:
        calls = {
            "gradient": gradients,
            "theirs, gradient": lambda n: ask("gradient", n),
        }
        ours, losses = {}, {}
        for form in forms:
            tx = rmtdamp.kfac(measurer=measurer, tikhonov=form, kl_clip=None, **own)
            ours[form] = Steps(tx, loss_fn, params, batch, None, loss_args)
            calls |= {form: ours[form], f"theirs, {form}": functools.partial(ask, form)}
        for form in forms:  # which compiles, and shows that both do one thing
            theirs = ask(form, EVERY)
            ours[form](EVERY)
            losses[form] = float(loss_fn(ours[form].carry[0], batch)), theirs
        timed = {name: functools.partial(call, num) for name, call in calls.items()}
        times = rotate(timed, effort.rounds, f"KFAC beside kfac-jax, {batch_size}")
    return {
        name: compare(times[f"theirs, {name}"], times[name])
        | {
            "seconds": statistics.median(times[name]) / num,
            "theirs, seconds": statistics.median(times[f"theirs, {name}"]) / num,
        }
        | (
            dict(zip(("loss", "theirs, loss"), losses[name], strict=True))
            if name in losses
            else {}
        )
        for name in ("gradient", *forms)
    }


def eigenbases_row(effort, kind, batch_size, devices):
    """A refresh of KFAC, spread over devices, over one that each makes whole."""
    loss_fn, params, batch = problem(kind, batch_size)
    del loss_fn
    model = timing.model_of(kind)
    loss_args = nnx.as_pure(rmtdamp.flax.loss_args(model))
    factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
    on = lambda tree, *axes: jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*axes)))
    params, batch = on(params), on(batch, "data")

    def refresh(mesh):
        every = {"eigen_every": 1, "mesh": mesh}
        measurer = rmtdamp.KroneckerMeasurer(factors_fn, **every)
        state = rmtdamp.scale_by_kfac(measurer, damping=1.0).init(params)
        found = rmtdamp.refresh(state, measurer, params, batch, loss_args=loss_args)
        jax.block_until_ready(found)

    calls = (functools.partial(refresh, where) for where in (None, mesh))
    return interleaved(*calls, effort.rounds, f"eigenbases, {kind}")


def product_row(effort, kind, batch_size, dtype):
    """Both products and the gradient: time, FLOPs, memory, use of the machine."""
    loss_fn, params, batch = problem(kind, batch_size, dtype)
    matvec = hessian_matvec(loss_fn, params, batch)
    vector = jax.tree.map(jnp.ones_like, params)
    programs = {
        "gradient": compiled(jax.grad(loss_fn), params, batch),
        "hvp": compiled(functools.partial(hvp, loss_fn), params, batch, vector),
        "matvec": compiled(lambda m, v: m(v), matvec, vector),
    }
    n = 1536 if on_cpu() else 8192  # a matrix product: what the machine can do
    multiply, square = jax.jit(jnp.matmul), (jnp.ones((n, n), dtype),) * 2
    calls = {name: program[0] for name, program in programs.items()}
    calls["peak"] = lambda: multiply(*square)
    calls["steps"] = lambda: lanczos(matvec, vector, 5, reorthogonalization="none")
    times = timing.timed(calls, effort, f"{kind} {dtype} {batch_size}")
    peak, steps = 2 * n**3 / times.pop("peak"), times.pop("steps") / 5
    row = {"lanczos_step": compare(times["matvec"], steps)}  # over its product
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


def penalty_row(effort, kind, batch_size):
    """The gradient of v^T H v in two forms, over that of the loss."""
    loss_fn, params, batch = problem(kind, batch_size)

    def reverse(params, batch, key):
        """H v forward over reverse, with v of signs too."""
        del key
        signs = jax.tree.map(lambda x: jnp.where(x < 0, -1.0, 1.0), params)
        vector = jax.lax.stop_gradient(signs)
        slope = lambda p: jax.grad(loss_fn)(p, batch)
        return optax.tree.vdot(vector, jax.jvp(slope, (params,), (vector,))[1])

    penalty, key = functools.partial(trace_penalty, loss_fn), jax.random.key(0)
    programs = {
        "gradient": compiled(jax.grad(loss_fn), params, batch),
        "trace_penalty": compiled(jax.grad(penalty), params, batch, key),
        "over reverse": compiled(jax.grad(reverse), params, batch, key),
    }
    calls = {name: program[0] for name, program in programs.items()}
    times = timing.timed(calls, effort, f"{kind} {batch_size}")
    _, flops, memory = programs["gradient"]
    return {
        name: compare(times["gradient"], times[name])
        | {"flops_ratio": count / flops, "temp_ratio": temp / memory}
        for name, (_, count, temp) in programs.items()
    }


def vocabulary_row(effort, tokens, width, vocabulary, chunk_size):
    """A chunked cross-entropy over one of dense logits: time and temporary memory."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape) / width**0.5
    params = draw(keys[0], width, width), draw(keys[1], width, vocabulary)
    labels = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    batch = width**0.5 * draw(keys[3], tokens, width), labels
    hidden = lambda p, x: (jnp.tanh(x @ p[0]), p[1])
    cross_entropies = functools.partial(
        chunked_softmax_cross_entropy, chunk_size=chunk_size
    )
    ways = {
        "dense": (
            lambda p, x: jnp.matmul(*hidden(p, x)),
            cross_entropy,
            lambda p, b: cross_entropy(jnp.matmul(*hidden(p, b[0])), b[1]),
        ),
        "chunked": (
            hidden,
            lambda z, y: cross_entropies(*z, y, gauss_newton=True).mean(),
            lambda p, b: cross_entropies(*hidden(p, b[0]), b[1]).mean(),
        ),
    }
    row = {}
    for name, program in {
        "gradient": lambda model, criterion, loss: jax.grad(loss),
        "hvp": lambda model, criterion, loss: lambda p, b: hvp(loss, p, b, p),
        "ggn_matvec": lambda model, criterion, loss: (
            lambda p, b: ggn_matvec(model, criterion, p, b)(p)
        ),
    }.items():
        made = {way: compiled(program(*of), params, batch) for way, of in ways.items()}
        calls = {way: found[0] for way, found in made.items()}
        times = timing.timed(calls, effort, f"{name}, {tokens} tokens")
        row[name] = compare(*times.values()) | {
            "dense_seconds": statistics.median(times["dense"]),
            "dense_megabytes": made["dense"][2] / 2**20,
            "megabytes": made["chunked"][2] / 2**20,
        }
    return row


@functools.cache
def digits():
    """A tanh network, 64-64-10, after 100 steps of Adam on 512 digits."""
    inputs, labels = (jnp.asarray(x[:512]) for x in load_digits().train)
    keys = jax.random.split(jax.random.key(0), 2)
    draw = lambda key, m, n: jax.random.normal(key, (m, n)) / m**0.5
    params = draw(keys[0], 64, 64), draw(keys[1], 64, 10)
    tx = optax.adam(1e-3)

    @jax.jit
    def step(_, carry):
        params, state = carry
        grads = jax.grad(digits_loss("float32"))(params, (inputs, labels))
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, 100, step, (params, tx.init(params)))[0], inputs, labels


@functools.cache
def digits_loss(activations):
    """Layers in one dtype, the cross-entropy in float32 or wider."""

    def loss_fn(params, batch):
        first, last = (w.astype(activations) for w in params)
        logits = jnp.tanh(batch[0].astype(activations) @ first) @ last
        return cross_entropy(
            logits.astype(jnp.promote_types(activations, "f4")), batch[1]
        )

    return loss_fn


@functools.cache
def measured_on_digits(dtype, activations, mode):
    """What is measured with the same probes: m, lambda_max, a density's points."""
    params, inputs, labels = digits()
    start = jax.tree.map(
        lambda w: jax.random.normal(jax.random.key(w.size), w.shape), params
    )
    with jax.enable_x64(dtype == "float64"):
        params, start, inputs = jax.tree.map(
            lambda x: np.asarray(x).astype(dtype), (params, start, inputs)
        )
        at = (
            digits_loss(activations),
            jax.tree.map(jnp.asarray, params),
            (inputs, labels),
        )
        noise = moments(*at, jax.random.key(1), num_probes=4, mode=mode, stderr=False)
        matvec = hessian_matvec(*at, mode=mode)
        top = eigsh(matvec, at[1], jax.random.key(2), k=1).eigenvalues[0]
        nodes, weights = lanczos(matvec, start, 40).ritz()
        return float(noise.variance), float(top), np.array(nodes), np.array(weights)


def precision_row(effort, dtype, activations, mode):
    """Relative errors by dtype of params and activations, against float64."""
    del effort
    exact = measured_on_digits("float64", "float64", "forward-over-reverse")
    found = measured_on_digits(dtype, activations, mode)
    relative = lambda i: abs(found[i] - exact[i]) / abs(exact[i])
    distance = wasserstein_distance(found[2], exact[2], found[3], exact[3])
    return {
        "variance": relative(0),
        "top eigenvalue": relative(1),
        # How far its mass is moved, over the mean distance from 0.
        "density": distance / np.average(abs(exact[2]), weights=exact[3]),
    }


def first_call_row(effort, what, kind, batch_size):
    """CPU seconds of a first call, compiling included, over those of a plain one."""
    loss_fn, params, batch = problem(kind, batch_size)
    rule, key = rmtdamp.StabilityFloor.for_adam(), jax.random.key(0)
    learner = rmtdamp.DampingLearner(loss_fn, rule=rule, floor=1e-8)  # auto_adam's own
    adam, auto = optax.adam(1e-3), rmtdamp.auto_adam(1e-3, learner)
    state = auto.init(params)
    matvec = hessian_matvec(loss_fn, params, batch)
    first_step = lambda tx: lambda: Steps(tx, loss_fn, params, batch)(1)
    gradient = lambda: jax.jit(jax.grad(loss_fn))(params, batch)
    plain, ours = {
        "refresh by hand": (
            gradient,
            lambda: rmtdamp.refresh(state, learner, params, batch),
        ),
        "auto_adam": (first_step(adam), first_step(auto)),
        "eigsh": (
            lambda: jax.jit(lambda v: matvec(v))(params),
            lambda: eigsh(matvec, params, key, k=3),
        ),
    }[what]

    def seconds(call):
        jax.clear_caches()
        start = time.process_time()
        jax.block_until_ready(call())
        return time.process_time() - start

    rounds = [(seconds(plain), seconds(ours)) for _ in range(effort.rounds)]
    one, other = zip(*rounds, strict=True)
    return compare(one, other) | {
        "baseline_seconds": statistics.median(one),
        "seconds": statistics.median(other),
    }


def big_row(effort, layers, width, heads, tokens, batch_size):
    """Moments and a density of a transformer, with the time that is left on show."""
    model = Transformer(tokens, 64, width, layers, heads, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.as_pure(params)
    del model
    keys = jax.random.split(jax.random.key(0), 3)
    text = jax.random.randint(keys[0], (batch_size, 65), 0, tokens)
    batch = text[:, :-1], text[:, 1:]
    batches = [tuple(x[i : i + 2] for x in batch) for i in range(0, batch_size, 2)]
    loss_fn = lambda p, b: cross_entropy(nnx.merge(graphdef, p)(b[0]), b[1])
    row = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    gradient = jax.jit(jax.grad(loss_fn))
    steps = 20 if effort.steps > 20 else 2
    with Progress() as progress:  # which says how long is left
        task = progress.add_task("products of the density", total=steps)

        def watched(batches):
            yield from batches
            progress.advance(task)

        matvec = dataset_matvec(loss_fn, params, batches, wrap=watched)
        options = {"num_microbatches": batch_size // 2, "stderr": False}
        calls = {
            "gradient": lambda: gradient(params, batches[0]),
            "gradient, warm": lambda: gradient(params, batches[0]),
            "moments": lambda: moments(loss_fn, params, batch, keys[1], **options),
            "density": lambda: spectral_density(
                matvec, params, keys[2], num_steps=steps, num_probes=1
            ),
        }
        for name, call in calls.items():
            taken = timing.seconds(lambda call=call: jax.block_until_ready(call()))
            row[f"{name}, seconds"] = taken
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row | {"peak GiB of memory": peak}


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
    times = rotate(calls, effort.rounds, f"density, {kind} {batch_size}")
    return {
        name: compare(times["rmtdamp"], taken) | {"seconds": statistics.median(taken)}
        for name, taken in times.items()
    }


WITHOUT = "auto_damping without a refresh"
EVERYS = {"auto_damping": EVERY, WITHOUT: NEVER, "auto_damping by hand": None}
STEPS = [(w, "mlp", n) for n in (256, 1024) for w in ("adam_shrinkage", *EVERYS)]
HOW = ("eager", "scan", "vmap")
REFRESHED = [(how, "mlp", n) for n in (256, 1024) for how in HOW]
# Two decades of batch sizes; on a CPU the largest takes a second or so.
SIZES = {"mlp": (16, 160, 1600), "cnn": (2, 20, 200), "transformer": (1, 10, 100)}
DTYPES = ("float32", "bfloat16")
PRODUCTS = [(k, n, dtype) for k, of in SIZES.items() for dtype in DTYPES for n in of]
DEVICES = (1, 2, 4, 8)
DENSITIES = (("mlp", 1024, 4, 80), ("cnn", 16, 1, 10))  # batch size, probes, steps
KFAC = [("mlp", n, *of) for n in (256, 4096) for of in ((), ("factored",))]
KFAC += [("cnn", 128)]
STEPPED = [("mlp", 256), ("mlp", 4096), ("cnn", 128)]
REGIONS = [(what, *size) for what in ("Adam", "KFAC") for size in STEPPED]
# Where there is an environment for it.
PEER = [(n,) for n in (256, 4096)] if KFAC_JAX else []
# Tokens, width, vocabulary, tokens in a chunk.
VOCABULARIES = [(n, 128, 50_304, 128) for n in (512, 1024)]
TYPES = (
    ("float32",) * 2,
    ("float32", "bfloat16"),
    ("bfloat16",) * 2,
    ("float32", "float16"),
    ("float16",) * 2,
)
MODES = ("forward-over-reverse", "finite-difference")
PRECISIONS = [(*types, mode) for mode in MODES for types in TYPES]
CALLS = ("refresh by hand", "auto_adam", "eigsh")
# A batch so small that next to nothing of a first call is its arithmetic.
FIRST = list(itertools.product(CALLS, ("mlp", "transformer"), (4,)))
SECTIONS = {
    "steps": (step_row, [*STEPS, ("auto_damping by hand", "cnn", 128)]),
    "refreshes": (refresh_row, [*REFRESHED, ("eager", "cnn", 128)]),
    "kfac": (kfac_row, KFAC),
    "regions": (region_row, REGIONS),
    "kfac-jax": (kfac_jax_row, PEER),
    "eigenbases": (eigenbases_row, [(k, 16, 2) for k in ("mlp", "transformer")]),
    "products": (product_row, PRODUCTS),
    "density": (density_row, DENSITIES),
    "penalties": (penalty_row, [("mlp", 256), ("cnn", 64)]),
    "vocabulary": (vocabulary_row, VOCABULARIES),
    "precision": (precision_row, PRECISIONS),
    "first calls": (first_call_row, FIRST),
    "scaling": (scaling_row, list(itertools.product(PROGRAMS, LAYOUTS, DEVICES))),
    # Layers, width, heads, tokens, examples.
    "big": (big_row, [(12, 768, 12, 10_000, 8)]),
}


def main():
    """Measure what is missing, and print the tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("sections", nargs="*", metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="a rehearsal")
    parser.add_argument("--fresh", action="store_true", help="measure rows again")
    parser.add_argument("--compare", action="store_true", help="with what is kept")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}: take {', '.join(SECTIONS)}")
    if len(args.sections) != 1:
        command = [sys.executable, "-m", "benchmarks.costs"]
        options = [option for option in sys.argv[1:] if option.startswith("-")]
        failed = [
            section
            for section in args.sections or SECTIONS
            if subprocess.run([*command, section, *options], check=False).returncode
        ]
        sys.exit(f"failed, or worse than before: {', '.join(failed)}" if failed else 0)
    jax.config.update("jax_default_matmul_precision", "highest")
    if devices := {"scaling": max(DEVICES), "eigenbases": 2}.get(args.sections[0]):
        jax.config.update("jax_num_cpu_devices", devices)
    effort = QUICK if args.quick else timing.Effort()
    path, cores = RESULTS / "costs.json", len(os.sched_getaffinity(0))
    kept = json.loads(path.read_text()) if path.exists() else {}
    keeps = not (args.quick or args.compare)
    found = kept if keeps else {}
    device = (
        f"{cores} CPU core{'s' * (cores > 1)}"
        if on_cpu()
        else jax.devices()[0].device_kind
    )
    for section in args.sections:
        measure, cases = SECTIONS[section]
        done = found.setdefault(device, {}).setdefault(section, {})
        for case in cases:
            name = ", ".join(map(str, case))
            if name not in done or args.fresh:
                done[name] = {"jax": jax.__version__, **measure(effort, *case)}
                if keeps:
                    path.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(
        f"**{section}, {device}**\n\n{cost_table(of)}\n"
        for device, sections in found.items()
        for section, of in sections.items()
    )
    if keeps:
        (RESULTS / "costs.md").write_text(text)
    print(f"\n{text}")
    if args.compare:
        before = kept.get(device, {})
        changes = worse(before, found[device])
        table = markdown(changes) if changes else "nothing"
        print(f"**Worse than in {path.name}**\n\n{table}")
        for row in unmatched(before, found[device]):
            print(f"Not compared: {row}")
        sys.exit(bool(changes))


if __name__ == "__main__":
    main()
