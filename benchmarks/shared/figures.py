"""Three panels for every picture: curves, points with errors, a grid of numbers.

A panel draws on the axes that it is given; `save_figure` puts some side by side, with
one legend below for all of them.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Panel = Callable[[Axes, Callable[[str], int]], None]


class Line(NamedTuple):
    """One curve; those of one label have one colour, if they have none of their own."""

    label: str
    x: Any
    y: Any
    style: str = "-"
    error: Any = None


def _panel(draw):
    """What a drawing function draws, and the settings of its axes -> a panel."""

    @functools.wraps(draw)
    def make(*args, **settings) -> Panel:
        def panel(axes, order):
            draw(axes, order, *args)
            axes.set(**settings)

        return panel

    return make


@_panel
def curves(axes: Axes, order: Callable[[str], int], lines: Sequence[Line]) -> None:
    """Lines or points, by label."""
    for label, x, y, style, error in lines:
        place = order(label)
        look = {"color": f"C{place % 10}", "alpha": 1 if place < 10 else 0.5}
        axes.errorbar(x, y, error, fmt=style, lw=1.2, ms=3.5, label=label, **look)


@_panel
def bars(
    axes: Axes,
    order: Callable[[str], int],
    found: dict[str, dict[str, tuple[float, float]]],
    level: float,
) -> None:
    """Label -> category -> (value, error), by category; `level` to hold against."""
    categories = list(dict.fromkeys(c for of in found.values() for c in of))
    for i, (label, of) in enumerate(found.items()):
        offset, place = 0.7 * ((i + 0.5) / len(found) - 0.5), order(label)
        places = [categories.index(c) + offset for c in of]
        values, errors = zip(*of.values(), strict=True)
        marks = {"fmt": "osD^vP*Xph"[place % 10], "color": f"C{place % 10}", "ms": 4}
        axes.errorbar(places, values, errors, label=label, **marks)
    axes.axhline(level, color="grey", lw=0.8)
    axes.set_xticks(range(len(categories)), categories, fontsize=7, rotation=20)


@_panel
def grid(axes: Axes, order, values: np.ndarray, rows, columns) -> None:
    """A heat map with its numbers."""
    axes.imshow(values, aspect="auto", cmap="magma_r")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for i, j in np.ndindex(values.shape):
        colour = "white" if values[i, j] > values.max() / 2 else "black"
        style = {"ha": "center", "va": "center", "color": colour, "fontsize": 7}
        axes.text(j, i, f"{values[i, j]:.1f}", **style)


def save_figure(path: pathlib.Path, panels: Sequence[Panel]) -> None:
    """Panels side by side, to a PNG."""
    figure, everywhere = plt.subplots(
        1, len(panels), figsize=(9, 4.2), layout="constrained", squeeze=False
    )
    # One label has one colour in all panels, and one place in the legend.
    seen, handles = {}, {}
    for axes, panel in zip(everywhere[0], panels, strict=True):
        panel(axes, lambda label: seen.setdefault(label, len(seen)))
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    where = "outside lower center"
    if handles:
        figure.legend(handles.values(), handles, loc=where, ncols=4, fontsize=7)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
