"""The results' JSON files -> the README of this folder."""

import json
import pathlib
from typing import Any

from benchmarks.shared.report import markdown
from benchmarks.shared.runs import Row
from rmtdamp.demo._report import write

from ._experiment import HERE, RESULTS
from .experiments import EXPERIMENTS

README, HEAD = HERE / "README.md", HERE / "head.md"
MAIN = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- begin of the verdicts -->\n", "<!-- end of the verdicts -->\n"
HOLDS = {True: "yes", False: "no", None: "not comparable"}
SECTION = """\
## {name}

**Claim.** {claim}.

**{verdict}.** {remark}

![{experiment}](results/{name}.png)

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


def _entries(fields: Row) -> str:
    return "\n".join(f"- {name}: {_value(value)}" for name, value in fields.items())


def _check(check: Row) -> Row:
    found = _value(check["value"])
    if check["stderr"] is not None:
        found += f" ± {check['stderr']:.2g}"
    held = HOLDS[check["holds"]]
    return {"part of the claim": check["statement"], "found": found, "holds": held}


def records(results: pathlib.Path = RESULTS) -> list[tuple[pathlib.Path, Row]]:
    """(path, record) of every experiment that has been run, in their order."""
    paths = [results / f"{name}.json" for name in EXPERIMENTS]
    return [(p, json.loads(p.read_text())) for p in paths if p.exists()]


def _section(path: pathlib.Path, record: Row) -> str:
    return SECTION.format_map(
        record
        | {
            "name": path.stem,
            "verdict": record["verdict"].capitalize(),
            "checks": markdown(map(_check, record["checks"])),
            "paper": _entries(record["paper"]),
            "table": markdown(record["measured"]["table"], _value),
        }
    )


def overview(results: pathlib.Path = RESULTS, page: str = "") -> str:
    """A line per experiment: what was claimed, and what came out."""
    names = ("claim", "verdict", "scale", "seeds")
    return markdown(
        {"experiment": f"[{path.stem}]({page}#{path.stem})"}
        | {name: record[name] for name in names}
        for path, record in records(results)
    )


def page(results: pathlib.Path = RESULTS) -> str:
    """The page as Markdown."""
    sections = [_section(path, record) for path, record in records(results)]
    return "\n".join([HEAD.read_text(), overview(results), "", *sections])


def main_readme(text: str) -> str:
    """The project's README with the verdicts of today between its two marks."""
    before, rest = text.split(BEGIN)
    verdicts = overview(page="benchmarks/paper/README.md")
    return f"{before}{BEGIN}\n{verdicts}\n\n{END}{rest.split(END)[1]}"


def write_page() -> None:
    """Write the README of this folder, and the verdicts into the project's."""
    write(README, page())
    write(MAIN, main_readme(MAIN.read_text()))
