"""Which damping, at any learning rate? Rules and flat values, each over the rates.

A validation split chooses a method's rate and epoch; the test data are looked at there.
Three numbers say what a method is worth: its loss at its own best rate; its regret, how
far it is from the best of all methods and rates, averaged over the rates; and over how
many of the rates it ends within 5 % of that best.
"""

import functools
import math

from benchmarks.paper._experiment import Experiment
from benchmarks.shared.claims import Check, by, cell, ends, mean, within
from benchmarks.shared.runs import Row, Run
from benchmarks.shared.training import train_scanned

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
NEAR, SEEDS = 0.05, range(3)
TASKS = {
    "digits, MLP": (
        {"dataset": "digits", "model": "mlp", "width": 0.25, "num_valid": 250},
        {"epochs": 40, "batch_size": 128},
    ),
    "Fashion-MNIST, MLP": (
        {"dataset": "fashion-mnist", "model": "mlp", "width": 0.25, "pool": 2}
        | {"num_train": 6000, "num_test": 4000, "num_valid": 1000},
        {"epochs": 15, "batch_size": 128},
    ),
    "MNIST, logistic": (
        {"dataset": "mnist", "model": "logistic", "pool": 2}
        | {"num_train": 3000, "num_test": 4000, "num_valid": 1000},
        {"epochs": 30, "batch_size": 128},
    ),
}
RULES = (
    "identity",
    "floor",
    "relative",
    "floor + relative",
    "mean fraction",
    "gradient norm",
)
FLAT = (1e-3, 1e-2, 1e-1, 1.0)
loss = functools.partial(ends, name="best_loss")


def _methods():
    base = {"optimizer": "kfac"}
    yield from ((base, damping) for damping in FLAT)
    for rule in RULES:
        floor = 1e-4 if rule == "identity" else 1e-8
        yield base | {"learned": True, "rule": rule}, floor


def _runs():
    return [
        Run(
            train_scanned,
            {"task": task, "method": method, "damping": damping, **sizes}
            | {"learning_rate": rate, "seed": seed},
        )
        for task, sizes in TASKS.values()
        for method, damping in _methods()
        for rate in RATES
        for seed in SEEDS
    ]


def _each(rows):
    """With the test loss and error of the epoch that validation chooses."""
    for row in rows:
        curve = [math.inf if x is None or x != x else x for x in row["valid_loss"]]
        best = min(range(len(curve)), key=curve.__getitem__)
        row["chosen_loss"] = curve[best]
        # Whoever diverged at once has learned nothing, which is no better than chance.
        for name in ("loss", "error"):
            row[f"best_{name}"] = row[f"test_{name}"][best]
    return rows


def _name(method: Row, damping: float) -> str:
    rule = method.get("rule", "").replace("identity", "eq. 15")
    return rule or f"flat {damping:g}"


def _heads(row):
    task = next(k for k, (of, _) in TASKS.items() if of == row["task"])
    return {"task": task, "damping": _name(row["method"], row["damping"])}


def _at_rates(rows) -> dict[float, list[Row]]:
    return by(rows, lambda row: row["learning_rate"])


def best_rate(rows) -> list[Row]:
    """A method's rows at the rate that validation chooses."""
    rates = _at_rates(rows).values()
    return min(rates, key=lambda of: mean(ends(of, "chosen_loss")))


def _best(found, task) -> float:
    """The best test loss of all methods, at their own best rates."""
    of = [rows for (name, _), rows in found.items() if name == task]
    return min(mean(loss(best_rate(rows))) for rows in of)


def regret(found, key) -> float:
    """Mean over the rates of log(test loss / best of all)."""
    best = _best(found, key[0])
    logs = [math.log(mean(loss(of)) / best) for of in _at_rates(found[key]).values()]
    return mean(logs)


def near(found, key) -> int:
    """How many of the rates end within 5 % of the best of all."""
    best = (1 + NEAR) * _best(found, key[0])
    return sum(mean(loss(of)) <= best for of in _at_rates(found[key]).values())


def _line(key, found):
    chosen = best_rate(found[key])
    rates = _at_rates(found[key])
    return {
        "best rate": chosen[0]["learning_rate"],
        "test loss there": cell(loss(chosen)),
        "error, %": cell(ends(chosen, "best_error", 100.0), 2),
        **{f"loss at {rate:g}": cell(loss(of)) for rate, of in rates.items()},
        "regret": round(regret(found, key), 3),
        f"rates within 5 % (of {len(RATES)})": near(found, key),
    }


def _regrets(found) -> dict[str, float]:
    """Name -> mean regret over tasks."""
    names = dict.fromkeys(name for _, name in found)
    return {n: mean([regret(found, (task, n)) for task in TASKS]) for n in names}


def _rank(found):
    order = sorted(_regrets(found).items(), key=lambda item: item[1])
    return [
        {"task": "all", "damping": name, "regret": round(value, 3)}
        for name, value in order
    ]


def _trains(found, rule):
    """Every run of a rule ends better than it began to: at half of chance, at most."""
    rows = [row for (_, name), of in found.items() if name == rule for row in of]
    lost = sum(not (x <= 0.45) for x in ends(rows, "test_error"))
    text = f"{rule}: every run, at every rate, ends with a test error below 45 %: lost"
    return Check(text, lost, None, lost == 0)


def _below_all(found, rule, others):
    regrets = _regrets(found)
    value = regrets[rule] - min(regrets[other] for other in others)
    text = f"{rule}: the mean regret is below that of {', '.join(others)}, by"
    return Check(text, value, None, value < 0)


def _at_best(found, rule, share):
    for task in TASKS:
        flat = [k for k in found if k[0] == task and k[1].startswith("flat")]
        best = min(flat, key=lambda k: mean(loss(best_rate(found[k]))))
        ours, theirs = (loss(best_rate(found[k])) for k in ((task, rule), best))
        text = f"{task}: {rule} at its best rate within {share:.0%} of the best flat"
        yield within(text, share, ours, theirs)


def _checks(found):
    flat = [f"flat {x:g}" for x in FLAT]
    below = _below_all(found, "floor", [*flat, "eq. 15"])
    return [_trains(found, "floor"), below, *_at_best(found, "floor", 0.02)]


PICTURES = [("linear", "regret"), ("linear", f"rates within 5 % (of {len(RATES)})")]
EXPERIMENTS = [
    Experiment("rules_kfac", _runs, _heads, _line, _checks, PICTURES, _rank, _each)
]
