"""What counts as a difference: one rule, for every claim of every bench.

Seeds fix initial weights, data and its order for all methods alike, so differences are
paired. **A difference counts if it exceeds two standard errors of the paired
differences over seeds**; a run that diverged is infinitely bad. Values rise (or fall)
along a list if the last differs from the first by that rule, and no two neighbours
differ by it the other way: steps within their errors are ties. "Within 5 % of" means
below 1.05 times it, by that rule. With three seeds two standard errors are little (one
chance in eleven either way, by Student's t), so a check shows its value and its error.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .runs import Row

SIGMAS = 2.0  # standard errors from which on a difference counts
EQUAL = 1.25  # ratio up to which training losses count as equal
Values = Sequence[float]  # one for each seed


class Check(NamedTuple):
    """A part of a claim, and what was found."""

    statement: str
    value: float | None
    stderr: float | None  # None where the value has no error
    holds: bool | None  # None: cannot be judged here, and counts as not shown


def by(rows: Sequence[Row], key: Callable[[Row], object]) -> dict:
    """Rows by a key, in the order in which the keys come; seeds in order."""
    found: dict = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return {k: sorted(v, key=lambda row: row.get("seed", 0)) for k, v in found.items()}


def ends(rows: Sequence[Row], name: str, factor: float = 1.0) -> list[float]:
    """A number, or the last one of a curve, for each row; infinite if there is none."""
    last = [x[-1] if isinstance(x := row[name], list) else x for row in rows]
    return [math.inf if x is None or x != x else factor * x for x in last]


def mean(values: Values) -> float:
    """The mean over seeds; infinite if one run diverged."""
    return statistics.fmean(x if math.isfinite(x) else math.inf for x in values)


def error(values: Values) -> float:
    """The standard error of that mean; NaN with one seed or a diverged run."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / len(values) ** 0.5


def difference(ours: Values, theirs: Values) -> tuple[float, float]:
    """Mean and standard error of the paired differences over seeds."""
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(paired), error(paired)


def sign(ours: Values, theirs: Values) -> int:
    """-1, 0 or 1: does the difference count, and which way?"""
    lost = [not all(map(math.isfinite, x)) for x in (ours, theirs)]
    if any(lost):
        return lost[0] - lost[1]
    value, stderr = difference(ours, theirs)
    return 0 if not abs(value) > SIGMAS * stderr else 1 if value > 0 else -1


def _compared(signs, statement: str, ours: Values, theirs: Values) -> Check:
    """Ours less theirs, and whether the difference is one of these."""
    return Check(statement, *difference(ours, theirs), sign(ours, theirs) in signs)


less = functools.partial(_compared, {-1})
more = functools.partial(_compared, {1})
not_more = functools.partial(_compared, {-1, 0})  # matches or beats


def below(statement: str, values: Values, bound: float) -> Check:
    """A number is below a bound."""
    holds = sign(values, [bound] * len(values)) < 0
    return Check(statement, mean(values), error(values), holds)


def above(statement: str, values: Values, bound: float) -> Check:
    """A number is above a bound."""
    holds = sign(values, [bound] * len(values)) > 0
    return Check(statement, mean(values), error(values), holds)


def within(statement: str, share: float, ours: Values, theirs: Values) -> Check:
    """Ours is at most so much above theirs, as a share of its mean."""
    holds = sign(ours, [(1 + share) * x for x in theirs]) < 0
    value, stderr = (x / mean(theirs) for x in difference(ours, theirs))
    return Check(statement, value, stderr, holds)


def trend(statement: str, along: Sequence[Values], way: int = 1) -> Check:
    """The values rise (`way` 1) or fall (-1) along the list."""
    ties = all(way * sign(b, a) >= 0 for a, b in itertools.pairwise(along))
    holds = ties and way * sign(along[-1], along[0]) > 0
    return Check(statement, *difference(along[-1], along[0]), holds)


def at_equal_loss(check: Check, losses: Sequence[Values]) -> Check:
    """The check, if these training losses are equal; otherwise it cannot be judged."""
    means = [mean(x) for x in losses]
    return check if max(means) <= EQUAL * min(means) else check._replace(holds=None)


def cell(values: Values, digits: int = 3) -> str:
    """Mean ± standard error over seeds; runs that diverged are counted."""
    good = [x for x in values if math.isfinite(x)]
    lost = len(values) - len(good)
    kind = f".{digits}f" if max(map(abs, good), default=0) < 1e6 else ".1e"
    text = lambda x: format(x, kind).replace("e+", "e")
    parts = [text(mean(good))] if good else []
    if len(good) > 1:
        parts = [f"{parts[0]} ± {text(error(good))}"]
    return ", ".join(parts + [f"{lost} of {len(values)} diverged"] * (lost > 0))


def cells(rows: Sequence[Row], columns: dict[str, tuple]) -> Row:
    """A line of a table: head -> (name, digits, factor) of what is in the cell."""
    return {k: cell(ends(rows, n, *f), d) for k, (n, d, *f) in columns.items()}


def signed(change: tuple[float, float], digits: int = 2) -> str:
    """A difference and its standard error."""
    return f"{change[0]:+.{digits}f} ± {change[1]:.{digits}f}"
