"""Which damping, at any learning rate? Rules and flat values, each over the rates.

A validation split chooses a method's rate and epoch; the test data are looked at there.
Three numbers say what a method is worth: its loss at its own best rate; its regret, how
far it is from the best of all methods and rates, averaged over the rates; and over how
many of the rates it ends within 5 % of that best.
"""

import functools
import itertools
import math

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import report
from benchmarks.shared.claims import Check, by, cell, ends, mean, not_more, within
from benchmarks.shared.runs import Row, Run
from benchmarks.shared.training import train_scanned

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WIDER = (1e-4, 3e-4, *RATES)  # deep networks have their best below
NEAR, SEEDS = 0.05, range(10)


def _mlp(dataset):
    task = {"dataset": dataset, "model": "mlp", "width": 0.25, "pool": 2}
    task |= {"num_train": 6000, "num_test": 4000, "num_valid": 1000}
    return task, {"epochs": 15, "batch_size": 128}


def _logistic(dataset):
    task = {"dataset": dataset, "model": "logistic", "pool": 2}
    task |= {"num_train": 3000, "num_test": 4000, "num_valid": 1000}
    return task, {"epochs": 30, "batch_size": 128}


TASKS = {
    "digits, MLP": (
        {"dataset": "digits", "model": "mlp", "width": 0.25, "num_valid": 250},
        {"epochs": 40, "batch_size": 128},
    ),
    "Fashion-MNIST, MLP": _mlp("fashion-mnist"),
    "MNIST, logistic": _logistic("mnist"),
}
HELD_OUT_TASKS = {
    "MNIST, MLP": _mlp("mnist"),
    "Fashion-MNIST, logistic": _logistic("fashion-mnist"),
}
TEXT = {
    "Shakespeare, transformer": (
        {"dataset": "tinyshakespeare", "model": "transformer"}
        | {"num_train": 5000, "num_test": 500, "num_valid": 500},
        {"epochs": 3, "batch_size": 32},
    ),
}
DEEP = {
    f"CIFAR-100, {name}": (
        {"dataset": "cifar-100", "model": model, "width": 0.125, "coarse": True}
        | {"num_classes": 5, "num_train": 6000, "num_test": 2500, "num_valid": 880}
        | {"pool": 2},
        {"epochs": 20, "batch_size": 128, "by_hand": True},
    )
    for name, model in (("VGG-16", "vgg16"), ("VGG-16-BN", "vgg16-bn"))
}
LONG = {
    "Shakespeare, 1.0M parameters": (
        {"dataset": "tinyshakespeare", "model": "transformer-1m"}
        | {"num_train": 4500, "num_test": 500, "num_valid": 500},
        {"epochs": 3, "batch_size": 32},
    ),
}
RULES = (
    "identity",
    "floor",
    "aware floor",
    "relative",
    "mean fraction",
    "largest fraction",
    "gradient norm",
)
EACH_LAYER = {"kfac": "floor", "adam": "aware floor"}
FLAT = {
    "kfac": (1e-3, 1e-2, 1e-1, 1.0),
    "adam": (1e-8, 1e-3, 1e-2, 1e-1),
    "subspace": (1e-3, 1e-2, 1e-1, 1.0),
}
ADAM = "flat 1e-08"
KFAC, LANCZOS = "floor, c = 12", "floor, c = 1"  # the defaults, for_lanczos
FLAT_KFAC = [f"flat {x:g}" for x in FLAT["kfac"]]
# `kl_clip` bounds one step and momentum sums ten: 0.003 of their sum.
CLIP, SHORT = 3e-5, "short clip"
OTHERS = ["eq. 15", "Levenberg-Marquardt"]
WITH_SHORT_CLIP = [*FLAT_KFAC, *OTHERS, "floor, c = 4"]
KFAC_SHORT = f"floor, c = 4, {SHORT}"
REGION = ", trust region"
KFAC_REGION = KFAC + REGION
BATCH = ", batch statistics"
PICTURED = [KFAC, KFAC_SHORT, *FLAT_KFAC, *OTHERS]
HELD_OUT = (0.1, 1.0)  # flat values of Lanczos-Newton
# What is set beside Adam: optimisers of their own, and a form in which a damping
# leaves the length of the step alone.
PEERS = {
    "SGD": ({"optimizer": "sgd"}, 0.0),
    "AdamW, 0.01": ({"optimizer": "adamw"}, 0.0),
    "Adam-atan2": ({"optimizer": "adam-atan2"}, 0.0),
    "Adam-mini": ({"optimizer": "adam-mini"}, 0.0),
    "AvaGrad, 0.1": ({"optimizer": "adam", "form": "avagrad"}, 0.1),
    "Muon": ({"optimizer": "muon"}, 0.0),
    "relative, length kept": (
        {"optimizer": "adam", "form": "length", "learned": True, "rule": "relative"}
        | {"early": True},
        1e-8,
    ),
}
# Optimisers that are tried with a trust region and without; SGD's rates are larger.
SGD_RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
IN_REGION = {"SGD": "SGD", "Muon": "Muon", ADAM: "Adam", "aware floor": "auto_adam"}
loss = functools.partial(ends, name="best_loss")


