"""Figure 2, Theorem 1, eq. 7: bulk and outliers, overlaps, the noise's law."""

import functools
import itertools
import pathlib
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import claims, report, training
from benchmarks.shared.claims import below, by, cells, ends, error, mean
from benchmarks.shared.optimizers import Method
from benchmarks.shared.runs import Row, Run, rounded, runs_of
from rmtdamp import hessian, rmt
from rmtdamp.outliers import spiked_law
from rmtdamp.plot import density as plot_density

from . import vgg

TASK = {"dataset": "fashion-mnist", "model": "mlp", "width": 0.25, "num_train": 5000}
SEEDS, TOP = (0, 1, 2), 10
NAMES = {"sgd": "SGD", "adam": "Adam"}
CONSTANT = Method("adam", "constant")
BULK, APART = 0.01, 10.0  # the bulk, over lambda_1; an outlier, over the bulk
LAW, FORMULA = 0.05, 0.1  # how near the laws are to come
END_COLUMNS = {
    "lambda_1": ("lambda_max", 1),
    "smallest": ("lambda_min", 2),
    "trace": ("trace", 1),
    "edge of a batch's noise": ("noise_edge", 1),
    "outliers of 8": ("outliers", 1),
    "train error, %": ("train_error", 1, 100),
    "test error, %": ("test_error", 1, 100),
}
OVERLAP_COLUMNS = {
    "overlap^2": ("overlap", 3),
    "with the best of ten": ("best_overlap", 3),
    "Theorem 1": ("theorem", 3),
    "noise's own law": ("noise_law", 3),
}
NOISE_COLUMNS = {
    "P^-1 Tr X^4 / m^2 (semicircle: 2)": ("kurtosis", 1),
    "edge over 2 sqrt(m) (semicircle: 1)": ("edge_ratio", 2),
    "Kolmogorov distance": ("distance", 3),
}


class Point:
    """Where a run ended: Hessians of some of the training set there."""

    def __init__(self, folder, task, method, epochs, seed, rate=1e-3, damping=1e-8):
        numbers = {"learning_rate": rate, "damping": damping, "seed": seed}
        made = training.Task(**task), method
        self.done = training.fit(folder, *made, epochs=epochs, **numbers)
        self.params, self.data = self.done.params, self.done.data[0]
        self.arguments = self.done.network.loss_fn, self.params
        self.loss_args = {"loss_args": self.done.loss_args}

    def some(self, size, rng):
        rows = rng.permutation(len(self.data[1]))[:size]
        return tuple(x[rows] for x in self.data)

    def matvec(self, batch):
        return hessian.hessian_matvec(*self.arguments, batch, **self.loss_args)

    def density(self, matvec, key, num_steps, num_probes):
        sizes = {"num_steps": num_steps, "num_probes": num_probes}
        return hessian.spectral_density(matvec, self.params, key, **sizes)

    def noise(self, batch):
        """The noise of a batch's Hessian, from its halves."""
        return hessian.noise_matvec(*map(self.matvec, hessian.halves(batch)))


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
    density = point.density(point.matvec(part(examples)), keys[0], num_steps, 1)
    noise_key, batch_key = jax.random.split(keys[1])
    extreme = functools.partial(hessian.eigsh, like=point.params, which="LM", tol=1e-3)
    seen = extreme(point.matvec(part(128)), key=batch_key, k=8).eigenvalues
    reach = jnp.abs(extreme(point.noise(part(128)), key=noise_key, k=5).eigenvalues)
    # By as much again as the largest of the noise lies beyond its fifth.
    edge = 2 * reach[0] - reach[4]
    return {
        "nodes": rounded(density.nodes),
        "weights": rounded(density.weights),
        "num_parameters": density.num_parameters,
        "lambda_max": float(density.nodes.max()),
        "lambda_min": float(density.nodes.min()),
        "trace": float(density.moment(1)[0]) * density.num_parameters,
        "noise_edge": float(edge),
        "batch_eigenvalues": rounded(seen),
        "outliers": int(jnp.sum(jnp.abs(seen) > edge)),
        "test_error": point.done.curves["test_error"][-1],
        "train_error": point.done.curves["train_error"][-1],
    }


