r"""Spectral descent on imbalanced data: linear networks on a Gaussian mixture.

Classes k of prior p_k, x = |mu| v_k + z with orthonormal v_k and normal z,
one-hot y, squared loss. E[y x^T] = sum s_k e_k v_k^T with s_k = |mu| p_k, and E[x x^T]
has eigenvalue l_k = |mu|^2 p_k + 1 along v_k: they are jointly diagonal. A network of L
linear layers that starts there, all singular values eps, stays there: its product has
the components w_k = a_k^L, with a_k of each layer. A layer's gradient has the singular
value a_k^(L - 1) |s_k - l_k w_k|, so that with t = learning rate x steps

    spectral descent:  a_k = min(eps + t, (s_k / l_k)^(1/L)), all at one rate,
    gradient descent:  w_k' = L w_k^(2 - 2/L) (s_k - l_k w_k); for L = 1 from 0
                       w_k = (s_k / l_k) (1 - exp(-l_k t)).
"""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import report
from benchmarks.shared.claims import below, by, cell, ends, mean, more, trend
from benchmarks.shared.optimizers import OPTIMIZERS
from benchmarks.shared.runs import Row, rounded, runs_of

CLASSES, INPUTS, LENGTH, RATIO = 5, 20, 3.0, 100.0  # LENGTH is |mu|, of unit noise
PRIORS = RATIO ** (-np.arange(CLASSES) / (CLASSES - 1))
PRIORS = PRIORS / PRIORS.sum()
STRENGTHS, CURVATURES = PRIORS * LENGTH, PRIORS * LENGTH**2 + 1  # s, l
END = STRENGTHS / CURVATURES
DEPTHS, START = (1, 2, 3, 4), 1e-4  # w at the start, eps^L
LEVELS = (0.001, 0.01, 0.1, 0.5, 0.9)  # the first component's share of its end
NUM_STEPS = {"spectral": 2000, "gd": 200_000, "normalised": 2000}
SNAPSHOTS = 1000  # of these steps, at equal ratios
ORIGIN = {0: "true", 5000: "of 5000 examples"}  # of the moments
NAMES = {
    "spectral": "SpecGD",
    "gd": "gradient descent",
    "normalised": "normalised SGD",
}


def spectral_flow(depth, t):
    """w_k under spectral descent, (times, classes)."""
    eps = START ** (1 / depth)
    return np.minimum((eps + np.asarray(t)[:, None]) ** depth, END)


def _flow(depth, k):
    """Times, and w_k at these, under gradient flow.

    With y the logit of w_k / (s_k / l_k) the flow is dt = w_k^(2/L - 1) dy / (L s_k).
    """
    logit = lambda share: np.log(share / (1 - share))
    y = np.linspace(logit(START / END[k]), 30, 20001)
    w = END[k] / (1 + np.exp(-y))
    slope = w ** (2 / depth - 1) / (depth * STRENGTHS[k])
    times = np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(y))
    return np.append(0, times), w


def gradient_flow(depth, t):
    """w_k under gradient flow, (times, classes)."""
    flows = [_flow(depth, k) for k in range(CLASSES)]
    return np.stack([np.interp(t, *flow) for flow in flows], 1)


@functools.partial(jax.jit, static_argnames="optimizer")
def descend(optimizer, steps, rate, layers, strength, curvature):
    """The product of the layers after so many steps, from two moments."""
    tx = OPTIMIZERS[optimizer](rate, None, None, None)
    product = lambda layers: functools.reduce(lambda w, layer: layer @ w, layers)

    def loss(layers):
        w = product(layers)
        return jnp.vdot(w, w @ curvature) / 2 - jnp.vdot(w, strength)

    def one(_, carry):
        layers, state = carry
        updates, state = tx.update(jax.grad(loss)(layers), state, layers)
        return optax.apply_updates(layers, updates), state

    def some(carry, num):
        carry = jax.lax.fori_loop(0, num, one, carry)
        return carry, product(carry[0])

    carry = layers, tx.init(layers)
    return jax.lax.scan(some, carry, jnp.diff(steps, prepend=0))[1]