def _methods(optimizer):
    base = {"optimizer": optimizer, "early": True}
    yield from ((base, damping) for damping in FLAT[optimizer])
    for rule in RULES:
        floor = 1e-4 if rule == "identity" else 1e-8
        yield base | {"learned": True, "rule": rule}, floor
    layered = {"learned": True, "rule": EACH_LAYER[optimizer], "layers": True}
    yield base | layered, 1e-8
    if optimizer == "adam":
        for c in (8, 16):
            yield base | {"learned": True, "rule": f"aware floor, c = {c}"}, 1e-8
        yield from PEERS.values()
    else:
        for rule in ("floor, c = 4", KFAC, "floor, c = 16"):
            yield base | {"learned": True, "rule": rule}, 1e-8
        # As its authors have it, every fifth step.
        learned = {"learned": True, "rule": "Levenberg-Marquardt", "refresh_every": 5}
        yield base | learned, 0.0


def _kfac_methods(names, **changes):
    methods = {_name(*method): method for method in _methods("kfac")}
    return [(methods[name][0] | changes, methods[name][1]) for name in names]


def run(sizes, method, damping, rate, seed):
    task, budget = sizes
    config = {"task": task, "method": method, "damping": damping, **budget}
    return Run(train_scanned, config | {"learning_rate": rate, "seed": seed})


def _all(tasks, methods, rates=RATES, seeds=SEEDS):
    axes = tasks, methods, rates, seeds
    return [run(s, *m, r, i) for s, m, r, i in itertools.product(*axes)]


def _adam_runs():
    return _all(TASKS.values(), _methods("adam"))


def _kfac_runs():
    return _all(TASKS.values(), [*_methods("kfac"), *_other_clips()])


def _other_clips():
    short = _kfac_methods(WITH_SHORT_CLIP, kl_clip=CLIP)
    return short + _kfac_methods([KFAC, *FLAT_KFAC, *OTHERS], region=True)


def _kfac_held_out_runs():
    methods = _kfac_methods([*FLAT_KFAC, *OTHERS, KFAC]) + _other_clips()
    return _all(HELD_OUT_TASKS.values(), methods)


def _adam_and_its_rule(tasks, seeds, rates=RATES):
    """Adam as it comes and under its rule."""
    both = [m for m in _methods("adam") if _name(*m) in (ADAM, "aware floor")]
    return _all(tasks.values(), both, rates, seeds)


def _text_runs():
    """Four seeds: a run takes up to a minute."""
    return _adam_and_its_rule(TEXT, range(4))


