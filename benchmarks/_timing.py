"""Programs timed in turn, A B C, C B A, ...: a drifting machine does not matter.

A figure is the median of the ratios of neighbours, with a 95 % interval for the median
from order statistics.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.progress import track


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rotate(
    calls: dict[str, Callable],
    rounds: int,
    title: str,
    limits: dict[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round; a name in `limits` takes part in fewer."""
    limits = limits or {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in track(range(rounds), title):
        # Which one goes first alternates, so that none profits from its place.
        for name in list(calls)[:: -1 if i % 2 else 1]:
            if i < limits.get(name, rounds):
                times[name].append(seconds(calls[name]))
    return times


def compare(baseline: list[float], other: list[float]) -> dict[str, float]:
    """Median of other/baseline, round by round, and its 95 % interval."""
    ratios = sorted(b / a for a, b in zip(baseline, other, strict=False))
    pairs = len(ratios)
    # Order statistics j, n+1-j cover the median with probability 1 - 2 P(Bin < j).
    j = max(int((pairs - 1.96 * pairs**0.5) / 2), 0)
    return {
        "ratio": statistics.median(ratios),
        "low": ratios[j],
        "high": ratios[-1 - j],
        "pairs": pairs,
    }


def interleaved(a, b, pairs, name):
    """Median of b/a over neighbouring runs, its 95 % interval, and median of a."""
    a()
    b()
    times = rotate({"a": a, "b": b}, pairs, name)
    found = compare(times["a"], times["b"])
    return found | {"baseline_seconds": statistics.median(times["a"])}


def on_cpu():
    return jax.default_backend() == "cpu"


def looped(call, least):
    """(`call` as often as fills `least` seconds, that number), warmed up.

    A CPU's calls are waited for one by one, lest two of them share the cores.
    """
    jax.block_until_ready(call())
    num = math.ceil(least / seconds(lambda: jax.block_until_ready(call())))

    def run():
        found = None
        for _ in range(num):
            found = call()
            if on_cpu():
                jax.block_until_ready(found)
        jax.block_until_ready(found)

    return run, num


def timed(calls, options, title, pairs=25):
    """Seconds per call in each round, for a dictionary of calls."""
    loops = {name: looped(call, options.least) for name, call in calls.items()}
    once = sum(seconds(run) for run, _ in loops.values())
    rounds = min(max(math.ceil(options.budget / once), options.rounds), pairs)
    times = rotate({name: run for name, (run, _) in loops.items()}, rounds, title)
    return {name: np.array(times[name]) / num for name, (_, num) in loops.items()}


def compiled(function, *args):
    """(a call of the compiled program, its FLOPs, its temporary bytes)."""
    program = jax.jit(function).lower(*args).compile()
    flops = program.cost_analysis()["flops"]
    memory = program.memory_analysis()
    assert memory is not None
    return functools.partial(program, *args), flops, memory.temp_size_in_bytes
