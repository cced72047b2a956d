"""A claim of the paper, the runs that test it, and what to conclude from them."""

import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from benchmarks.shared.figures import Panel, save_figure
from benchmarks.shared.runs import Row, Run, perform
from rmtdamp.demo._report import write

HERE = pathlib.Path(__file__).parent
RESULTS, TEXTS = HERE / "results", HERE / "texts"
Scale = Literal["small", "full"]
Verdict = Literal["reproduced", "partly", "not reproduced"]


class Conclusion(NamedTuple):
    """What the runs say."""

    table: list[Row]  # rows of one picture or table, numbers or "mean ± error"
    findings: Row  # the few numbers that the verdict rests on
    checks: Sequence[bool]  # the parts of the claim


class Experiment(NamedTuple):
    """One figure or table of the paper; its words are in `texts`."""

    name: str
    runs: Callable[[Scale], list[Run]]
    conclude: Callable[[list[Row]], Conclusion]
    draw: Callable[[list[Row]], list[Panel]]

    @property
    def text(self) -> "Text":
        """What is said about it, by hand."""
        return texts()[self.name]


class Text(NamedTuple):
    """An experiment's entry in `texts`: Markdown, written by hand."""

    claim: str
    paper: Row  # the paper's own figures
    protocol: dict[str, str]  # by scale: what is run; at "small", how it is reduced
    remark: str  # why that verdict, and what else a reader should know


@functools.cache
def texts(folder: pathlib.Path = TEXTS) -> dict[str, Text]:
    """All entries by name.

    A file has one heading per experiment, `# name`, with the sections Claim, The paper
    (a list of `- **what**: figure`), How (at a scale) and What came out. A heading in
    braces names words that stand wherever these braces are repeated.
    """
    found = {}
    for path in sorted(folder.glob("*.md")):
        entries = _sections(path.read_text(), "# ")
        shared = {
            name: body.strip() for name, body in entries.items() if name[0] == "{"
        }
        for name, body in entries.items():
            for token, words in shared.items():
                body = body.replace(token, words)
            parts = _sections(body, "## ")
            if name not in shared:
                found[name] = Text(
                    claim=_flat(parts["Claim"]),
                    paper=dict(map(_figure, parts["The paper"].split("\n- ")[1:])),
                    protocol={
                        scale: _flat(parts[f"How ({scale} scale)"])
                        for scale in ("small", "full")
                        if f"How ({scale} scale)" in parts
                    },
                    remark=_flat(parts["What came out"]),
                )
    return found


def _sections(text: str, mark: str) -> dict[str, str]:
    """Heading -> what stands below it."""
    _, *parts = re.split(rf"^{mark}(.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], ("\n" + x for x in parts[1::2]), strict=True))


def _flat(text: str) -> str:
    return " ".join(text.split())


def _figure(item: str) -> tuple[str, Any]:
    """`**what**: figure`, the figure a JSON value or words."""
    name, value = re.match(r"\*\*(.+?)\*\*: (.+)", _flat(item)).groups()
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def path_of(
    experiment: Experiment, scale: str, results: pathlib.Path = RESULTS
) -> pathlib.Path:
    """The JSON file; the PNG lies beside it. The first scale has the plain name."""
    first = next(iter(experiment.text.protocol))
    suffix = "" if scale == first else f"_{scale}"
    return results / f"{experiment.name}{suffix}.json"


def carry_out(
    experiment: Experiment,
    scale: Scale,
    folder: pathlib.Path,
    results: pathlib.Path = RESULTS,
) -> Row:
    """Make the runs that are missing, then write the record and its picture."""
    text = experiment.text
    if scale not in text.protocol:
        raise ValueError(
            f"{experiment.name} has no scale {scale!r}: it has "
            f"{', '.join(text.protocol)}"
        )
    rows = perform(experiment.name, experiment.runs(scale), folder, results)
    record = record_of(experiment, scale, rows)
    path = path_of(experiment, scale, results)
    words = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write(path, words + "\n")
    save_figure(path.with_suffix(".png"), experiment.draw(rows))
    return record


def record_of(experiment: Experiment, scale: Scale, rows: list[Row]) -> Row:
    """What is kept of an experiment: its words and what its runs say."""
    text, (table, findings, checks) = experiment.text, experiment.conclude(rows)
    record = {
        "experiment": experiment.name,
        "claim": text.claim,
        "paper": text.paper,
        "measured": {**findings, "table": table},
        "seeds": len({row["seed"] for row in rows}),
        "scale": scale,
        "verdict": verdict_of(checks),
        "remark": text.remark,
        "protocol": text.protocol[scale],
        "runs": len(rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
    }
    return _finite(record)


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict_of(checks: Sequence[bool]) -> Verdict:
    """All of what was claimed, some of it, or nothing."""
    return (
        "reproduced" if all(checks) else "partly" if any(checks) else "not reproduced"
    )
