"""Finished runs -> a table on the terminal, a picture and one JSON file.

The report folder is also the memory: each run is one file in `runs/`, written whole or
not at all, and a run whose file is there is not trained again. A run that was cut short
goes on from what its `.unfinished` file keeps.
"""

import json
import math
import pathlib
import statistics
from typing import Any

import matplotlib
import numpy as np
import rich.box
from rich.table import Table

from rmtdamp._cli import write_whole

from ._train import METHODS, Record, Settings
from ._unfinished import Unfinished

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class ReportError(ValueError):
    """The report folder cannot be used; the message says why."""


def write(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_whole(path, lambda part: part.write_text(text))


# What is no JSON, no text, nested without end, or JSON of something else.
_DAMAGED = (ValueError, RecursionError, TypeError, AttributeError, KeyError)


class Runs:
    """The runs of a report folder, all made with one data set and one `Settings`."""

    def __init__(self, folder: pathlib.Path, data_name: str, settings: Settings):
        self.folder = folder
        meta = {"data": data_name, "settings": settings._asdict()}
        path = folder / "settings.json"
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
            before = json.loads(path.read_text()) if path.exists() else meta
            old, new = before["settings"] | before, meta["settings"] | meta
        except OSError as error:
            raise ReportError(f"cannot write the report to {folder}: {error}") from None
        except _DAMAGED:
            raise ReportError(f"{path} is damaged: delete {folder}") from None
        if before != meta:
            changed = [k for k in new if k != "settings" and old.get(k) != new[k]]
            raise ReportError(
                f"{folder} holds runs made with other options ({', '.join(changed)}): "
                "choose another --out, or delete it"
            )
        self.meta = meta
        write(path, json.dumps(meta, indent=1) + "\n")

    def _path(self, method: str, seed: int) -> pathlib.Path:
        return self.folder / "runs" / f"{method}-{seed}.json"

    def load(self, method: str, seed: int) -> list[Record] | None:
        """The records of a finished run, None if it is still to be made."""
        path = self._path(method, seed)
        if not path.exists():
            return None
        try:
            records = [_record(row) for row in json.loads(path.read_text())]
        except (OSError, *_DAMAGED):
            records = []
        last = self.meta["settings"]["epochs"]
        epochs = [record.epoch for record in records]
        ends = records and (records[-1].diverged or epochs[-1] == last)
        if not ends or epochs != list(range(1, len(epochs) + 1)):
            raise ReportError(f"{path} is damaged: delete it to run it again")
        return records

    def unfinished(self, method: str, seed: int) -> Unfinished:
        """What is kept of a run while it is made."""
        return Unfinished(self._path(method, seed).with_suffix(".unfinished"))

    def save(self, method: str, seed: int, records: list[Record]) -> None:
        """Keep a finished run."""
        write(self._path(method, seed), _json(_rows(records)) + "\n")


Results = dict[str, list[list[Record]]]  # method -> seed -> epoch
_MAY_BE_MISSING = ("damping", "measured_variance")


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    value = value.item() if hasattr(value, "item") else value  # a NumPy scalar
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, **options) -> str:
    return json.dumps(finite(value), allow_nan=False, **options)


def _rows(run: list[Record]) -> list[dict]:
    return [record._asdict() for record in run]


def _record(row: dict) -> Record:
    """A record, with NaN where a run that diverged left no number."""
    known: dict = {k: math.nan if x is None else x + 0 for k, x in row.items()}
    return Record(**known | {k: row[k] for k in _MAY_BE_MISSING})


def kept(runs: list[list[Record]]) -> list[list[Record]]:
    """The runs of a method that did not diverge."""
    return [run for run in runs if not run[-1].diverged]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds; NaN with one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, statistics.stdev(values) / len(values) ** 0.5


def summarise(results: Results) -> dict[str, Any]:
    """Mean and standard error over seeds of each final figure, by method.

    Over the runs that did not diverge; "diverged" counts the others.

    Returns:
        A dict from method to its figures.
    """
    summary = {}
    for method, all_runs in results.items():
        runs = kept(all_runs)
        last = [run[-1] for run in runs]
        # The first epoch holds compilation.
        speed = [
            statistics.median(r.steps_per_second for r in run[1:] or run)
            for run in runs
        ]
        columns = {
            "train_loss": [r.train_loss for r in last],
            "test_loss": [r.test_loss for r in last],
            "train_accuracy": [r.train_accuracy for r in last],
            "test_accuracy": [r.test_accuracy for r in last],
            "damping": [r.damping for r in last if r.damping is not None],
            "steps_per_second": speed,
        }
        summary[method] = {
            name: dict(zip(("mean", "stderr"), mean_and_error(values), strict=True))
            for name, values in columns.items()
            if values
        }
        summary[method]["diverged"] = len(all_runs) - len(runs)
    return summary


