"""Markdown tables, for what is printed and for the pages."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

NAMES = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet", "transformer": "transformer"}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def table(columns: dict[str, Callable[..., str]], rows: Iterable[Any]) -> list[str]:
    """The lines of a table whose columns are functions of a row."""
    cells = ([make(row) for make in columns.values()] for row in rows)
    return markdown(list(columns), cells)


def interval(found: dict[str, float], digits: int = 2) -> str:
    """A median ratio and its interval, as `timing.compare` gives them."""
    ratio, low, high = (f"{found[k]:.{digits}f}" for k in ("ratio", "low", "high"))
    return f"{ratio} ({low} to {high})"


def label(row: dict) -> str:
    """A network and its batch size."""
    return f"{NAMES[row['model']]}, {row['batch']}"
