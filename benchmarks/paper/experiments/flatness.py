"""Flatness: the trace of the Hessian as a regulariser (Gatmiry et al., 2023).

A deep linear network W_L ... W_1 learns a matrix from random measurements <A_i, M>.
Over the factorisations of one product the least trace is a power of its nuclear norm;
over products that fit, a small trace then means a low rank. A real network follows.
"""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import report
from benchmarks.shared.claims import (
    Check,
    below,
    by,
    cells,
    ends,
    less,
    mean,
    not_more,
)
from benchmarks.shared.runs import Row, Run, rounded, runs_of
from rmtdamp.flatness import (
    least_linear_network_trace,
    linear_network_trace,
    trace_penalty,
)

from . import rules

DEPTHS, SEEDS = (2, 3, 4, 5), range(5)
SIZE, RANK, HELD_OUT = 10, 2, 40  # of the matrix; validation measurements
RATES = (0.003, 0.01, 0.03)
LARGER = (*RATES, 0.1)  # what they are held against is better at larger ones
# method -> the strengths that are tried
STRENGTHS = {
    "gradient descent": (0.0,),
    "trace penalty": (3e-4, 3e-3, 3e-2),
    "closed form": (3e-4, 3e-3, 3e-2),
    "SAM": (0.03, 0.1, 0.3),
    "label noise": (0.3, 1.0, 3.0),
    "parameter noise": (0.03, 0.1, 0.3),
}
PENALTIES = (0.0, 1e-5, 1e-4, 1e-3)  # of a network's trace


def product(weights):
    """W_L ... W_1."""
    return functools.reduce(lambda x, w: w @ x, weights)


def see(matrices, matrix):
    """The measurements <A_i, M>."""
    return jnp.einsum("nkm,km->n", matrices, matrix)


def loss_fn(weights, batch):
    """The mean squared error of the measurements."""
    matrices, targets = batch
    return jnp.mean((see(matrices, product(weights)) - targets) ** 2)


def _random(key, *shape):
    return jax.random.normal(key, shape) / shape[-1] ** 0.5


# The least trace over the factorisations of one product.


def flattest(matrix, measurements, key, depth: int, steps: int = 4000):
    """(trace of some factorisation of M, the least of all), by Adam over the bases.

    Any factorisation of a regular M into square factors is W_l = G_l V_l G_(l-1)^-1
    with V one of them, regular G_1 to G_(L-1), and G_0 = G_L = I.
    """
    size, keys = len(matrix), jax.random.split(key, depth)
    some = [jnp.linalg.qr(_random(k, size, size))[0] for k in keys[: depth - 1]]
    last = jnp.linalg.solve(product(some).T, matrix.T).T
    eye = jnp.eye(size)

    def trace(bases):
        sides = [eye, *bases, eye]
        pairs = zip([*some, last], itertools.pairwise(sides), strict=True)
        weights = [g @ jnp.linalg.solve(f.T, w.T).T for w, (f, g) in pairs]
        return linear_network_trace(weights, measurements)

    solver = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    def one(carry, _):
        bases, state = carry
        grads = jax.grad(lambda x: jnp.log(trace(x)))(bases)
        updates, state = solver.update(grads, state)
        return (optax.apply_updates(bases, updates), state), None

    bases = [eye] * (depth - 1)
    (found, _), _ = jax.lax.scan(one, (bases, solver.init(bases)), length=steps)
    return trace(bases), trace(found)


@functools.partial(jax.jit, static_argnames="depth")
def _flattest_each(matrices, measurements, keys, depth):
    return jax.vmap(lambda m, key: flattest(m, measurements, key, depth))(
        matrices, keys
    )


