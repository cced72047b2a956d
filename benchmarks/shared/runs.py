"""Finished runs, one line each: what was asked for -> what came out.

A run is a function and the JSON that it is called with: whoever asks for the same run,
in this experiment or another, gets its line. A kill loses what the run being made has
not yet left in its folder `unfinished`, and no more; made again it gives the same
numbers, for seeds are part of what is asked for.
"""

import contextvars
import functools
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import rich.progress

from rmtdamp.demo._unfinished import Unfinished, digest

Row = dict[str, Any]  # a run's config and its result, side by side


_folder = contextvars.ContextVar[pathlib.Path | None]("folder", default=None)


def unfinished(*of: Any) -> Unfinished:
    """Where the run that `perform` is making keeps what it was asked for as `of`."""
    folder = _folder.get()
    return Unfinished(folder / digest(*of) if folder else None)


class Run(NamedTuple):
    """`function(folder, **config) -> result`; config and result are JSON objects."""

    function: Callable[..., Row]
    config: Row

    @property
    def key(self) -> str:
        """What identifies the run."""
        return json.dumps(self.config, sort_keys=True)


def runs_of(function: Callable[..., Row], config: Row, **axes: Iterable) -> list[Run]:
    """A run for every combination of the axes' values, the first axis slowest."""
    values = itertools.product(*axes.values())
    return [
        Run(function, {**config, **dict(zip(axes, x, strict=True))}) for x in values
    ]


def rounded(values) -> list[float]:
    """An array as a flat list, to five digits."""
    return [float(f"{x:.5g}") for x in np.ravel(np.asarray(values))]


def path_of(function: Callable[..., Row], results: pathlib.Path) -> pathlib.Path:
    """The file of all runs of one function."""
    return results / "runs" / f"{function.__name__}.jsonl"


def load(path: pathlib.Path) -> dict[str, Row]:
    """All finished runs of a file, by key; a line that a kill cut short is no run."""
    if not path.exists():
        return {}
    stat = path.stat()
    return _parsed(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _parsed(path: pathlib.Path, size: int, time: int) -> dict[str, Row]:
    """A file of that size and time: two megabytes take a fifth of a second."""
    del size, time
    rows = {}
    *lines, _ = path.read_bytes().split(b"\n")  # the last one has no end
    for number, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            rows[json.dumps(run["config"], sort_keys=True)] = {**run["result"]}
        except (ValueError, RecursionError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number} is damaged: delete that line to run it again"
            ) from None
    return rows


def save(path: pathlib.Path, run: Run, result: Row) -> None:
    """Append a finished run, after taking off what a kill left of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"config": run.config, "result": result}) + "\n"
    with path.open("ab+") as file:
        end = file.seek(0, 2)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


def finished(runs: Iterable[Run], results: pathlib.Path) -> list[Row]:
    """The rows of those runs that are there."""
    found = [(r, load(path_of(r.function, results)).get(r.key)) for r in runs]
    return [{**run.config, **result} for run, result in found if result is not None]


def perform(
    name: str, runs: list[Run], folder: pathlib.Path, results: pathlib.Path
) -> list[Row]:
    """Make every run that is not there yet, and return all rows in the order asked."""
    for run in rich.progress.track(runs, description=name):
        path = path_of(run.function, results)
        # Read anew each time: another process may be making runs too.
        if run.key in load(path):
            continue
        start = time.perf_counter()
        kept = path.parent / "unfinished" / digest(path.stem, run.key)
        token = _folder.set(kept)
        try:
            result = run.function(folder, **run.config)
        finally:
            _folder.reset(token)
        result.setdefault("seconds", round(time.perf_counter() - start, 1))
        if shared := sorted(set(result) & set(run.config)):
            raise ValueError(
                f"{run.function.__name__} returns {', '.join(shared)}, which its "
                "config holds too: give the result another name"
            )
        save(path, run, result)
        shutil.rmtree(kept, ignore_errors=True)
    return finished(runs, results)
