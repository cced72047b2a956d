"""Figures 4 to 6: LanczosOPT (eq. 9) on logistic regression, at the paper's scale."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import data, report, training
from benchmarks.shared.claims import by, cells, ends, more, sign, trend
from benchmarks.shared.optimizers import Method, Numbers, transformation
from benchmarks.shared.runs import Row, runs_of

RATE, EPOCHS = 0.01, 500
DIVISORS = (1.0, 3.0, 10.0)
DAMPINGS = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
GD_RATES = (0.01, 0.1)
SEEDS = (0, 1, 2)
EVERY = 5  # epochs between evaluations
EVALUATED = list(range(EVERY, EPOCHS + 1, EVERY))
COLUMNS = {
    "train loss": ("train_loss", 4),
    "train error, %": ("train_error", 2, 100),
    "test error, %": ("test_error", 2, 100),
    "test loss": ("test_loss", 3),
}


@functools.cache
def _data(folder, dataset, seed):
    """A thousand training images (which ones depends on the seed), all test images."""
    full = data.load(dataset, folder)
    order = np.random.default_rng(seed).permutation(len(full.train[1]))
    full = full._replace(train=tuple(x[order] for x in full.train))
    return jax.device_put(data.standardise(data.take(full, num_train=1000)))


@functools.partial(jax.jit, static_argnames=("method", "network", "chapters"))
def _descend(method, network, settings, seed, start, parts, chapters):
    """Full-batch descent at all settings: losses and errors, training then test."""
    rows = np.empty((EVERY, 0), int)

    def one(setting):
        numbers = Numbers(**setting, total_steps=1, seed=seed)
        tx = transformation(method, numbers, network)

        def chapter(carry, _):
            carry, _ = training.take_steps(network, tx, carry, parts[0], rows)
            sums = [training.judge(network, *carry[:2], x) / len(x[1]) for x in parts]
            return carry, jnp.concatenate(sums)

        carry = *start, tx.init(start[0])
        return jax.lax.scan(chapter, carry, length=chapters)[1]

    return jax.vmap(one)(settings)


def lanczos_opt(
    folder: pathlib.Path, *, dataset: str, seed: int, epochs: int, settings: list[Row]
) -> Row:
    """One data set, one thousand images, many settings at once."""
    stacked = {k: jnp.array([s[k] for s in settings]) for k in settings[0]}
    newton = "damping" in stacked
    if newton:
        stacked["sharp_divisor"] = stacked.pop("divisor")
    else:
        stacked["damping"] = jnp.zeros(len(settings))
    task, shape = training.Task(dataset, "logistic"), (28, 28, 1)
    found = _descend(
        Method("lanczos" if newton else "gd", "constant"),
        training.network_of(task.model, task.width, 10, shape),
        stacked,
        seed,
        training.initial(task, 10, shape, 0),
        _data(folder, dataset, seed),
        epochs // EVERY,
    )
    digits = lambda xs: [float(f"{x:.4g}") for x in np.asarray(xs)]
    names = list(enumerate(training.CURVES))
    return {"curves": [{n: digits(c[:, i]) for i, n in names} for c in found]}


def _runs(dataset):
    pairs = itertools.product(DIVISORS, DAMPINGS)
    newton = [{"learning_rate": RATE, "damping": d, "divisor": e} for e, d in pairs]
    descent = [{"learning_rate": r} for r in GD_RATES]
    shared = {"dataset": dataset, "epochs": EPOCHS}
    return runs_of(lanczos_opt, shared, seed=SEEDS, settings=(newton, descent))


def _each(rows):
    """A row for each setting, descent last."""
    flat = [
        {**setting, **curve, "seed": row["seed"], "epoch": EVALUATED}
        for row in rows
        for setting, curve in zip(row["settings"], row["curves"], strict=True)
    ]
    return sorted(flat, key=lambda row: "divisor" not in row)


def _heads(row):
    if "divisor" in row:
        return {"optimiser": f"LOPT[{row['divisor']:g}]", "delta": row["damping"]}
    return {"optimiser": f"GD, rate {row['learning_rate']:g}", "delta": None}


def _checks(found):
    test = lambda eta, d: ends(found[f"LOPT[{eta}]", d], "test_error", 100)
    train = lambda eta, d: ends(found[f"LOPT[{eta}]", d], "train_error", 100)
    gap = lambda eta, d: np.subtract(test(eta, d), train(eta, d))
    text = "The gap between test and training error rises with it, points"
    along = [[of(1, d) for d in DAMPINGS[::-1]] for of in (test, gap)]
    checks = [trend("The test error rises as delta falls, points", along[0])]
    checks.append(trend(text, along[1]))
    for eta in (3, 10):
        average = [np.mean([gap(e, d) for d in DAMPINGS], axis=0) for e in (eta, 1)]
        text = f"eta = {eta} raises the test error more than the training error"
        check = more(f"{text}, points, mean over delta (at no delta less)", *average)
        less = any(sign(gap(eta, d), gap(1, d)) < 0 for d in DAMPINGS)
        checks.append(check._replace(holds=check.holds and not less))
    return checks


def _panels(rows):
    """Errors over epochs at two dampings."""
    found = by(rows, lambda row: tuple(_heads(row).values()))
    for delta in (1e-2, 1.0):
        of = {k[0]: v for k, v in found.items() if k[1] in (delta, None)}
        yield report.training(of, "train_error", f"training error, delta {delta:g}")
        yield report.training(of, "test_error", f"test error, delta {delta:g}")


GRID = [("grid", "train error, %"), ("grid", "test error, %")]
_line = lambda key, found: cells(found[key], COLUMNS)
_of = lambda name, dataset, pictures: Experiment(
    name, lambda: _runs(dataset), _heads, _line, _checks, pictures, each=_each
)
EXPERIMENTS = [
    _of("fig4_mnist", "mnist", GRID),
    _of("fig5_mnist", "mnist", [_panels]),
    _of("fig6_fashion", "fashion-mnist", [_panels]),
]
