"""Section 8: the largest stable learning rates, found on a grid and predicted."""

import itertools
import math
from operator import itemgetter

from benchmarks.paper._experiment import Experiment
from benchmarks.paper._stability import sharpness, stable_rate
from benchmarks.shared import report
from benchmarks.shared.claims import Check, by, error, mean, trend
from benchmarks.shared.runs import Run

SEEDS = (0, 1, 2)
# (optimiser, damping) -> the exponent, in sixths, of its grid's first rate
FIRST = {("sgd", 0.0): -9, ("adam", 1e-4): -14, ("adam", 0.01): -12, ("adam", 1.0): -5}
FIRST |= {("kfac", 0.01): -15, ("kfac", 1.0): -9}
FIRST |= {("kfac-clipped", 0.01): -9, ("kfac-clipped", 1.0): -9}
NUM_RATES = 15
MODERATE, LIMIT = 0.25, 1.0  # of the first prediction
COMMON = (0.01, 1.0)  # dampings of both Adam and KFAC
LEARNED = 0.9  # of log(num_classes): below it a run has learned something
NAMES = {"sgd": "SGD", "adam": "Adam", "kfac": "KFAC", "kfac-clipped": "KFAC, KL clip"}
SMALL = {"dataset": "fashion-mnist", "model": "mlp", "width": 0.25, "pool": 2}
SMALL |= {"num_train": 500, "num_test": 100}
PATH = {"task": SMALL, "batch_size": None, "num_examples": None}
PATH |= {"at": [0, 10, 20, 40, 100]}
GRID = {"task": SMALL, "steps": 300, "schedule": "constant"}


def rates_from(first, num) -> list[float]:
    """`num` rates, six to a factor of ten, from 10^(first/6)."""
    return [float(f"{10 ** (k / 6):.3g}") for k in range(first, first + num)]


def _runs():
    runs = []
    for seed, ((optimizer, damping), first) in itertools.product(SEEDS, FIRST.items()):
        method = {"optimizer": optimizer, "damping": damping, "seed": seed}
        rates = GRID | {"rates": rates_from(first, NUM_RATES)}
        clipped = optimizer == "kfac-clipped"
        for size in (100,) if clipped else (None, 100):
            runs.append(Run(stable_rate, method | rates | {"batch_size": size}))
        for fraction in () if clipped else (MODERATE, LIMIT):
            runs.append(Run(sharpness, method | PATH | {"fraction": fraction}))
    return runs


def is_calm(outcome, num_classes) -> bool:
    """No ten steps had a larger mean loss than the first step."""
    return outcome["peak"] is not None and outcome["peak"] <= outcome["first"]


def has_learned(outcome, num_classes) -> bool:
    """The last ten steps' loss is clearly below that of a guess."""
    last = outcome["last"]
    return last is not None and last < LEARNED * math.log(num_classes)


def largest_stable(rows, stable) -> float:
    """The largest rate that is stable with all rates below it; 0 if there is none."""
    found = 0.0
    outcomes = [(o, row["num_classes"]) for row in rows for o in row["outcomes"]]
    for outcome, num_classes in sorted(outcomes, key=lambda o: o[0]["rate"]):
        if not stable(outcome, num_classes):
            break
        found = outcome["rate"]
    return found


def _rates(rows):
    """{(test, batch size): the largest stable rate of every seed}."""
    sizes = by([row for row in rows if "rates" in row], itemgetter("batch_size"))
    seeds = lambda of: by(of, itemgetter("seed")).values()
    tests = {"calm": is_calm, "learns": has_learned}
    return {
        (name, size): [largest_stable(of_seed, test) for of_seed in seeds(of)]
        for size, of in sizes.items()
        for name, test in tests.items()
    }


def _calm(row):
    """What was measured while the run was calm."""
    first = row["measured"][0]["loss"]
    return [m for m in row["measured"] if m["peak"] <= first and m["predicted"]]


def _first(rows, name):
    """One number per seed, at the start of its run."""
    return [r["measured"][0][name] for r in rows if r.get("fraction") == MODERATE]


def _cell(values):
    """Mean ± standard error, to two digits and one."""
    plain = f"{mean(values):.2g}"
    return plain if len(values) < 2 else f"{plain} ± {error(values):.1g}"


def _line(key, found):
    rows, line = found[key], {}
    if path := [row for row in rows if row.get("fraction") == MODERATE]:
        least = [min(m["predicted"] for m in _calm(row)) for row in path]
        later = [
            [row["rate"] / m["predicted"] for m in _calm(row)[1:]]
            for row in rows
            if row.get("fraction") == LIMIT
        ]
        used = [max(ratios) for ratios in later if ratios]
        line = {
            "predicted at the start": _cell(_first(rows, "predicted")),
            "least predicted on the way": _cell(least),
            "eq. 19 at the start": _cell(_first(rows, "bound")),
            "run at the prediction / that of the moment, most": (
                _cell(used) if used else "not calm"
            ),
        }
    batches = lambda n: "full batch" if n is None else f"batches of {n}"
    rates = _rates(rows).items()
    return line | {f"{k}, {batches(n)}": _cell(v) for (k, n), v in rates}


def _over(found, name):
    """The calm rates over what is said of them, means over seeds; full-batch first."""
    ratios = []
    for rows in found.values():
        calm, said = next(iter(_rates(rows).values())), _first(rows, name)
        if said:
            ratios.append(mean([a / b for a, b in zip(calm, said, strict=True)]))
    return ratios


def _checks(found):
    ratios, most = _over(found, "predicted"), max(_over(found, "bound"))
    near = sum(0.5 <= ratio <= 2 for ratio in ratios)
    text = (
        f"Calm rates are within a factor of 2 of the prediction for all {len(ratios)}"
    )
    checks = [
        Check(f"{text} methods: for so many", near, None, near == len(ratios)),
        Check(
            "They are below eq. 19's bound: at most so much of it", most, None, most < 1
        ),
    ]
    learns = lambda *key: list(_rates(found[key]).values())[-1]  # in batches
    for d in COMMON:
        along = [learns("SGD", None), learns("Adam", d), learns("KFAC", d)]
        text = (
            f"At delta {d:g} the rates that learn in batches grow from SGD to Adam to"
        )
        checks.append(trend(f"{text} KFAC: KFAC's less SGD's", along))
    return checks


def _limits(rows):
    lines = [
        report.Line(
            f"run at the prediction, {report.label(list(_heads(row).values()))}",
            [m["step"] for m in _calm(row)],
            [row["rate"] / m["predicted"] for m in _calm(row)],
            "o-",
        )
        for row in rows
        if row.get("fraction") == LIMIT
    ]
    axes = {"yscale": "log", "xlabel": "step, while calm", "xscale": "symlog"}
    return [report.curves(lines, **axes, title="rate / prediction then")]


def _heads(row):
    return {"optimiser": NAMES[row["optimizer"]], "delta": row["damping"] or None}


SHOWN = ("predicted at the start", "eq. 19 at the start", "calm, full batch")
SHOWN += ("learns, full batch", "learns, batches of 100")
PICTURES = [("log", *SHOWN), _limits]
EXPERIMENTS = [Experiment("sec8_stable_rate", _runs, _heads, _line, _checks, PICTURES)]
