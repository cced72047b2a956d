"""Section 8: the largest stable learning rates, found on a grid and predicted."""

import functools
import operator
import pathlib
import time

import jax
import numpy as np

from benchmarks.paper._experiment import (
    Conclusion,
    Experiment,
    error,
    groups,
    mean,
    select,
    verdict_of,
)
from benchmarks.paper._runs import Row, Run
from benchmarks.paper._stability import (
    MOMENTUM,
    curvature,
    descend,
    finite,
    grid,
    has_learned,
    is_calm,
    largest_stable,
    problem_of,
    search,
    start,
)
from benchmarks.paper.experiments import _grid

SEEDS = (0, 1, 2)
# (optimiser, damping) -> the exponent, in sixths, of its grid's first rate
FIRST = {
    ("sgd", 0.0): -9,
    ("adam", 1e-4): -14,
    ("adam", 0.01): -12,
    ("adam", 1.0): -5,
    ("kfac", 0.01): -15,
    ("kfac", 1.0): -9,
    ("kfac-clipped", 0.01): -9,
    ("kfac-clipped", 1.0): -9,
}
NUM_RATES = 15
MODERATE, LIMIT = 0.25, 1.0  # of the first prediction
COMMON = (0.01, 1.0)  # dampings of both Adam and KFAC
NAMES = {"sgd": "SGD", "adam": "Adam", "kfac": "KFAC", "kfac-clipped": "KFAC, KL clip"}
_first = operator.itemgetter(0)
TESTS = {"calm": is_calm, "learns": has_learned}
SMALL = {"dataset": "fashion-mnist", "model": "mlp", "width": 0.25, "pool": 2}
SMALL |= {"num_train": 500, "num_test": 100}
FULL_STEPS = 300 * (50_000 // 128)
PATH = {
    "small": {
        "task": SMALL,
        "at": [0, 10, 20, 40, 100],
        "batch_size": None,
        "num_examples": None,
    },
    "full": {
        "task": _grid.FULL,
        "at": [0, 390, 3900, 39_000, FULL_STEPS],
        "batch_size": 128,
        "num_examples": 512,
    },
}


def stable_rate(
    folder: pathlib.Path,
    *,
    task: Row,
    optimizer: str,
    damping: float,
    rates: list[float],
    batch_size: int | None,
    steps: int,
    schedule: str,
    seed: int,
) -> Row:
    """What becomes of the training loss at each rate; `batch_size` None: full-batch."""
    begun = time.perf_counter()
    problem, params, num_classes = problem_of(
        folder, task, seed, optimizer.startswith("kfac")
    )
    outcomes = search(
        optimizer, damping, problem, params, rates, steps, batch_size=batch_size,
        schedule=schedule, augmented=task.get("augmented", False), seed=seed,
    )  # fmt: skip
    return {
        "outcomes": outcomes,
        "num_classes": num_classes,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def sharpness(
    folder: pathlib.Path,
    *,
    task: Row,
    optimizer: str,
    damping: float,
    fraction: float,
    at: list[int],
    batch_size: int | None,
    num_examples: int | None,
    seed: int,
) -> Row:
    """The prediction along a run at `fraction` of the first one, at steps `at`."""
    begun = time.perf_counter()
    problem, params, _ = problem_of(folder, task, seed, optimizer == "kfac")
    part = jax.tree.map(lambda x: x[:num_examples], problem.data)
    seen = problem._replace(data=part)
    measure = lambda carry, step: curvature(
        optimizer, damping, seen, *jax.tree.map(lambda x: x[0], carry), step
    )
    carry = start(optimizer, problem, params, [0.0])
    measured = [measure(carry, 0)]
    rate = fraction * measured[0]["predicted"]
    peak = measured[0]["peak"] = measured[0]["loss"]
    walk = descend(
        optimizer, damping, problem, carry, [rate], max(at), batch_size=batch_size,
        augmented=task.get("augmented", False), seed=seed,
    )  # fmt: skip
    for step, *carry, losses in walk:
        peak = float(np.maximum(peak, np.mean(losses)))  # NaN stays
        if step in at:
            if finite(peak) is None:
                break
            measured.append(measure(carry, step) | {"peak": finite(peak)})
    return {
        "rate": rate,
        "measured": measured,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _runs(scale):
    runs = []
    for seed in SEEDS if scale == "small" else SEEDS[:1]:
        for optimizer, damping in FIRST:
            method = {"optimizer": optimizer, "damping": damping, "seed": seed}
            runs += _grids(scale, method)
            if optimizer != "kfac-clipped":
                runs += [
                    Run(sharpness, method | PATH[scale] | {"fraction": fraction})
                    for fraction in (MODERATE, LIMIT)
                ]
    return runs


def _grids(scale, method):
    if scale == "full":
        common = {"task": _grid.FULL, "batch_size": 128, "steps": FULL_STEPS}
        common |= {"schedule": "linear"}
        rates = grid(-12, 13)  # 0.01 to 1
        return [Run(stable_rate, method | common | {"rates": [r]}) for r in rates]
    rates = grid(FIRST[method["optimizer"], method["damping"]], NUM_RATES)
    common = {"task": SMALL, "steps": 300, "schedule": "constant", "rates": rates}
    clipped = method["optimizer"] == "kfac-clipped"
    return [
        Run(stable_rate, method | common | {"batch_size": size})
        for size in ((100,) if clipped else (None, 100))
    ]


def _found(rows):
    """{(optimizer, damping): {(test, batch size): the rate of every seed}}."""
    found = {}
    grids = [r for r in rows if "rates" in r]
    for (*method, size), kind in groups(
        grids, "optimizer", "damping", "batch_size"
    ).items():
        rates = found.setdefault(tuple(method), {})
        for name, test in TESTS.items():
            rates[name, size] = [
                largest_stable(
                    [o for row in of_seed for o in row["outcomes"]],
                    functools.partial(test, num_classes=of_seed[0]["num_classes"]),
                )
                for of_seed in groups(kind, "seed").values()
            ]
    return found


def _paths(rows, fraction):
    """{(optimizer, damping): the rows of `sharpness`, one per seed}."""
    found = [r for r in rows if r.get("fraction") == fraction]
    return groups(found, "optimizer", "damping")


def _calm(row):
    """What was measured while the run was calm."""
    first = row["measured"][0]["loss"]
    return [m for m in row["measured"] if m["peak"] <= first and m["predicted"]]


def _of(path, name, pick):
    """One number per seed out of those measured along its run."""
    return [pick([m[name] for m in _calm(r)]) for r in path]


def _used(path):
    """The rate over the prediction of the moment, largest after the start, per run."""
    later = [[r["rate"] / m["predicted"] for m in _calm(r)[1:]] for r in path]
    return [max(ratios) for ratios in later if ratios]


def _cell(values):
    """Mean ± standard error, to two digits and one."""
    plain = f"{mean(values):.2g}"
    return plain if len(values) < 2 else f"{plain} ± {error(values):.1g}"


def _label(method):
    name = NAMES[method[0]]
    return name if method[0] == "sgd" else f"{name}, {method[1]:g}"


def _batches(size):
    return "full batch" if size is None else f"batches of {size}"


def _table(found, paths, limits):
    table = []
    for method, rates in found.items():
        row = {"optimiser": NAMES[method[0]], "delta": method[1] or None}
        if method in paths:
            path = paths[method]
            row |= {
                "predicted at the start": _cell(_of(path, "predicted", _first)),
                "least predicted on the way": _cell(_of(path, "predicted", min)),
                "eq. 19 at the start": _cell(_of(path, "bound", _first)),
            }
            used = _used(limits[method])
            row["run at the prediction / that of the moment, most"] = (
                _cell(used) if used else "not calm"
            )
        for (name, size), values in rates.items():
            row[f"{name}, {_batches(size)}"] = _cell(values)
        table.append(row)
    return table


def _ratio(found, path, pick):
    """The mean over seeds of a rate found, over one predicted."""
    pairs = zip(found, _of(path, "predicted", pick), strict=True)
    return mean([a / b for a, b in pairs])


def _conclude(rows):
    found, paths = _found(rows), _paths(rows, MODERATE)
    limits = _paths(rows, LIMIT)
    sizes = [size for _, size in found["sgd", 0.0]]
    clean, usual = sizes[0], sizes[-1]  # full-batch, if there is; in batches
    learns = lambda *method: mean(found[method]["learns", usual])
    orders = {
        d: learns("sgd", 0.0) < learns("adam", d) < learns("kfac", d) for d in COMMON
    }
    ratios = {
        m: _ratio(found[m]["calm", clean], path, _first) for m, path in paths.items()
    }
    late = {m: _ratio(found[m]["calm", clean], path, min) for m, path in paths.items()}
    seen = [m for path in paths.values() for row in path for m in _calm(row)]
    slack = [m["bound"] / m["predicted"] for m in seen]
    moderate = [x for path in paths.values() for x in _used(path)]
    used = {m: max(_used(path)) for m, path in limits.items() if _used(path)}
    near = sum(0.5 <= ratio <= 2 for ratio in ratios.values())
    checks = [*orders.values(), near == len(ratios)]
    verdict = verdict_of(checks)
    clipped = min(x for d in COMMON for x in found["kfac-clipped", d]["learns", usual])
    top = max(max(r["rates"]) for r in select(rows, optimizer="kfac-clipped"))
    averaging = 1 - MOMENTUM  # Adam's rate in the units of momentum that sums
    three = lambda d: (("sgd", 0.0), ("adam", d), ("kfac", d))
    listed = lambda ratios: [f"{_label(m)}: {r:.2g}" for m, r in ratios.items()]
    findings = {
        f"largest rate that learns, {_batches(usual)}, delta {d:g} (SGD, Adam, KFAC)": [
            _cell(found[m]["learns", usual]) for m in three(d)
        ]
        for d in COMMON
    } | {
        f"calm rate ({_batches(clean)}) over the first prediction": listed(ratios),
        f"calm rate ({_batches(clean)}) over the least prediction": listed(late),
        "eq. 19 over the prediction, least and largest": [min(slack), max(slack)],
        "a run at the first prediction, over that of the moment, largest": listed(used),
        "largest rate at which KFAC with a KL clip of 0.01 learns": clipped,
    }
    holds = [f"{d:g}" for d, held in orders.items() if held]
    remark = (
        f"The paper's order, SGD < Adam < KFAC in {_batches(usual)}, holds at "
        + (f"damping {' and '.join(holds)}" if holds else "neither damping")
        + f": SGD {learns('sgd', 0.0):.2g}; "
        + "; ".join(
            f"at damping {d:g} Adam {learns('adam', d):.2g}, "
            f"KFAC {learns('kfac', d):.2g}"
            for d in COMMON
        )
        + ". Rates of different methods have different units: Adam's momentum averages "
        f"gradients where SGD's sums them, which alone multiplies its rate by "
        f"{1 / averaging:.0f} (in SGD's units: "
        + ", ".join(f"{averaging * learns('adam', d):.2g}" for d in COMMON)
        + "), and D >= delta alone allows delta times SGD's rate. "
        f"The calm rates ({_batches(clean)}) are {min(ratios.values()):.2g} to "
        f"{max(ratios.values()):.2g} times the prediction at the start, within a "
        f"factor of 2 for {near} of {len(ratios)} methods. The curvature follows the "
        "rate: a run at a quarter of the first prediction comes up to "
        f"{max(moderate):.2g} of the prediction of the moment, and one at that "
        "prediction, while it is calm, "
        + (f"up to {max(used.values()):.2g}" if used else "is never seen")
        + ". Adam's factor of 19 holds once its momentum has averaged: the bias "
        "correction makes the first steps up to ten times as large. "
        f"Eq. 19 is {min(slack):.2g} to {max(slack):.3g} times the prediction. "
        "With the KL clip of the paper's runs, off in all else, KFAC learns up to rate "
        f"{clipped:.2g}" + (", the grid's end." if clipped >= top else ".")
    )
    return Conclusion(_table(found, paths, limits), findings, verdict, remark)


def _draw(figure, rows):
    found, paths = _found(rows), _paths(rows, MODERATE)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    kinds = list(found["sgd", 0.0])
    lines = (
        ("predicted", _first, "-", "predicted at the start"),
        ("predicted", min, "--", "least predicted on the way"),
        ("bound", _first, ":", "eq. 19 at the start"),
    )
    for i, (method, path) in enumerate(paths.items()):
        for name, pick, style, label in lines:
            heights = [mean(_of(path, name, pick))] * 2
            label = label if i == 0 else None
            left.plot([i - 0.4, i + 0.4], heights, "k", ls=style, lw=1, label=label)
        for j, (kind, mark) in enumerate(zip(kinds, "osD^", strict=False)):
            values = found[method][kind]
            x = i + 0.15 * (j - (len(kinds) - 1) / 2)
            label = f"{kind[0]}, {_batches(kind[1])}" if i == 0 else None
            left.plot([x] * len(values), values, mark, color=f"C{j}", ms=4, label=label)
    names = [_label(method).replace(", ", "\n") for method in paths]
    left.set_xticks(range(len(paths)), names)
    left.set(yscale="log", ylabel="learning rate", title="largest stable rate")
    for i, (method, path) in enumerate(_paths(rows, LIMIT).items()):
        for row in path:
            calm = _calm(row)
            ratios = [row["rate"] / m["predicted"] for m in calm]
            steps = [row["at"].index(m["step"]) for m in calm]
            label = _label(method) if row is path[0] and len(calm) > 1 else None
            right.plot(steps, ratios, "o-", ms=3, lw=1, color=f"C{i}", label=label)
        right.set_xticks(range(len(path[0]["at"])), path[0]["at"])
    right.axhline(1, color="grey", lw=1)
    right.set(yscale="log", xlabel="step, at the rate predicted at the start")
    right.set_title("rate / prediction then, while calm")
    right.legend(fontsize=7)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center",
                  ncols=4, fontsize=7)  # fmt: skip


EXPERIMENTS = [
    Experiment(
        name="sec8_stable_rate",
        claim="The largest stable learning rate is 2 / lambda_max of the "
        "preconditioned Hessian, below eq. 19's bound, and grows from SGD to Adam to "
        "KFAC, since KFAC estimates the sharp directions best",
        paper={
            "largest stable rate of SGD, Adam, KFAC": [0.01, 0.12, 0.32],
            "on": "VGG-16, CIFAR-100, 300 epochs, linear schedule, momentum 0.9; the "
            "dampings are not stated",
        },
        protocol={
            "small": "MLP 196-64-64-10 (P = 17,418), 500 images of Fashion-MNIST "
            "(pixels averaged 2 x 2), 300 steps at a constant rate, six rates to a "
            "factor of ten, momentum 0.9, no weight decay, no KL clip unless said; "
            "KFAC's factors and eigenvectors every 10 steps. A rate is stable if it "
            "and all smaller ones of the grid are: it learns if the loss of the last "
            "ten steps is below 0.9 log(10), it is calm if no ten steps have a larger "
            "mean loss than the first step. Predicted: 2 / lambda_max, times 1.9 for "
            "momentum that sums and 19 for Adam's, from all 500 images, at the start "
            "and along full-batch runs at a quarter of that rate and at that rate. "
            "Judged: the order by the rates that learn in batches; the prediction by "
            "the calm rates, full-batch, all to be within a factor of 2.",
            "full": "The paper's: VGG-16, all of CIFAR-100 with crops and flips, "
            "batches of 128, 300 epochs, linear schedule (eq. 12), rates from 0.01 to "
            "1, six to a factor of ten, one seed, a run for each rate; dampings, tests "
            "and KFAC's factors as at small scale. Predicted from the first 512 "
            "images. For a GPU.",
        },
        runs=_runs,
        conclude=_conclude,
        draw=_draw,
    )
]
