"""Figures 4 to 6: LanczosOPT (eq. 9) on logistic regression, at the paper's scale."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper._experiment import Conclusion, Experiment
from benchmarks.shared.checks import cell, difference, groups, mean
from benchmarks.shared.data import load, standardise, take
from benchmarks.shared.figures import Line, curves, grid
from benchmarks.shared.optimizers import Method, Numbers, transformation
from benchmarks.shared.runs import Row, Run
from benchmarks.shared.training import (
    CURVES,
    Task,
    initial,
    judge,
    network_of,
    take_steps,
)

RATE, EPOCHS = 0.01, 500
DIVISORS = (1.0, 3.0, 10.0)
DAMPINGS = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
GD_RATES = (0.01, 0.1)
SEEDS = (0, 1, 2)
EVERY = 5  # epochs between evaluations


@functools.cache
def _data(folder, dataset, seed):
    """A thousand training images (which ones depends on the seed), all test images."""
    full = load(dataset, folder)
    order = np.random.default_rng(seed).permutation(len(full.train[1]))
    full = full._replace(train=tuple(x[order] for x in full.train))
    return jax.device_put(standardise(take(full, num_train=1000)))


@functools.partial(jax.jit, static_argnames=("method", "network", "chapters"))
def _descend(method, network, settings, seed, start, data, chapters):
    """Full-batch descent at all settings: losses and errors, training then test."""
    rows = np.empty((EVERY, 0), int)

    def one(setting):
        tx = transformation(
            method, Numbers(**setting, total_steps=1, seed=seed), network
        )

        def chapter(carry, _):
            carry, _ = take_steps(network, tx, carry, data[0], rows, None)
            seen = [judge(network, *carry[:2], x) / len(x[1]) for x in data]
            return carry, jnp.concatenate(seen)

        carry = *start, tx.init(start[0])
        return jax.lax.scan(chapter, carry, length=chapters)[1]

    return jax.vmap(one)(settings)


def lanczos_opt(
    folder: pathlib.Path, *, dataset: str, seed: int, epochs: int, settings: list[Row]
) -> Row:
    """One data set, one thousand images, many settings at once."""
    names = {"learning_rate": "learning_rate", "damping": "damping"}
    names["divisor"] = "sharp_divisor"
    stacked = {names[k]: jnp.array([s[k] for s in settings]) for k in settings[0]}
    method = Method("lanczos" if "damping" in stacked else "gd", "constant")
    stacked.setdefault("damping", jnp.zeros(len(settings)))
    task, shape = Task(dataset, "logistic"), (28, 28, 1)
    start, data = initial(task, 10, shape, 0), _data(folder, dataset, seed)
    network, chapters = network_of(task, 10, shape), epochs // EVERY
    found = _descend(method, network, stacked, seed, start, data, chapters)
    digits = lambda xs: [float(f"{x:.4g}") for x in np.asarray(xs)]
    return {
        "curves": [{n: digits(c[:, i]) for i, n in enumerate(CURVES)} for c in found]
    }


def _runs(dataset, scale):
    newton = [
        {"learning_rate": RATE, "damping": d, "divisor": e}
        for e in DIVISORS
        for d in DAMPINGS
    ]
    descent = [{"learning_rate": r} for r in GD_RATES]
    shared = {"dataset": dataset, "epochs": EPOCHS}
    return [
        Run(lanczos_opt, {**shared, "seed": seed, "settings": settings})
        for seed in SEEDS
        for settings in (newton, descent)
    ]


def _by_setting(rows):
    """(divisor, damping) or (None, rate) -> a row per seed."""
    flat = [
        {"eta": s.get("divisor"), "at": s.get("damping", s["learning_rate"]), **curve}
        for row in rows
        for s, curve in zip(row["settings"], row["curves"], strict=True)
    ]
    return groups(flat, "eta", "at")


def _final(rows, name, factor=100):
    return [factor * row[name][-1] for row in rows]


def _line(eta, at, rows):
    return {
        "optimiser": f"LOPT[{eta:g}]" if eta else f"GD, rate {at:g}",
        "delta": at if eta else None,
        "train loss": cell(_final(rows, "train_loss", 1), 4),
        "train error, %": cell(_final(rows, "train_error"), 2),
        "test error, %": cell(_final(rows, "test_error"), 2),
        "test loss": cell(_final(rows, "test_loss", 1), 3),
    }


def _conclude(rows):
    found = _by_setting(rows)
    test = lambda eta, at: _final(found[eta, at], "test_error")
    best = min(DAMPINGS, key=lambda d: mean(test(1.0, d)))
    low = DAMPINGS[0]
    gap = difference(test(1.0, low), test(1.0, best))
    harm = lambda eta, at, name: difference(
        _final(found[eta, at], name), _final(found[1.0, at], name)
    )
    both = lambda at: [
        pair(harm(10.0, at, name)) for name in ("train_error", "test_error")
    ]
    pair = lambda x: f"{x[0]:.2f} ± {x[1]:.2f}"
    more = [
        harm(10.0, d, "test_error")[0] > harm(10.0, d, "train_error")[0]
        for d in DAMPINGS
    ]
    checks = [
        gap[0] > 2 * gap[1] and best > low,
        all(
            harm(10.0, d, "test_error")[0] >= harm(3.0, d, "test_error")[0]
            for d in DAMPINGS
        ),
        sum(more) > len(DAMPINGS) / 2,
    ]
    findings = {
        "best delta for the test error": best,
        "test error, %, at the best and the smallest delta": [
            cell(test(1.0, best), 2),
            cell(test(1.0, low), 2),
        ],
        "difference, points": pair(gap),
        "dampings at which eta = 10 harms the test error more": sum(more),
        "harm of eta = 10 at delta 0.1, points (train, test)": both(1e-1),
        f"harm of eta = 10 at delta {low:g}, points (train, test)": both(low),
    }
    order = [(e, d) for e in DIVISORS for d in DAMPINGS] + [(None, r) for r in GD_RATES]
    return Conclusion([_line(*k, found[k]) for k in order], findings, checks)


def _heat(rows):
    found = _by_setting(rows)
    panels = []
    for name in ("train_error", "test_error"):
        of = lambda d, e, name=name: mean(_final(found[e, d], name))
        values = np.array([[of(d, e) for e in DIVISORS] for d in DAMPINGS])
        title = f"{name.replace('_', ' ')}, points above the best"
        labels = {"xlabel": "eta", "ylabel": "damping", "title": title}
        panels.append(grid(values - values.min(), DAMPINGS, DIVISORS, **labels))
    return panels


def _curves(rows):
    found = _by_setting(rows)
    epochs = np.arange(EVERY, EPOCHS + 1, EVERY)
    of = lambda key, name: 100 * np.mean([r[name] for r in found[key]], axis=0)
    panels = []
    for d in (1e-3, 1e-2, 1e-1, 1.0):
        lines = [
            Line(f"LOPT[{e:g}]{of_what}", epochs, of((e, d), name), style)
            for name, style, of_what in (
                ("test_error", "-", ""),
                ("train_error", "--", ", training"),
            )
            for e in DIVISORS
        ]
        lines.append(Line(f"GD, {RATE:g}", epochs, of((None, RATE), "test_error")))
        labels = {"xlabel": "epoch", "ylabel": "error, %", "title": f"delta = {d:g}"}
        panels.append(curves(lines, ylim=(0, 40), **labels))
    return panels


EXPERIMENTS = [
    Experiment(name, functools.partial(_runs, dataset), _conclude, draw)
    for name, dataset, draw in (
        ("fig4_mnist", "mnist", _heat),
        ("fig5_mnist", "mnist", _curves),
        ("fig6_fashion", "fashion-mnist", _curves),
    )
]
