"""Tables 1 and 2, Figures 7 to 9, 11 to 15: the damping of Adam and KFAC on VGG-16."""

import functools
import itertools
import math

import numpy as np

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import claims
from benchmarks.shared.claims import below, cells, ends, error, less, mean, more, trend
from benchmarks.shared.runs import Row, Run
from benchmarks.shared.training import train

TASK = {"dataset": "cifar-100", "model": "vgg16", "width": 0.125, "coarse": True}
TASK |= {"num_classes": 5, "num_train": 2560, "num_test": 2500, "pool": 2}
SEEDS = (0, 1, 2)
SGD, SGD_RATE = {"optimizer": "sgd"}, 0.02  # the rate that is best here
NAMES = {"sgd": "SGD", "adam": "Adam", "kfac": "KFAC"}
COLUMNS = {
    "train loss": ("train_loss", 4),
    "train error, %": ("train_error", 1, 100),
    "test error, %": ("test_error", 1, 100),
    "test loss": ("test_loss", 2),
    "lambda_1": ("spectral_norm", 1),
}
EPOCHS, KFAC_EPOCHS = 40, 30
DEFAULT = 1e-8
# alpha: deltas of Table 1 (left) and Figure 8, and the default delta beside them.
ALONG = {4e-4: (DEFAULT, 4e-4, 1e-3), 1e-3: (DEFAULT, 1e-3, 5e-3, 8e-3)}
PAIRS = [(a, d) for a, dampings in ALONG.items() for d in dampings]
DAMPED = (1e-3, 5e-3)  # Table 2's Adam-D
# Weights shrink by 0.25 alpha a step: optax and PyTorch multiply by the rate.
DECAYS = (0.0, 0.25)
ADAM = {"optimizer": "adam"}
# 20 steps are an epoch here; the paper's has 391, and its periods are 100.
KFAC = {"optimizer": "kfac", "eigen_every": 2}
LEARNED = {"learned": True, "refresh_every": 20}
RAMP = {"schedule": "ramp"}
FORMS = ({}, {"form": "shrinkage"}, {"rule": "scaled-identity"})
TABLE = [(1e-1, 1e-1), (1e-3, 1e-2), (1e-4, 1e-3), (1e-4, 3e-4), (1e-4, 1e-4)]
FIGURES = {
    # alpha: flat dampings, first values of the learned one
    "fig11": (1e-4, (1e-4, 3e-4, 1e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-3)),
    "fig12": (1e-3, (1e-2, 3e-2, 1e-1), (1e-2, 3e-2)),
    "fig13": (1e-4, (3e-2, 1e-1), (1e-4, 3e-2)),
}
# Adam. alpha = delta = 4e-4 where the paper has 1e-4: there are 150 times fewer steps.
LOW, HIGH = 4e-4, 1e-3
FIG14 = [
    (ADAM, LOW, DEFAULT),
    (ADAM, HIGH, HIGH),
    *(({**ADAM, **LEARNED, **form}, HIGH, HIGH) for form in FORMS),
    ({**ADAM, **LEARNED, **RAMP}, HIGH, HIGH),
]
FIG15 = [
    (ADAM, LOW, LOW),
    ({**ADAM, **RAMP}, LOW, LOW),
    ({**ADAM, **LEARNED}, LOW, LOW),
    *(({**ADAM, **LEARNED, **RAMP, **form}, LOW, LOW) for form in FORMS),
    ({**ADAM, **LEARNED}, HIGH, HIGH),
]
GUESS = 0.9 * math.log(5)  # a training loss below it: something has been learned
FITTED, SAME = 5.0, 5.0  # training error, %: fitted; points of it: hardly changed


def run(method, rate, damping, seed, *, epochs, weight_decay=0.0, model="vgg16") -> Run:
    """One training run; lambda_1 is measured at its end."""
    config = {"task": {**TASK, "model": model}, "method": method, "damping": damping}
    config |= {"learning_rate": rate, "weight_decay": weight_decay, "seed": seed}
    config |= {"epochs": epochs, "batch_size": 128, "eval_every": 2}
    return Run(train, config | {"with_spectral_norm": True})


def label(row: Row) -> str:
    """An optimiser's name for a table."""
    method, usual = row["method"], {"form": "damping", "schedule": "linear"}
    parts = [NAMES[method["optimizer"]], *["learned"] * method.get("learned", False)]
    parts += ["equivariant rule"] * (method.get("rule") == "scaled-identity")
    parts += [f"{method[k]} {k}" for k, v in usual.items() if method.get(k, v) != v]
    return ", ".join(parts)


def heads(row: Row) -> Row:
    """What names a line of the tables."""
    name, flat = label(row), row["method"] == SGD
    delta = None if flat else row["damping"]
    return {"optimiser": name, "alpha": row["learning_rate"], "delta": delta}


