"""Tables 1 and 2, Figures 7 to 9, 11 to 15: the damping of Adam and KFAC on VGG-16."""

import functools
import itertools
import math

from benchmarks.paper._experiment import Conclusion, Experiment
from benchmarks.shared.checks import cell, difference, mean, signed
from benchmarks.shared.figures import Line, curves

from . import _vgg
from ._vgg import SEEDS, by_setting, last, table

EPOCHS, KFAC_EPOCHS = 40, 30
DEFAULT = 1e-8
# alpha, delta of Table 1 (left) and Figure 8, and the default delta beside them.
PAIRS = [
    (4e-4, DEFAULT), (4e-4, 4e-4), (4e-4, 1e-3),
    (1e-3, DEFAULT), (1e-3, 1e-3), (1e-3, 5e-3), (1e-3, 8e-3),
]  # fmt: skip
DAMPED = (1e-3, 5e-3)  # Table 2's Adam-D
# Weights shrink by 0.25 alpha a step: optax and PyTorch multiply by the rate.
DECAYS = (0.0, 0.25)
ADAM = {"optimizer": "adam"}
# 20 steps are an epoch at the small scale; at full scale an epoch is 391, and these
# periods are 100.
KFAC = {"optimizer": "kfac", "eigen_every": 20}
LEARNED = {"learned": True, "every": 20}
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


def _runs(settings, scale, epochs=EPOCHS, sgd=True, **more):
    """All seeds of (method, rate, damping), after those of SGD."""
    runs = [
        _vgg.run(scale, *setting, seed, epochs=epochs, **more)
        for seed in SEEDS
        for setting in settings
    ]
    return [*(_vgg.sgd(scale, epochs) if sgd else ()), *runs]


def _bn_runs(scale):
    adam = [
        _vgg.run(scale, ADAM, 1e-3, damping, seed, epochs=EPOCHS, weight_decay=decay,
                 model="vgg16-bn")
        for seed in SEEDS
        for decay in DECAYS
        for damping in (DEFAULT, 1e-3)
    ]  # fmt: skip
    return [*_vgg.sgd(scale, EPOCHS, "vgg16-bn"), *adam]


def _adam_runs(pairs):
    return functools.partial(_runs, [(ADAM, *pair) for pair in pairs])


def _kfac_runs(settings):
    return functools.partial(_runs, settings, epochs=KFAC_EPOCHS, sgd=False)


def _auto_settings(name):
    rate, flat, floors = FIGURES[name]
    held = [(KFAC, rate, damping) for damping in flat]
    return held + [({**KFAC, **LEARNED}, rate, floor) for floor in floors]


def is_falling(values):
    return all(a >= b for a, b in itertools.pairwise(values))


def _norms(rows):
    return [row["spectral_norm"] for row in rows]


def _conclude_norms(rows):
    """Table 1: more damping, a smaller norm, and for a while better test errors."""
    found = by_setting(rows)
    along = {
        rate: [found["Adam", a, d, 0.0] for a, d in PAIRS if a == rate]
        for rate in (4e-4, 1e-3)
    }
    norms = {k: [mean(_norms(x)) for x in v] for k, v in along.items()}
    errors = {k: [mean(last(x, "test_error")) for x in v] for k, v in along.items()}
    checks = [is_falling(v) for v in norms.values()]
    checks += [min(range(len(v)), key=v.__getitem__) > 0 for v in errors.values()]
    findings = {f"lambda_1 along delta, alpha {k:g}": v for k, v in norms.items()}
    findings |= {
        f"test error, %, along delta, alpha {k:g}": v for k, v in errors.items()
    }
    return Conclusion(table(rows), findings, checks)


def _conclude_gap(rows):
    """Figure 8, Table 2: SGD, Adam, Adam-D, test error at comparable training error."""
    found = by_setting(rows)
    of = lambda *pair: last(found["Adam", *pair, 0.0], "test_error")
    sgd = last(next(v for k, v in found.items() if k[0] == "SGD"), "test_error")
    plain, same_rate, damped = of(4e-4, DEFAULT), of(1e-3, DEFAULT), of(*DAMPED)
    trained = last(found["Adam", *DAMPED, 0.0], "train_error")
    gap, left = difference(plain, sgd), difference(damped, sgd)
    closed, closed_same = difference(damped, plain), difference(damped, same_rate)
    checks = [
        gap[0] > 2 * gap[1],
        max(closed[0] + 2 * closed[1], closed_same[0] + 2 * closed_same[1]) < 0,
        left[0] - 2 * left[1] < 0,
        # The effect is late: one that does not fit the training set may owe its test
        # error to that.
        mean(trained) < 5,
    ]
    findings = {
        "test error, %: SGD, Adam (4e-4, 1e-8), Adam-D (1e-3, 5e-3)": [
            cell(x, 1) for x in (sgd, plain, damped)
        ],
        "Adam - SGD, points": signed(gap),
        "Adam-D - Adam at 4e-4, points": signed(closed),
        "Adam-D - Adam at its own rate 1e-3, points": signed(closed_same),
        "Adam-D - SGD, points": signed(left),
        "training error of Adam-D, %": cell(trained, 1),
    }
    return Conclusion(table(rows), findings, checks)


