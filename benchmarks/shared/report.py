"""What is shown: Markdown tables, and three panels for every picture.

A panel (curves, points with errors, a grid of numbers) draws on given axes; a figure
is some side by side, with one legend below for all of them.
"""

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from rmtdamp._cli import write_whole

from .claims import mean
from .runs import Row

Order = Callable[[str], int]  # a label's place among all labels of a picture
Panel = Callable[[Axes, Order], None]
RATIO = ("ratio", "low", "high")
LOG = {"damping_curve": "log"}


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
    """Columns of a table, "mean ± error": one by its last head, several by all."""
    one = len(columns) == 1
    along, rest = (heads[-1:], heads[:-1]) if one else (heads, ())
    name = lambda row, of: label([row[k] for k in of])
    names = list(dict.fromkeys(name(row, along) for row in table))
    for row, column in itertools.product(table, columns):
        series, text = name(row, rest) or column, str(row.get(column, ""))
        if found := _numbers(text):
            place, error = order(series) % 10, found[1] if "±" in text else 0
            x = names.index(name(row, along)) + 0.07 * (place - 3)
            marks = {"fmt": "osD^vP*XpH"[place], "color": f"C{place}", "ms": 4}
            axes.errorbar(x, found[0], error, **marks, label=series)
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
    axes.set(xlabel=", ".join(along), title=columns[0] if one else "")


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
    parts = key if isinstance(key, tuple | list) else (key,)
    return ", ".join(map(word, filter(None, parts)))


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
        1, len(panels), figsize=(9, 4), layout="constrained", squeeze=False
    )
    # One label has one colour in all panels, and one place in the legend.
    seen, handles = {}, {}
    for axes, panel in zip(everywhere[0], panels, strict=True):
        panel(axes, lambda label: seen.setdefault(label, len(seen)))
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if handles:
        where = "outside lower center"
        figure.legend(handles.values(), handles, loc=where, ncols=4, fontsize=7)
    options = {"format": "png", "dpi": 88, "metadata": {"Software": None}}
    write_whole(path, lambda part: figure.savefig(part, **options))
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


def cost_table(rows: dict[str, Row]) -> str:
    """A table of costs by name: a ratio and its interval, and what stands beside it."""

    def text(found):
        if not isinstance(found, dict):
            return f"{found:.1e}" if isinstance(found, float) else str(found)
        rest = {k: x for k, x in found.items() if isinstance(x, float)}
        more = [f"{k} {x:.3g}" for k, x in rest.items() if k not in RATIO]
        return "; ".join([interval(found), *more])

    columns = lambda row: {"ratio": row} if "ratio" in row else row
    return markdown([{"": k, **columns(row)} for k, row in rows.items()], text)
