"""Spectra -> curves: one with what theory says of it, or several, layer by layer."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rmtdamp import rmt
from rmtdamp.hessian import SpectralDensity
from rmtdamp.outliers import Outliers

from ._axis import (
    BULK,
    EIGENVALUE,
    LAW,
    NOISE,
    SPIKE,
    Axes,
    Smoothed,
    arsinh_axis,
    check_reach,
    choose_width,
    own_axes,
)


def density(
    spectrum: SpectralDensity,
    *,
    outliers: Outliers | None = None,
    noise: SpectralDensity | None = None,
    variance: Any = None,
    linear_width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The spectral density, with what random-matrix theory says of it laid over.

    Height: the density, on a log axis that ends below the height of one eigenvalue of
    P. A node that stands for a single eigenvalue is a Gaussian of 1/250 of the axis'
    length, one that stands for more fills the gaps beside it. Vertical lines: how far
    the measured noise reaches, to either side. Points: eigenvalues of the batch whose
    vectors are outliers, labelled with their values. Line: the semicircle of
    `variance`. Outliers may lie inside the reach of the noise, which has their own
    directions in it.

    Args:
        spectrum: of the Hessian, from `rmtdamp.hessian.spectral_density`.
        outliers: of the same batch, from `rmtdamp.outliers.outliers`.
        noise: of the same batch: `spectral_density` of `noise_matvec` of two halves.
        variance: s^2 of the semicircle, in the squared unit of an eigenvalue; default:
            P^-1 Tr X^2 of `noise`, if given, else no semicircle.
        linear_width: w, below which the axis is linear, in the unit of an eigenvalue;
            default: s, or where there is none the upper quartile of |lambda|, but at
            least a thousandth of the largest.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: a spectrum that is not finite, or a `linear_width` not above 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import spectral_density
        >>> from rmtdamp import plot
        >>> diagonal = jnp.linspace(-1.0, 1.0, 200).at[0].set(30.0)
        >>> spectrum = spectral_density(
        ...     lambda v: diagonal * v, diagonal, jax.random.key(0)
        ... )
        >>> ax = plot.density(spectrum, variance=0.3)
        >>> ax.get_yscale()
        'log'

    References:
        Granziol and Baskerville, eq. 7 for the semicircle, whose norm is added.
    """
    if variance is None and noise is not None:
        variance = noise.moment(2)[0]
    reached = () if noise is None else (float(np.max(np.abs(noise.nodes))),)
    edge = [sign * x for x in reached for sign in (-1, 1)]
    seen = np.zeros(0)
    if outliers is not None:
        seen = np.asarray(outliers.eigenvalues)[np.asarray(outliers.is_outlier)]
    reach = check_reach(spectrum, and_also=[*edge, *seen.tolist()])
    width = choose_width(spectrum, linear_width, variance)
    smoothed = Smoothed(spectrum, width, reach)
    floor = smoothed.one / 5

    ax = own_axes(ax)
    shown = np.maximum(smoothed.density, floor)
    ax.fill_between(smoothed.x, floor, shown, color=BULK, alpha=0.25, lw=0)
    ax.plot(smoothed.x, shown, color=BULK, lw=1.2, label="spectral density")
    top = float(shown.max())
    if variance is not None and float(variance) > 0:
        s = float(variance) ** 0.5
        x = 2 * s * np.sin(np.linspace(-np.pi / 2, np.pi / 2, 401))
        law = np.asarray(jax.jit(rmt.semicircle_density)(x, s**2))
        label = f"semicircle, edges ±{2 * s:.2g}"
        ax.plot(x, np.maximum(law, floor), color=LAW, lw=1.5, label=label)
        top = max(top, float(law.max()))
    for i, x in enumerate(edge):
        label = f"reach of the measured noise, ±{x:.2g}" if i else None
        ax.axvline(x, color=NOISE, ls="--", lw=1, label=label)
    ax.set_yscale("log")
    arsinh_axis(ax, width, reach)
    ax.set_xlim(smoothed.x[0], smoothed.x[-1])
    # Room for the labels of the outliers.
    ax.set_ylim(floor, top * (top / floor) ** (0.12 if seen.size == 0 else 0.25))
    if seen.size:
        _mark_outliers(ax, smoothed, seen, width)
    ax.set_xlabel(EIGENVALUE)
    ax.set_ylabel("density  (parameter² / loss)")
    ax.legend(fontsize=8, loc="upper left", framealpha=0.9)
    return ax