def overlap(folder: pathlib.Path, *, task, epochs, batch_size, seed, examples) -> Row:
    """Top eigenvectors of a batch's Hessian against those of the data set's."""
    point = Point(folder, task, CONSTANT, epochs, seed)
    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 4)
    parts = [
        tuple(x[i : i + 1000] for x in point.data) for i in range(0, examples, 1000)
    ]
    whole = hessian.dataset_matvec(*point.arguments, parts, **point.loss_args)
    top = functools.partial(hessian.eigsh, like=point.params, k=TOP, which="LM")
    true, batch = top(whole, key=keys[0]), point.some(batch_size, rng)
    seen = top(point.matvec(batch), key=keys[1])
    columns = lambda tree: np.concatenate(
        [np.asarray(x, np.float64).reshape(TOP, -1) for x in jax.tree.leaves(tree)], 1
    )
    squared = (columns(true.eigenvectors) @ columns(seen.eigenvectors).T) ** 2
    # m of a batch of this size, from 40 of them.
    some = point.some(min(examples, 40 * 64), rng)
    options = {"num_microbatches": 40, "num_probes": 4, "batch_size": batch_size}
    options |= point.loss_args
    found = hessian.moments(*point.arguments, some, keys[2], **options)
    variance = float(found.variance)
    noise = point.density(point.noise(batch), keys[3], 40, 2)
    edge = jnp.max(jnp.abs(noise.nodes))
    outside = jnp.abs(seen.eigenvalues) > edge
    law = spiked_law(jnp.where(outside, seen.eigenvalues, 2 * edge), noise)[1]
    nu = np.asarray(true.eigenvalues, np.float64)
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
    point = Point(folder, task, CONSTANT, epochs, seed)
    batch = point.some(batch_size, np.random.default_rng(seed))
    density = point.density(point.noise(batch), jax.random.key(seed), 60, 4)
    nodes = np.asarray(density.nodes, np.float64).ravel()
    weights = np.asarray(density.weights, np.float64).ravel() / len(density.nodes)
    order = np.argsort(nodes)
    nodes, weights = nodes[order], weights[order]
    variance, mass = weights @ nodes**2, np.cumsum(weights)
    law = np.asarray(rmt.semicircle_cdf(nodes, variance), np.float64)
    return {
        "variance": variance,
        "kurtosis": weights @ nodes**4 / variance**2,
        "edge_ratio": np.abs(nodes).max() / (2 * variance**0.5),
        "distance": max(np.abs(mass - law).max(), np.abs(mass - weights - law).max()),
        "nodes": rounded(nodes / variance**0.5),
        "mass": rounded(mass),
        "num_parameters": density.num_parameters,
    }


SGD = {"optimizer": "sgd", "learning_rate": vgg.SGD_RATE, "damping": 0.0}
ADAM = {"optimizer": "adam", "learning_rate": 1e-3, "damping": 1e-8}
ENDS = {"task": vgg.TASK, "epochs": 40, "examples": 512, "num_steps": 30}


def _end_runs():
    methods = itertools.product(SEEDS, (SGD, ADAM))
    return [Run(end_spectrum, {**ENDS, **of, "seed": seed}) for seed, of in methods]


def _overlap_runs():
    axes = {"batch_size": (64, 256, 1024), "epochs": (1, 20), "seed": SEEDS}
    return runs_of(overlap, {"task": TASK, "examples": 5000}, **axes)


def _noise_runs():
    axes = {"batch_size": (128, 1024), "epochs": (0, 1, 5, 20), "seed": SEEDS}
    return runs_of(noise, {"task": TASK}, **axes)


def _bulk(row):
    """(weight within 1 % of lambda_1 of 0, lambda_1 over the bulk's edge)."""
    sizes, weights = np.abs(row["nodes"]), np.array(row["weights"])
    order = np.argsort(sizes)
    edge = sizes[order][np.searchsorted(np.cumsum(weights[order]), 0.999)]
    return weights[sizes < BULK * row["lambda_max"]].sum(), row["lambda_max"] / edge


