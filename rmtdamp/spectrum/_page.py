"""Report -> the page on the terminal, the picture, the JSON file."""

import math
from typing import Any

import jax
import numpy as np
import rich.box
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rmtdamp import damping, plot, rmt, stability
from rmtdamp.damping import identity_target
from rmtdamp.hessian import SpectralDensity, squared_overlaps

from ._measure import Report

MOMENTUM = 0.9
# Compiled whole: operation by operation, as much again as the rest of the page.
scaled_identity_target = jax.jit(damping.scaled_identity_target)
semicircle_edge = jax.jit(rmt.semicircle_edge)
stable_learning_rate = jax.jit(
    stability.stable_learning_rate, static_argnames="momentum"
)


def _number(x: Any) -> float | None:
    """A float, None where it is not finite: JSON has no name for such numbers."""
    value = float(x)
    return value if math.isfinite(value) else None


def _numbers(x: Any) -> list:
    return [_number(v) for v in np.asarray(x)]


def _quadrature(spectrum: SpectralDensity) -> dict[str, Any]:
    return {
        "num_parameters": spectrum.num_parameters,
        "nodes": [_numbers(row) for row in spectrum.nodes],
        "weights": [_numbers(row) for row in spectrum.weights],
    }


def _kurtosis(report: Report) -> float:
    """P^-1 Tr X^4 / (P^-1 Tr X^2)^2: 2 for a semicircle, more for heavy tails."""
    noise = report.noise_density
    return float(noise.moment(4)[0]) / float(noise.moment(2)[0]) ** 2


def _edge(report: Report) -> float:
    """The largest magnitude among the eigenvalues of the noise."""
    return float(np.max(np.abs(report.noise_density.nodes)))


def as_json(report: Report) -> dict[str, Any]:
    """All numbers of the report, raw quadratures included; null is not finite."""
    found, noise, p = report.outliers, report.moments, report.num_parameters
    pairs = {
        name: {
            "eigenvalues": _numbers(x.eigenvalues),
            "residuals": _numbers(x.residuals),
        }
        for name, x in (
            ("largest", report.largest),
            ("smallest", report.smallest),
            ("leading", report.leading),
        )
    }
    equivariant = scaled_identity_target(noise)
    largest = report.largest.eigenvalues[0]
    return {
        "num_parameters": p,
        "num_examples": report.num_examples,
        "num_batches": report.num_batches,
        "batch_size": report.batch_size,
        "batch_only": report.batch_only,
        "dense": report.density.exact,
        "loss": report.loss,
        "trace": {
            "value": _number(report.trace.value),
            "stderr": _number(report.trace.stderr),
            "per_parameter": _number(float(report.trace.value) / p),
            "per_parameter_stderr": _number(float(report.trace.stderr) / p),
        },
        **pairs,
        "stable_learning_rate": {
            "sgd": _number(stable_learning_rate(largest)),
            "sgd_momentum_0.9": _number(
                stable_learning_rate(largest, momentum=MOMENTUM)
            ),
        },
        "noise": {
            "mean": _number(noise.mean),
            "square": _number(noise.square),
            "variance": _number(noise.variance),
            "variance_stderr": _number(noise.variance_stderr),
            "kurtosis": _number(_kurtosis(report)),
            "edge": _number(_edge(report)),
            "semicircle_edge": _number(semicircle_edge(noise.variance)),
            "num_microbatches": report.num_microbatches,
            "num_probes": report.num_probes,
        },
        "damping": {
            "identity": _number(identity_target(noise).damping),
            "scaled_identity": _number(equivariant.damping),
            "scaled_identity_target": _number(equivariant.target),
        },
        "outliers": {
            "eigenvalues": _numbers(found.eigenvalues),
            "residuals": _numbers(found.residuals),
            "is_outlier": np.asarray(found.is_outlier).tolist(),
            "true_eigenvalues": _numbers(found.true_eigenvalues),
            "overlaps_squared": _numbers(found.overlaps_squared),
            "measured_overlaps_squared": None
            if report.batch_only
            else _numbers(_measured(report)),
        },
        "densities": {
            "data": _quadrature(report.density),
            "batch": _quadrature(report.batch_density),
            "noise": _quadrature(report.noise_density),
            "layers": {n: _quadrature(s) for n, s in report.layers.items()},
        },
        "kronecker": {n: found._asdict() for n, found in report.kronecker.items()},
        "notes": report.notes,
    }


