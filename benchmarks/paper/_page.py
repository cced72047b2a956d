"""The results' JSON files -> the README of this folder."""

import json
import pathlib
from typing import Any

from benchmarks.shared.report import markdown
from benchmarks.shared.runs import Row
from rmtdamp.demo._report import write

from ._experiment import HERE, RESULTS
from .experiments import EXPERIMENTS

README = HERE / "README.md"
HOLDS = {True: "yes", False: "no", None: "not comparable"}
SECTION = """\
## {experiment}

**Claim.** {claim}.

**{verdict}.** {remark}

![{experiment}](results/{experiment}.png)

{checks}

The paper:

{paper}

Measured ({scale} scale, {runs} runs, {seeds} seeds, {minutes:g} minutes):

{table}

How: {protocol}
"""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "" if value is None else str(value)


def _check(check: Row) -> Row:
    spread = f" ± {check['stderr']:.3g}" if check["stderr"] is not None else ""
    found, held = _value(check["value"]) + spread, HOLDS[check["holds"]]
    return {"part of the claim": check["statement"], "found": found, "holds": held}


def records(results: pathlib.Path = RESULTS) -> list[Row]:
    """Every experiment that has been run, in their order."""
    paths = [results / f"{name}.json" for name in EXPERIMENTS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _section(record: Row) -> str:
    paper = [f"- {name}: {_value(value)}" for name, value in record["paper"].items()]
    parts = {"verdict": record["verdict"].capitalize(), "paper": "\n".join(paper)}
    parts["checks"] = markdown(map(_check, record["checks"]))
    parts["table"] = markdown(record["measured"]["table"], _value)
    return SECTION.format_map(record | parts)


def overview() -> str:
    """A line per experiment: what was claimed, and what came out."""
    names = ("claim", "verdict", "scale", "seeds")
    return markdown(
        {"experiment": "[{0}](#{0})".format(record["experiment"])}
        | {name: record[name] for name in names}
        for record in records()
    )


def page() -> str:
    """The page as Markdown."""
    head, sections = (HERE / "head.md").read_text(), map(_section, records())
    return "\n".join([head, overview(), "", *sections])


def write_page() -> None:
    """Write the README of this folder."""
    write(README, page())
