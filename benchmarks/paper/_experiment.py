"""A claim of the paper, the runs that test it, and what to conclude from them."""

import json
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rmtdamp.demo._report import write

from ._runs import RESULTS, Row, Run, perform

Scale = Literal["small", "full"]
Verdict = Literal["reproduced", "partly", "not reproduced"]


class Conclusion(NamedTuple):
    """What the runs say."""

    table: list[Row]  # rows of one picture or table, numbers or "mean ± error"
    findings: Row  # the few numbers that the verdict rests on
    verdict: Verdict
    remark: str  # why that verdict, and what else a reader should know


class Experiment(NamedTuple):
    """One figure or table of the paper."""

    name: str
    claim: str  # in our words
    paper: Row  # the paper's own figures
    protocol: dict[Scale, str]  # what is run; at "small", how it is reduced
    runs: Callable[[Scale], list[Run]]
    conclude: Callable[[list[Row]], Conclusion]
    draw: Callable[[Figure, list[Row]], None]


def path_of(
    experiment: Experiment, scale: Scale, results: pathlib.Path = RESULTS
) -> pathlib.Path:
    """The JSON file; the PNG lies beside it. The first scale has the plain name."""
    first = next(iter(experiment.protocol))
    suffix = "" if scale == first else f"_{scale}"
    return results / f"{experiment.name}{suffix}.json"


def carry_out(
    experiment: Experiment,
    scale: Scale,
    folder: pathlib.Path,
    results: pathlib.Path = RESULTS,
) -> Conclusion:
    """Make the runs that are missing, then write the JSON and the PNG."""
    if scale not in experiment.protocol:
        raise ValueError(
            f"{experiment.name} has no scale {scale!r}: it has "
            f"{', '.join(experiment.protocol)}"
        )
    rows = perform(experiment.name, experiment.runs(scale), folder, results)
    conclusion = experiment.conclude(rows)
    record = {
        "experiment": experiment.name,
        "claim": experiment.claim,
        "paper": experiment.paper,
        "measured": {**conclusion.findings, "table": conclusion.table},
        "seeds": len({row["seed"] for row in rows}),
        "scale": scale,
        "verdict": conclusion.verdict,
        "remark": conclusion.remark,
        "protocol": experiment.protocol[scale],
        "runs": len(rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
    }
    path = path_of(experiment, scale, results)
    text = json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False)
    write(path, text + "\n")
    figure = plt.figure(figsize=(9, 4.2), layout="constrained")
    experiment.draw(figure, rows)
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    plt.close(figure)
    return conclusion


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows whose config holds these values."""
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def groups(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows by the values of some fields, in the order in which they come."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[n] for n in names), []).append(row)
    return found


def mean(values: Sequence[float]) -> float:
    """The mean over seeds; infinite if one run diverged."""
    return statistics.fmean(x if math.isfinite(x) else math.inf for x in values)


def error(values: Sequence[float]) -> float:
    """The standard error of that mean; NaN with one seed or a diverged run."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / len(values) ** 0.5


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard error over seeds; runs that diverged are counted."""
    good = [x for x in values if math.isfinite(x)]
    lost = len(values) - len(good)
    parts = [f"{mean(good):.{digits}f}"] if good else []
    if len(good) > 1:
        parts = [f"{parts[0]} ± {error(good):.{digits}f}"]
    if lost:
        parts.append(f"{lost} of {len(values)} diverged")
    return ", ".join(parts)


def verdict_of(checks: Sequence[bool]) -> Verdict:
    """All of what was claimed, some of it, or nothing."""
    return (
        "reproduced" if all(checks) else "partly" if any(checks) else "not reproduced"
    )


def signed(change: tuple[float, float]) -> str:
    """A difference and its standard error."""
    return f"{change[0]:+.2f} ± {change[1]:.2f}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the paired differences over seeds."""
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(paired), error(paired)
