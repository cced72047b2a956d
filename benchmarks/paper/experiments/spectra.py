"""Figure 2, Theorem 1, eq. 7: bulk and outliers, overlaps, the noise's law."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper._experiment import Conclusion, Experiment
from benchmarks.shared.checks import cell, difference, groups, mean
from benchmarks.shared.figures import Line, curves
from benchmarks.shared.optimizers import Method
from benchmarks.shared.runs import Row, Run, rounded
from benchmarks.shared.training import Task, fit
from rmtdamp import hessian, rmt
from rmtdamp.outliers import halves, outliers, spiked_law
from rmtdamp.plot import spectral_density as plot_density

from . import _vgg

TASK = {"dataset": "fashion-mnist", "model": "mlp", "width": 0.25, "num_train": 5000}
SEEDS = (0, 1, 2)
TOP = 10
NAMES = {"sgd": "SGD", "adam": "Adam"}


class Point:
    """Where a run ended: Hessians of some of the training set there."""

    def __init__(self, folder, task, method, epochs, seed, rate=1e-3, damping=1e-8):
        self.done = fit(
            folder,
            Task(**task),
            method,
            learning_rate=rate,
            damping=damping,
            epochs=epochs,
            seed=seed,
        )
        self.params, self.data = self.done.params, self.done.data[0]
        self.arguments = self.done.network.loss_fn, self.params
        self.loss_args = {"loss_args": self.done.loss_args}

    def some(self, size, rng):
        rows = rng.permutation(len(self.data[1]))[:size]
        return tuple(x[rows] for x in self.data)

    def matvec(self, batch):
        return hessian.hessian_matvec(*self.arguments, batch, **self.loss_args)

    def noise(self, batch):
        """The noise of a batch's Hessian, from its halves."""
        return hessian.noise_matvec(*map(self.matvec, halves(batch)))


def end_spectrum(
    folder: pathlib.Path, *, task, optimizer, learning_rate, damping, epochs, examples,
    num_steps, seed,
) -> Row:  # fmt: skip
    """Train as the tables do, then look: the density on some of the training set."""
    method = Method(optimizer)
    point = Point(folder, task, method, epochs, seed, learning_rate, damping)
    keys = jax.random.split(jax.random.key(seed), 2)
    order = np.random.default_rng(seed).permutation(len(point.data[1]))
    part = lambda size: tuple(x[order[:size]] for x in point.data)
    options = {"num_steps": num_steps, "num_probes": 1}
    density = hessian.spectral_density(
        point.matvec(part(examples)), point.params, keys[0], **options
    )
    first, second = map(point.matvec, halves(part(128)))
    found = outliers(first, second, point.params, keys[1], k=8, **options)
    return {
        "nodes": rounded(density.nodes),
        "weights": rounded(density.weights),
        "num_parameters": density.num_parameters,
        "lambda_max": float(density.nodes.max()),
        "lambda_min": float(density.nodes.min()),
        "trace": float(density.moment(1)[0]) * density.num_parameters,
        "noise_edge": float(found.edge),
        "batch_eigenvalues": rounded(found.eigenvalues),
        "outliers": int(found.is_outlier.sum()),
        "test_error": point.done.curves["test_error"][-1],
        "train_error": point.done.curves["train_error"][-1],
    }


def overlap(
    folder: pathlib.Path, *, task, epochs, batch_size, seed, examples
) -> Row:  # fmt: skip
    """Top eigenvectors of a batch's Hessian against those of the data set's."""
    point = Point(folder, task, Method("adam", "constant"), epochs, seed)
    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 4)
    data, params = point.data, point.params
    parts = [tuple(x[i : i + 1000] for x in data) for i in range(0, examples, 1000)]
    whole = hessian.dataset_matvec(*point.arguments, parts, **point.loss_args)
    top = functools.partial(hessian.eigsh, k=TOP, which="LM")
    true = top(whole, params, keys[0])
    batch = point.some(batch_size, rng)
    seen = top(point.matvec(batch), params, keys[1])
    flat = lambda tree: np.concatenate(
        [np.asarray(x, np.float64).reshape(TOP, -1) for x in jax.tree.leaves(tree)], 1
    )
    squared = (flat(true.eigenvectors) @ flat(seen.eigenvectors).T) ** 2
    # m of a batch of this size, from 40 of them.
    moments = hessian.moments(
        *point.arguments,
        point.some(min(examples, 40 * 64), rng),
        keys[2],
        num_microbatches=40,
        num_probes=4,
        batch_size=batch_size,
        **point.loss_args,
    )
    noise = hessian.spectral_density(
        point.noise(batch), params, keys[3], num_steps=40, num_probes=2
    )
    edge = jnp.max(jnp.abs(noise.nodes))
    outside = jnp.abs(seen.eigenvalues) > edge
    law = spiked_law(jnp.where(outside, seen.eigenvalues, 2 * edge), noise)[1]
    nu, variance = np.asarray(true.eigenvalues, np.float64), float(moments.variance)
    return {
        "true": rounded(nu),
        "seen": rounded(seen.eigenvalues),
        "variance": variance,
        "overlap": rounded(np.diag(squared)),
        "best_overlap": rounded(squared.max(axis=1)),
        "theorem": rounded(np.clip(1 - variance / nu**2, 0, None)),
        "noise_law": rounded(jnp.where(outside, law, 0)),
        "residual": float(jnp.max(true.residuals)),
    }