def check_finite(report: Report) -> None:
    """Refuse a report whose main numbers are not finite.

    Raises:
        ValueError: which they are, and where they come from.
    """
    numbers = {
        "the trace": report.trace.value,
        "an eigenvalue": report.leading.eigenvalues,
        "the largest eigenvalue": report.largest.eigenvalues,
        "the smallest eigenvalue": report.smallest.eigenvalues,
        "the density": report.density.nodes,
    }
    noise = {
        "the variance": report.moments.variance,
        "an eigenvalue": report.outliers.eigenvalues,
        "the spectrum of the noise": report.noise_density.nodes,
    }
    where = "batch 0" if report.batch_only else "the data set"
    for side, measured in ((where, numbers), ("batch 0", noise)):
        for name, value in measured.items():
            if not np.all(np.isfinite(np.asarray(value))):
                raise ValueError(
                    f"{name} of {side} is not finite: the Hessian of some example "
                    "holds NaN or infinity though its loss does not; look for a square "
                    "root, a norm or a logarithm at 0, or for overflow"
                )


def _measured(report: Report) -> np.ndarray:
    """Squared projection of the batch's eigenvectors on the data set's leading ones."""
    return squared_overlaps(report.outliers, report.leading).sum(1)


def _with_error(value, stderr) -> str:
    error = float(stderr)
    text = f"{float(value):.3g}"
    return f"{text} ± {error:.1g}" if math.isfinite(error) and error else text


def _rate(x) -> str:
    return f"{float(x):.3g}" if math.isfinite(float(x)) else "any"


def _drawn(report: Report) -> str:
    """From how many microbatches and probes the variance is."""
    probes = f"{report.num_probes} probe{'s' * (report.num_probes != 1)}"
    return f"{report.num_microbatches} microbatches, " + (
        probes if report.num_probes else "exact traces"
    )


def _damping_rows(report: Report):
    noise, name = report.moments, "damping, Ledoit and Wolf"
    yield "damping, eq. 15", f"{float(noise.variance):.3g}", "towards 1"
    rule = scaled_identity_target(noise)
    value, target = float(rule.damping), float(rule.target)
    if math.isnan(value):
        yield name, "none", f"mean eigenvalue {target:.2g} <= 0"
    elif math.isinf(value):
        yield name, "infinite", "nothing but noise was seen"
    else:
        text = f"towards nu = {target:.3g}"
        yield name, f"{value:.3g}", text


def _section(title: str, rows) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.title_style = "bold"
    for style in ("", "cyan", "dim"):
        table.add_column(style=style)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def page(report: Report, name: str) -> Group:
    """What the terminal shows."""
    noise, p = report.moments, report.num_parameters
    where = "batch 0" if report.batch_only else "the data set"
    kind = "batch 0 alone" if report.batch_only else f"{report.num_batches} batches"
    residual = lambda pairs: f"residual {float(pairs.residuals[0]):.1g}"
    largest = report.largest.eigenvalues[0]
    per_parameter = _with_error(*(float(x) / p for x in report.trace))
    momentum = stable_learning_rate(largest, momentum=MOMENTUM)
    edge, semicircle = _edge(report), float(semicircle_edge(noise.variance))
    whole = _section(
        f"Hessian of {where}: {name}",
        [
            (
                "parameters P",
                f"{p:,}",
                "few: from the whole matrix" if report.density.exact else "",
            ),
            ("examples", f"{report.num_examples:,}", kind),
            ("loss", f"{report.loss:.4g}", ""),
            (
                "trace",
                _with_error(report.trace.value, report.trace.stderr),
                f"per parameter {per_parameter}",
            ),
            (
                "largest eigenvalue",
                f"{float(largest):.4g}",
                residual(report.largest),
            ),
            (
                "smallest eigenvalue",
                f"{float(report.smallest.eigenvalues[0]):.4g}",
                residual(report.smallest),
            ),
            (
                "stable learning rate, SGD",
                _rate(stable_learning_rate(largest)),
                f"{_rate(momentum)} with momentum {MOMENTUM}",
            ),
        ],
    )
    batch = _section(
        f"\nIts noise in a batch of {report.batch_size}, measured on batch 0",
        [
            (
                "variance m = P⁻¹ Tr Var(H)",
                _with_error(noise.variance, noise.variance_stderr),
                _drawn(report),
            ),
            ("kurtosis of the noise", f"{_kurtosis(report):.3g}", "semicircle 2"),
            ("reach of the noise", f"±{edge:.3g}", f"semicircle ±{semicircle:.3g}"),
            *_damping_rows(report),
        ],
    )
    parts = [whole, batch, _outlier_table(report)]
    parts += [_layer_table(report)] if report.layers else []
    parts += [Text(f"\nnote: {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def _table(title: str, caption: str | None) -> Table:
    return Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1),
        show_edge=False,
    )


