"""Programs timed in turn, A B C, C B A, ...: a drifting machine does not matter.

A figure is the median of the ratios of neighbours, with a 95 % interval for the median
from order statistics. `problem` has networks on random data, on which a cost does not
depend.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

from .models import build

SHAPES = {"mlp": (784, 1, 1), "cnn": (32, 32, 3), "resnet": (32, 32, 3)}
LENGTH, TOKENS, CLASSES = 64, 256, 10


class Effort(NamedTuple):
    """How long to measure."""

    least: float = 0.02  # seconds that a call is repeated for
    budget: float = 6  # seconds of all rounds
    rounds: int = 5  # at least
    pairs: int = 25  # at most


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rotate(
    calls: dict[str, Callable], rounds: int, title: str, limits: dict | None = None
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


def compare(baseline, other) -> dict[str, float]:
    """Median of other/baseline, round by round, and its 95 % interval."""
    ratios = sorted(b / a for a, b in zip(baseline, other, strict=False))
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


def timed(calls, effort: Effort, title):
    """Seconds per call in each round, for a dictionary of calls."""
    loops = {name: looped(call, effort.least) for name, call in calls.items()}
    once = sum(seconds(run) for run, _ in loops.values())
    rounds = min(max(math.ceil(effort.budget / once), effort.rounds), effort.pairs)
    times = rotate({name: run for name, (run, _) in loops.items()}, rounds, title)
    return {name: np.array(times[name]) / num for name, (_, num) in loops.items()}


def compiled(function, *args):
    """(a call of the compiled program, its FLOPs, its temporary bytes)."""
    program = jax.jit(function).lower(*args).compile()
    flops, memory = program.cost_analysis()["flops"], program.memory_analysis()
    assert memory is not None
    return functools.partial(program, *args), flops, memory.temp_size_in_bytes


def model_of(kind) -> nnx.Module:
    """MLP 784-512-512-10, the CNN, the ResNet, or a transformer of width 128."""
    shape, classes = SHAPES.get(kind, (LENGTH,)), TOKENS if kind not in SHAPES else 10
    return build(kind, num_classes=classes, shape=shape, width=2.0, rngs=nnx.Rngs(0))


@functools.cache
def problem(kind, batch_size, dtype="float32"):
    """(loss_fn, params, (inputs, labels)); logits are widened to float32."""
    # BatchNorm uses the batch's statistics: its running ones are updated in a copy.
    graphdef, params, rest = nnx.split(model_of(kind), nnx.Param, ...)
    key, other = jax.random.split(jax.random.key(0))
    if kind == "transformer":
        inputs = jax.random.randint(key, (batch_size, LENGTH), 0, TOKENS)
        labels = jnp.roll(inputs, -1, axis=1)
    else:
        shape = [n for n in SHAPES[kind] if n > 1]
        inputs = jax.random.normal(key, (batch_size, *shape), dtype)
        labels = jax.random.randint(other, (batch_size,), 0, CLASSES)

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params, rest, copy=True)(batch[0])
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean()

    params = jax.tree.map(lambda x: x.astype(dtype), nnx.as_pure(params))
    return loss_fn, params, (inputs, labels)


def normal_like(params, seed=1):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda key, x: jax.random.normal(key, x.shape, x.dtype)
    return jax.tree.unflatten(treedef, map(draw, keys, leaves))
