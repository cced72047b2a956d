"""Figures 4 to 6: LanczosOPT (eq. 9) on logistic regression, at the paper's scale."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtdamp
from benchmarks.paper._data import load, standardise, take
from benchmarks.paper._experiment import (
    Conclusion,
    Experiment,
    cell,
    difference,
    groups,
    mean,
    select,
    verdict_of,
)
from benchmarks.paper._runs import Row, Run

RATE, EPOCHS, KRYLOV = 0.01, 500, 50
DIVISORS = (1.0, 3.0, 10.0)
DAMPINGS = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
GD_RATES = (0.01, 0.1)
SEEDS = (0, 1, 2)
EVERY = 5  # epochs between evaluations


def _logits(params, images):
    return images @ params["kernel"] + params["bias"]


def _loss(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        _logits(params, batch[0]), batch[1]
    )
    return losses.mean()


def _error(params, batch):
    return (_logits(params, batch[0]).argmax(1) != batch[1]).mean()


@functools.cache
def _data(folder, dataset, seed):
    """A thousand training images (which ones depends on the seed), all test images."""
    full = load(dataset, folder)
    order = np.random.default_rng(seed).permutation(len(full.train[1]))
    full = full._replace(train=(full.train[0][order], full.train[1][order]))
    flat = lambda x: jnp.asarray(x.reshape(len(x), -1))
    train, test = standardise(take(full, num_train=1000))
    return (flat(train[0]), jnp.asarray(train[1])), (
        flat(test[0]),
        jnp.asarray(test[1]),
    )


@functools.partial(jax.jit, static_argnames=("epochs", "newton"))
def _descend(setting, train, test, seed, *, epochs, newton):
    """Full-batch descent: losses and errors by epoch, training then test."""
    params = {"kernel": jnp.zeros((train[0].shape[1], 10)), "bias": jnp.zeros(10)}
    if newton:
        tx = rmtdamp.lanczos_newton(
            setting["learning_rate"],
            _loss,
            num_steps=KRYLOV,
            damping=setting["damping"],
            sharp_divisor=setting["divisor"],
            seed=seed,
        )
    else:
        tx = optax.with_extra_args_support(optax.sgd(setting["learning_rate"]))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(_loss)(params, train)
        updates, state = tx.update(grads, state, params, batch=train)
        return (optax.apply_updates(params, updates), state), None

    def chapter(carry, _):
        carry, _ = jax.lax.scan(step, carry, length=EVERY)
        params = carry[0]
        seen = [f(params, part) for part in (train, test) for f in (_loss, _error)]
        return carry, jnp.stack(seen)

    carry = params, tx.init(params)
    return jax.lax.scan(chapter, carry, length=epochs // EVERY)[1]


def lanczos_opt(
    folder: pathlib.Path, *, dataset: str, seed: int, epochs: int, settings: list[Row]
) -> Row:
    """One data set, one thousand images, many settings at once (vmap)."""
    start = time.perf_counter()
    train, test = _data(folder, dataset, seed)
    stacked = {k: jnp.array([s[k] for s in settings]) for k in settings[0]}
    descend = functools.partial(
        _descend, epochs=epochs, newton="damping" in settings[0]
    )
    curves = jax.vmap(descend, (0, None, None, None))(stacked, train, test, seed)
    curves = np.asarray(curves)
    names = ("train_loss", "train_error", "test_loss", "test_error")
    return {
        "curves": [
            {n: [float(f"{x:.4g}") for x in c[:, i]] for i, n in enumerate(names)}
            for c in curves
        ],
        "seconds": round(time.perf_counter() - start, 1),
    }


def _runs(dataset, scale):
    del scale
    newton = [
        {"learning_rate": RATE, "damping": d, "divisor": e}
        for e in DIVISORS
        for d in DAMPINGS
    ]
    descent = [{"learning_rate": r} for r in GD_RATES]
    return [
        Run(
            lanczos_opt,
            {"dataset": dataset, "seed": seed, "epochs": EPOCHS, "settings": settings},
        )
        for seed in SEEDS
        for settings in (newton, descent)
    ]


def _flat(rows):
    """One row per setting and seed."""
    return [
        {**setting, "seed": row["seed"], **curve}
        for row in rows
        for setting, curve in zip(row["settings"], row["curves"], strict=True)
    ]


def _final(rows, name):
    return [100 * row[name][-1] for row in rows]


def _table(rows):
    flat = _flat(rows)
    table = []
    for (damping, divisor), found in groups(
        [r for r in flat if "damping" in r], "damping", "divisor"
    ).items():
        table.append(
            {"optimiser": f"LOPT[{divisor:g}]", "delta": damping, **_cells(found)}
        )
    for (rate,), found in groups(
        [r for r in flat if "damping" not in r], "learning_rate"
    ).items():
        table.append(
            {"optimiser": f"GD, rate {rate:g}", "delta": None, **_cells(found)}
        )
    return table


def _cells(found):
    return {
        "train loss": cell([r["train_loss"][-1] for r in found], 4),
        "train error, %": cell(_final(found, "train_error"), 2),
        "test error, %": cell(_final(found, "test_error"), 2),
        "test loss": cell([r["test_loss"][-1] for r in found], 3),
    }


def _conclude(rows):
    flat = [r for r in _flat(rows) if "damping" in r]
    plain = select(flat, divisor=1.0)
    at = lambda damping, name, rows=plain: _final(select(rows, damping=damping), name)
    best = min(DAMPINGS, key=lambda d: mean(at(d, "test_error")))
    low = DAMPINGS[0]
    gap = difference(at(low, "test_error"), at(best, "test_error"))
    # At dampings where every optimiser fits the training set, only the test can suffer.
    harm = {}
    for divisor in DIVISORS[1:]:
        perturbed = select(flat, divisor=divisor)
        harm[divisor] = {
            name: [difference(at(d, name, perturbed), at(d, name)) for d in DAMPINGS]
            for name in ("train_error", "test_error")
        }
    large = DAMPINGS.index(1e-1)
    harm10 = {k: v[large] for k, v in harm[10.0].items()}
    small10 = {k: v[0] for k, v in harm[10.0].items()}
    suffers = gap[0] > 2 * gap[1] and best > low
    order = all(
        harm[10.0]["test_error"][i][0] >= harm[3.0]["test_error"][i][0]
        for i in range(len(DAMPINGS))
    )
    more_than_training = sum(
        harm[10.0]["test_error"][i][0] > harm[10.0]["train_error"][i][0]
        for i in range(len(DAMPINGS))
    )
    checks = [suffers, order, more_than_training > len(DAMPINGS) / 2]
    verdict = verdict_of(checks)
    pair = lambda x: f"{x[0]:.2f} ± {x[1]:.2f}"
    findings = {
        "best delta for the test error": best,
        "test error, %, at the best and the smallest delta": [
            cell(at(best, "test_error"), 2),
            cell(at(low, "test_error"), 2),
        ],
        "difference, points": pair(gap),
        "dampings at which eta = 10 harms the test error more": more_than_training,
        "harm of eta = 10 at delta 0.1, points (train, test)": [
            pair(harm10["train_error"]),
            pair(harm10["test_error"]),
        ],
        f"harm of eta = 10 at delta {low:g}, points (train, test)": [
            pair(small10["train_error"]),
            pair(small10["test_error"]),
        ],
    }
    remark = (
        "A smaller damping, that is a larger rate in flat directions, "
        + ("raises" if suffers else "does not raise")
        + f" the test error: {pair(gap)} points from delta {best:g} to {low:g}. "
        + "Taking movement out of the sharp directions harms "
        + (
            "more at eta = 10 than at 3 for every delta"
            if order
            else "not at every delta more at eta = 10 than at 3"
        )
        + ", and harms the test error more than the training error at "
        f"{more_than_training} of {len(DAMPINGS)} dampings."
    )
    return Conclusion(_table(rows), findings, verdict, remark)


def _heat(figure, rows):
    flat = [r for r in _flat(rows) if "damping" in r]
    axes = figure.subplots(1, 2)
    for ax, name in zip(axes, ("train_error", "test_error"), strict=True):
        grid = np.array(
            [
                [
                    mean(_final(select(flat, damping=d, divisor=e), name))
                    for e in DIVISORS
                ]
                for d in DAMPINGS
            ]
        )
        grid -= grid.min()
        image = ax.imshow(grid, aspect="auto", cmap="magma_r")
        ax.set_xticks(range(len(DIVISORS)), [f"{e:g}" for e in DIVISORS])
        ax.set_yticks(range(len(DAMPINGS)), [f"{d:g}" for d in DAMPINGS])
        ax.set(
            xlabel="eta",
            ylabel="damping",
            title=name.replace("_", " ") + ", points above the best",
        )
        for i, j in np.ndindex(grid.shape):
            colour = "white" if grid[i, j] > grid.max() / 2 else "black"
            ax.text(
                j,
                i,
                f"{grid[i, j]:.1f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=7,
            )
        figure.colorbar(image, ax=ax)


def _curves(figure, rows):
    flat = _flat(rows)
    epochs = np.arange(EVERY, EPOCHS + 1, EVERY)
    shown = (1e-3, 1e-2, 1e-1, 1.0)
    axes = figure.subplots(1, len(shown), sharey=True)
    for ax, damping in zip(axes, shown, strict=True):
        for i, divisor in enumerate(DIVISORS):
            found = [r for r in flat if "damping" in r]
            found = select(found, damping=damping, divisor=divisor)
            for name, style in (("train_error", "--"), ("test_error", "-")):
                curve = 100 * np.mean([r[name] for r in found], axis=0)
                label = f"LOPT[{divisor:g}]" if style == "-" else None
                ax.plot(epochs, curve, style, color=f"C{i}", lw=1, label=label)
        descent = [r for r in flat if "damping" not in r and r["learning_rate"] == RATE]
        curve = 100 * np.mean([r["test_error"] for r in descent], axis=0)
        ax.plot(epochs, curve, color="grey", lw=1, label=f"GD, {RATE:g}")
        ax.set(title=f"delta = {damping:g}", xlabel="epoch", ylim=(0, 40))
    axes[0].set_ylabel("error, % (dashed: training)")
    axes[-1].legend(fontsize=7)


PROTOCOL = {
    "full": (
        "The paper's: logistic regression (P = 7,850) from zero, 1,000 training and"
        " 10,000 test images, 500 full-batch epochs, m = 50, alpha = 0.01; three"
        " different thousands of training images."
    )
}
PAPER = {
    "pictures": "curves and heat maps; no numbers are printed",
    "said": (
        "for a fixed alpha the test error grows as delta falls; eta = 3 and 10 harm "
        "the test error more than the training error, more for larger delta"
    ),
}


def _experiment(name, dataset, title, draw):
    return Experiment(
        name=name,
        claim=title,
        paper=PAPER,
        protocol=PROTOCOL,
        runs=functools.partial(_runs, dataset),
        conclude=_conclude,
        draw=draw,
    )


CLAIM = (
    "Taking movement out of the sharp directions, or a smaller damping, harms "
    "generalisation more than training"
)
EXPERIMENTS = [
    _experiment("fig4_mnist", "mnist", f"{CLAIM} (MNIST, heat map)", _heat),
    _experiment("fig5_mnist", "mnist", f"{CLAIM} (MNIST, curves)", _curves),
    _experiment("fig6_fashion", "fashion-mnist", f"{CLAIM} (Fashion-MNIST)", _curves),
]
