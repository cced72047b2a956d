"""What the paper left open: other tasks without tuning, text, a damping per layer.

Adam at its usual rate on small real tasks: flat dampings against the learner as it
comes (`auto_adam`'s defaults), under both rules. Networks without convolutions go
through `train_scanned`, the convolutional one through `train`, and tasks that two
experiments share are run once.
"""

import functools
import itertools

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import claims, report
from benchmarks.shared.claims import Check, by, cells, difference, ends, mean, signed
from benchmarks.shared.runs import Run
from benchmarks.shared.training import train, train_scanned

RATE, FLOOR, NEAR = 1e-3, 1e-4, 0.05
DAMPINGS = (1e-8, 1e-4, 1e-3, 1e-2, 1e-1)
FINE = (3e-3, 3e-2)  # besides, on Fashion-MNIST
SEEDS = range(3)
FACTORS = (0.1, 10.0)  # of the loss
DIGITS, FASHION, CIFAR, TEXT = "digits", "fashion-mnist", "cifar-100", "tinyshakespeare"
NAMES = {
    DIGITS: "digits, MLP",
    "mnist": "MNIST, logistic",
    FASHION: "Fashion-MNIST, MLP",
    CIFAR: "CIFAR-100, VGG-16",
    TEXT: "Shakespeare, transformer",
}
TASKS = {
    DIGITS: {"model": "mlp", "width": 0.5},
    "mnist": {"model": "logistic"},
    FASHION: {"model": "mlp"},
    CIFAR: {"model": "vgg16", "coarse": True},
    TEXT: {"model": "transformer", "num_test": 500},
}
QUARTER = {"num_classes": 5, "num_train": 2560, "num_test": 2500, "pool": 2}
SIZES = {  # how each task is reduced, epochs, batch size
    DIGITS: ({}, 40, 128),
    "mnist": ({"num_train": 2000}, 60, 128),
    FASHION: ({"num_train": 5000}, 30, 128),
    CIFAR: ({**QUARTER, "width": 0.125}, 30, 128),
    TEXT: ({}, 1, 32),
}
HELD = {"optimizer": "adam"}
LEARNED = {"optimizer": "adam", "learned": True, "rule": "identity"}
EQUIVARIANT = {**LEARNED, "rule": "scaled-identity"}
RULES = {"learned": LEARNED, "learned, equivariant": EQUIVARIANT}
KINDS = {"block": "its block", "rows": "its rows"}
PLAIN = "flat 1e-08"
COLUMNS = {
    "train loss": ("train_loss", 3),
    "test loss": ("test_loss", 3),
    "test error, %": ("test_error", 2, 100),
}
loss = functools.partial(ends, name="test_loss")


