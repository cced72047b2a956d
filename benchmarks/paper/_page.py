"""The results' JSON files -> the README of this folder."""

import json
import pathlib
from typing import Any

from benchmarks.shared.runs import Row
from benchmarks.shared.tables import markdown
from rmtdamp.demo._report import write

from ._experiment import HERE, RESULTS, path_of
from .experiments import EXPERIMENTS

README, HEAD = HERE / "README.md", HERE / "head.md"
MAIN = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- begin of the verdicts -->\n", "<!-- end of the verdicts -->\n"


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return str(value)


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[_value(row.get(name)) for name in names] for row in rows]
    return "\n".join(markdown(names, lines))


def _entries(fields: Row) -> str:
    return "\n".join(f"- {name}: {_value(value)}" for name, value in fields.items())


def records(results: pathlib.Path = RESULTS) -> list[tuple[pathlib.Path, Row]]:
    """(path, record) of every experiment that has been run, in their order."""
    found = []
    for experiment in EXPERIMENTS.values():
        for scale in experiment.text.protocol:
            path = path_of(experiment, scale, results)
            if path.exists():
                found.append((path, json.loads(path.read_text())))
    return found


def _section(path: pathlib.Path, record: Row) -> str:
    measured = {k: v for k, v in record["measured"].items() if k != "table"}
    seeds = f"{record['seeds']} seed{'s' * (record['seeds'] > 1)}"
    count = f"{record['runs']} runs, {seeds}, {record['minutes']:g} minutes"
    return f"""\
## {path.stem}

**Claim.** {record["claim"]}.

**{record["verdict"].capitalize()}.** {record["remark"]}

![{record["experiment"]}](results/{path.with_suffix(".png").name})

The paper:

{_entries(record["paper"])}

Measured ({record["scale"]} scale, {count}):

{_entries(measured)}

{_table(record["measured"]["table"])}

How: {record["protocol"]}
"""


def overview(results: pathlib.Path = RESULTS, page: str = "") -> str:
    """A line per experiment: what was claimed, and what came out."""
    names = ("claim", "verdict", "scale", "seeds")
    return _table(
        [
            {"experiment": f"[{path.stem}]({page}#{path.stem})"}
            | {name: record[name] for name in names}
            for path, record in records(results)
        ]
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
