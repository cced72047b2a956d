"""Spectral descent on imbalanced data: real images with long-tailed class counts.

A validation split chooses an optimiser's rate and epoch; the test data are looked at
there, and early.
"""

import itertools
import pathlib

import numpy as np

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import report, training
from benchmarks.shared.claims import by, cell, mean, more
from benchmarks.shared.optimizers import Method
from benchmarks.shared.runs import Row, rounded, runs_of

EPOCHS, SEEDS, GROUPS = 20, range(5), ("head", "middle", "tail")
MODEL = {"model": "mlp", "width": 0.25, "num_valid": 2000}
TASKS = {  # and the number of classes
    "Fashion-MNIST": (
        {"dataset": "fashion-mnist", "pool": 2, "num_train": 17_000}
        | {"num_test": 4000, "imbalance": 100.0, **MODEL},
        10,
    ),
    "CIFAR-100, coarse": (
        {"dataset": "cifar-100", "coarse": True, "pool": 4, "num_train": 22_000}
        | {"imbalance": 50.0, **MODEL},
        20,
    ),
}
RATES = {
    "spectral": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "muon": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "shampoo": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "normalised": (3e-2, 1e-1, 3e-1, 1.0, 3.0),
}
PAIRS = [("spectral", "normalised"), ("muon", "sgd"), ("shampoo", "sgd")]
PAIRS += [(name, "adam") for name, _ in PAIRS]
NAMES = {
    "spectral": "SpecGD",
    "muon": "Muon",
    "shampoo": "Shampoo",
    "adam": "Adam",
    "sgd": "SGD",
    "normalised": "normalised SGD",
}


def long_tail(
    folder: pathlib.Path, *, task, optimizer, learning_rate, epochs, seed
) -> Row:
    """Balanced accuracy, and that of thirds of the classes by size, in %."""
    task = training.Task(**task)
    numbers = {"learning_rate": learning_rate, "damping": 1e-8, "epochs": epochs}
    numbers |= {"num_evaluations": 10, "by_hand": False, "seed": seed}
    seen = training.fit(folder, task, Method(optimizer), **numbers).curves
    right = 100 * (1 - np.array(seen["class_errors"]))
    right = np.roll(right, -task.first_class, axis=1)
    thirds = np.array_split(right, len(GROUPS), axis=1)
    row = {"epoch": [epochs * n / seen["step"][-1] for n in seen["step"]]}
    row |= {name: seen[name] for name in ("train_loss", "valid_error")}
    row["balanced"] = rounded(right.mean(1))
    return row | {k: rounded(x.mean(1)) for k, x in zip(GROUPS, thirds, strict=True)}


def _runs():
    """Of five seeds each begins the tail elsewhere: no class is always rare."""
    axes = TASKS.values(), RATES.items(), SEEDS
    return [
        run
        for (task, classes), (name, rates), seed in itertools.product(*axes)
        for run in runs_of(
            long_tail,
            {
                "task": task | {"first_class": seed * classes // len(SEEDS)},
                "optimizer": name,
                "epochs": EPOCHS,
            },
            learning_rate=rates,
            seed=[seed],
        )
    ]


def _heads(row):
    which = lambda task: task["dataset"] == row["task"]["dataset"]
    name = next(k for k, (task, _) in TASKS.items() if which(task))
    return {"task": name, "optimiser": NAMES[row["optimizer"]]}


def at_best(rows, when=slice(None)) -> list[Row]:
    """At the rate with the best epoch on validation, among all or these."""
    of = lambda row: min(row["valid_error"][when])
    rates = by(rows, lambda row: row["learning_rate"]).values()
    return min(rates, key=lambda rows: mean([of(row) for row in rows]))


def chosen(rows, name) -> list[float]:
    """A curve's value at the epoch that validation prefers."""
    return [row[name][int(np.argmin(row["valid_error"]))] for row in rows]


def _first(rows, name) -> list[float]:
    return [row[name][0] for row in rows]


# Which evaluations choose the rate, and which is judged.
MOMENTS = {
    "early": (slice(None), _first),
    "early, at the best rate then": (slice(1), _first),
    "at the chosen epoch": (slice(None), chosen),
}


def _line(key, found):
    rows = at_best(found[key])
    line = {"best rate": rows[0]["learning_rate"]}
    for name, (when, value) in MOMENTS.items():
        line[f"{name}, %"] = cell(value(at_best(found[key], when), "balanced"), 1)
    line["tail early"] = cell(_first(rows, "tail"), 1)
    return line | {f"{name} then": cell(chosen(rows, name), 1) for name in GROUPS}


def _checks(found):
    checks = []
    for task, (name, (when, value)) in itertools.product(TASKS, MOMENTS.items()):
        for pair in PAIRS:
            ours, theirs = (NAMES[name] for name in pair)
            text = f"{task}, balanced accuracy {name}: {ours} less {theirs}, points"
            rows = (at_best(found[task, name], when) for name in (ours, theirs))
            checks.append(more(text, *(value(of, "balanced") for of in rows)))
    return checks


def _panels(rows):
    """At the best rates: all classes and the tail, by epoch."""
    found = by(rows, lambda row: tuple(_heads(row).values()))
    for task, name in itertools.product(TASKS, ("balanced", "tail")):
        lines = {k: at_best(of) for (where, k), of in found.items() if where == task}
        yield report.training(lines, name, f"{task.split(',')[0]}, {name}")


EXPERIMENTS = [Experiment("imbalanced_data", _runs, _heads, _line, _checks, [_panels])]