def _mark_outliers(ax, smoothed, seen, width) -> None:
    """Points on the curve, with values where there is room for them."""
    ones = 1.6 * smoothed.one
    heights = np.maximum(np.interp(seen, smoothed.x, smoothed.density), ones)
    ax.plot(seen, heights, "o", color=SPIKE, ms=5, label=f"{seen.size} outliers")
    u = np.arcsinh(seen / width)
    room = np.ptp(np.arcsinh(smoothed.x[[0, -1]] / width)) / 70
    written = []
    for i in np.argsort(-np.abs(seen)):
        if all(abs(u[i] - other) > room for other in written):
            written.append(u[i])
            ax.annotate(
                f"{seen[i]:.3g}",
                (seen[i], heights[i]),
                xytext=(0, 6),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=8,
                color=SPIKE,
            )


def layer_densities(
    spectra: Mapping[str, SpectralDensity],
    *,
    linear_width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The spectral densities of several blocks, one ridge above the other.

    All share the axis of eigenvalues; a ridge's height is the logarithm of its density,
    from the height of one eigenvalue on, in one scale for all.

    Args:
        spectra: name -> `SpectralDensity`, drawn from the top, such as those that
            `rmtdamp.spectrum.layer_spectra` makes.
        linear_width: below which the axis is linear; default: as `density`'s
            without a variance, the least of all blocks.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: no spectrum, one that is not finite, or a `linear_width` not above
            0.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp import plot
        >>> from rmtdamp.hessian import SpectralDensity
        >>> weights = jnp.array([[0.9, 0.1]])
        >>> ax = plot.layer_densities(
        ...     {
        ...         "first": SpectralDensity(jnp.array([[0.0, 5.0]]), weights, 10),
        ...         "last": SpectralDensity(jnp.array([[0.0, 9.0]]), weights, 10),
        ...     }
        ... )
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['last\nP = 10', 'first\nP = 10']
    """
    if not spectra:
        raise ValueError("spectra is empty: hand over at least one, by name")
    reach = check_reach(*spectra.values())
    width = min(choose_width(s, linear_width, None) for s in spectra.values())
    ax = own_axes(ax, (8.0, 1.2 + 0.9 * len(spectra)))
    ridges = [Smoothed(s, width, reach) for s in spectra.values()]
    heights = [np.log10(np.maximum(r.density / r.one, 1)) for r in ridges]
    tallest = max(float(h.max()) for h in heights) or 1.0
    top = len(spectra) - 1
    for i, (ridge, height) in enumerate(zip(ridges, heights, strict=True)):
        base = top - i
        curve = base + 0.9 * height / tallest
        colour = f"C{i % 10}"
        # Those below stand in front of those above.
        ax.fill_between(
            ridge.x, base, curve, color=colour, alpha=0.35, lw=0, zorder=2 + i
        )
        ax.plot(ridge.x, curve, color=colour, lw=1.2, zorder=2 + i)
    arsinh_axis(ax, width, reach)
    ax.set_xlim(ridges[0].x[0], ridges[0].x[-1])
    names = [f"{name}\nP = {s.num_parameters:,}" for name, s in spectra.items()]
    ax.set_yticks(range(len(names)), names[::-1], fontsize=8)
    ax.set_ylim(-0.05, len(names))
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.set_xlabel(EIGENVALUE)
    ax.set_ylabel(f"log density, {tallest:.1f} decades a row")
    return ax