def noise(folder: pathlib.Path, *, task, epochs, batch_size, seed) -> Row:
    """The spectrum of a batch Hessian's noise, from its halves, and eq. 7's law."""
    point = Point(folder, task, Method("adam", "constant"), epochs, seed)
    batch = point.some(batch_size, np.random.default_rng(seed))
    key, options = jax.random.key(seed), {"num_steps": 60, "num_probes": 4}
    density = hessian.spectral_density(point.noise(batch), point.params, key, **options)
    nodes = np.asarray(density.nodes, np.float64).ravel()
    weights = np.asarray(density.weights, np.float64).ravel() / len(density.nodes)
    order = np.argsort(nodes)
    nodes, weights = nodes[order], weights[order]
    variance, mass = weights @ nodes**2, np.cumsum(weights)
    law = np.asarray(rmt.semicircle_cdf(jnp.asarray(nodes), variance), np.float64)
    return {
        "variance": variance,
        "kurtosis": weights @ nodes**4 / variance**2,
        "edge_ratio": np.abs(nodes).max() / (2 * variance**0.5),
        "distance": max(np.abs(mass - law).max(), np.abs(mass - weights - law).max()),
        "nodes": rounded(nodes / variance**0.5),
        "mass": rounded(mass),
        "num_parameters": density.num_parameters,
    }


def _end_runs(scale):
    small = scale == "small"
    shared = {
        "task": _vgg.SMALL if small else _vgg.FULL,
        "epochs": 40 if small else 300,
    }
    shared |= {"examples": 512, "num_steps": 30} if small else {
        "examples": 5000, "num_steps": 80}  # fmt: skip
    rates = {"sgd": (_vgg.SGD_RATE[scale], 0.0), "adam": (1e-3, 1e-8)}
    names = "learning_rate", "damping"
    return [
        Run(
            end_spectrum,
            {"optimizer": n, "seed": s, **shared, **dict(zip(names, v, strict=True))},
        )
        for s in SEEDS
        for n, v in rates.items()
    ]


def _runs(function, scale, sizes, epochs, **more):
    small = scale == "small"
    shared = {"task": TASK if small else _vgg.FULL, **more}
    return [
        Run(function, {**shared, "epochs": n, "batch_size": size, "seed": seed})
        for size in sizes
        for n in epochs
        for seed in SEEDS
    ]


def _overlap_runs(scale):
    if scale == "small":
        return _runs(overlap, scale, (64, 256, 1024), (1, 20), examples=5000)
    return _runs(overlap, scale, (128, 1024), (1, 30), examples=50_000)


def _noise_runs(scale):
    return _runs(
        noise, scale, (128, 1024), (0, 1, 5, 20) if scale == "small" else (0, 1, 30)
    )


def _conclude_end(rows):
    found = {k[0]: v for k, v in groups(rows, "optimizer").items()}
    values = lambda name, field, factor=1: [factor * r[field] for r in found[name]]
    both = lambda field, factor=1: [mean(values(n, field, factor)) for n in NAMES]
    columns = {
        "lambda_1": ("lambda_max", 1, 1),
        "smallest": ("lambda_min", 2, 1),
        "trace": ("trace", 1, 1),
        "edge of a batch's noise": ("noise_edge", 1, 1),
        "outliers of 8": ("outliers", 1, 1),
        "train error, %": ("train_error", 1, 100),
        "test error, %": ("test_error", 1, 100),
    }
    table = [
        {"optimiser": NAMES[name]}
        | {k: cell(values(name, f, x), digits) for k, (f, digits, x) in columns.items()}
        for name in found
    ]
    sharper = difference(values("sgd", "lambda_max"), values("adam", "lambda_max"))
    worse = difference(values("sgd", "test_error"), values("adam", "test_error"))
    differ = abs(sharper[0]) > 2 * sharper[1] and abs(worse[0]) > 2 * worse[1]
    # Weight that lies within a hundredth of the largest eigenvalue: the bulk.
    near = lambda r: np.abs(r["nodes"]) < 0.01 * r["lambda_max"]
    bulk = mean([sum(np.array(r["weights"])[near(r)]) for r in rows])
    checks = [bulk > 0.9, differ and sharper[0] * worse[0] < 0]
    findings = {
        "weight of the spectrum within 1 % of lambda_1 of 0": bulk,
        "lambda_1: SGD, Adam": both("lambda_max"),
        "test error, %: SGD, Adam": [100 * x for x in both("test_error")],
        "eigenvalues of a batch of 128 outside its noise, of 8: SGD, Adam": (
            both("outliers")
        ),
    }
    return Conclusion(table, findings, checks)


