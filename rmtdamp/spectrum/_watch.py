"""Who is told how far `measure` is: nobody, a terminal, or a log."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rmtdamp._types import Batch


class Watch:
    """Told how far `measure` is; this one keeps it to itself."""

    def stage(self, name: str, steps: int | None = None) -> None:
        """A stage begins, of so many steps where that is known beforehand."""

    def step(self) -> None:
        """One step of the stage is done."""

    def passing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """One pass over the data, which is a step."""
        yield from batches
        self.step()


class Bars(Watch):
    """On a terminal: a bar per stage, with the time it has taken."""

    def __init__(self, progress: Any):
        self._progress, self._task = progress, None

    def stage(self, name, steps=None):
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=steps)

    def step(self):
        if self._task is not None:
            self._progress.advance(self._task)


class Lines(Watch):
    """In a log: a line for each stage that lasts for some seconds, then more."""

    patience = 3.0  # seconds
    interval = 10.0  # seconds between two lines of a stage, at least

    def __init__(self, file: TextIO):
        self._file, self._timer = file, None
        self._name, self._steps, self._done, self._said = "", None, 0, 0.0

    def stage(self, name, steps=None):
        self.close()
        self._name, self._steps, self._done = name, steps, 0
        self._said = time.monotonic()
        count = f" ({steps} steps)" if steps else ""
        self._timer = threading.Timer(self.patience, self._say, [f"{name}{count}"])
        self._timer.daemon = True
        self._timer.start()

    def step(self):
        self._done += 1
        if time.monotonic() - self._said >= self.interval:
            self._said = time.monotonic()
            of = f" of {self._steps}" if self._steps else ""
            self._say(f"{self._name}: step {self._done}{of}")

    def close(self) -> None:
        """Nothing more to say."""
        if self._timer is not None:
            self._timer.cancel()

    def _say(self, text):
        print(f"rmtdamp: {text} ...", file=self._file, flush=True)
