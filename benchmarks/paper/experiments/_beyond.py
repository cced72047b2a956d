"""The tasks of `beyond`, their runs, and what is read off the rows.

Adam at its usual rate on small real tasks: flat dampings against the learner as it
comes (`auto_adam`'s defaults), under both rules. Networks without convolutions go
through `train_scanned`, the convolutional one through `train`, and tasks that two
experiments share are run once.
"""

from benchmarks.paper._experiment import (
    cell,
    difference,
    groups,
    mean,
)
from benchmarks.paper._runs import Run
from benchmarks.paper._scanned import train_scanned
from benchmarks.paper._train import train

RATE, FLOOR, NEAR = 1e-3, 1e-4, 0.05
DAMPINGS = (1e-8, 1e-4, 1e-3, 1e-2, 1e-1)
FINE = (3e-3, 3e-2)  # besides, on Fashion-MNIST
SEEDS = {"small": range(3), "full": range(5)}
FACTORS = (0.1, 10.0)  # of the loss
DIGITS, LOGISTIC, FASHION, CIFAR, TEXT = (
    "digits",
    "mnist",
    "fashion-mnist",
    "cifar-100",
    "tinyshakespeare",
)
TASKS = {
    DIGITS: ("digits, MLP", {"model": "mlp", "width": 0.5}),
    LOGISTIC: ("MNIST, logistic", {"model": "logistic"}),
    FASHION: ("Fashion-MNIST, MLP", {"model": "mlp"}),
    CIFAR: ("CIFAR-100, VGG-16", {"model": "vgg16", "coarse": True}),
    TEXT: ("Shakespeare, transformer", {"model": "transformer", "num_test": 500}),
}
SIZES = {  # how each task is reduced, epochs, batch size
    "small": {
        DIGITS: ({}, 40, 128),
        LOGISTIC: ({"num_train": 2000}, 60, 128),
        FASHION: ({"num_train": 5000}, 30, 128),
        CIFAR: (
            {
                "num_classes": 5,
                "num_train": 2560,
                "num_test": 2500,
                "pool": 2,
                "width": 0.125,
            },
            30,
            128,
        ),
        TEXT: ({}, 1, 32),
    },
    "full": {
        DIGITS: ({}, 100, 128),
        LOGISTIC: ({}, 60, 128),
        FASHION: ({}, 60, 128),
        CIFAR: ({}, 100, 128),
        TEXT: ({"width": 2.0}, 20, 32),
    },
}
HELD = {"optimizer": "adam"}
LEARNED = {"optimizer": "adam", "learned": True, "rule": "identity"}
EQUIVARIANT = {**LEARNED, "rule": "scaled-identity"}
RULES = {"learned": LEARNED, "learned, equivariant": EQUIVARIANT}
KINDS = {"block": "its block", "rows": "its rows"}


def run_of(name, scale, method, damping, seed, **more):
    reduced, epochs, batch_size = SIZES[scale][name]
    convolutional = name == CIFAR
    config = {
        "task": {"dataset": name, **TASKS[name][1], **reduced},
        "method": method,
        "learning_rate": RATE,
        "damping": damping,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
    }
    more |= {"eval_every": epochs // 10} if convolutional else {}
    return Run(train if convolutional else train_scanned, config | more)


def compared(name, scale, dampings=DAMPINGS):
    """The flat dampings and the learner under both rules, all seeds of each."""
    methods = [(HELD, d) for d in dampings]
    methods += [(method, FLOOR) for method in RULES.values()]
    return [run_of(name, scale, *m, s) for m in methods for s in SEEDS[scale]]


def label_of(row):
    if not row["method"].get("learned"):
        return f"flat {row['damping']:g}"
    label = next(k for k, v in RULES.items() if v == row["method"])
    return label + (f", a layer by {KINDS[row['layers']]}" if "layers" in row else "")


def by_method(rows, name, factor=1.0):
    """Label -> rows of one task, seeds in one order."""
    of_task = [
        {**row, "label": label_of(row)}
        for row in rows
        if row["task"]["dataset"] == name and row.get("loss_factor", 1.0) == factor
    ]
    return {label: found for (label,), found in groups(of_task, "label").items()}


def by_task(rows):
    """Task -> label -> rows."""
    return {n: by_method(rows, n) for n in TASKS if by_method(rows, n)}


def final(found, name="test_loss"):
    return [row[name][-1] for row in found]


def flat_of(methods):
    return {k: v for k, v in methods.items() if k.startswith("flat")}


def best_of(methods) -> str:
    """The flat damping of the least mean final test loss, chosen in hindsight."""
    flat = flat_of(methods)
    return min(flat, key=lambda label: mean(final(flat[label])))


def gap_of(methods, label, other, name="test_loss"):
    return difference(final(methods[label], name), final(methods[other], name))


def excess_of(methods, label) -> float:
    """How far above the best flat test loss, as a fraction of it."""
    best = best_of(methods)
    return gap_of(methods, label, best)[0] / mean(final(methods[best]))


def settled_at(found):
    """The last damping, averaged over seeds; one for each layer where there are."""
    last = [row["damping_curve"] for row in found]
    if isinstance(last[0], dict):
        return {n: mean([x[n][-1] for x in last]) for n in last[0]}
    return mean([x[-1] for x in last])


def in_words(gap, digits=3):
    return f"{gap[0]:+.{digits}f} ± {gap[1]:.{digits}f}"


def percent(x):
    return f"{100 * x:+.0f} %"


def table_of(tasks):
    table = []
    for name, methods in tasks.items():
        best = best_of(methods)
        for label, found in methods.items():
            settled = settled_at(found)
            many = isinstance(settled, dict)
            shown = settled.values() if many else [settled]
            table.append(
                {
                    "task": TASKS[name][0],
                    "damping": label,
                    "train loss": cell(final(found, "train_loss")),
                    "test loss": cell(final(found)),
                    "test error, %": cell(
                        [100 * x for x in final(found, "test_error")], 2
                    ),
                    "to the best flat": "best"
                    if label == best
                    else in_words(gap_of(methods, label, best)),
                    "to flat 1e-08": ""
                    if label == "flat 1e-08"
                    else in_words(gap_of(methods, label, "flat 1e-08")),
                    "final damping": " to ".join(
                        f"{x:.2g}" for x in dict.fromkeys([min(shown), max(shown)])
                    ),
                }
            )
    return table


def near_best(methods, label):
    """(within NEAR of the best flat test loss, within one standard error of it)."""
    best = best_of(methods)
    gap, error = gap_of(methods, label, best)
    return gap <= NEAR * mean(final(methods[best])), gap <= error


def scaled_table(rows):
    """The learner on Fashion-MNIST with the loss times a factor."""
    plain = by_method(rows, FASHION)
    table = []
    for factor in sorted((*FACTORS, 1.0)):
        methods = plain | {
            k: v for k, v in by_method(rows, FASHION, factor).items() if k in RULES
        }
        for label in RULES:
            table.append(
                {
                    "task": f"{TASKS[FASHION][0]}, loss x {factor:g}",
                    "damping": label,
                    "train loss": cell(final(methods[label], "train_loss")),
                    "test loss": cell(final(methods[label])),
                    "to the best flat": in_words(
                        gap_of(methods, label, best_of(methods)),
                    ),
                    "final damping": f"{settled_at(methods[label]):.2g}",
                    "excess": excess_of(methods, label),
                }
            )
    return table