def line(key: tuple, found: dict) -> Row:
    """What else is in it."""
    shown = cells(found[key], COLUMNS)
    if any("learned" in name for name, *_ in found):
        last = mean(ends(found[key], "damping_curve"))
        shown["final delta"] = None if key[0] == "SGD" else f"{last:.2g}"
    return shown


def curve(name: str, factor: float = 1.0):
    """(found, names of a line) -> the last value of a curve for each seed."""
    return lambda found, *key: ends(found[key], name, factor)


def _runs(settings, epochs=EPOCHS, sgd=True, **more):
    """All seeds of (method, rate, damping), after those of SGD."""
    options = {"epochs": epochs, **more}
    runs = [run(SGD, SGD_RATE, 0.0, seed, **options) for seed in SEEDS if sgd]
    return runs + [run(*of, seed, **options) for seed in SEEDS for of in settings]


def _bn_runs():
    options = {"epochs": EPOCHS, "model": "vgg16-bn"}
    cases = itertools.product(SEEDS, DECAYS, (DEFAULT, 1e-3))
    return _runs([], **options) + [
        run(ADAM, 1e-3, damping, seed, weight_decay=decay, **options)
        for seed, decay, damping in cases
    ]


_kfac_runs = functools.partial(functools.partial, _runs, epochs=KFAC_EPOCHS, sgd=False)
_adam_runs = lambda pairs: functools.partial(_runs, [(ADAM, *pair) for pair in pairs])
_auto_runs = lambda rate, flat, floors: _kfac_runs(
    [(KFAC, rate, d) for d in flat] + [({**KFAC, **LEARNED}, rate, d) for d in floors]
)
test_error = curve("test_error", 100)
train_error = curve("train_error", 100)
train_loss = curve("train_loss")
sharpness = curve("spectral_norm")


def of_sgd(found):
    return test_error(found, *next(key for key in found if key[0] == "SGD"))


def _fits(found, *key):
    return below("It fits the training set, %", train_error(found, *key), FITTED)


def best_of(found, of, rate):
    """The delta above the smallest that is best at a rate."""
    keys = [("Adam", rate, d) for d in ALONG[rate][1:]]
    return min(keys, key=lambda key: mean(of(found, *key)))


def table1_adam(found, rates=tuple(ALONG)):
    """More damping, a smaller norm, and for a while better test errors."""
    checks = []
    for rate in rates:
        along = [("Adam", rate, d) for d in ALONG[rate]]
        text = f"At alpha {rate:g} and equal training loss lambda_1 falls with delta"
        check = trend(text, [sharpness(found, *key) for key in along], -1)
        losses = [train_loss(found, *key) for key in along]
        best, plain = best_of(found, test_error, rate), test_error(found, *along[0])
        text = f"At alpha {rate:g} the best larger delta lowers the test error, points"
        checks.append(claims.at_equal_loss(check, losses))
        checks.append(less(text, test_error(found, *best), plain))
    return checks


def _fig8(found):
    """Larger deltas at the larger rate."""
    trained, best = (best_of(found, of, 1e-3) for of in (train_loss, test_error))
    plain = train_loss(found, "Adam", 1e-3, DEFAULT)
    return [
        less("At rate 1e-3 a larger delta trains to a lower loss than 1e-8",
             train_loss(found, *trained), plain),
        claims.not_more("The best delta there matches or beats SGD, points",
                        test_error(found, *best), of_sgd(found)),
        _fits(found, *best),
    ]  # fmt: skip


def gap_to_sgd(found):
    """Adam's, what Adam-D takes of it, and whether that is all."""
    sgd, of = of_sgd(found), functools.partial(test_error, found, "Adam")
    plain, damped = of(LOW, DEFAULT), of(*DAMPED)
    return [
        more("Adam (4e-4, 1e-8) has a larger test error than SGD, points", plain, sgd),
        less("Adam-D has a smaller one than Adam (4e-4, 1e-8), points", damped, plain),
        claims.not_more("Adam-D matches or beats SGD, points", damped, sgd),
    ]


def _table2(found):
    """SGD, Adam, Adam-D."""
    *gap, level = gap_to_sgd(found)
    text = "Adam-D has a smaller one than Adam at its rate, points"
    of = functools.partial(test_error, found, "Adam")
    own = less(text, of(*DAMPED), of(HIGH, DEFAULT))
    return [*gap, own, level, _fits(found, "Adam", *DAMPED)]


def _fig9(found):
    checks = []
    for decay in DECAYS:
        low, high = (("Adam", 1e-3, d, decay) for d in (DEFAULT, 1e-3))
        text = f"With weight decay {decay:g} a delta of 1e-3 lowers the"
        for name, of in {
            "training loss": train_loss,
            "test error, %": test_error,
        }.items():
            checks.append(less(f"{text} {name}", of(found, *high), of(found, *low)))
    return checks