def _conclude_bn(rows):
    found = by_setting(rows)
    findings, checks = {}, []
    for decay in DECAYS:
        low, high = (found["Adam", 1e-3, d, decay] for d in (DEFAULT, 1e-3))
        train, test = (
            difference(last(high, name), last(low, name))
            for name in ("train_error", "test_error")
        )
        checks.append(test[0] + test[1] < 0)
        name = f"delta 1e-3 against 1e-8, weight decay {decay:g}, points (train, test)"
        findings[name] = [signed(train), signed(test)]
    return Conclusion(table(rows), findings, checks)


def _conclude_table(rows):
    found = by_setting(rows)
    settings = [found["KFAC", *pair, 0.0] for pair in TABLE]
    norms = [mean(_norms(x)) for x in settings]
    tests = [mean(last(x, "test_error")) for x in settings]
    trains = [mean(last(x, "train_error")) for x in settings]
    # Down the table the damping falls.
    checks = [is_falling(norms[::-1]), is_falling(tests[::-1])]
    findings = {
        "lambda_1 as delta falls": norms,
        "test error, %, as delta falls": tests,
        "training error, %, as delta falls": trains,
    }
    return Conclusion(table(rows), findings, checks)


def _steps_to(row, target):
    """The first epoch at which the training loss is at most `target`."""
    seen = zip(row["epoch"], row["train_loss"], strict=True)
    return next((e for e, x in seen if x is not None and x <= target), math.inf)


def _conclude_auto(rows):
    """Does every first value come to the best flat training loss, in no more steps?"""
    found = by_setting(rows)
    flat = {k[2]: v for k, v in found.items() if k[0] == "KFAC"}
    learned = {k[2]: v for k, v in found.items() if k[0] != "KFAC"}
    loss = lambda group: mean(last(group, "train_loss", 1.0))
    test = lambda group: mean(last(group, "test_error"))
    best = min(flat, key=lambda d: loss(flat[d]))
    target = last(flat[best], "train_loss", 1.0)
    reached = {d: list(map(_steps_to, of, target)) for d, of in learned.items()}
    hits = [math.isfinite(x) for steps in reached.values() for x in steps]
    tests = [[test(g) for g in of.values()] for of in (learned, flat)]
    spread = [max(x) - min(x) for x in tests]
    failed = [[d for d, g in of.items() if not loss(g) < 1.5] for of in (learned, flat)]
    checks = [
        all(hits),
        spread[0] < spread[1],
        not failed[0],
        min(tests[0]) <= min(tests[1]) + 1.0,
    ]
    findings = {
        "best flat delta by training loss": best,
        "its training loss": cell(target, 4),
        "learned runs that reach it": f"{sum(hits)} of {len(hits)}",
        "median epoch at which they do, by first value": [
            f"{d:g}: {sorted(v)[len(v) // 2]:g}" for d, v in reached.items()
        ],
        "spread of mean test errors, points, learned and flat": spread,
        "best mean test error, %, learned and flat": [min(x) for x in tests],
        "flat dampings that did not train": failed[1],
        "first values from which the learner did not train": failed[0],
    }
    return Conclusion(table(rows), findings, checks)


