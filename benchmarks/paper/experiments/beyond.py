"""What the paper left open: other tasks without tuning, text, a damping per layer.

Adam at its usual rate on small real tasks: flat dampings against the learner as it
comes (`auto_adam`'s defaults), under both rules. Two more ask the same of the main
job's own network and loop: Adam at two learning rates, and KFAC (the paper's Figure 11
in another setting).
"""

import functools
import itertools
import pathlib

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import claims, report
from benchmarks.shared.claims import Check, by, cells, difference, ends, mean, signed
from benchmarks.shared.runs import Row, Run
from benchmarks.shared.training import train, train_scanned
from rmtdamp.demo import _train as demo
from rmtdamp.demo._data import load_digits, load_idx

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
LAYERED = {
    f"{name}, each layer": rule | {"layers": True} for name, rule in RULES.items()
}
PLAIN = "flat 1e-08"
# The main job, with every field, so that finished runs outlive its defaults.
ADAM_JOB = demo.Settings(
    30, 128, 256, 1e-3, 0.05, 1e-2, 1e-4, 100, "identity", "damping"
)
KFAC_JOB = demo.Settings(30, 128, 128, 0.03, 0.05, 0.1, 1e-2, 20, "identity", "damping")
RATES, FORMS, FLOORS = (1e-3, 1e-2), ("damping", "shrinkage"), (1e-3, 1e-2, 1e-1)
JOB_RULES = ("identity", "scaled-identity")
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
    axes = (FASHION, DIGITS, TEXT), LAYERED.values(), SEEDS
    return runs + [run_of(x, m, FLOOR, s) for x, m, s in itertools.product(*axes)]


def main_job(folder: pathlib.Path, *, data, method, settings: Row, seed) -> Row:
    """A run of `python -m rmtdamp` on 5,000 images; curves by epoch, or of some."""
    found = load_digits() if data == DIGITS else load_idx(folder / data)
    found = found._replace(train=tuple(x[:5000] for x in found.train))
    records = list(demo.train(found, method, demo.Settings(**settings), seed))
    names = ("train_loss", "test_loss", "test_accuracy", "damping", "measured_variance")
    return {name: [getattr(record, name) for record in records] for name in names}


def _job_runs(cases):
    runs = [{"data": x, "method": m, "settings": of._asdict()} for x, m, of in cases]
    return [Run(main_job, run | {"seed": seed}) for run in runs for seed in range(5)]


def _rate_runs():
    cases = []
    for rate in RATES:
        base = ADAM_JOB._replace(learning_rate=rate)
        flat = sorted({*DAMPINGS, *FINE})
        cases += [("adam-shrinkage", base._replace(damping=d)) for d in flat]
        learned = itertools.product(JOB_RULES, FORMS, (1e-5, 1e-4, 1e-3))
        for rule, form, floor in learned:
            changed = base._replace(rule=rule, form=form, floor=floor)
            cases.append(("auto-adam", changed))
    return _job_runs((FASHION, *case) for case in cases)


def _kfac_runs():
    cases = [("kfac", KFAC_JOB._replace(damping=d)) for d in (*FLOORS, 0.3, 1.0)]
    cases += [("auto-kfac", KFAC_JOB._replace(floor=floor)) for floor in FLOORS]
    return _job_runs((data, *case) for data in (DIGITS, FASHION) for case in cases)


def label_of(row):
    if of := row.get("settings"):
        if not row["method"].startswith("auto"):
            return f"flat {of['damping']:g}"
        usual = {"rule": "identity", "form": "damping"}
        unlike = [f", {of[k]}" for k, v in usual.items() if of[k] != v]
        return f"learned from {of['floor']:g}{''.join(unlike)}"
    if not row["method"].get("learned"):
        return f"flat {row['damping']:g}"
    return next(k for k, v in (RULES | LAYERED).items() if v == row["method"])


