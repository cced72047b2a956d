"""What the paper left open: other tasks without tuning, text, a damping per layer.

Adam at its usual rate on small real tasks: flat dampings against the learner as it
comes (`auto_adam`'s defaults), under both rules. Networks without convolutions go
through `train_scanned`, the convolutional one through `train`, and tasks that two
experiments share are run once.
"""

import functools
import itertools

import numpy as np

from benchmarks.paper._experiment import Conclusion, Experiment
from benchmarks.paper._train import train, train_scanned
from benchmarks.shared.checks import cell, difference, groups, mean, signed
from benchmarks.shared.figures import Line, bars, curves
from benchmarks.shared.runs import Run

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
NAMES = {
    DIGITS: "digits, MLP",
    LOGISTIC: "MNIST, logistic",
    FASHION: "Fashion-MNIST, MLP",
    CIFAR: "CIFAR-100, VGG-16",
    TEXT: "Shakespeare, transformer",
}
TASKS = {
    DIGITS: {"model": "mlp", "width": 0.5},
    LOGISTIC: {"model": "logistic"},
    FASHION: {"model": "mlp"},
    CIFAR: {"model": "vgg16", "coarse": True},
    TEXT: {"model": "transformer", "num_test": 500},
}
QUARTER = {"num_classes": 5, "num_train": 2560, "num_test": 2500, "pool": 2}
SIZES = {  # how each task is reduced, epochs, batch size
    "small": {
        DIGITS: ({}, 40, 128),
        LOGISTIC: ({"num_train": 2000}, 60, 128),
        FASHION: ({"num_train": 5000}, 30, 128),
        CIFAR: ({**QUARTER, "width": 0.125}, 30, 128),
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
RULES = {
    "learned": LEARNED,
    "learned, equivariant": {**LEARNED, "rule": "scaled-identity"},
}
KINDS = {"block": "its block", "rows": "its rows"}
PLAIN = "flat 1e-08"


def run_of(name, scale, method, damping, seed, **more):
    reduced, epochs, batch_size = SIZES[scale][name]
    config = {"task": {"dataset": name, **TASKS[name], **reduced}, "method": method}
    config |= {"learning_rate": RATE, "damping": damping, "seed": seed}
    config |= {"epochs": epochs, "batch_size": batch_size, **more}
    if name == CIFAR:
        return Run(train, config | {"eval_every": epochs // 10})
    return Run(train_scanned, config)


def compared(name, scale, dampings=DAMPINGS):
    """The flat dampings and the learner under both rules, all seeds of each."""
    methods = [(HELD, d) for d in dampings]
    methods += [(method, FLOOR) for method in RULES.values()]
    return [run_of(name, scale, *m, s) for m in methods for s in SEEDS[scale]]


def _task_runs(scale):
    runs = [run for name in TASKS for run in compared(name, scale)]
    methods = [(m, FLOOR, factor) for factor in FACTORS for m in RULES.values()]
    # Adam's step is the same if loss and damping are both ten times as large.
    methods += [(HELD, 1e-1, 10.0)]
    return runs + [
        run_of(FASHION, scale, method, damping, seed, loss_factor=factor)
        for method, damping, factor in methods
        for seed in SEEDS[scale]
    ]


def _layer_runs(scale):
    runs = compared(FASHION, scale, sorted(DAMPINGS + FINE))
    runs += compared(DIGITS, scale) + compared(TEXT, scale)
    cells = list(itertools.product((FASHION, DIGITS), KINDS, RULES.values()))
    cells += [(TEXT, "rows", LEARNED)]
    return runs + [
        run_of(name, scale, method, FLOOR, seed, layers=kind)
        for name, kind, method in cells
        for seed in SEEDS[scale]
    ]


def label_of(row):
    if not row["method"].get("learned"):
        return f"flat {row['damping']:g}"
    label = next(k for k, v in RULES.items() if v == row["method"])
    return label + (f", a layer by {KINDS[row['layers']]}" if "layers" in row else "")


def final(found, name="test_loss"):
    return [row[name][-1] for row in found]


class Compared:
    """One task's rows by label, beside the flat damping that is best in hindsight."""

    def __init__(self, rows, name, factor=1.0):
        own = [
            {**row, "label": label_of(row)}
            for row in rows
            if row["task"]["dataset"] == name and row.get("loss_factor", 1.0) == factor
        ]
        self.rows = {k: v for (k,), v in groups(own, "label").items()}
        self.name = NAMES[name]
        self.flat = [k for k in self.rows if k.startswith("flat")]
        loss = lambda label: mean(final(self.rows[label]))
        self.best = min(self.flat, key=loss, default=PLAIN)

    def gap(self, label, other=None, name="test_loss"):
        """Paired difference of final scores, to the best flat damping's."""
        other = self.rows[other or self.best]
        return difference(final(self.rows[label], name), final(other, name))

    def excess(self, label):
        """How far above the best flat test loss, as a fraction of it."""
        return self.gap(label)[0] / mean(final(self.rows[self.best]))

    def near(self, label):
        """(within NEAR of the best flat test loss, within one standard error of it)."""
        gap, error = self.gap(label)
        return gap <= NEAR * mean(final(self.rows[self.best])), gap <= error

    def settled(self, label):
        """The last damping, averaged over seeds; one for each layer where there are."""
        last = [row["damping_curve"] for row in self.rows[label]]
        if isinstance(last[0], dict):
            return {n: mean([x[n][-1] for x in last]) for n in last[0]}
        return mean([x[-1] for x in last])

    def line(self, label):
        """A line of the table."""
        found, settled = self.rows[label], self.settled(label)
        shown = settled.values() if isinstance(settled, dict) else [settled]
        ends = dict.fromkeys([min(shown), max(shown)])
        to = lambda other: signed(self.gap(label, other), 3)
        return {
            "task": self.name,
            "damping": label,
            "train loss": cell(final(found, "train_loss")),
            "test loss": cell(final(found)),
            "test error, %": cell([100 * x for x in final(found, "test_error")], 2),
            "to the best flat": "best" if label == self.best else to(self.best),
            "to flat 1e-08": "" if label == PLAIN else to(PLAIN),
            "final damping": " to ".join(f"{x:.2g}" for x in ends),
        }


def by_task(rows):
    """Every task that has rows."""
    return {n: of for n in TASKS if (of := Compared(rows, n)).rows}


def _table(tasks):
    return [of.line(label) for of in tasks.values() for label in of.rows]


def scaled(rows):
    """Factor of the loss -> Fashion-MNIST with the learner at that factor."""
    found = {}
    for factor in sorted((*FACTORS, 1.0)):
        found[factor] = Compared(rows, FASHION)
        at = Compared(rows, FASHION, factor).rows
        found[factor].rows |= {k: v for k, v in at.items() if k in RULES}
    return found


def percent(x):
    return f"{100 * x:+.0f} %"


def _conclude_tasks(rows):
    tasks, factors = by_task(rows), scaled(rows)
    labels = list(next(iter(tasks.values())).rows)
    near = {k: [of.near(k) for of in tasks.values()] for k in labels}
    count = {k: [sum(x) for x in zip(*v, strict=True)] for k, v in near.items()}
    excess = {k: [of.excess(k) for of in tasks.values()] for k in labels}
    twin = difference(
        final(Compared(rows, FASHION, 10.0).rows["flat 0.1"]),
        final(tasks[FASHION].rows["flat 0.01"]),
    )
    num, hits = len(tasks), count["learned"][0]
    checks = [hits == num, 2 * hits > num]
    each = lambda text: [f"{of.name}: {text(of)}" for of in tasks.values()]
    findings = {
        f"tasks of {num} within 5 % of the best flat damping's test loss": [
            f"{k}: {v[0]}" for k, v in count.items()
        ],
        f"tasks of {num} within one standard error of it": [
            f"{k}: {v[1]}" for k, v in count.items()
        ],
        "mean excess over the best flat damping": [
            f"{k}: {percent(mean(v))}" for k, v in excess.items()
        ],
        "learned damping beside the best flat one": each(
            lambda of: (
                f"{of.settled('learned'):.2g}, equivariant "
                f"{of.settled('learned, equivariant'):.2g} ({of.best})"
            )
        ),
        "learned, test loss above the best flat damping's": each(
            lambda of: percent(of.excess("learned"))
        ),
        "learned, test error to the best flat damping's, points": each(
            lambda of: f"{100 * of.gap('learned', name='test_error')[0]:+.2f}"
        ),
        "loss x 0.1, 1, 10 on Fashion-MNIST, test loss above the best flat one's": [
            f"{k}: {', '.join(percent(of.excess(k)) for of in factors.values())}"
            for k in RULES
        ],
        "check: flat 0.1 at loss x 10 less flat 0.01": f"{twin[0]:.1e}",
    }
    table = _table(tasks)
    for factor, of in factors.items():
        for label in RULES:
            line = of.line(label) | {"task": f"{of.name}, loss x {factor:g}"}
            left_out = ("test error, %", "to flat 1e-08")
            table.append({k: v for k, v in line.items() if k not in left_out})
    return Conclusion(table, findings, checks)


def _conclude_text(rows):
    of = Compared(rows, TEXT)
    gaps = {
        other: {label: of.gap(label, other) for label in RULES}
        for other in (of.best, PLAIN)
    }
    gap, its_error = gaps[of.best]["learned"]
    near = gap <= 0.01 * mean(final(of.rows[of.best])) or gap <= its_error
    path = lambda label: [
        f"{mean([r['damping_curve'][i] for r in of.rows[label]]):.2g}"
        for i in (0, 4, 9)
    ]
    listed = lambda found: [f"{k}: {signed(v, 3)}" for k, v in found.items()]
    findings = {
        "best flat damping": of.best,
        "test loss, nats per character": [
            f"{label}: {cell(final(found))}" for label, found in of.rows.items()
        ],
        "to the best flat damping": listed(gaps[of.best]),
        f"to {PLAIN}": listed(gaps[PLAIN]),
        "damping after a tenth, half and all of the steps": [
            f"{label}: {' -> '.join(path(label))}" for label in RULES
        ],
    }
    checks = [near, gaps[PLAIN]["learned"][0] < 0]
    return Conclusion(_table({TEXT: of}), findings, checks)


def _conclude_layers(rows):
    tasks = by_task(rows)
    gaps = {
        f"{of.name} ({KINDS[kind]}), {rule}": of.gap(label, rule)
        for of in tasks.values()
        for kind, rule in itertools.product(KINDS, RULES)
        if (label := f"{rule}, a layer by {KINDS[kind]}") in of.rows
    }
    checks = [v[0] < -2 * v[1] for k, v in gaps.items() if "equivariant" not in k]
    fashion = tasks[FASHION]
    dampings = {
        text: fashion.settled(f"learned, a layer by {text}") for text in KINDS.values()
    }
    listed = lambda found: ", ".join(f"{n} {x:.2g}" for n, x in found.items())
    findings = {
        "test loss, a damping per layer less one for all": [
            f"{k}: {signed(v, 3)}" for k, v in gaps.items()
        ],
        "test loss, to the best flat damping": [
            f"{of.name}, {label}: {signed(of.gap(label), 3)}"
            for of in tasks.values()
            for label in of.rows
            if label not in of.flat
        ],
        "final dampings on Fashion-MNIST": [
            *(f"{text}: {listed(found)}" for text, found in dampings.items()),
            f"one for all: {fashion.settled('learned'):.2g}",
        ],
    }
    return Conclusion(_table(tasks), findings, checks)


def _draw_tasks(rows):
    """Excess over the best flat damping; where the learner settles; the loss scaled."""
    tasks = by_task(rows)
    excess, ends = {}, {}
    short = lambda of: of.name.replace(", ", "\n")
    for of in tasks.values():
        scale = 100 / mean(final(of.rows[of.best]))
        for label in of.rows:
            value = tuple(scale * x for x in of.gap(label))
            excess.setdefault(label, {})[short(of)] = value
        for label in RULES:
            ends.setdefault(label, {})[short(of)] = of.settled(label), 0
        ends.setdefault("best flat", {})[short(of)] = float(of.best.split()[1]), 0
    factors = scaled(rows)
    lines = [
        Line(k, list(factors), [100 * of.excess(k) for of in factors.values()], "o-")
        for k in RULES
    ]
    axes = {"yscale": "symlog", "title": "test loss above the best flat, %"}
    right = {
        "xscale": "log",
        "xlabel": "loss times",
        "title": "Fashion-MNIST, the same",
    }
    return [
        bars(excess, 100 * NEAR, **axes),
        bars(ends, 1.0, yscale="log", title="damping at the end"),
        curves(lines, **right),
    ]


def _draw_text(rows):
    """Test loss along the run, the damping along it, and both at the end."""
    of = Compared(rows, TEXT)
    average = lambda label, name: np.mean([r[name] for r in of.rows[label]], axis=0)
    steps = next(iter(of.rows.values()))[0]["step"]
    loss = [Line(k, steps, average(k, "test_loss")) for k in of.rows]
    path = [Line(k, steps, row["damping_curve"]) for k in RULES for row in of.rows[k]]
    end = [
        Line(k, [of.settled(k)], [mean(final(found))], "o")
        for k, found in of.rows.items()
    ]
    return [
        curves(loss, xlabel="step", title="test loss, nats per character"),
        curves(path, xlabel="step", yscale="log", title="damping"),
        curves(end, xlabel="damping at the end", xscale="log", title="final test loss"),
    ]


def _draw_layers(rows):
    """Distance to the best flat damping; dampings along the run."""
    tasks = by_task(rows)
    gaps = {}
    for of in tasks.values():
        scale = 100 / mean(final(of.rows[of.best]))
        for label in (k for k in of.rows if k not in of.flat):
            value = tuple(scale * x for x in of.gap(label))
            gaps.setdefault(label, {})[of.name.split(",")[0]] = value
    fashion = tasks[FASHION].rows
    panels = [bars(gaps, 0.0, yscale="symlog", title="above the best flat, %")]
    one = np.mean([row["damping_curve"] for row in fashion["learned"]], axis=0)
    for text in KINDS.values():
        found = fashion[f"learned, a layer by {text}"]
        steps = found[0]["step"]
        lines = [
            Line(name, steps, curve)
            for row in found
            for name, curve in row["damping_curve"].items()
        ]
        axes = {"yscale": "log", "ylim": (1e-4, 1.2), "xlabel": "step"}
        lines.append(Line("one for all", steps, one, "--"))
        panels.append(curves(lines, **axes, title=f"damping of a layer by {text}"))
    return panels


EXPERIMENTS = [
    Experiment("beyond_tasks", _task_runs, _conclude_tasks, _draw_tasks),
    Experiment(
        "beyond_text", functools.partial(compared, TEXT), _conclude_text, _draw_text
    ),
    Experiment("beyond_layers", _layer_runs, _conclude_layers, _draw_layers),
]
