"""Section 7.1: what learning the damping costs, and whether cheaper estimates do."""

import functools
import itertools
import math
import pathlib

import jax
import numpy as np

import rmtdamp
from benchmarks.costs.timing import compare, rotate
from benchmarks.paper._experiment import Experiment
from benchmarks.shared import optimizers, report, training
from benchmarks.shared.claims import Check, by, difference, ends, error, mean, sign
from benchmarks.shared.optimizers import Method, Numbers
from benchmarks.shared.runs import Row, Run, runs_of
from rmtdamp import hessian

from . import vgg

BATCH_SIZE = 128
NUM_SCANNED = 78  # batches of 128 out of 10,000 examples
NUM_STEPS = 10  # of one timed loop
FLOOR, RATE = 1e-2, 1e-3
GAPS = (10, 100)
EPOCHS = (0, 1, 5, 15)  # at which the estimates are compared
SEEDS = (0, 1, 2)
MLP = {"dataset": "fashion-mnist", "model": "mlp"}
NAMES = {"adam": "Adam", "kfac": "KFAC"}
KINDS = {"own": "own microbatches", "scan": "scan of 9,984"}
TWICE, SAME, NEAR = 2.2, 0.01, 1.25  # what the verdict takes for equal


def epoch_time(
    folder: pathlib.Path, *, task: Row, batches_per_call: int, rounds: int, seed: int
) -> Row:
    """Seconds of an epoch's pieces, in turn, so that a drifting machine cancels.

    The scan is timed on `batches_per_call` of its 78 batches.
    """
    prepared = training.prepare(folder, training.Task(**task), seed, True)
    (data, _), network, params, loss_args, _ = prepared
    batch = tuple(x[:BATCH_SIZE] for x in data)
    sample = tuple(x[: batches_per_call * BATCH_SIZE] for x in data)
    # A rate of nearly 0: it is one batch over and over.
    numbers = Numbers(1e-9, 1e-2, 1)
    method = lambda name, learned=False: Method(name, "constant", learned)
    learned = method("adam", True)
    learner = functools.partial(optimizers.learner_of, learned, numbers, network)

    def state_of(method):
        return optimizers.transformation(method, numbers, network).init(params)

    def steps(method):
        carry = params, loss_args, state_of(method)

        def run():
            nonlocal carry
            for _ in range(NUM_STEPS):
                carry = training.stepped(method, network, numbers, carry, batch)
            jax.block_until_ready(carry)

        return run

    def refresh(state, measurer, sample=None):
        options = {"loss_args": loss_args, "curvature_batch": sample}
        by_hand = functools.partial(rmtdamp.refresh, state, measurer, params, batch)
        return lambda: jax.block_until_ready(by_hand(**options))

    def factors(eigen_every):
        made = method("kfac")._replace(eigen_every=eigen_every)
        measurer = optimizers.factors_of(made, network)
        # The first measurement decomposes whatever is asked for.
        return refresh(refresh(state_of(made), measurer)(), measurer)

    state, num = state_of(learned), batches_per_call
    own, learning = refresh(state, learner()), steps(learned)
    calls = {
        "adam": steps(method("adam")),
        "kfac": steps(method("kfac")),
        "factors": factors(2),
        "eigenvectors": factors(1),
        "own": own,
        "scan": refresh(state, learner(num_microbatches=num), sample),
        "adam, own": lambda: (own(), learning()),
    }
    for call in calls.values():
        call()
    times = rotate(calls, rounds, "pieces of an epoch")
    times = {name: [float(f"{x:.4g}") for x in found] for name, found in times.items()}
    size = sum(x.size for x in jax.tree.leaves(params))
    return {"times": times, "num_parameters": size}


def agreement(
    folder: pathlib.Path, *, task: Row, epochs, num_batches, num_probes, seed
) -> Row:
    """The variance after some epochs: by batches' own microbatches, and by a scan.

    A probe for each batch, `num_probes` for the scan.
    """
    made = training.Task(**task), Method("adam", "constant")
    numbers = {"learning_rate": 1e-3, "damping": 1e-4, "epochs": epochs, "seed": seed}
    done = training.fit(folder, *made, **numbers)
    data, rng = done.data[0], np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), num_batches + 1)

    def measure(key, size, **options):
        rows = rng.permutation(len(data[1]))[:size]
        batch = tuple(x[rows] for x in data)
        options |= {"loss_args": done.loss_args, "batch_size": BATCH_SIZE}
        return hessian.moments(done.network.loss_fn, done.params, batch, key, **options)

    options = {"num_microbatches": 8, "stderr": False}
    own = [float(measure(k, BATCH_SIZE, **options).variance) for k in keys[1:]]
    options = {"num_microbatches": NUM_SCANNED, "num_probes": num_probes}
    scan = measure(keys[0], NUM_SCANNED * BATCH_SIZE, **options)
    found = {"scan": float(scan.variance), "scan_error": float(scan.variance_stderr)}
    return {"own": own, **found}