def _deep_runs():
    """With convolutions: measured by hand."""
    aware = [m for m in _methods("adam") if _name(*m) == "aware floor"]
    batch = [(method | {"batch_statistics": True}, d) for method, d in aware]
    both = _adam_and_its_rule(DEEP, range(5), WIDER)
    return both + _all([DEEP["CIFAR-100, VGG-16-BN"]], batch, WIDER, range(5))


def _deep_kfac_runs():
    """A run takes half a minute, with BatchNorm one: fewer of these."""
    plain, normed = ([sizes] for sizes in DEEP.values())
    flat, c, batch = FLAT_KFAC[1:], ["floor, c = 4"], {"batch_statistics": True}
    methods = _kfac_methods([*flat, "floor", KFAC, "floor, c = 16"])
    methods += _kfac_methods([*flat[:2], *c], kl_clip=CLIP)
    methods += _kfac_methods([KFAC, "flat 0.1"], region=True)
    runs = _all(plain, methods, seeds=range(3))
    methods = _kfac_methods([*flat, KFAC]) + _kfac_methods(flat, kl_clip=CLIP)
    methods += _kfac_methods([KFAC], **batch) + _kfac_methods(c, **batch, kl_clip=CLIP)
    methods += _kfac_methods([KFAC], **batch, region=True)
    methods += _kfac_methods(["flat 0.1"], region=True)
    return runs + _all(normed, methods, seeds=range(2))


def _long_runs():
    return _adam_and_its_rule(LONG, range(5), WIDER)


def _adam_held_out_runs():
    return _adam_and_its_rule(HELD_OUT_TASKS, SEEDS)


def _region_runs(tasks):
    """Small networks: four optimisers."""
    named = {_name(*method): method for method in _methods("adam")}
    runs = []
    for name in IN_REGION:
        rates = SGD_RATES if name == "SGD" else RATES
        runs += _all(tasks.values(), _with_and_without(named[name]), rates)
    return runs


def _with_and_without(of):
    method, damping = of
    return [of, (method | {"region": True}, damping)]


def _region_deep_runs():
    """Adam on deep networks and on text, and KFAC where it was lost without."""
    named = {_name(*method): method for method in _methods("adam")}
    both, learned = (_with_and_without(named[name]) for name in (ADAM, "aware floor"))
    plain, *_ = DEEP.values()
    kfac = _kfac_methods([KFAC], region=True)
    runs = _all(TEXT.values(), both + learned, seeds=range(4))
    runs += _all(LONG.values(), both + learned, seeds=range(3))
    runs += _all(DEEP.values(), both, WIDER, range(5))
    return runs + _all([plain], kfac, seeds=range(5))


def _of_lanczos(tasks, flat, rules):
    """Three seeds: a step takes twenty products."""
    base = {"optimizer": "subspace", "early": True}
    methods = [(base, damping) for damping in flat]
    for rule in rules:
        floor = 1e-4 if rule == "identity" else 1e-8
        methods.append((base | {"learned": True, "rule": rule}, floor))
    return _all([TASKS[task] for task in tasks], methods, seeds=range(3))


def _lanczos_runs():
    """The safety factor of the floor is chosen on these two tasks."""
    tasks = "digits, MLP", "MNIST, logistic"
    rules = "identity", "floor", LANCZOS, "floor, c = 2", "floor, c = 4"
    return _of_lanczos(tasks, FLAT["subspace"], rules)


def _held_out_runs():
    """Another task for the factor that was chosen, and the flat values that train."""
    return _of_lanczos(["Fashion-MNIST, MLP"], HELD_OUT, [LANCZOS])


