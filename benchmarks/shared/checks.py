"""What counts as a difference: one rule, for every claim of every bench.

Seeds fix initial weights, data and its order for all methods alike, so differences are
paired. A difference counts if it exceeds two standard errors of the paired differences
over seeds; a run that diverged counts as infinitely bad. Values fall (or rise) along a
list if the last differs from the first by that rule and no neighbours differ by it the
other way. With three seeds two standard errors are little (one chance in eleven either
way, by Student's t): every check shows its value and its error.

What cannot be judged here, as end points of different training losses, is None: it is
not shown.
"""

import math
import statistics
from collections.abc import Sequence
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
    holds: bool | None  # None: cannot be judged here


def groups(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows by the values of some fields, in the order in which they come."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[n] for n in names), []).append(row)
    return found


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


def cell(values: Values, digits: int = 3) -> str:
    """Mean ± standard error over seeds; runs that diverged are counted."""
    good = [x for x in values if math.isfinite(x)]
    lost = len(values) - len(good)
    parts = [f"{mean(good):.{digits}f}"] if good else []
    if len(good) > 1:
        parts = [f"{parts[0]} ± {error(good):.{digits}f}"]
    if lost:
        parts.append(f"{lost} of {len(values)} diverged")
    return ", ".join(parts)


def signed(change: tuple[float, float], digits: int = 2) -> str:
    """A difference and its standard error."""
    return f"{change[0]:+.{digits}f} ± {change[1]:.{digits}f}"
