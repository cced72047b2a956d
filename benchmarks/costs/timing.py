"""Programs timed in turn, A B C, C B A, ...: a drifting machine does not matter.

A figure is the median of the ratios of neighbours, with a 95 % interval for the median
from order statistics. `problem` has networks on random data, on which a cost does not
depend.
"""

import functools
import math
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track

from benchmarks.shared.models import build
from rmtdamp.demo._train import cross_entropy

# Inputs, classes; MLP 784-512-512-10, the CNN, a transformer of width 128.
SHAPES = {
    "mlp": ((784, 1, 1), 10),
    "cnn": ((32, 32, 3), 10),
    "transformer": ((64,), 256),
}


class Effort(NamedTuple):
    """How long to measure."""

    least: float = 0.02  # seconds that a call is repeated for
    budget: float = 6  # seconds of all rounds
    rounds: int = 5  # at least
    pairs: int = 25  # at most
    steps: int = 100  # of one loop, at most


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rotate(calls, rounds, title) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    times = {name: [] for name in calls}
    for i in track(range(rounds), title):
        # Which one goes first alternates, so that none profits from its place.
        for name in list(calls)[:: -1 if i % 2 else 1]:
            times[name].append(seconds(calls[name]))
    return times


def compare(baseline, other) -> dict[str, float]:
    """Median of other/baseline, round by round, and its 95 % interval."""
    ratios = sorted(b / a for a, b in zip(baseline, other, strict=True))
    pairs = len(ratios)
    # Order statistics j, n+1-j cover the median with probability 1 - 2 P(Bin < j).
    j = max(int((pairs - 1.96 * pairs**0.5) / 2), 0)
    found = {"ratio": statistics.median(ratios), "low": ratios[j]}
    return found | {"high": ratios[-1 - j], "pairs": pairs}


def interleaved(a, b, pairs, title):
    """Median of b/a over neighbouring runs, its 95 % interval, and median of a."""
    a()
    b()
    times = rotate({"a": a, "b": b}, pairs, title)
    found = compare(times["a"], times["b"])
    return found | {"baseline_seconds": statistics.median(times["a"])}


def on_cpu():
    return jax.default_backend() == "cpu"


def timed(calls, effort: Effort, title):
    """Seconds per call in each round, for a dictionary of calls.

    Each is repeated until it fills a least time; a CPU's calls are waited for one by
    one, lest two of them share the cores.
    """
    wait = jax.block_until_ready

    def repeated(call, num):
        found = None
        for _ in range(num):
            found = wait(call()) if on_cpu() else call()
        wait(found)

    nums = {}
    for name, call in calls.items():
        wait(call())
        nums[name] = math.ceil(effort.least / seconds(lambda call=call: wait(call())))
    loops = {n: functools.partial(repeated, f, nums[n]) for n, f in calls.items()}
    rounds = math.ceil(effort.budget / sum(map(seconds, loops.values())))
    rounds = min(max(rounds, effort.rounds), effort.pairs)
    times = rotate(loops, rounds, title)
    return {name: np.array(times[name]) / nums[name] for name in calls}


def compiled(function, *args):
    """(a call of the compiled program, its FLOPs, its temporary bytes)."""
    program = jax.jit(function).lower(*args).compile()
    flops, memory = program.cost_analysis()["flops"], program.memory_analysis()
    assert memory is not None
    return functools.partial(program, *args), flops, memory.temp_size_in_bytes


def model_of(kind) -> nnx.Module:
    shape, classes = SHAPES[kind]
    return build(kind, classes, shape, width=2.0)


@functools.cache
def problem(kind, batch_size, dtype="float32"):
    """(loss_fn, params, (inputs, labels)); logits are widened to float32."""
    graphdef, params = nnx.split(model_of(kind), nnx.Param)
    key, other = jax.random.split(jax.random.key(0))
    shape, classes = SHAPES[kind]
    if kind == "transformer":
        inputs = jax.random.randint(key, (batch_size, *shape), 0, classes)
        labels = jnp.roll(inputs, -1, axis=1)
    else:
        inputs = jax.random.normal(key, (batch_size, *shape), dtype)
        labels = jax.random.randint(other, (batch_size,), 0, classes)

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params)(batch[0])
        return cross_entropy(logits.astype(jnp.float32), batch[1])

    params = jax.tree.map(lambda x: x.astype(dtype), nnx.as_pure(params))
    return loss_fn, params, (inputs, labels)