def problem(rng, depth, num_train):
    """Directions (classes, inputs), two moments, the layers at the start.

    True moments and layers that are diagonal there, or those of examples and layers
    that are orthogonal at random.
    """
    orthonormal = lambda m, n: np.linalg.qr(rng.normal(size=(n, m)))[0].T
    v = orthonormal(CLASSES, INPUTS)
    if num_train:
        y = rng.choice(CLASSES, num_train, p=PRIORS)
        x = LENGTH * v[y] + rng.normal(size=(num_train, INPUTS))
        moments = np.eye(CLASSES)[y].T @ x / num_train, x.T @ x / num_train
        layers = [orthonormal(CLASSES, INPUTS)]
        layers += [orthonormal(CLASSES, CLASSES) for _ in range(depth - 1)]
    else:
        curvature = LENGTH**2 * (v.T * PRIORS) @ v + np.eye(INPUTS)
        moments = STRENGTHS[:, None] * v, curvature
        layers = [v, *[np.eye(CLASSES)] * (depth - 1)]
    return v, moments, [START ** (1 / depth) * layer for layer in layers]


def mixture(folder: pathlib.Path, *, depth, num_train, seed) -> Row:
    """Three ways down, from true moments (`num_train` 0) or from those of examples.

    Spectral descent until the first component is at its end, gradient descent until all
    are at 90 %, normalised as many steps as spectral descent, each as long as its.
    """
    del folder
    rng = np.random.default_rng(seed)
    v, (strength, curvature), layers = problem(rng, depth, num_train)
    limit = np.linalg.solve(curvature, strength.T).T
    flows = [_flow(depth, k) for k in range(CLASSES)]
    times = {
        "spectral": 1.1 * (END[0] ** (1 / depth) - START ** (1 / depth)),
        "gd": max(np.interp(0.9 * END[k], *flow[::-1]) for k, flow in enumerate(flows)),
    }
    steps = {k: np.rint(np.geomspace(1, n, SNAPSHOTS)) for k, n in NUM_STEPS.items()}
    steps = {k: x.astype(int) for k, x in steps.items()}
    rates = {name: time / NUM_STEPS[name] for name, time in times.items()}
    rates["normalised"] = rates["spectral"] * (CLASSES * depth) ** 0.5
    with jax.enable_x64(True):
        moments = jnp.asarray(strength), jnp.asarray(curvature)
        layers = [jnp.asarray(layer) for layer in layers]
        w = {
            k: np.asarray(descend(k, steps[k], rate, layers, *moments))
            for k, rate in rates.items()
        }
    parts = {k: np.einsum("nkd,kd->nk", x, v) for k, x in w.items()}
    t = {k: rates[k] * steps[k] for k in times}
    root = lambda x: np.maximum(x, 0) ** (1 / depth)
    far = lambda x: np.abs(x).max()
    flow = {
        "spectral": root(spectral_flow(depth, t["spectral"])),
        "gd": gradient_flow(depth, t["gd"]),
    }
    test = LENGTH * v[:, None] + rng.normal(size=(CLASSES, 2000, INPUTS))

    def accuracy(w):
        """The mean over classes of the share that is right."""
        return np.mean((test @ w.T).argmax(-1) == np.arange(CLASSES)[:, None])

    def lag(t, shares):
        """The rarest component's time to half of its end, over the first's."""
        first, *_, rarest = np.argmax(shares >= 0.5, axis=0)
        return t[rarest] / t[first] if first and rarest else None

    end = limit[0] @ v[0]
    at = {
        k: [int(np.argmax(x[:, 0] >= s * end)) for s in LEVELS]
        for k, x in parts.items()
    }
    at["normalised"] = at["spectral"]  # as many steps
    drawn = slice(None, None, SNAPSHOTS // 40)
    return {
        "spectral_error": far(root(parts["spectral"]) - flow["spectral"])
        / rates["spectral"],
        "gradient_error": far((parts["gd"] - flow["gd"]) / END),
        "lag": {k: lag(t[k], parts[k] / END) for k in times},
        "accuracy": {k: rounded([accuracy(x[i]) for i in at[k]]) for k, x in w.items()},
        "limit_accuracy": accuracy(limit),
        "times": {k: rounded(x[drawn]) for k, x in t.items()},
        "shares": {k: [rounded(x) for x in (parts[k][drawn] / END).T] for k in t},
    }


def _runs():
    return runs_of(mixture, {}, depth=DEPTHS, num_train=ORIGIN, seed=range(5))


def _case(row):
    return {"depth": row["depth"], "moments": ORIGIN[row["num_train"]]}


def _accuracies(rows, name, level) -> list[float]:
    """Balanced accuracy, in %, with the first component at this share of its end."""
    return [100 * row["accuracy"][name][LEVELS.index(level)] for row in rows]


def _gaps(rows, level) -> list[float]:
    pair = (_accuracies(rows, name, level) for name in ("spectral", "gd"))
    return [a - b for a, b in zip(*pair, strict=True)]


def _line(key, found):
    rows, line = found[key], {}
    if key[1] == ORIGIN[0]:
        line["SpecGD's error, steps"] = cell(ends(rows, "spectral_error"), 2)
        line["gradient descent's, %"] = cell(ends(rows, "gradient_error", 100.0), 2)
        for name in ("spectral", "gd"):
            lags = [row["lag"][name] for row in rows]
            line[f"{NAMES[name]}: rarest over first"] = cell(lags, 2)
    for level, name in itertools.product(LEVELS[2:4], NUM_STEPS):
        head = f"{NAMES[name]} at {level:g}, %"
        line[head] = cell(_accuracies(rows, name, level), 1)
    return line | {"least squares, %": cell(ends(rows, "limit_accuracy", 100.0), 1)}


def _checks(found):
    exact, drawn = ([found[L, x] for L in DEPTHS] for x in ORIGIN.values())
    worst = lambda name: np.max([ends(rows, name) for rows in exact], axis=0)
    lags = lambda name: [[row["lag"][name] for row in rows] for rows in exact]
    flow = "SpecGD's components are min((eps + t)^L, s/l): off by at most, in steps"
    late = "SpecGD: time until the rarest component is half learned, over the first's"
    checks = [
        below(flow, worst("spectral_error"), 1.001),
        below("Gradient descent's are its flow's", worst("gradient_error"), 0.05),
        below(f"{late}: below 1", np.max(lags("spectral"), axis=0), 1),
        trend("Gradient descent: that rises with depth", lags("gd")),
    ]
    for depth, rows in zip(DEPTHS, drawn, strict=True):
        for name in ("gd", "normalised"):
            text = f"Depth {depth}: accuracy at 0.1, points, SpecGD less {NAMES[name]}"
            pair = (_accuracies(rows, k, 0.1) for k in ("spectral", name))
            checks.append(more(text, *pair))
        along = [_gaps(rows, level) for level in LEVELS[:3]]
        checks.append(trend(f"Depth {depth}: the gap grows until 0.1", along))
    for level in LEVELS[2:4]:
        along = [_gaps(rows, level) for rows in drawn]
        checks.append(trend(f"The gap at {level:g} rises with depth", along))
    return checks


def _panels(rows):
    """Components against time at two depths; the gap against the first's progress."""
    found = by(rows, lambda row: tuple(_case(row).values()))
    for depth in (1, 3):
        row, lines = found[depth, ORIGIN[0]][0], []
        for name, style in (("gd", "--"), ("spectral", "-")):
            for k, share in enumerate(row["shares"][name]):
                y, label = END[k] * np.array(share), f"prior {PRIORS[k]:.2g}"
                lines.append(report.Line(label, row["times"][name], y, style))
        axes = {"xscale": "log", "yscale": "log", "xlabel": "t; gradient descent: --"}
        yield report.curves(lines, **axes, title=f"components, depth {depth}")
    lines = []
    for depth in DEPTHS:
        y = [mean(_gaps(found[depth, ORIGIN[5000]], level)) for level in LEVELS]
        lines.append(report.Line(f"depth {depth}", LEVELS, y, "o-"))
    axes = {"xscale": "log", "xlabel": "first component, share of its end"}
    yield report.curves(lines, **axes, title="balanced accuracy, gap")


EXPERIMENTS = [
    Experiment("imbalanced_theory", _runs, _case, _line, _checks, [_panels]),
]