def _conclude_overlap(rows):
    table = []
    columns = {
        "overlap^2": "overlap",
        "with the best of ten": "best_overlap",
        "Theorem 1": "theorem",
        "noise's own law": "noise_law",
    }
    for (size, epochs), found in groups(rows, "batch_size", "epochs").items():
        cells = {k: cell([mean(r[n]) for r in found]) for k, n in columns.items()}
        table.append({"batch": size, "epoch": epochs, **cells})
    off = lambda name: [
        float(np.mean(size([np.subtract(r[name], r["overlap"]) for r in rows])))
        for size in (np.abs, np.array)
    ]
    half = TOP // 2
    ranks = lambda part: mean([x for r in rows for x in r["overlap"][part]])
    sharp, flat = ranks(slice(half)), ranks(slice(half, None))
    sizes = sorted({r["batch_size"] for r in rows})
    of_size = lambda n: mean(
        [x for r in rows if r["batch_size"] == n for x in r["overlap"]]
    )
    small, large = of_size(sizes[0]), of_size(sizes[-1])
    principle = sharp > flat and large > small
    checks = [principle, principle and off("theorem")[0] < 0.1]
    findings = {
        "mean overlap^2, the five sharpest and the next five": [sharp, flat],
        f"mean overlap^2, batch of {sizes[0]} and of {sizes[-1]}": [small, large],
        "mean |prediction - measured|, Theorem 1": off("theorem")[0],
        "mean prediction - measured, Theorem 1": off("theorem")[1],
        "the same, from the noise's own law": off("noise_law"),
    }
    return Conclusion(table, findings, checks)


def _conclude_noise(rows):
    cases = groups(rows, "batch_size", "epochs")
    of = lambda found, name: [r[name] for r in found]
    table = [
        {
            "batch": size,
            "epoch": epochs,
            "m": f"{mean(of(found, 'variance')):.2e}",
            "P^-1 Tr X^4 / m^2 (semicircle: 2)": cell(of(found, "kurtosis"), 1),
            "edge over 2 sqrt(m) (semicircle: 1)": cell(of(found, "edge_ratio"), 2),
            "Kolmogorov distance": cell(of(found, "distance"), 3),
        }
        for (size, epochs), found in cases.items()
    ]
    means = lambda name: [mean(of(found, name)) for found in cases.values()]
    extremes = lambda name: [min(means(name)), max(means(name))]
    findings = {
        "Kolmogorov distance, nearest and furthest": extremes("distance"),
        "P^-1 Tr X^4 / m^2, nearest and furthest": extremes("kurtosis"),
        "edge over the semicircle's, nearest and furthest": extremes("edge_ratio"),
    }
    return Conclusion(table, findings, [x < 0.05 for x in extremes("distance")])


def _draw_end(rows):
    def panel(name):
        row = next(r for r in rows if r["optimizer"] == name and r["seed"] == 0)
        arrays = jnp.array([row["nodes"]]), jnp.array([row["weights"]])
        spectrum = hessian.Spectrum(*arrays, row["num_parameters"])

        def draw(axes, order):
            plot_density(spectrum, ax=axes)
            axes.set_title(f"{NAMES[name]}, test error {100 * row['test_error']:.1f} %")

        return draw

    return [panel(name) for name in NAMES]


def _draw_overlap(rows):
    values = lambda found, name: [x for r in found for x in r[name]]
    panels = []
    for name, title in (("theorem", "Theorem 1"), ("noise_law", "the noise's own law")):
        lines = [
            Line(f"batch of {n}", values(found, name), values(found, "overlap"), ".")
            for (n,), found in groups(rows, "batch_size").items()
        ]
        lines.append(Line("equal", [0, 1], [0, 1], "--"))
        axes = {"xlabel": f"squared overlap by {title}", "ylabel": "measured"}
        panels.append(curves(lines, **axes))
    return panels


def _draw_noise(rows):
    x = np.linspace(-3, 3, 400)
    law = Line("semicircle", x, rmt.semicircle_cdf(jnp.asarray(x), 1.0), "--")
    panels = []
    for (size,), found in groups(rows, "batch_size").items():
        of_seed = [r for r in found if r["seed"] == 0]
        lines = [Line(f"epoch {r['epochs']}", r["nodes"], r["mass"]) for r in of_seed]
        axes = {"xlabel": "eigenvalue of the noise over sqrt(m)", "xlim": (-3, 3)}
        axes |= {"ylabel": "cumulative distribution", "title": f"batch of {size}"}
        panels.append(curves([*lines, law], **axes))
    return panels


EXPERIMENTS = [
    Experiment("fig2_spectrum", _end_runs, _conclude_end, _draw_end),
    Experiment("thm1_overlap", _overlap_runs, _conclude_overlap, _draw_overlap),
    Experiment("semicircle", _noise_runs, _conclude_noise, _draw_noise),
]