def _conclude_fig14(rows):
    found = by_setting(rows)
    sgd = last(next(v for k, v in found.items() if k[0] == "SGD"), "test_error")
    of = lambda name, at=(HIGH, HIGH): last(found[name, *at, 0.0], "test_error")
    learned = of("Adam, learned")
    ramped = of("Adam, learned, ramp schedule")
    over_plain = difference(learned, of("Adam", (LOW, DEFAULT)))
    over_flat = difference(learned, of("Adam"))
    ramp_gain, to_sgd = difference(ramped, learned), difference(ramped, sgd)
    checks = [
        over_plain[0] + over_plain[1] < 0,
        over_flat[0] + over_flat[1] > 0,
        ramp_gain[0] + ramp_gain[1] < 0,
        to_sgd[0] + to_sgd[1] < 0,
    ]
    findings = {
        "learned - Adam (4e-4, 1e-8), points of test error": signed(over_plain),
        "learned - flat at the same rate and first value": signed(over_flat),
        "ramp (eq. 16) - linear (eq. 12), learned": signed(ramp_gain),
        "learned with the ramp - SGD": signed(to_sgd),
    }
    for form in ("Adam, learned, shrinkage form", "Adam, learned, equivariant rule"):
        change = difference(of(form), learned)
        findings[f"{form} - damping form of eq. 15"] = signed(change)
    return Conclusion(table(rows), findings, checks)


def _conclude_fig15(rows):
    found = by_setting(rows)
    of = lambda name, curve="test_error", factor=100.0: last(
        found[name, LOW, LOW, 0.0], curve, factor
    )
    held, learned = "Adam, ramp schedule", "Adam, learned, ramp schedule"
    ramp = difference(of(learned), of("Adam, learned"))
    over = difference(of(learned), of("Adam"))
    held_loss, loss = (mean(of(name, "train_loss", 1.0)) for name in (held, learned))
    curves_of = [row["damping_curve"] for row in found[learned, LOW, LOW, 0.0]]
    checks = [held_loss > 1.0 > loss, ramp[0] + ramp[1] < 0, over[0] + over[1] < 0]
    findings = {
        "final training loss, flat with the ramp": held_loss,
        "final training loss, learned with the ramp": loss,
        "learned: ramp - linear, points of test error": signed(ramp),
        "learned with the ramp - flat linear": signed(over),
        "largest damping over the first, learned with the ramp": mean(
            [max(c) / c[0] for c in curves_of]
        ),
    }
    return Conclusion(table(rows), findings, checks)


def _draw_norms(rows):
    """lambda_1 and the test error over the damping."""
    found = by_setting(rows)
    panels = []
    for label, of, scale in (
        ("lambda_1 at the end", _norms, "log"),
        ("test error, %", lambda x: last(x, "test_error"), "linear"),
    ):
        lines = []
        for rate in (4e-4, 1e-3):
            dampings = [d for a, d in PAIRS if a == rate]
            values = [of(found["Adam", rate, d, 0.0]) for d in dampings]
            x, name = [max(d, 1e-5) for d in dampings], f"Adam, {rate:g}"
            lines.append(Line(name, x, list(map(mean, values))))
            lines += [Line(name, x, y, "o") for y in zip(*values, strict=True)]
        sgd = mean(of(next(v for k, v in found.items() if k[0] == "SGD")))
        lines.append(Line("SGD", [1e-5, 8e-3], [sgd, sgd]))
        axes = {"xlabel": "damping (1e-8 drawn at 1e-5)", "xscale": "log"}
        panels.append(curves(lines, **axes, ylabel=label, yscale=scale))
    return panels


AUTO = [(f"{n}_kfac_auto", _auto_settings(n)) for n in FIGURES]
TABLE_2 = [(4e-4, DEFAULT), (1e-3, DEFAULT), DAMPED]
_table_runs = _kfac_runs([(KFAC, *pair) for pair in TABLE])
_fig14_runs = functools.partial(_runs, FIG14)
_fig15_runs = functools.partial(_runs, FIG15, sgd=False)
EXPERIMENTS = [
    Experiment("table1_adam", _adam_runs(PAIRS), _conclude_norms, _draw_norms),
    Experiment("fig8_adam", _adam_runs(PAIRS), _conclude_gap, _vgg.draw),
    Experiment("table2_adam_d", _adam_runs(TABLE_2), _conclude_gap, _vgg.draw),
    Experiment("fig9_adamw_bn", _bn_runs, _conclude_bn, _vgg.draw),
    Experiment("table1_kfac", _table_runs, _conclude_table, _vgg.draw),
    Experiment("fig7_kfac", _table_runs, _conclude_table, _vgg.draw),
    *(Experiment(n, _kfac_runs(x), _conclude_auto, _vgg.draw) for n, x in AUTO),
    Experiment("fig14_adam_auto", _fig14_runs, _conclude_fig14, _vgg.draw),
    Experiment("fig15_adam_auto", _fig15_runs, _conclude_fig15, _vgg.draw),
]