def _runs():
    mlp = MLP | {"num_train": 10_000}
    timed = [
        Run(epoch_time, {"task": task, "batches_per_call": n, "rounds": 15, "seed": 0})
        for task, n in ((mlp, NUM_SCANNED), (vgg.TASK, 3))
    ]
    sizes = {"task": mlp, "num_batches": 16, "num_probes": 16}
    common = {"task": MLP | {"num_train": 5000}, "learning_rate": RATE}
    common |= {"damping": FLOOR, "epochs": 15, "batch_size": BATCH_SIZE}
    kinds = itertools.product(NAMES, GAPS)
    methods = [{"optimizer": x, "learned": True, "refresh_every": n} for x, n in kinds]
    compared = runs_of(agreement, sizes, seed=SEEDS, epochs=EPOCHS)
    trained = runs_of(training.train, common, seed=SEEDS, method=methods)
    return timed + compared + trained


def _hundred_steps(row, optimizer):
    """Seconds of 100 steps without a learner, round by round."""
    times = {name: np.array(x) for name, x in row["times"].items()}
    total = 100 / NUM_STEPS * times[optimizer]
    if optimizer == "kfac":
        total = total + 9 * times["factors"] + times["eigenvectors"]
    return total


def ratio_of(row, optimizer, kind, gap):
    """`compare` of an epoch with and without the learner."""
    plain, refresh = _hundred_steps(row, optimizer), np.array(row["times"][kind])
    if kind == "scan":
        refresh = refresh * NUM_SCANNED / row["batches_per_call"]
    return compare(plain, plain + 100 / gap * refresh)


def _score(row):
    """(own, its error, scan, z) of a comparison."""
    own, spread = mean(row["own"]), error(row["own"])
    z = (own - row["scan"]) / (spread**2 + row["scan_error"] ** 2) ** 0.5
    return own, spread, row["scan"], z


def _heads(row):
    """The three kinds of runs; the table is about the first."""
    if method := row.get("method"):
        return {"optimiser": method["optimizer"], "gap": method["refresh_every"]}
    return {"kind": "times" if "times" in row else "variances"}


def _table(found):
    table = []
    for row in found["times"]:
        for optimizer in NAMES:
            name = "MLP" if row["task"]["model"] == "mlp" else "VGG-16, narrow"
            line = {"model": name, "optimiser": NAMES[optimizer]}
            line["s per 100 steps"] = float(np.median(_hundred_steps(row, optimizer)))
            for kind, gap in itertools.product(KINDS, GAPS):
                ratio = report.interval(ratio_of(row, optimizer, kind, gap))
                line[f"time, {KINDS[kind]}, gap {gap}"] = ratio
            table.append(line)
    return table


def _checks(found):
    # The paper's own case is KFAC.
    ratios = [ratio_of(row, "kfac", "scan", 100)["ratio"] for row in found["times"]]
    text = "With a scan every 100 steps KFAC's epoch takes at most 2.2 times as long"
    checks = [Check(text, max(ratios), None, max(ratios) <= TWICE)]
    for optimizer, name in itertools.product(NAMES, ("train_loss", "test_loss")):
        short, long = (ends(found[optimizer, gap], name) for gap in GAPS)
        change = difference(short, long)
        same = not sign(short, long) or abs(change[0]) <= SAME * mean(long)
        text = f"{NAMES[optimizer]}'s final {name.replace('_', ' ')} is the same"
        checks.append(Check(f"{text} at gaps 10 and 100, or within 1 %", *change, same))
    scores = list(map(_score, found["variances"]))
    rms = math.sqrt(mean([s[3] ** 2 for s in scores]))
    factor = math.exp(mean([math.log(s[0] / s[2]) for s in scores]))
    agree = rms <= 2 and 1 / NEAR <= factor <= NEAR
    text = f"Own microbatches and a scan agree (z {rms:.1f}): the one over the other"
    return [*checks, Check(text, factor, None, agree)]


def _times(rows):
    of = by(rows, lambda row: _heads(row).get("kind"))
    names = [f"time, {KINDS[kind]}, gap {gap}" for kind in KINDS for gap in GAPS]
    heads = ("model", "optimiser")
    yield report.bars(_table(of), names, heads, yscale="log", title="time / without")
    scores = [(row["epochs"], _score(row)) for row in of["variances"]]
    lines = [
        report.Line(name, [n for n, _ in scores], [s[i] for _, s in scores], style)
        for name, i, style in (("own", 0, "o"), ("scan", 2, "s"))
    ]
    yield report.curves(lines, xlabel="epoch", title="variance (eq. 15)", yscale="log")
    losses = by(of[None], lambda row: "{optimiser}, gap {gap}".format_map(_heads(row)))
    yield report.training(losses, "test_loss")


_none = lambda key, found: None
EXPERIMENTS = [Experiment("cost", _runs, _heads, _none, _checks, [_times], _table)]