def least_trace(
    folder: pathlib.Path, *, depth, size, num_measurements, num_matrices, seed
) -> Row:
    """Matrices of many spectra: nuclear norm, and the least trace that was found."""
    del folder
    keys = jax.random.split(jax.random.key(seed), num_matrices + 1)
    measurements = jax.random.normal(keys[0], (num_measurements, size**2))
    # As many as a matrix has elements, with the same second moments, do as well.
    measurements = jnp.linalg.qr(measurements)[1].reshape(-1, size, size)
    measurements *= size / num_measurements**0.5
    rng, shape = np.random.default_rng(seed), (num_matrices, size)
    spectra = 10 ** (rng.uniform(-0.5, 1, (num_matrices, 1)) - 1.5 * rng.random(shape))
    make = functools.partial(_matrix, size=size)
    matrices = jax.vmap(make)(jnp.asarray(spectra, jnp.float32), keys[1:])
    some, least = _flattest_each(matrices, measurements, keys[1:], depth)
    predict = functools.partial(least_linear_network_trace, depth=depth)
    predicted = jax.vmap(predict)(matrices)
    nuclear = spectra.sum(axis=1)
    slope = np.polyfit(np.log(nuclear), np.log(least), 1)[0]
    curves = {"nuclear": nuclear, "least": least, "predicted": predicted}
    return {name: rounded(curve) for name, curve in curves.items()} | {
        "slope": float(slope),
        "ratio": float(jnp.exp(jnp.mean(jnp.log(least / predicted)))),
        "excess": float(jnp.min(some / least)),
    }


def _matrix(spectrum, key, size):
    """Of these singular values."""
    both = jax.random.split(key)
    u, v = (jnp.linalg.qr(_random(k, size, size))[0] for k in both)
    return u * spectrum[None] @ v.T


def _least_runs():
    sizes = {"size": 6, "num_measurements": 4000, "num_matrices": 12}
    return runs_of(least_trace, sizes, depth=DEPTHS, seed=SEEDS)


def _power(depth):
    return 2 * (depth - 1) / depth


def _least_checks(found):
    checks = []
    for depth, rows in found.items():
        off = [abs(x - _power(depth)) for x in ends(rows, "slope")]
        text = f"Depth {depth}: the slope is off 2 (L - 1) / L by less than 0.05"
        checks.append(below(text, off, 0.05))
        off = [abs(x - 1) for x in ends(rows, "ratio")]
        text = (
            f"Depth {depth}: the constant is off 2 L (d_0 d_L)^(1/L) by less than 5 %"
        )
        checks.append(below(text, off, 0.05))
        excess = ends(rows, "excess")
        text = f"Depth {depth}: no random factorisation is flatter: the least ratio"
        checks.append(Check(text, mean(excess), None, min(excess) >= 1))
    return checks


LEAST = {"slope": ("slope", 3), "least over predicted": ("ratio", 3)}


def _least_panels(rows):
    drawn = [row for row in rows if row["seed"] == 0]
    lines = [
        report.Line(f"depth {r['depth']}", r["nuclear"], r["least"], "o") for r in drawn
    ]
    for row in drawn:
        x, y = (np.sort(row[k]) for k in ("nuclear", "predicted"))
        lines.append(report.Line(f"depth {row['depth']}", x, y, "-"))
    axes = {"xscale": "log", "yscale": "log", "xlabel": "nuclear norm"}
    return [report.curves(lines, **axes, title="least trace; line: predicted")]


# Recovery of a matrix of low rank.


def _gradient(method, weights, batch, strength, key):
    """The gradient that a method follows; SAM is optax's own."""
    matrices, targets = batch
    loss = functools.partial(loss_fn, batch=batch)
    penalty = {
        "trace penalty": lambda w: trace_penalty(loss_fn, w, batch, key),
        "closed form": lambda w: linear_network_trace(w, matrices),
    }.get(method)
    if penalty is not None:
        return jax.grad(lambda w: loss(w) + strength * penalty(w))(weights)
    if method == "label noise":
        noisy = targets + strength * jax.random.normal(key, targets.shape)
        return jax.grad(loss_fn)(weights, (matrices, noisy))
    if method == "parameter noise":
        keys = jax.random.split(key, len(weights))
        noise = lambda k, w: strength * jax.random.normal(k, w.shape)
        weights = [w + noise(k, w) for k, w in zip(keys, weights, strict=True)]
    return jax.grad(loss)(weights)