def run_of(name, method, damping, seed, **more):
    reduced, epochs, batch_size = SIZES[name]
    config = {"task": {"dataset": name, **TASKS[name], **reduced}, "method": method}
    config |= {"learning_rate": RATE, "damping": damping, "seed": seed}
    config |= {"epochs": epochs, "batch_size": batch_size, **more}
    if name == CIFAR:
        return Run(train, config | {"eval_every": epochs // 10})
    return Run(train_scanned, config)


def compared(name, dampings=DAMPINGS):
    """The flat dampings and the learner under both rules, all seeds of each."""
    methods = [(HELD, d) for d in dampings]
    methods += [(method, FLOOR) for method in RULES.values()]
    return [run_of(name, *m, s) for m in methods for s in SEEDS]


def _task_runs():
    methods = [(m, FLOOR, factor) for factor in FACTORS for m in RULES.values()]
    # Adam's step is the same if loss and damping are both ten times as large.
    methods += [(HELD, 1e-1, 10.0)]
    return [run for name in TASKS for run in compared(name)] + [
        run_of(FASHION, method, damping, seed, loss_factor=factor)
        for method, damping, factor in methods
        for seed in SEEDS
    ]


def _layer_runs():
    runs = compared(FASHION, sorted(DAMPINGS + FINE))
    runs += compared(DIGITS) + compared(TEXT)
    kinds = list(itertools.product((FASHION, DIGITS), KINDS, RULES.values()))
    return runs + [
        run_of(name, method, FLOOR, seed, layers=kind)
        for name, kind, method in [*kinds, (TEXT, "rows", LEARNED)]
        for seed in SEEDS
    ]


def label_of(row):
    if not row["method"].get("learned"):
        return f"flat {row['damping']:g}"
    label = next(k for k, v in RULES.items() if v == row["method"])
    return label + (f", a layer by {KINDS[row['layers']]}" if "layers" in row else "")


def _heads(row):
    task = NAMES[row["task"]["dataset"]]
    if "loss_factor" in row:
        task += f", loss x {row['loss_factor']:g}"
    return {"task": task, "damping": label_of(row)}


def _tasks(found):
    """Task -> label -> rows, but for the loss times a factor."""
    tasks: dict = {name: {} for name in NAMES.values()}
    for (task, label), rows in found.items():
        if task in tasks:
            tasks[task][label] = rows
    return {task: of for task, of in tasks.items() if of}


def best_of(labels) -> str:
    """The flat damping of the least mean final test loss, chosen in hindsight."""
    flat = [k for k in labels if k.startswith("flat")]
    return min(flat, key=lambda k: mean(loss(labels[k])))


def settled(rows):
    """The last damping, averaged over seeds; one for each layer where there are."""
    last = [row["damping_curve"] for row in rows]
    if isinstance(last[0], dict):
        return {name: mean([x[name][-1] for x in last]) for name in last[0]}
    return {"": mean([x[-1] for x in last])}


def _line(key, found, scaled=False):
    task, label = key
    if "loss x" in task and not scaled:
        return None
    labels = _tasks(found)[task.partition(", loss x")[0]]
    best, rows = best_of(labels), found[key]
    to = lambda other: signed(difference(loss(rows), loss(labels[other])), 3)
    final = settled(rows).values()
    line = cells(rows, COLUMNS)
    line["to the best flat"] = "best" if label == best else to(best)
    line["to flat 1e-08"] = "" if label == PLAIN else to(PLAIN)
    shown = dict.fromkeys([min(final), max(final)])
    return line | {"final damping": " to ".join(f"{x:.2g}" for x in shown)}


def _more(found):
    """Lines of the loss times factors."""
    lines = []
    for factor, label in itertools.product(sorted((*FACTORS, 1.0)), RULES):
        key = f"{NAMES[FASHION]}, loss x {factor:g}", label
        of = found | {key: found.get(key) or found[NAMES[FASHION], label]}
        line = {"task": key[0], "damping": label, **_line(key, of, scaled=True)}
        left_out = ("test error, %", "to flat 1e-08")
        lines.append({k: v for k, v in line.items() if k not in left_out})
    return lines


def _near(labels, share=NEAR):
    text = f"Learned within {100 * share:g} % of the best flat damping's test loss"
    return claims.within(
        text, share, loss(labels["learned"]), loss(labels[best_of(labels)])
    )


def _on_tasks(found):
    near = [_near(of).holds for of in _tasks(found).values()]
    text = "The learner is within 5 % of the best flat damping's test loss on"
    num, hits = len(near), sum(near)
    return [
        Check(f"{text} all {num} tasks: on so many", hits, None, hits == num),
        Check(f"{text} more than half: on so many", hits, None, 2 * hits > num),
    ]


def _on_text(found):
    labels = _tasks(found)[NAMES[TEXT]]
    plain, ours = loss(labels[PLAIN]), loss(labels["learned"])
    below = claims.less("learned is below Adam's (1e-8), nats", ours, plain)
    return [_near(labels, share=0.01), below]


def _by_layer(found):
    checks = []
    for task, labels in _tasks(found).items():
        for label in (f"learned, a layer by {text}" for text in KINDS.values()):
            if label in labels:
                text = f"{task}: {label}, is below one for all, test loss"
                ours, theirs = loss(labels[label]), loss(labels["learned"])
                checks.append(claims.less(text, ours, theirs))
    return checks


def _paths(rows):
    """Dampings along the run, layer by layer."""
    found = by([r for r in rows if r["task"]["dataset"] == FASHION], label_of)
    for text in KINDS.values():
        of = found[f"learned, a layer by {text}"]
        layers = {
            name: [row | {"damping_curve": row["damping_curve"][name]} for row in of]
            for name in of[0]["damping_curve"]
        } | {"one for all": found["learned"]}
        yield report.training(layers, "damping_curve", f"damping of a layer by {text}")


GAPS, ENDS = ("symlog", "to the best flat"), ("log", "final damping")
_in_order = lambda rows: sorted(
    rows, key=lambda r: list(TASKS).index(r["task"]["dataset"])
)
_of = lambda name, runs, checks, pictures, more=lambda found: []: Experiment(
    name, runs, _heads, _line, checks, pictures, more, _in_order
)
_text_runs = functools.partial(compared, TEXT)
CURVES = ("test_loss", "damping_curve")
EXPERIMENTS = [
    _of("beyond_tasks", _task_runs, _on_tasks, [GAPS, ENDS], _more),
    _of("beyond_text", _text_runs, _on_text, CURVES),
    _of("beyond_layers", _layer_runs, _by_layer, [GAPS, _paths]),
]
