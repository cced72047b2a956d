"""Figure 2: the Hessian's spectrum where SGD and Adam end, bulk and outliers."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper._experiment import (
    Conclusion,
    Experiment,
    cell,
    difference,
    groups,
    mean,
    verdict_of,
)
from benchmarks.paper._runs import Row, Run, rounded
from benchmarks.paper._train import Method, Task, fit
from benchmarks.paper.experiments import _grid
from benchmarks.paper.experiments.vgg_adam import DEFAULT, EPOCHS
from rmtdamp import hessian
from rmtdamp.plot import spectral_density as plot_density


def end_spectrum(
    folder: pathlib.Path,
    *,
    task: Row,
    optimizer: str,
    learning_rate: float,
    damping: float,
    epochs: int,
    examples: int,
    num_steps: int,
    seed: int,
) -> Row:
    """Train as the tables do, then look: the density on some of the training set."""
    start = time.perf_counter()
    done = fit(
        folder,
        Task(**task),
        Method(optimizer),
        learning_rate=learning_rate,
        damping=damping,
        epochs=epochs,
        seed=seed,
    )
    loss_fn, params = done.network.loss_fn, done.params
    keys = jax.random.split(jax.random.key(seed), 2)
    order = np.random.default_rng(seed).permutation(len(done.data[0][1]))
    part = lambda rows: tuple(x[rows] for x in done.data[0])
    matvec = lambda batch: hessian.hessian_matvec(
        loss_fn, params, batch, loss_args=(done.rest,)
    )
    density = hessian.spectral_density(
        matvec(part(order[:examples])),
        params,
        keys[0],
        num_steps=num_steps,
        num_probes=1,
    )
    batch = part(order[:128])
    noise = hessian.noise_matvec(*map(matvec, hessian.halves(batch)))
    noise_key, batch_key = jax.random.split(keys[1])
    extreme = functools.partial(hessian.eigsh, like=params, which="LM", tol=1e-3)
    seen = extreme(matvec(batch), key=batch_key, k=8).eigenvalues
    reach = jnp.abs(extreme(noise, key=noise_key, k=5).eigenvalues)
    # By as much again as the largest of the noise lies beyond its fifth.
    edge = 2 * reach[0] - reach[4]
    return {
        "nodes": rounded(density.nodes),
        "weights": rounded(density.weights),
        "num_parameters": density.num_parameters,
        "lambda_max": float(density.nodes.max()),
        "lambda_min": float(density.nodes.min()),
        "trace": float(density.moment(1)[0]) * density.num_parameters,
        "noise_edge": float(edge),
        "batch_eigenvalues": rounded(seen),
        "outliers": int(jnp.sum(jnp.abs(seen) > edge)),
        "test_error": done.curves["test_error"][-1],
        "train_error": done.curves["train_error"][-1],
        "seconds": round(time.perf_counter() - start, 1),
    }


def _runs(scale):
    small = scale == "small"
    shared = {
        "task": _grid.SMALL if small else _grid.FULL,
        "epochs": EPOCHS if small else 300,
        "examples": 512 if small else 5000,
        "num_steps": 30 if small else 80,
    }
    methods = (("sgd", _grid.SGD_RATE[scale], 0.0), ("adam", 1e-3, DEFAULT))
    return [
        Run(
            end_spectrum,
            {
                "optimizer": optimizer,
                "learning_rate": rate,
                "damping": damping,
                "seed": seed,
                **shared,
            },
        )
        for seed in _grid.SEEDS
        for optimizer, rate, damping in methods
    ]


def _conclude(rows):
    found = {k[0]: v for k, v in groups(rows, "optimizer").items()}
    table = [
        {
            "optimiser": {"sgd": "SGD", "adam": "Adam"}[name],
            "lambda_1": cell([r["lambda_max"] for r in group], 1),
            "smallest": cell([r["lambda_min"] for r in group], 2),
            "trace": cell([r["trace"] for r in group], 1),
            "edge of a batch's noise": cell([r["noise_edge"] for r in group], 1),
            "outliers of 8": cell([r["outliers"] for r in group], 1),
            "train error, %": cell([100 * r["train_error"] for r in group], 1),
            "test error, %": cell([100 * r["test_error"] for r in group], 1),
        }
        for name, group in found.items()
    ]
    of = lambda name, field: mean([r[field] for r in found[name]])
    values = lambda name, field: [r[field] for r in found[name]]
    sharper = difference(values("sgd", "lambda_max"), values("adam", "lambda_max"))
    worse = difference(values("sgd", "test_error"), values("adam", "test_error"))
    differ = abs(sharper[0]) > 2 * sharper[1] and abs(worse[0]) > 2 * worse[1]
    # Weight that lies within a hundredth of the largest eigenvalue: the bulk.
    bulk = mean(
        [
            sum(
                w
                for x, w in zip(r["nodes"], r["weights"], strict=True)
                if abs(x) < 0.01 * r["lambda_max"]
            )
            for r in rows
        ]
    )
    checks = [bulk > 0.9, differ and sharper[0] * worse[0] < 0]
    verdict = verdict_of(checks)
    findings = {
        "weight of the spectrum within 1 % of lambda_1 of 0": bulk,
        "lambda_1: SGD, Adam": [of("sgd", "lambda_max"), of("adam", "lambda_max")],
        "test error, %: SGD, Adam": [
            100 * of("sgd", "test_error"),
            100 * of("adam", "test_error"),
        ],
        "eigenvalues of a batch of 128 outside its noise, of 8: SGD, Adam": [
            of("sgd", "outliers"),
            of("adam", "outliers"),
        ],
    }
    remark = (
        f"{100 * bulk:.1f} % of the spectrum lies within 1 % of lambda_1 of zero, the"
        " rest is a few outliers. SGD's lambda_1 differs from Adam's by"
        f" {sharper[0]:+.1f} ± {sharper[1]:.1f}, its test error by"
        f" {100 * worse[0]:+.1f} ± {100 * worse[1]:.1f} points: "
        + (
            "the sharper solution generalises better, as in the paper's picture."
            if checks[1]
            else "no sharper solution that generalises better, as the paper shows one."
        )
        + " Against the measured noise of a batch of 128,"
        f" {of('sgd', 'outliers'):.1f} (SGD) and {of('adam', 'outliers'):.1f} (Adam) of"
        " its 8 largest eigenvalues stand out."
    )
    return Conclusion(table, findings, verdict, remark)


def _draw(figure, rows):
    axes = figure.subplots(1, 2)
    for ax, name in zip(axes, ("sgd", "adam"), strict=True):
        row = next(r for r in rows if r["optimizer"] == name and r["seed"] == 0)
        spectrum = hessian.Spectrum(
            jnp.array([row["nodes"]]),
            jnp.array([row["weights"]]),
            row["num_parameters"],
        )
        plot_density(spectrum, ax=ax)
        error = f"test error {100 * row['test_error']:.1f} %"
        ax.set_title(f"{'SGD' if name == 'sgd' else 'Adam'}, {error}")


EXPERIMENTS = [
    Experiment(
        name="fig2_spectrum",
        claim="The Hessian at the end has a bulk and well separated outliers, and the "
        "sharper of SGD's and Adam's solutions can have the lower test error",
        paper={"curves": "VGG-16, epoch 300: a bulk, a few eigenvalues near it, clear "
               "outliers; the sharper solution has better validation accuracy"},
        protocol=_grid.protocol(
            EPOCHS,
            "Density on 512 training images by 30 Lanczos steps (5,000 and 80 at full "
            "scale); outliers of a batch of 128 against the noise of its halves.",
        ),
        runs=_runs,
        conclude=_conclude,
        draw=_draw,
    )
]  # fmt: skip