@functools.partial(jax.jit, static_argnames=("method", "depth", "steps"))
def _recovered(method, depth, steps, batch, key, rate, strength):
    """The product after training; strengths fall to 0 over the last quarter."""
    fall = lambda count: jnp.clip(4 * (1 - count / steps), 0, 1)
    solver = optax.sgd(rate, momentum=0.9)
    if method == "SAM":
        away = optax.scale_by_learning_rate(lambda count: strength * fall(count))
        away = optax.chain(optax.contrib.normalize(), away)
        solver = optax.contrib.sam(solver, away, opaque_mode=True, reset_state=False)

    def one(carry, count):
        weights, state = carry
        given = weights, batch, strength * fall(count), jax.random.fold_in(key, count)
        again = lambda w, _: _gradient(method, w, *given[1:])
        extra = {"grad_fn": again} if method == "SAM" else {}
        updates, state = solver.update(
            _gradient(method, *given), state, weights, **extra
        )
        return (optax.apply_updates(weights, updates), state), None

    keys = jax.random.split(jax.random.fold_in(key, steps), depth)
    weights = [_random(k, SIZE, SIZE) for k in keys]
    begun = weights, solver.init(weights)
    (weights, _), _ = jax.lax.scan(one, begun, jnp.arange(steps))
    return product(weights), loss_fn(weights, batch)


def recovery(
    folder: pathlib.Path, *, method, depth, num_measurements, steps, seeds
) -> Row:
    """Of random matrices of low rank, one for each seed."""
    del folder
    rates = LARGER if method in ("gradient descent", "SAM") else RATES
    pairs = jnp.array(list(itertools.product(rates, STRENGTHS[method])))
    made = method, depth, num_measurements, steps
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    found = jax.lax.map(lambda key: _recover(*made, key, pairs), keys)
    return {k: rounded(v) for k, v in found.items()}


def _recover(method, depth, num_measurements, steps, key, pairs):
    """Held-out measurements choose rate and strength."""
    keys = jax.random.split(key, 5)
    u, v = (jnp.linalg.qr(_random(k, SIZE, RANK))[0] for k in keys[:2])
    truth = u @ v.T
    matrices = jax.random.normal(keys[2], (num_measurements, SIZE, SIZE))
    held_out = jax.random.normal(keys[3], (HELD_OUT, SIZE, SIZE))
    batch = matrices, see(matrices, truth)
    train = functools.partial(_recovered, method, depth, steps, batch, keys[4])
    products, losses = jax.vmap(train)(*pairs.T)
    errors = jax.vmap(lambda m: jnp.mean(see(held_out, m - truth) ** 2))(products)
    best = jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf))
    found = products[best]
    return {
        "rate": pairs[best, 0],
        "strength": pairs[best, 1],
        "train_loss": losses[best],
        "error": jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth),
        "nuclear": jnp.linalg.svd(found, compute_uv=False).sum(),
    }


def by_seed(rows):
    """A row for each seed of a run."""
    names = ("rate", "strength", "train_loss", "error", "nuclear")
    return [
        row | {"seed": seed} | {name: row[name][i] for name in names}
        for row in rows
        for i, seed in enumerate(row["seeds"])
    ]


MEASUREMENTS = (35, 50, 65, 80)


def _recovery_runs():
    axes = {"depth": DEPTHS, "num_measurements": MEASUREMENTS, "method": STRENGTHS}
    return runs_of(recovery, {"steps": 3000, "seeds": list(SEEDS)}, **axes)


def _recovery_heads(row):
    names = {"depth": "depth", "num_measurements": "measurements", "method": "method"}
    return {head: row[name] for name, head in names.items()}


RECOVERY = {
    "error": ("error", 3),
    "nuclear norm (truth: 2)": ("nuclear", 3),
    "train loss": ("train_loss", 6),
}