def table(results: Results, data_name: str) -> Table:
    """The terminal's table."""
    seeds = len(next(iter(results.values())))
    shown = f"mean ± standard error of {seeds} seeds" if seeds > 1 else "one seed"
    out = Table(
        title=f"{data_name}: {shown}, last epoch",
        box=rich.box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        pad_edge=False,
    )
    out.add_column("method", no_wrap=True)
    for name in (
        "train loss",
        "test loss",
        "train %",
        "test %",
        "damping",
        "steps/s",
    ):
        out.add_column(name, justify="right", no_wrap=True)

    def cell(figure, digits, factor=1):
        if figure is None:
            return "-"
        error = figure["stderr"] * factor
        text = f"{figure['mean'] * factor:.{digits}f}"
        return text if math.isnan(error) else f"{text}±{error:.{digits}f}"

    for method, row in summarise(results).items():
        if row["diverged"] == seeds:
            out.add_row(method, *["diverged"] * 2, *["-"] * 4)
            continue
        if row["diverged"]:
            method += f" ({row['diverged']} of {seeds} diverged)"
        damping = row.get("damping")
        out.add_row(
            method,
            cell(row["train_loss"], 4),
            cell(row["test_loss"], 4),
            cell(row["train_accuracy"], 1, 100),
            cell(row["test_accuracy"], 1, 100),
            "-" if damping is None else f"{damping['mean']:.2g}",
            f"{row['steps_per_second']['mean']:.0f}",
        )
    return out


def _curve(axis, runs, field, **style):
    """The mean over seeds, with a band of one standard error."""
    values = np.array([[getattr(r, field) for r in run] for run in runs], float)
    epochs = [r.epoch for r in runs[0]]
    mean = values.mean(0)
    (line,) = axis.plot(epochs, mean, **style)
    if len(runs) > 1:
        error = values.std(0, ddof=1) / len(runs) ** 0.5
        axis.fill_between(
            epochs, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0
        )


def picture(results: Results, data_name: str, path: pathlib.Path) -> None:
    """Losses on the left; on the right dampings, with the variance where measured."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(METHODS)}
    for method, all_runs in results.items():
        runs = kept(all_runs)
        if len(runs) < len(all_runs):
            lost = f"{method}: {len(all_runs) - len(runs)} of {len(all_runs)} diverged"
            left.plot([], [], color=colours[method], ls=":", label=lost)
        if not runs:
            continue
        _curve(left, runs, "test_loss", color=colours[method], label=method)
        _curve(left, runs, "train_loss", color=colours[method], ls="--", lw=1)
        if runs[0][-1].damping is None:
            continue
        kind = "learned" if method.startswith("auto") else "flat"
        style = {"color": colours[method], "ls": "-" if kind == "learned" else "--"}
        _curve(right, runs, "damping", label=f"damping, {method} ({kind})", **style)
        if runs[0][-1].measured_variance is not None:
            _curve(
                right,
                runs,
                "measured_variance",
                color="0.4",
                lw=1,
                marker=".",
                ms=3,
                label=r"measured $P^{-1}\,\mathrm{Tr\,Var}(H)$",
            )
    left.set(xlabel="epoch", ylabel="loss", yscale="log", title=f"{data_name}: loss")
    left.plot([], [], color="0.4", ls="--", lw=1, label="training loss")
    left.plot([], [], color="0.4", label="test loss")
    left.legend(fontsize=8)
    right.set(xlabel="epoch", title="damping")
    if right.lines:
        right.set_yscale("log")
        right.legend(fontsize=8)
    else:
        right.text(0.5, 0.5, "no method with a damping in its state", ha="center")
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=150))
    plt.close(figure)


def write_report(results: Results, runs: Runs) -> None:
    """`report.json` and `report.png` in the report folder."""
    name = runs.meta["data"]
    report = runs.meta | {
        "summary": summarise(results),
        "runs": {
            method: [_rows(run) for run in seeds] for method, seeds in results.items()
        },
    }
    write(runs.folder / "report.json", _json(report, indent=1) + "\n")
    picture(results, name, runs.folder / "report.png")