def with_chosen(rows):
    """With the test loss and error of the epoch that validation chooses.

    And with the loss that it would have chosen had the last tenth of the run been left
    out, for what a method costs in time.
    """
    for row in rows:
        curve = [math.inf if x is None or x != x else x for x in row["valid_loss"]]
        best = min(range(len(curve)), key=curve.__getitem__)
        early = min(range(len(curve) - 1), key=curve.__getitem__)
        row["chosen_loss"], row["early_loss"] = curve[best], row["test_loss"][early]
        # Whoever diverged at once has learned nothing, which is no better than chance.
        for name in ("loss", "error"):
            row[f"best_{name}"] = row[f"test_{name}"][best]
    return rows


def _name(method: Row, damping: float) -> str:
    region = REGION if method.get("region") else ""
    method = {k: v for k, v in method.items() if k != "region"}
    for name, peer in PEERS.items():
        if (method, damping) == peer:
            return name + region
    rule = method.get("rule", "").replace("identity", "eq. 15")
    rule += ", each layer" if method.get("layers") else ""
    name = rule or f"flat {damping:g}"
    name += f", {SHORT}" if "kl_clip" in method else ""
    return name + region + (BATCH if method.get("batch_statistics") else "")


def _heads(row):
    tasks = TASKS | HELD_OUT_TASKS | TEXT | DEEP | LONG
    task = next(k for k, (of, _) in tasks.items() if of == row["task"])
    return {"task": task, "damping": _name(row["method"], row["damping"])}


def _region_heads(row):
    heads = _heads(row)
    name = heads.pop("damping").replace(KFAC, "KFAC, floor")
    for rule, optimiser in IN_REGION.items():
        name = name.replace(rule, optimiser)
    return heads | {"optimiser": name}


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
        "loss, 9/10 of the steps": cell(ends(chosen, "early_loss")),
        **{f"loss at {rate:g}": cell(loss(of)) for rate, of in rates.items()},
        "regret": round(regret(found, key), 3),
        f"rates within 5 % (of {len(rates)})": near(found, key),
    }


def _tasks(found) -> list[str]:
    return list(dict.fromkeys(task for task, _ in found))


def _regrets(found) -> dict[str, float]:
    """Name -> mean regret over tasks, of what was run on all of them."""
    tasks = _tasks(found)
    keys = {
        name: [(t, name) for t in tasks] for name in dict.fromkeys(n for _, n in found)
    }
    return {
        name: mean([regret(found, key) for key in of])
        for name, of in keys.items()
        if all(key in found for key in of)
    }


def _rank(found):
    order = sorted(_regrets(found).items(), key=lambda item: item[1])
    return [
        {"task": "all", "damping": name, "regret": round(value, 3)}
        for name, value in order
    ]


def _trains(found, rule, most=0.45):
    """Every run of a rule ends better than it began to: at half of chance, at most."""
    rows = [row for (_, name), of in found.items() if name == rule for row in of]
    lost = sum(not (x <= most) for x in ends(rows, "test_error"))
    text = f"{rule}: every run, at every rate, ends with a test error below "
    text += f"{most:.0%}: lost".replace("%", " %")
    return Check(text, lost, None, lost == 0)


def _below_all(found, rule, others):
    regrets = _regrets(found)
    value = regrets[rule] - min(regrets[other] for other in others)
    text = f"{rule}: the mean regret is below that of {', '.join(others)}, by"
    return Check(text, value, None, value < 0)


def _at_best(found, rule, others, share, name):
    """At its own best rate, against the best of the others at its own."""
    for task in _tasks(found):
        keys = [(task, other) for other in others]
        best = min(keys, key=lambda k: mean(loss(best_rate(found[k]))))
        ours, theirs = (loss(best_rate(found[k])) for k in ((task, rule), best))
        text = f"{task}: {rule} at its best rate within {share:.0%} of {name}"
        yield within(text, share, ours, theirs)


def _kfac_checks(found):
    others = [*FLAT_KFAC, *OTHERS]
    regions = [name + REGION for name in others]
    cases = (
        (KFAC, others, FLAT_KFAC),
        (KFAC_SHORT, _short(others), [*FLAT_KFAC, *_short(FLAT_KFAC)]),
        (KFAC_REGION, regions, [*FLAT_KFAC, *regions[: len(FLAT_KFAC)]]),
    )
    for ours, others, flat in cases:
        yield _trains(found, ours)
        yield _below_all(found, ours, others)
        yield from _at_best(found, ours, flat, 0.02, "the best flat")