def along(found, of):
    """KFAC's table: the damping falls."""
    return [of(found, "KFAC", *pair) for pair in TABLE]


def _suffers(found):
    text = "The test error rises as delta falls, points"
    return trend(text, along(found, test_error))


def sharper(found):
    """Part of KFAC's half of Table 1."""
    text = "At equal training loss lambda_1 rises as delta falls"
    check = trend(text, along(found, sharpness))
    return claims.at_equal_loss(check, along(found, train_loss))


def _table1_kfac(found):
    return [sharper(found), _suffers(found)]


def fig7(found):
    span = np.ptp(along(found, train_error), axis=0).tolist()
    text = "The training error hardly changes: points that it spans, below 5"
    return [below(text, span, SAME), _suffers(found)]


def _epochs_to(row, target):
    """The first epoch at which the training loss is at most `target`."""
    seen = zip(row["epoch"], row["train_loss"], strict=True)
    return next((e for e, x in seen if x is not None and x <= target), math.inf)


def _auto(found):
    """Does every first value train, and to the best flat training loss, and sooner?"""
    flat = [key for key in found if key[0] == "KFAC"]
    best = min(flat, key=lambda key: mean(train_loss(found, *key)))
    target = train_loss(found, *best)
    epochs = lambda key: list(map(_epochs_to, found[key], target))
    checks = []
    for key in (key for key in found if key not in flat):
        text = f"From {key[2]:g} it trains: the loss ends below {GUESS:.2f}"
        checks.append(below(text, train_loss(found, *key), GUESS))
        text = f"From {key[2]:g} it comes to the training loss of the best flat damping"
        checks.append(less(f"{text} sooner, epochs", epochs(key), epochs(best)))
    return checks


def fig14(found):
    """Adam's default, a flat delta, SGD."""
    of = lambda name, *at: test_error(found, name, *(at or (HIGH, HIGH)))
    learned, ramped = of("Adam, learned"), of("Adam, learned, ramp schedule")
    text = "A flat delta of the same rate and first value beats learned, points"
    return [
        less("Learned beats Adam's default (4e-4, 1e-8), points", learned,
             of("Adam", LOW, DEFAULT)),
        less(text, of("Adam"), learned),
        less("Learned with the ramp beats SGD, points", ramped, of_sgd(found)),
    ]  # fmt: skip


def _fig15(found):
    names = ("", ", ramp schedule", ", learned", ", learned, ramp schedule")
    plain, held, linear, ramped = ((f"Adam{x}", LOW, LOW) for x in names)
    guess, loss = [math.log(5)] * len(SEEDS), train_loss(found, *ramped)
    grown = [x[-1] / x[0] for x in (row["damping_curve"] for row in found[ramped])]
    text = "With the ramp a flat damping diverges: its loss less that of a guess"
    rise = "The learned one rises: its last value over its first"
    others = {"flat": plain, "flat with the ramp": held, "learned without it": linear}
    return [
        more(text, train_loss(found, *held), guess),
        claims.Check(rise, mean(grown), error(grown), min(grown) > 1),
        below(f"It trains: its loss ends below {GUESS:.2f}", loss, GUESS),
        *(
            less(f"It has a lower test error than {name}, points",
                 test_error(found, *ramped), test_error(found, *other))
            for name, other in others.items()
        ),
    ]  # fmt: skip


CURVES = ("train_error", "test_error")
DAMPING = (*CURVES, "damping_curve")
TABLE_2 = [(4e-4, DEFAULT), (1e-3, DEFAULT), DAMPED]
KFAC_TABLE = _kfac_runs([(KFAC, *pair) for pair in TABLE])
experiment = lambda name, runs, checks, pictures, heads=heads: Experiment(
    name, runs, heads, line, checks, pictures
)
_decayed = lambda row: heads(row) | {"weight decay": row["weight_decay"]}
NORMS = [("log", "lambda_1"), ("linear", "test error, %")]
EXPERIMENTS = [
    experiment("table1_adam", _adam_runs(PAIRS), table1_adam, NORMS),
    experiment("fig8_adam", _adam_runs(PAIRS), _fig8, CURVES),
    experiment("table2_adam_d", _adam_runs(TABLE_2), _table2, CURVES),
    experiment("fig9_adamw_bn", _bn_runs, _fig9, CURVES, _decayed),
    experiment("table1_kfac", KFAC_TABLE, _table1_kfac, CURVES),
    experiment("fig7_kfac", KFAC_TABLE, fig7, CURVES),
    *(
        experiment(f"{n}_kfac_auto", _auto_runs(*of), _auto, DAMPING)
        for n, of in FIGURES.items()
    ),
    experiment("fig14_adam_auto", functools.partial(_runs, FIG14), fig14, DAMPING),
    experiment(
        "fig15_adam_auto", functools.partial(_runs, FIG15, sgd=False), _fig15, DAMPING
    ),
]
