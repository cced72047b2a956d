"""The results' JSON files -> the README of this folder."""

import json
import pathlib
from typing import Any

from rmtdamp.demo._report import write

from ._experiment import path_of
from ._runs import RESULTS, Row
from .experiments import EXPERIMENTS

README = RESULTS.parent / "README.md"
MAIN = pathlib.Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- begin of the verdicts -->\n", "<!-- end of the verdicts -->\n"
HEAD = """\
# The paper's figures and tables, run again

    pip install '.[paper]'
    python -m benchmarks.paper all --data FOLDER --download
    python -m benchmarks.paper page             # writes this page from results/*.json

Granziol and Baskerville, "A random matrix theory approach to damping in deep
learning". `FOLDER` holds MNIST, Fashion-MNIST, CIFAR-100 and tinyshakespeare in their
original files; `--download` fetches what is missing.
Every figure below was measured by these commands, on two CPU cores (float32) unless it
says otherwise; what the paper prints stands beside it and nowhere else. "±" is the
standard error over seeds, which fix initial weights, data and its order for all rows
alike, so that differences are paired. A verdict is "reproduced" where the claim holds,
"partly" where some of it does, "not reproduced" where it does not: on the task named,
at the scale named. The runs are in `results/runs/`, one line each.
"""


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
    lines = [names, ["---"] * len(names)]
    lines += [[_value(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _entries(fields: Row) -> str:
    return "\n".join(f"- {name}: {_value(value)}" for name, value in fields.items())


def records(results: pathlib.Path = RESULTS) -> list[tuple[pathlib.Path, Row]]:
    """(path, record) of every experiment that has been run, in their order."""
    found = []
    for experiment in EXPERIMENTS.values():
        for scale in experiment.protocol:
            path = path_of(experiment, scale, results)
            if path.exists():
                found.append((path, json.loads(path.read_text())))
    return found


def _section(path: pathlib.Path, record: Row) -> str:
    measured = {k: v for k, v in record["measured"].items() if k != "table"}
    return f"""\
## {path.stem}

**Claim.** {record["claim"]}.

**{record["verdict"].capitalize()}.** {record["remark"]}

![{record["experiment"]}](results/{path.with_suffix(".png").name})

The paper:

{_entries(record["paper"])}

Measured ({record["scale"]} scale, {_count(record)}):

{_entries(measured)}

{_table(record["measured"]["table"])}

How: {record["protocol"]}
"""


def _count(record: Row) -> str:
    seeds = record["seeds"]
    return (
        f"{record['runs']} runs, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{record['minutes']:g} minutes"
    )


def overview(results: pathlib.Path = RESULTS, page: str = "") -> str:
    """A line per experiment: what was claimed, and what came out."""
    return _table(
        [
            {
                "experiment": f"[{path.stem}]({page}#{path.stem})",
                "claim": record["claim"],
                "verdict": record["verdict"],
                "scale": record["scale"],
                "seeds": record["seeds"],
            }
            for path, record in records(results)
        ]
    )


def page(results: pathlib.Path = RESULTS) -> str:
    """The page as Markdown."""
    sections = [_section(path, record) for path, record in records(results)]
    return "\n".join([HEAD, overview(results), "", *sections])


def main_readme(text: str) -> str:
    """The project's README with the verdicts of today between its two marks."""
    before, rest = text.split(BEGIN)
    verdicts = overview(page="benchmarks/paper/README.md")
    return f"{before}{BEGIN}\n{verdicts}\n\n{END}{rest.split(END)[1]}"


def write_page() -> None:
    """Write the README of this folder, and the verdicts into the project's."""
    write(README, page())
    write(MAIN, main_readme(MAIN.read_text()))