def _short(names):
    return [f"{name}, {SHORT}" for name in names]


def _apart(found, rule):
    """Each network's results and its rule, with BatchNorm of the loss in training mode.

    Yields:
        Pairs.
    """
    plain, normed = _tasks(found)
    for task, ours in ((plain, rule), (normed, rule + BATCH)):
        yield {key: rows for key, rows in found.items() if key[0] == task}, ours


def _deep_kfac_checks(found):
    flat = FLAT_KFAC[1:]
    for of, ours in _apart(found, KFAC):
        yield _trains(of, ours, 0.7)  # 0.8 is chance
        yield _below_all(of, ours, flat)
        yield from _at_best(of, ours, flat, 0.02, "the best flat")
    for of, ours in _apart(found, KFAC_SHORT):
        yield _trains(of, ours, 0.7)
        yield _below_all(of, ours, [*flat, *_short(flat[:2])])
    for of, ours in _apart(found, KFAC_REGION):
        yield _trains(of, ours, 0.7)
        others = [*flat, "flat 0.1" + REGION]
        yield _below_all(of, ours, others)
        yield from _at_best(of, ours, others, 0.02, "the best flat")
    yield _of_batches(found, KFAC)


def _deep_checks(found):
    for of, ours in _apart(found, "aware floor"):
        yield from _text_checks(of, ours)
    yield _of_batches(found, "aware floor")


def _of_batches(found, rule):
    _, normed = _tasks(found)
    rows = (
        [x for of in _at_rates(found[normed, name]).values() for x in loss(of)]
        for name in (rule + BATCH, rule)
    )
    text = f"{normed}: {rule} with batch statistics, loss at all rates not above "
    return not_more(text + "that with running averages", *rows)


def _lanczos_checks(found):
    names = dict.fromkeys(name for _, name in found)
    flat = [name for name in names if name.startswith("flat")]
    others = [name for name in names if not name.startswith("floor")]
    return [
        _trains(found, LANCZOS),
        _below_all(found, LANCZOS, others),
        *_at_best(found, LANCZOS, flat, 0.02, "the best flat"),
    ]


def _wider(found, ours):
    """How many times as many good rates as Adam's, over the tasks."""
    count = lambda name: sum(near(found, (task, name)) for task in _tasks(found))
    text = f"{ours}: rates within 5 % of the best, at least 1.5 times Adam's"
    ratio = count(ours) / max(count(ADAM), 1)
    return Check(text, ratio, None, ratio >= 1.5)


def _never_costs(found, ours, rate):
    for task in _tasks(found):
        rows, adam = (_at_rates(found[task, name])[rate] for name in (ours, ADAM))
        text = f"{task}: {ours} at {rate:g} within 1 % of Adam's loss"
        yield within(text, 0.01, loss(rows), loss(adam))
        errors = (ends(of, "best_error", 100.0) for of in (rows, adam))
        yield not_more(f"{task}: {ours} at {rate:g}, error not above Adam's", *errors)


def _adam_checks(found):
    flat, ours = [f"flat {x:g}" for x in FLAT["adam"]], "aware floor"
    names = {name for _, name in found}
    others = [name for name in (*flat, "eq. 15", "floor") if name in names]
    return [
        _trains(found, ours),
        _below_all(found, ours, others),
        _wider(found, ours),
        *_at_best(found, ours, [ADAM], 0.01, "Adam at its own"),
        *_never_costs(found, ours, 1e-3),
    ]