def _recovery_checks(found):
    """At each depth, over all numbers of measurements."""
    error = lambda depth, method: [
        mean([row["error"] for row in of])
        for of in by(
            [r for n in MEASUREMENTS for r in found[depth, n, method]],
            lambda row: row["seed"],
        ).values()
    ]
    checks = []
    plain, ours, *others = STRENGTHS
    for depth in DEPTHS:
        base, penalised = error(depth, plain), error(depth, ours)
        text = f"Depth {depth}: the relative error is smaller than gradient descent's"
        checks.append(less(f"{text} with the trace penalty", penalised, base))
        for other in others[1:]:
            checks.append(less(f"{text} with {other}", error(depth, other), base))
        text = f"Depth {depth}: the penalty's error is no larger than"
        for other in others:
            theirs = error(depth, other)
            checks.append(not_more(f"{text} with {other}", penalised, theirs))
    return checks


def _recovery_panels(rows):
    for depth in DEPTHS:
        lines = []
        for method in STRENGTHS:
            of = [r for r in rows if (r["depth"], r["method"]) == (depth, method)]
            found = by(of, lambda row: row["num_measurements"])
            y = [mean(ends(x, "error")) for x in found.values()]
            lines.append(report.Line(method, list(found), y, "o-"))
        axes = {"xlabel": "measurements", "yscale": "log"}
        yield report.curves(lines, **axes, title=f"relative error, depth {depth}")


# A real network.


def _network_runs():
    tasks = [of for name, of in rules.TASKS.items() if "MLP" in name]
    method = {"optimizer": "adam-flat"}
    axes = tasks, PENALTIES, rules.RATES[:3], SEEDS
    runs = []
    for sizes, penalty, rate, seed in itertools.product(*axes):
        run = rules.run(sizes, method, 0.0, rate, seed)
        runs.append(Run(run.function, run.config | {"trace_penalty": penalty}))
    return runs


def _network_heads(row):
    task = next(k for k, (of, _) in rules.TASKS.items() if of == row["task"])
    return {"task": task, "penalty": row["trace_penalty"]}


def _network_line(key, found):
    chosen = rules.best_rate(found[key])
    columns = {"test loss": ("best_loss", 4), "test error, %": ("best_error", 2, 100)}
    return {"best rate": chosen[0]["learning_rate"], **cells(chosen, columns)}


def _network_checks(found):
    """The weight that validation chooses, against none."""
    checks = []
    for task in dict.fromkeys(task for task, _ in found):
        of = {penalty: rules.best_rate(found[task, penalty]) for penalty in PENALTIES}
        seen = {k: mean(ends(rows, "chosen_loss")) for k, rows in of.items()}
        best = min(PENALTIES[1:], key=seen.__getitem__)
        for name, factor in {"loss": 1, "error": 100}.items():
            both = of[best], of[0.0]
            ours, plain = (ends(rows, f"best_{name}", factor) for rows in both)
            points = ", points" if name == "error" else ""
            text = f"{task}: a penalty of {best:g} lowers the test {name}{points}"
            checks.append(less(text, ours, plain))
    return checks


EXPERIMENTS = [
    Experiment(
        "flatness_least",
        _least_runs,
        lambda row: {"depth": row["depth"]},
        lambda key, found: (
            {"2 (L - 1) / L": f"{_power(key):.3f}"} | cells(found[key], LEAST)
        ),
        _least_checks,
        [_least_panels],
    ),
    Experiment(
        "flatness_recovery",
        _recovery_runs,
        _recovery_heads,
        lambda key, found: cells(found[key], RECOVERY),
        _recovery_checks,
        [_recovery_panels],
        each=by_seed,
    ),
    Experiment(
        "flatness_network",
        _network_runs,
        _network_heads,
        _network_line,
        _network_checks,
        [("linear", "test error, %")],
        each=rules.with_chosen,
    ),
]