def _layer_table(report: Report) -> Table:
    """Each layer's block, and how much of its sharp space Kronecker factors show."""
    seen, caption = report.kronecker, None
    if seen:
        caption = (
            f"KFAC: share of the {max(x.k for x in seen.values())} sharpest directions "
            "in the Kronecker factors' own"
        )
    where = "batch 0" if report.batch_only else "the data set"
    table = _table(f"Blocks of the Hessian of {where}", caption)
    names = [
        "block",
        "parameters",
        "trace",
        "largest",
        *(["KFAC", "random"] * bool(seen)),
    ]
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left")
    for name, spectrum in report.layers.items():
        p, largest = spectrum.num_parameters, float(np.max(spectrum.nodes))
        total = _with_error(*(float(x) * p for x in spectrum.moment(1)))
        row = [Text(name), f"{p:,}", total, f"{largest:.4g}"]
        if seen:
            x = seen.get(name)
            row += [f"{x.overlap:.3f}", f"{x.random:.2g}"] if x else ["-", "-"]
        table.add_row(*row)
    return table


def _outlier_table(report: Report) -> Table:
    """Each leading eigenvector of the batch, and how much of it is true."""
    found = report.outliers
    count = int(np.sum(np.asarray(found.is_outlier)))
    table = _table(
        f"Eigenvectors of batch 0: {count} of {len(found.eigenvalues)} are shown to be "
        "more than noise",
        "overlap²: the share of it in the span of the k + 2 leading true ones, from "
        "two halves of the batch; verdict: true where that is above 0.89"
        + ("" if report.batch_only else "; measured: in the span of the data set's"),
    )
    names = ["seen", "residual", "verdict", "overlap²"]
    if not report.batch_only:
        names += ["measured", "data set's"]
    for name in names:
        table.add_column(name, justify="right")
    measured = None if report.batch_only else _measured(report)
    for i, outside in enumerate(np.asarray(found.is_outlier)):
        row = [
            f"{float(found.eigenvalues[i]):.4g}",
            f"{float(found.residuals[i]):.1g}",
            "true" if outside else "not shown",
            f"{float(found.overlaps_squared[i]):.3f}" if outside else "-",
        ]
        if measured is not None:
            leading = float(report.leading.eigenvalues[i])
            row += [f"{measured[i]:.3f}", f"{leading:.4g}"]
        table.add_row(*row, style=None if outside else "dim")
    return table


def picture(report: Report, name: str) -> Figure:
    """Densities, overlaps and layers, as many as were measured, one above the other."""
    report = jax.tree.map(np.asarray, report._replace(notes=[]))
    tall = 1.2 + 0.6 * len(report.layers)
    heights = [4.0] if report.batch_only else [4.0, 4.0, 3.6]
    heights += [tall] if report.layers else []
    figure = Figure(figsize=(9, 0.5 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)
    panels = iter(panels[:, 0])
    ax = plot.density(
        report.batch_density,
        outliers=report.outliers,
        noise=report.noise_density,
        variance=report.moments.variance,  # the page's own
        ax=next(panels),
    )
    title = f"Hessian of batch 0, {report.batch_size:,} examples: {name}"
    ax.set_title(title, fontsize=10)
    if not report.batch_only:
        ax = plot.density(report.density, ax=next(panels))
        title = f"Hessian of the data set, {report.num_examples:,} examples: {name}"
        ax.set_title(title, fontsize=10)
        ax = plot.eigenvector_overlap(
            report.outliers,
            report.leading,
            variance=report.moments.variance,
            ax=next(panels),
        )
        ax.set_title("eigenvectors of batch 0 and of the data set", fontsize=10)
    if report.layers:
        where = "batch 0" if report.batch_only else "the data set"
        ax = plot.layer_densities(report.layers, ax=next(panels))
        ax.set_title(f"blocks of the Hessian of {where}", fontsize=10)
    return figure
