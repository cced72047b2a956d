"""A claim of the paper, the runs that test it, and what to conclude from them."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.shared import report
from benchmarks.shared.claims import Check, by
from benchmarks.shared.runs import Row, Run, perform
from rmtdamp.demo._report import finite, write

HERE = pathlib.Path(__file__).parent
RESULTS, TEXTS = HERE / "results", HERE / "texts"


class Text(NamedTuple):
    """What is said about an experiment: Markdown, written by hand."""

    claim: str
    paper: Row  # the paper's own figures
    scale: str  # "full" is the paper's own, "small" is reduced
    protocol: str  # what is run, and how it is reduced
    remark: str  # what the checks and the table say, and what a reader should know


class Experiment(NamedTuple):
    """One figure or table of the paper."""

    name: str
    runs: Callable[[], list[Run]]
    heads: Callable[[Row], Row]  # what names the line of the table that a row is in
    # (names, {names: rows}) -> what else is in the line; None: no line
    line: Callable[[Any, dict], Row | None]
    checks: Callable[[dict], list[Check]]  # {names: rows} -> the parts of the claim
    # A curve over epochs, ("grid" or a scale, columns of the table ...), or what draws.
    pictures: Sequence[Any]
    more: Callable[[dict], list[Row]] = lambda found: []  # further lines of the table
    each: Callable[[list[Row]], list[Row]] = list  # rows, where a run holds several

    @property
    def text(self) -> Text:
        """Its entry in `texts`."""
        return texts()[self.name]

    def found(self, rows: list[Row]) -> dict[Any, list[Row]]:
        """The rows of each line, by the values of its names."""
        found = by(self.each(rows), lambda row: tuple(self.heads(row).values()))
        return {k[0] if len(k) == 1 else k: v for k, v in found.items()}

    def table(self, rows: list[Row]) -> list[Row]:
        """Lines of names and cells, numbers or "mean ± error"."""
        found = self.found(rows)
        lines = [(self.heads(of[0]), self.line(k, found)) for k, of in found.items()]
        return [x | line for x, line in lines if line is not None] + self.more(found)

    def panels(self, rows: list[Row]) -> list[report.Panel]:
        """What is in the picture."""
        table, heads = self.table(rows), list(self.heads(self.each(rows)[0]))
        labelled = {report.label(k): of for k, of in self.found(rows).items()}
        panels = []
        for picture in self.pictures:
            if callable(picture):
                panels.extend(picture(self.each(rows)))
            elif isinstance(picture, str):
                panels.append(report.training(labelled, picture))
            elif picture[0] == "grid":
                panels.append(report.grid(table, picture[1], heads, title=picture[1]))
            else:
                scale, *columns = picture
                panels.append(report.bars(table, columns, heads, yscale=scale))
        return panels


@functools.cache
def texts(folder: pathlib.Path = TEXTS) -> dict[str, Text]:
    """All entries by name.

    A file has one heading per experiment, `# name`, with the sections Claim, The paper
    (a list of `- **what**: figure`), How (small scale) and What came out. A heading in
    braces names words that stand wherever these braces are repeated.
    """
    found = {}
    for path in sorted(folder.glob("*.md")):
        entries = _sections(path.read_text(), "#")
        words = {k: v.strip() for k, v in entries.items() if k.startswith("{")}
        for name in entries.keys() - words.keys():
            body = entries[name]
            for token, meant in words.items():
                body = body.replace(token, meant)
            parts = _sections(body, "##")
            flat = {title: " ".join(part.split()) for title, part in parts.items()}
            figures = re.findall(
                r"- \*\*(.+?)\*\*: (.+?)(?= - \*\*|$)", flat["The paper"]
            )
            (how,) = (title for title in flat if title.startswith("How"))
            found[name] = Text(
                flat["Claim"],
                {k: json.loads(v) if v.startswith("[") else v for k, v in figures},
                how.split("(")[1].split()[0],
                flat[how],
                flat["What came out"],
            )
    return found


def _sections(text: str, mark: str) -> dict[str, str]:
    """Heading -> what stands below it."""
    _, *parts = re.split(rf"^{mark} (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def carry_out(experiment: Experiment, folder: pathlib.Path, results=RESULTS) -> Row:
    """Make the runs that are missing, then write the record and its picture."""
    rows = perform(experiment.name, experiment.runs(), folder, results)
    record, path = record_of(experiment, rows), results / f"{experiment.name}.json"
    words = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write(path, words + "\n")
    report.save_figure(path.with_suffix(".png"), experiment.panels(rows))
    return record


def record_of(experiment: Experiment, rows: list[Row]) -> Row:
    """What is kept of an experiment: its words and what its runs say."""
    text, checks = experiment.text, list(experiment.checks(experiment.found(rows)))
    record = {
        "experiment": experiment.name,
        "claim": text.claim,
        "paper": text.paper,
        "checks": [check._asdict() for check in checks],
        "measured": {"table": experiment.table(rows)},
        "seeds": len({row["seed"] for row in experiment.each(rows)}),
        "scale": text.scale,
        "verdict": verdict_of(checks),
        "remark": text.remark,
        "protocol": text.protocol,
        "runs": len(rows),
        "minutes": round(sum(row.get("seconds", 0) for row in rows) / 60, 1),
    }
    return finite(record)


def verdict_of(checks: Sequence[Check]) -> str:
    """All of what was claimed, some of it, or nothing."""
    held = [bool(check.holds) for check in checks]
    return "reproduced" if all(held) else "partly" if any(held) else "not reproduced"