def _heads(row):
    if of := row.get("settings"):
        rate = f", {of['learning_rate']:g}"
        return {"task": NAMES[row["data"]] + rate, "damping": label_of(row)}
    factor = f", loss x {row['loss_factor']:g}" if "loss_factor" in row else ""
    return {"task": NAMES[row["task"]["dataset"]] + factor, "damping": label_of(row)}


def _each(rows):
    """In the order of the tasks; the main job's rows by the others' names."""
    for row in rows:
        if "settings" in row:
            row["test_error"] = [1 - x for x in row["test_accuracy"]]
            row["damping_curve"] = row["damping"]
    task_of = lambda row: row.get("data") or row["task"]["dataset"]
    return sorted(rows, key=lambda row: list(TASKS).index(task_of(row)))


def _tasks(found):
    """Task -> label -> rows, but for the loss times a factor."""
    tasks: dict = {}
    for (task, label), rows in found.items():
        if "loss x" not in task:
            tasks.setdefault(task, {})[label] = rows
    return tasks


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
    line["to flat 1e-08"] = to(PLAIN) if label != PLAIN and PLAIN in labels else ""
    shown = dict.fromkeys([min(final), max(final)])
    return line | {"final damping": " to ".join(f"{x:.2g}" for x in shown)}


def _more(found):
    """Lines of the loss times factors."""
    lines = []
    for factor, label in itertools.product(sorted((*FACTORS, 1.0)), RULES):
        key = f"{NAMES[FASHION]}, loss x {factor:g}", label
        of = found | {key: found.get(key) or found[NAMES[FASHION], label]}
        line = {"task": key[0], "damping": label}
        line |= _line(key, of, scaled=True) or {}
        left_out = ("test error, %", "to flat 1e-08")
        lines.append({k: v for k, v in line.items() if k not in left_out})
    return lines


def _near(labels, label="learned", share=NEAR, task=""):
    text = f"{task}{label} within {100 * share:g} % of the best flat test loss"
    ours, best = loss(labels[label]), loss(labels[best_of(labels)])
    return claims.within(text, share, ours, best)


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


def _at_rates(found):
    checks, label = [], "learned from 0.0001"
    for task, of in _tasks(found).items():
        text = f"{task}: {label} below plain Adam"
        checks.append(_near(of, label, task=f"{task}: "))
        checks.append(claims.less(text, loss(of[label]), loss(of[PLAIN])))
    return checks


def _from_floors(found):
    tasks = itertools.product(_tasks(found).items(), FLOORS)
    return [
        _near(of, f"learned from {x:g}", task=f"{task}: ") for (task, of), x in tasks
    ]


def _by_layer(found):
    checks = []
    for task, labels in _tasks(found).items():
        for one, each in zip(RULES, LAYERED, strict=True):
            text = f"{task}: {each}, is below one for all, test loss"
            checks.append(claims.less(text, loss(labels[each]), loss(labels[one])))
    return checks


def _paths(rows):
    """Dampings along the run, layer by layer."""
    found = by([r for r in rows if r["task"]["dataset"] == FASHION], label_of)
    for one, each in zip(RULES, LAYERED, strict=True):
        of = found[each]
        layers = {
            name: [row | {"damping_curve": row["damping_curve"][name]} for row in of]
            for name in of[0]["damping_curve"]
        } | {"one for all": found[one]}
        yield report.training(layers, "damping_curve", f"damping: {each}")


GAPS, ENDS = ("linear", "to the best flat"), ("log", "final damping")
_of = lambda name, runs, checks, pictures, more=lambda found: []: Experiment(
    name, runs, _heads, _line, checks, pictures, more, _each
)
CURVES = ("test_loss", "damping_curve")
EXPERIMENTS = [
    _of("beyond_tasks", _task_runs, _on_tasks, [GAPS, ENDS], _more),
    _of("beyond_text", lambda: compared(TEXT), _on_text, CURVES),
    _of("beyond_layers", _layer_runs, _by_layer, [GAPS, _paths]),
    _of("beyond_rates", _rate_runs, _at_rates, [("log", "test loss")]),
    _of("beyond_kfac", _kfac_runs, _from_floors, [("log", "test loss")]),
]