def _in_its_time(found, ours):
    """With a tenth of the steps less, which is about what measuring takes."""
    for task in _tasks(found):
        rows, adam = (best_rate(found[task, name]) for name in (ours, ADAM))
        text = f"{task}: {ours}, 9 of 10 evaluations, within 1 % of Adam at its own"
        yield within(text, 0.01, ends(rows, "early_loss"), loss(adam))


def _text_checks(found, ours="aware floor"):
    best = _at_best(found, ours, [ADAM], 0.01, "Adam at its own")
    costs = [*_in_its_time(found, ours), *_never_costs(found, ours, 1e-3)]
    return [_below_all(found, ours, [ADAM]), *best, *costs]


def _region_checks(found):
    """Each optimiser against itself."""
    names = {name for _, name in found}
    for name in (name for name in IN_REGION.values() if name in names):
        pair = {k: of for k, of in found.items() if k[1] in (name, name + REGION)}
        ours, theirs = (
            sum(near(pair, key) for key in pair if key[1] == of)
            for of in (name + REGION, name)
        )
        text = f"{name}: good rates in the region over those without, at least 1.5"
        ratio = ours / max(theirs, 1)
        yield Check(text, ratio, None, ratio >= 1.5)
        yield from _at_best(pair, name + REGION, [name], 0.01, "its best without")


def _region_deep_checks(found):
    deep = {k: of for k, of in found.items() if k[0] in DEEP}
    names = dict.fromkeys(name for _, name in deep if REGION in name)
    trained = [_trains(deep, name, 0.7) for name in names]  # 0.8 is chance
    return [*trained, *_region_checks(found)]


def _panels(rows, heads=_heads):
    """A task each: the test loss against the rate, up to twice the best.

    Yields:
        Panels; of KFAC's methods with those that answer which to take.
    """
    found = by(rows, lambda row: tuple(heads(row).values()))
    for task in _tasks(found):
        lines = []
        shown = {n: of for (t, n), of in found.items() if t == task}
        if set(PICTURED) <= set(shown):
            shown = {n: shown[n] for n in PICTURED}
        for name, of in shown.items():
            rates = _at_rates(of)
            y = [mean(loss(some)) for some in rates.values()]
            style = "--" if name.startswith("flat") else ":" if name in PEERS else "o-"
            if heads is _region_heads:
                style = "o-" if REGION in name else "--"
            lines.append(report.Line(name, list(rates), y, style))
        best = min(min(line.y) for line in lines)
        settings = {"xscale": "log", "xlabel": "learning rate", "title": task}
        yield report.curves(lines, ylim=(0.95 * best, 2 * best), **settings)


EXPERIMENTS = [
    Experiment(name, runs, _heads, _line, checks, [_panels], _rank, with_chosen)
    for name, runs, checks in (
        ("rules_kfac", _kfac_runs, _kfac_checks),
        ("rules_kfac_held_out", _kfac_held_out_runs, _kfac_checks),
        ("rules_adam", _adam_runs, _adam_checks),
        ("rules_adam_held_out", _adam_held_out_runs, _adam_checks),
        ("rules_text", _text_runs, _text_checks),
        ("rules_deep", _deep_runs, _deep_checks),
        ("rules_deep_kfac", _deep_kfac_runs, _deep_kfac_checks),
        ("rules_long", _long_runs, _text_checks),
        ("rules_lanczos", _lanczos_runs, _lanczos_checks),
        ("rules_lanczos_held_out", _held_out_runs, _lanczos_checks),
    )
]
EXPERIMENTS += [
    Experiment(name, runs, _region_heads, _line, checks, [picture], each=with_chosen)
    for picture in [functools.partial(_panels, heads=_region_heads)]
    for name, runs, checks in (
        ("rules_region", functools.partial(_region_runs, TASKS), _region_checks),
        (
            "rules_region_held_out",
            functools.partial(_region_runs, HELD_OUT_TASKS),
            _region_checks,
        ),
        ("rules_region_deep", _region_deep_runs, _region_deep_checks),
    )
]
