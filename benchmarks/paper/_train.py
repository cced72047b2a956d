"""The training runs of the paper's experiments, as rows."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shared.layers import split_layers
from benchmarks.shared.optimizers import Method, dampings
from benchmarks.shared.runs import Row, rounded
from benchmarks.shared.training import CURVES, Task, fit
from rmtdamp import hessian

NUM_CURVATURE_EXAMPLES, NUM_PRODUCTS = 256, 12


def largest(done) -> float:
    """lambda_1 of the Hessian of the first 256 training images, by Lanczos."""
    batch = tuple(x[:NUM_CURVATURE_EXAMPLES] for x in done.data[0])
    matvec = hessian.hessian_matvec(
        done.network.loss_fn, done.params, batch, loss_args=done.loss_args
    )
    spectrum = hessian.spectral_density(
        matvec, done.params, jax.random.key(0), num_steps=NUM_PRODUCTS, num_probes=1
    )
    return float(jnp.max(spectrum.nodes))


def train(
    folder: pathlib.Path,
    *,
    task: Row,
    method: Row,
    epochs: int,
    batch_size: int,
    eval_every: int = 1,
    with_spectral_norm: bool = False,
    **numbers,
) -> Row:
    """Measured by hand; its curves by epoch, and lambda_1 at the end if asked for."""
    done = fit(
        folder,
        Task(**task),
        Method(**method),
        epochs=epochs,
        batch_size=batch_size,
        eval_every=eval_every,
        **numbers,
    )
    per = len(done.data[0][1]) // batch_size
    first = lambda values: rounded(values)[0] if values else None
    row: Row = {"epoch": [n / per for n in done.curves["step"]]}
    row |= {name: done.curves[name] for name in CURVES}
    row["damping_curve"] = [first(values) for values in done.curves["damping"]]
    row["measured_variance"] = [
        first([x] if x is not None else []) for x in done.curves["variance"]
    ]
    return row | ({"spectral_norm": largest(done)} if with_spectral_norm else {})


def train_scanned(
    folder: pathlib.Path,
    *,
    task: Row,
    method: Row,
    loss_factor: float = 1.0,
    layers: str | None = None,
    **numbers,
) -> Row:
    """A network without convolutions, measured in the step, judged ten times.

    The damping's curve is that of each layer if `layers` has it learned so.
    """
    done = fit(
        folder,
        Task(**task),
        Method(**method, layers=layers),
        factor=loss_factor,
        num_evaluations=10,
        by_hand=False,
        **numbers,
    )
    row = {name: done.curves[name] for name in ("step", *CURVES)}
    curves = [rounded(x) for x in np.transpose(done.curves["damping"])]
    row["damping_curve"] = curves[0]
    if layers is not None:
        names = sorted(split_layers(done.params))
        row["damping_curve"] = dict(zip(names, curves, strict=True))
    return row | {"refused": int(sum(dampings(done.opt_state, "refresh_rejections")))}
