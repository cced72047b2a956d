"""The main job's own network: is a grid of flat dampings needed, for Adam, for KFAC?

`python -m rmtdamp`'s MLP and training loop (`rmtdamp.demo`), on the first 5,000 images:
Adam at two learning rates with three floors, both rules and both forms; KFAC at one
rate, the paper's Figure 11 in another setting.
"""

import functools
import itertools
import pathlib

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import claims
from benchmarks.shared.claims import cells, difference, ends, mean, signed
from benchmarks.shared.runs import Row, Run
from rmtdamp.demo._data import load_digits, load_idx
from rmtdamp.demo._train import Settings, train

SEEDS = range(5)
NEAR = 0.05
FLAT = (1e-8, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FLOORS, USUAL = (1e-5, 1e-4, 1e-3), 1e-4
RULES, FORMS = ("identity", "scaled-identity"), ("damping", "shrinkage")
KFAC_FLAT, KFAC_FLOORS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0), (1e-3, 1e-2, 1e-1)
RATES = (1e-3, 1e-2)
DATA = ("digits", "fashion-mnist")
# Every field, so that finished runs stay valid when the main job's defaults change.
BASE = Settings(30, 128, 256, 1e-3, 0.05, 1e-2, 1e-4, 100, "identity", "damping")
KFAC = Settings(30, 128, 128, 0.03, 0.05, 1e-1, 1e-2, 20, "identity", "damping")
COLUMNS = {"train loss": ("train_loss", 4), "test loss": ("test_loss", 3)}
COLUMNS |= {
    "best test loss": ("best_loss", 3),
    "accuracy, %": ("test_accuracy", 1, 100),
}
loss = functools.partial(ends, name="test_loss")


def main_job(folder: pathlib.Path, *, data, method, settings: Row, seed) -> Row:
    """A run of the main job; curves by epoch (of some, the best epoch and the last)."""
    found = load_digits() if data == "digits" else load_idx(folder / data)
    found = found._replace(train=tuple(x[:5000] for x in found.train))
    records = list(train(found, method, Settings(**settings), seed))
    names = ("train_loss", "test_loss", "test_accuracy", "damping", "measured_variance")
    return {name: [getattr(record, name) for record in records] for name in names}


def _runs(cases):
    return [
        Run(main_job, {"data": data, "method": method, "settings": of._asdict()} | seed)
        for data, method, of in cases
        for seed in ({"seed": n} for n in SEEDS)
    ]


def _adam_runs():
    cases = []
    for rate in RATES:
        base = BASE._replace(learning_rate=rate)
        cases += [("adam-shrinkage", base._replace(damping=d)) for d in FLAT]
        for rule, form, floor in itertools.product(RULES, FORMS, FLOORS):
            of = base._replace(rule=rule, form=form, floor=floor)
            cases.append(("auto-adam", of))
    return _runs(("fashion-mnist", *case) for case in cases)


def _kfac_runs():
    cases = [("kfac", KFAC._replace(damping=d)) for d in KFAC_FLAT]
    cases += [("auto-kfac", KFAC._replace(floor=floor)) for floor in KFAC_FLOORS]
    return _runs((data, *case) for data in DATA for case in cases)


def label_of(row):
    of = row["settings"]
    if not row["method"].startswith("auto"):
        return f"flat {of['damping']:g}"
    if row["method"] == "auto-kfac":
        return f"learned, floor {of['floor']:g}"
    return f"learned, {of['rule']}, {of['form']} form, floor {of['floor']:g}"


def _best(found, task):
    """The flat damping of the least test loss."""
    flat = [key for key in found if key[0] == task and key[1].startswith("flat")]
    return min(flat, key=lambda key: mean(loss(found[key])))


def _line(key, found):
    rows, best = found[key], _best(found, key[0])
    gap = signed(difference(loss(rows), loss(found[best])), 3)
    rows = [row | {"best_loss": min(row["test_loss"])} for row in rows]
    line = cells(rows, COLUMNS) | {"to the best flat": "best" if key == best else gap}
    return line | {"final damping": f"{mean(ends(rows, 'damping')):.2g}"}


def _near(found, task, label):
    text = f"{task}, {label}: within 5 % of the best flat damping's test loss"
    ours, theirs = loss(found[task, label]), loss(found[_best(found, task)])
    return claims.within(text, NEAR, ours, theirs)


def _rates(found):
    checks = []
    for rate in RATES:
        label = f"learned, identity, damping form, floor {USUAL:g}"
        ours, plain = loss(found[rate, label]), loss(found[rate, "flat 1e-08"])
        text = f"{rate}, {label}: below plain Adam"
        checks += [_near(found, rate, label), claims.less(text, ours, plain)]
    return checks


def _first_values(found):
    labels = [f"learned, floor {floor:g}" for floor in KFAC_FLOORS]
    return [_near(found, *case) for case in itertools.product(DATA, labels)]


_by_rate = lambda row: {
    "rate": row["settings"]["learning_rate"],
    "damping": label_of(row),
}
_by_data = lambda row: {"data": row["data"], "damping": label_of(row)}
SHOWN = [("log", "test loss", "best test loss")]
EXPERIMENTS = [
    Experiment("beyond_rates", _adam_runs, _by_rate, _line, _rates, SHOWN),
    Experiment("beyond_kfac", _kfac_runs, _by_data, _line, _first_values, SHOWN),
]
