"""SpectralDensity -> a smooth curve on an axis that shows bulk and outliers at once.

The axis is arsinh(lambda / w): linear within w of zero, logarithmic beyond. Smoothing
is done in that coordinate; what comes out is the density of lambda itself.
"""

import numpy as np

from rmtdamp.hessian import SpectralDensity

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"rmtdamp.plot needs {missing.name}: pip install 'rmtdamp[plot]'",
        name=missing.name,
    ) from None

EIGENVALUE = "eigenvalue λ  (loss / parameter²)"
BULK, NOISE, SPIKE, LAW = "C0", "0.35", "C3", "C1"


def own_axes(ax: Axes | None, size=(8.0, 4.5)) -> Axes:
    return Figure(figsize=size, layout="constrained").subplots() if ax is None else ax


class Smoothed:
    """A spectrum on a grid of the arsinh axis."""

    def __init__(
        self, spectrum: SpectralDensity, linear_width: float, reach: np.ndarray
    ):
        lower, upper = np.arcsinh(reach / linear_width)
        margin = 0.04 * (upper - lower)
        u = np.linspace(lower - margin, upper + margin, 1201)
        narrow = float(upper - lower) / 250
        density = np.mean(
            [
                _density(u, np.arcsinh(nodes / linear_width), weights, narrow, p)
                for nodes, weights, p in _rows(spectrum)
            ],
            axis=0,
        )
        # d lambda = w cosh(u) du
        slope = linear_width * np.cosh(u)
        self.x = linear_width * np.sinh(u)
        self.density = density / slope
        # The least height that one eigenvalue of P has.
        p = spectrum.num_parameters
        self.one = float(1 / (p * narrow * (2 * np.pi) ** 0.5 * np.max(slope)))


def _rows(spectrum: SpectralDensity):
    """Nodes and weights of each probe, in the order of the nodes, and P."""
    for nodes, weights in zip(
        np.asarray(spectrum.nodes, np.float64),
        np.asarray(spectrum.weights, np.float64),
        strict=True,
    ):
        order = np.argsort(nodes)
        yield nodes[order], weights[order], spectrum.num_parameters


def _density(u, nodes, weights, narrow, p):
    """Gaussians on the nodes, as wide as what a node stands for."""
    # Weights of single eigenvalues are chi-squared over P, rarely above 5 / P: such a
    # node is a line. One that stands for more fills half of the gaps beside it. Nodes
    # that stand for nothing (copies, padding) part no gap.
    kept = weights > 1e-3 / p
    nodes, weights = nodes[kept], weights[kept]
    widths = np.full_like(nodes, narrow)
    if nodes.size > 1:
        gaps = np.diff(nodes)
        beside = (np.append(gaps, gaps[-1]) + np.insert(gaps, 0, gaps[0])) / 2
        widths = np.where(weights * p > 5, np.maximum(beside / 2, narrow), narrow)
    z = (u[:, None] - nodes[None]) / widths[None]
    peaks = np.exp(-0.5 * z**2) / (widths[None] * (2 * np.pi) ** 0.5)
    return peaks @ weights / weights.sum()


def check_reach(*spectra: SpectralDensity, and_also=()) -> np.ndarray:
    """Smallest and largest node with any weight."""
    for spectrum in spectra:
        if not isinstance(spectrum, SpectralDensity):
            raise TypeError(
                f"spectrum is {type(spectrum).__name__}, and a density is drawn of a "
                "SpectralDensity: hand over what spectral_density returns"
            )
    seen = [np.asarray(s.nodes)[np.asarray(s.weights) > 0] for s in spectra]
    every = np.concatenate([*seen, np.ravel(np.asarray(and_also))])
    if not every.size or not np.all(np.isfinite(every)):
        raise ValueError(
            "the spectrum holds nodes that are not finite: nothing can be drawn; look "
            "for NaN in the params or the batch"
        )
    lower, upper = float(every.min()), float(every.max())
    if lower == upper:  # a multiple of the unit matrix
        margin = 0.1 * abs(lower) or 1.0
        return np.array([lower - margin, upper + margin])
    return np.array([lower, upper])


def choose_width(spectrum: SpectralDensity, given: float | None, variance) -> float:
    """Where the axis turns from linear to logarithmic."""
    if given is not None:
        if not given > 0:
            raise ValueError(
                f"linear_width is {given}, and must be above 0: below it the axis is "
                "linear"
            )
        return given
    nodes = np.abs(np.asarray(spectrum.nodes))
    largest = float(nodes[np.asarray(spectrum.weights) > 0].max()) or 1.0
    if variance is not None and float(variance) > 0:
        width = float(variance) ** 0.5
    else:
        # The median magnitude of the upper half of the eigenvalues: half of those of a
        # network are as good as zero.
        order = np.argsort(nodes, axis=None)
        share = np.cumsum(np.asarray(spectrum.weights).ravel()[order])
        width = float(nodes.ravel()[order][np.searchsorted(share, 0.75 * share[-1])])
    return min(max(width, 1e-3 * largest), largest)


def arsinh_axis(ax: Axes, linear_width: float, reach: np.ndarray) -> None:
    """The arsinh scale, with ticks at 0 and at powers of ten."""
    ax.set_xscale("asinh", linear_width=linear_width)
    decades = 10.0 ** np.arange(-12, 13)
    u = np.arcsinh(decades / linear_width)
    lower, upper = np.arcsinh(reach / linear_width)
    decades = decades[(u > 0.06 * (upper - lower)) & (u < max(-lower, upper))]
    ticks = np.concatenate([-decades[::-1], [0.0], decades])
    minor = np.outer(np.concatenate([-decades, decades]), np.arange(2, 10))
    ax.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    ax.xaxis.set_minor_locator(FixedLocator(minor.ravel().tolist()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
