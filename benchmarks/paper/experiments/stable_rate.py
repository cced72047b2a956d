"""Section 8: the largest stable learning rates, found on a grid and predicted."""

import math
import operator

from benchmarks.paper._experiment import Conclusion, Experiment
from benchmarks.paper._stability import sharpness, stable_rate
from benchmarks.shared.checks import error, groups, mean
from benchmarks.shared.figures import Line, bars, curves
from benchmarks.shared.runs import Run

from . import _vgg

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
LEARNED = 0.9  # of log(num_classes): below it a run has learned something
NAMES = {"sgd": "SGD", "adam": "Adam", "kfac": "KFAC", "kfac-clipped": "KFAC, KL clip"}
_first = operator.itemgetter(0)
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
        "task": _vgg.FULL,
        "at": [0, 390, 3900, 39_000, FULL_STEPS],
        "batch_size": 128,
        "num_examples": 512,
    },
}


def rates_from(first, num) -> list[float]:
    """`num` rates, six to a factor of ten, from 10^(first/6)."""
    return [float(f"{10 ** (k / 6):.3g}") for k in range(first, first + num)]


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
        common = {"task": _vgg.FULL, "batch_size": 128, "steps": FULL_STEPS}
        common |= {"schedule": "linear"}
        rates = rates_from(-12, 13)  # 0.01 to 1
        return [Run(stable_rate, method | common | {"rates": [r]}) for r in rates]
    rates = rates_from(FIRST[method["optimizer"], method["damping"]], NUM_RATES)
    common = {"task": SMALL, "steps": 300, "schedule": "constant", "rates": rates}
    sizes = (100,) if method["optimizer"] == "kfac-clipped" else (None, 100)
    return [Run(stable_rate, method | common | {"batch_size": n}) for n in sizes]


def is_calm(outcome, num_classes) -> bool:
    """No ten steps had a larger mean loss than the first step."""
    return outcome["peak"] is not None and outcome["peak"] <= outcome["first"]


def has_learned(outcome, num_classes) -> bool:
    """The last ten steps' loss is clearly below that of a guess."""
    last = outcome["last"]
    return last is not None and last < LEARNED * math.log(num_classes)


TESTS = {"calm": is_calm, "learns": has_learned}


def largest_stable(rows, stable) -> float:
    """The largest rate that is stable with all rates below it; 0 if there is none."""
    found = 0.0
    outcomes = [(o, row["num_classes"]) for row in rows for o in row["outcomes"]]
    for outcome, num_classes in sorted(outcomes, key=lambda o: o[0]["rate"]):
        if not stable(outcome, num_classes):
            break
        found = outcome["rate"]
    return found


def _found(rows):
    """{(optimizer, damping): {(test, batch size): the rate of every seed}}."""
    found = {}
    grids = [r for r in rows if "rates" in r]
    for (*method, size), of in groups(
        grids, "optimizer", "damping", "batch_size"
    ).items():
        seeds = groups(of, "seed").values()
        for name, test in TESTS.items():
            rates = [largest_stable(of_seed, test) for of_seed in seeds]
            found.setdefault(tuple(method), {})[name, size] = rates
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
            path, used = paths[method], _used(limits[method])
            row |= {
                "predicted at the start": _cell(_of(path, "predicted", _first)),
                "least predicted on the way": _cell(_of(path, "predicted", min)),
                "eq. 19 at the start": _cell(_of(path, "bound", _first)),
                "run at the prediction / that of the moment, most": (
                    _cell(used) if used else "not calm"
                ),
            }
        row |= {f"{k}, {_batches(n)}": _cell(v) for (k, n), v in rates.items()}
        table.append(row)
    return table


def _conclude(rows):
    found, paths = _found(rows), _paths(rows, MODERATE)
    limits = _paths(rows, LIMIT)
    sizes = [size for _, size in found["sgd", 0.0]]
    clean, usual = sizes[0], sizes[-1]  # full-batch, if there is; in batches
    three = lambda d: (("sgd", 0.0), ("adam", d), ("kfac", d))
    learns = lambda method: mean(found[method]["learns", usual])

    def over(pick):
        """The calm rates over the predictions, means over seeds."""
        pairs = {
            m: zip(found[m]["calm", clean], _of(path, "predicted", pick), strict=True)
            for m, path in paths.items()
        }
        return {m: mean([a / b for a, b in pair]) for m, pair in pairs.items()}

    ratios, late = over(_first), over(min)
    seen = [m for path in paths.values() for row in path for m in _calm(row)]
    slack = [m["bound"] / m["predicted"] for m in seen]
    used = {m: max(_used(path)) for m, path in limits.items() if _used(path)}
    orders = [[learns(m) for m in three(d)] for d in COMMON]
    near = [0.5 <= ratio <= 2 for ratio in ratios.values()]
    checks = [*(a < b < c for a, b, c in orders), all(near)]
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
        "largest rate at which KFAC with a KL clip of 0.01 learns": min(
            x for d in COMMON for x in found["kfac-clipped", d]["learns", usual]
        ),
    }
    return Conclusion(_table(found, paths, limits), findings, checks)


def _draw(rows):
    found, paths = _found(rows), _paths(rows, MODERATE)
    pair = lambda values: (mean(values), error(values))
    names = {m: _label(m).replace(", ", "\n") for m in paths}
    points = {
        label: {names[m]: pair(_of(path, what, pick)) for m, path in paths.items()}
        for label, what, pick in (
            ("predicted at the start", "predicted", _first),
            ("least predicted on the way", "predicted", min),
            ("eq. 19 at the start", "bound", _first),
        )
    }
    for kind in found["sgd", 0.0]:
        label = f"{kind[0]}, {_batches(kind[1])}"
        points[label] = {names[m]: pair(found[m][kind]) for m in paths}
    lines = [
        Line(
            f"run at the prediction, {_label(method)}",
            [m["step"] for m in _calm(row)],
            [row["rate"] / m["predicted"] for m in _calm(row)],
            "o-",
        )
        for method, path in _paths(rows, LIMIT).items()
        for row in path
    ]
    axes = {"yscale": "log", "ylabel": "learning rate", "title": "largest stable rate"}
    right = {"yscale": "log", "xlabel": "step, while calm", "xscale": "symlog"}
    title = "rate / prediction then"
    return [bars(points, 1.0, **axes), curves(lines, **right, title=title)]


EXPERIMENTS = [Experiment("sec8_stable_rate", _runs, _conclude, _draw)]