def _fig2(found):
    weight, apart = np.transpose([_bulk(row) for of in found.values() for row in of])
    both = lambda field: [ends(found[n], field, 100) for n in NAMES.values()]
    sharp, test = both("lambda_max"), both("test_error")
    swapped = claims.sign(*sharp) * claims.sign(*test) < 0
    bulk = "A bulk: weight within 1 % of lambda_1 of zero, above 0.9"
    far = "Outliers: lambda_1 over the eigenvalue that 99.9 % are below, above 10"
    text = "The sharper has the smaller test error: SGD's less Adam's, points"
    return [
        claims.Check(bulk, mean(weight), error(weight), min(weight) > 0.9),
        claims.Check(far, mean(apart), error(apart), min(apart) > APART),
        claims.Check(text, *claims.difference(*test), swapped),
    ]


def _averaged(key, found):
    """Cells of the means over the ten eigenvectors."""
    names = [name for name, *_ in OVERLAP_COLUMNS.values()]
    averaged = [{n: mean(row[n]) for n in names} for row in found[key]]
    return cells(averaged, OVERLAP_COLUMNS)


def _by_seed(found, name, *keys):
    """The values of all eigenvectors, (eigenvectors, cases), for each seed."""
    rows = by([r for key in keys or found for r in found[key]], itemgetter("seed"))
    return [np.transpose([row[name] for row in of]) for of in rows.values()]


def _theorem(found):
    seeds, half = _by_seed(found, "overlap"), TOP // 2
    along = [
        [x.mean() for x in _by_seed(found, "overlap", *(k for k in found if k[0] == n))]
        for n in dict.fromkeys(n for n, _ in found)
    ]
    pairs = zip(_by_seed(found, "theorem"), seeds, strict=True)
    off = [np.abs(a - b).mean() for a, b in pairs]
    text = "The five sharpest eigenvectors keep more overlap than the next five"
    formula = "Theorem 1 is off by less than 0.1, on average over eigenvectors"
    sharp, rest = zip(*((x[:half].mean(), x[half:].mean()) for x in seeds), strict=True)
    return [
        claims.more(text, sharp, rest),
        claims.trend("The overlap rises with the batch", along),
        below(formula, off, FORMULA),
    ]


def _moment(key, found):
    variance = mean(ends(found[key], "variance"))
    return {"m": f"{variance:.2e}", **cells(found[key], NOISE_COLUMNS)}


def _semicircle(found):
    text = "Batch of {}: the Kolmogorov distance to the semicircle is below 0.05"
    checks = []
    for size in dict.fromkeys(n for n, _ in found):
        far = [ends(of, "distance") for (n, _), of in found.items() if n == size]
        checks.append(below(text.format(size), np.max(far, axis=0), LAW))
    return checks


def _densities(rows):
    def panel(name):
        row = next(r for r in rows if r["optimizer"] == name and r["seed"] == 0)
        arrays = jnp.array([row["nodes"]]), jnp.array([row["weights"]])
        spectrum = hessian.SpectralDensity(*arrays, row["num_parameters"])
        title = NAMES[name]
        return lambda axes, order: plot_density(spectrum, ax=axes).set_title(title)

    return map(panel, NAMES)


def _distributions(rows):
    x = np.linspace(-3, 3, 100)
    law = report.Line("semicircle", x, rmt.semicircle_cdf(jnp.asarray(x), 1.0), "--")
    for size, of in by(rows, itemgetter("batch_size")).items():
        drawn = [row for row in of if row["seed"] == 0]
        lines = [
            report.Line(f"epoch {r['epochs']}", r["nodes"], r["mass"]) for r in drawn
        ]
        axes = {"xlabel": "eigenvalue / sqrt(m)", "xlim": (-3, 3)}
        title = f"cumulative distribution, batch of {size}"
        yield report.curves([*lines, law], **axes, title=title)


_optimiser = lambda row: {"optimiser": NAMES[row["optimizer"]]}
_case = lambda row: {"batch": row["batch_size"], "epoch": row["epochs"]}
_end = lambda key, found: cells(found[key], END_COLUMNS)
LAWS, OVERLAPS = [_distributions], [("linear", *OVERLAP_COLUMNS)]
EXPERIMENTS = [
    Experiment("fig2_spectrum", _end_runs, _optimiser, _end, _fig2, [_densities]),
    Experiment("thm1_overlap", _overlap_runs, _case, _averaged, _theorem, OVERLAPS),
    Experiment("semicircle", _noise_runs, _case, _moment, _semicircle, LAWS),
]
