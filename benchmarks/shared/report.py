"""What is shown: Markdown tables, and three panels for every picture.

A panel (curves, points with errors, a grid of numbers) draws on the axes that it is
given; `save_figure` puts some side by side, with one legend below for all of them.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .claims import mean
from .runs import Row

Order = Callable[[str], int]  # a label's place among all labels of a picture
Panel = Callable[[Axes, Order], None]
LOG = {"damping_curve": "log", "train_error": "symlog"}


class Line(NamedTuple):
    """One curve; those of one label have one colour."""

    label: str
    x: Any
    y: Any
    style: str = "-"


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
def curves(axes: Axes, order: Order, lines: Sequence[Line]) -> None:
    """Lines or points, by label."""
    for label, x, y, style in lines:
        place = order(label)
        look = {"color": f"C{place % 10}", "alpha": 1 if place < 10 else 0.5}
        axes.plot(x, y, style, lw=1.2, ms=3.5, label=label, **look)


def _numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?", text)]


@_panel
def bars(axes: Axes, order: Order, table: list[Row], columns, heads) -> None:
    """Columns of a record's table, "mean ± error", over what names its lines."""
    names = [label([row[k] for k in heads]) for row in table]
    for i, column in enumerate(columns):
        offset, place = 0.7 * ((i + 0.5) / len(columns) - 0.5), order(column)
        marks = {"fmt": "osD^vP*Xph"[place % 10], "color": f"C{place % 10}", "ms": 4}
        for x, row in enumerate(table):
            if found := _numbers(text := str(row.get(column, ""))):
                error = found[1] if "±" in text else 0
                axes.errorbar(x + offset, found[0], error, **marks, label=column)
    axes.set_xticks(range(len(names)), names, fontsize=6, rotation=90)


@_panel
def grid(axes: Axes, order: Order, table: list[Row], column, heads) -> None:
    """A column of a table with two heads: a heat map with its numbers."""
    found = {tuple(row[k] for k in heads): _numbers(row[column])[0] for row in table}
    sides = [list(dict.fromkeys(side)) for side in zip(*found, strict=True)]
    values = np.array([[found.get((x, y), np.nan) for x in sides[0]] for y in sides[1]])
    axes.imshow(values, aspect="auto", cmap="magma_r")
    axes.set_xticks(range(len(sides[0])), sides[0], fontsize=7, rotation=90)
    axes.set_yticks(range(len(sides[1])), sides[1])
    for i, j in np.argwhere(np.isfinite(values)):
        colour = "white" if values[i, j] > np.nanmax(values) / 2 else "black"
        style = {"ha": "center", "va": "center", "color": colour, "fontsize": 7}
        axes.text(j, i, f"{values[i, j]:.1f}", **style)


def label(key: Any) -> str:
    """What names a line of a table, in one string."""
    word = lambda x: f"{x:g}" if isinstance(x, float) else str(x)
    return key if isinstance(key, str) else ", ".join(map(word, filter(None, key)))


def training(found: dict[str, list[Row]], name: str, title: str = "") -> Panel:
    """A curve over epochs (or steps): its mean over seeds, a line per label."""
    lines, x = [], "step"
    for label, rows in found.items():
        x = "epoch" if "epoch" in rows[0] else "step"
        length = min(len(row[name]) for row in rows)
        if isinstance(rows[0][name], list) and rows[0][name][0] is not None:
            y = [mean([row[name][i] for row in rows]) for i in range(length)]
            lines.append(Line(label, rows[0][x][:length], y))
    title, scale = title or name.replace("_", " "), LOG.get(name, "linear")
    return curves(lines, xlabel=x, title=title, yscale=scale)


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
    if handles:
        where = "outside lower center"
        figure.legend(handles.values(), handles, loc=where, ncols=4, fontsize=7)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def markdown(rows: Iterable[Row], text: Callable[[Any], str] = str) -> str:
    """A table of rows, whose columns are all names that occur."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[text(row.get(name)) for name in names] for row in rows]
    head = [names, ["---"] * len(names)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*head, *lines])


def interval(found: dict[str, float]) -> str:
    """A median ratio and its interval, as `compare` of the costs gives them."""
    return "{ratio:.2f} ({low:.2f} to {high:.2f})".format_map(found)


def cost_table(rows: dict[str, Row], columns: str) -> str:
    """A table of costs; a column is a path into a row, `hvp.seconds`."""

    def text(name, row):
        for part in name.split("."):
            row = row.get(part.replace(",", ", ").replace("_", " "), row.get(part, ""))
        if isinstance(row, dict):
            return interval(row)
        return f"{row:.3g}" if isinstance(row, float) else str(row)

    return markdown(
        {"": name, **{c: text(c, row) for c in columns.split()}}
        for name, row in rows.items()
    )
