"""What `cost` measures: pieces of an epoch's time, and two estimates of a variance."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rmtdamp
from benchmarks._timing import seconds
from benchmarks.paper import _train
from benchmarks.paper._runs import Row
from benchmarks.paper._train import Method, Numbers, Task, data_of, fit
from rmtdamp import hessian

BATCH_SIZE = 128
NUM_SCANNED = 78  # batches of 128 out of 10,000 examples
NUM_STEPS = 10  # of one timed loop


def _loop(method, net, params, rest, batch):
    """(steps, a damping's refresh, a factors' refresh): calls that wait for the end."""
    # A rate of nearly 0: it is one batch over and over.
    numbers = Numbers(1e-9, 1e-2, 0.0, 1)
    opt_state = _train.transformation(method, numbers, net).init(params)
    # A step donates its state, so each loop has its own.
    carry = jax.tree.map(jnp.array, (params, rest, opt_state))

    def steps():
        nonlocal carry
        for _ in range(NUM_STEPS):
            carry = _train._step(method, net, numbers, *carry, batch)
        jax.block_until_ready(carry)

    def refresh(learner, sample=None):
        nonlocal carry
        params, rest, opt_state = carry
        opt_state = rmtdamp.refresh_damping(
            opt_state, learner, params, batch, loss_args=(rest,), curvature_batch=sample
        )
        carry = jax.block_until_ready((params, rest, opt_state))

    def factors(eigen):
        nonlocal carry
        params, rest, opt_state = carry
        opt_state = rmtdamp.refresh_factors(
            opt_state, net.factors_fn, params, batch, loss_args=(rest,), eigen=eigen
        )
        carry = jax.block_until_ready((params, rest, opt_state))

    return steps, refresh, factors


def epoch_time(
    folder: pathlib.Path, *, task: Row, batches_per_call: int, rounds: int, seed: int
) -> Row:
    """Seconds of an epoch's pieces, in turn, so that a drifting machine cancels.

    The scan is timed on `batches_per_call` of its 78 batches.
    """
    start = time.perf_counter()
    (data, _), num_classes = data_of(folder, Task(**task))
    shape = data[0].shape[1:]
    net = _train.network(Task(**task), num_classes, shape, True)
    model = _train.make_model(Task(**task), num_classes, shape, seed)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    part = lambda size: jax.tree.map(lambda x: jnp.asarray(x[:size]), data)
    batch, sample = part(BATCH_SIZE), part(batches_per_call * BATCH_SIZE)
    learner = functools.partial(rmtdamp.DampingLearner, net.loss_fn)
    own, scan = learner(), learner(num_microbatches=batches_per_call)
    make = lambda optimizer, learned: _loop(
        Method(optimizer, schedule="constant", learned=learned),
        net, params, rest, batch,
    )  # fmt: skip
    adam, kfac, learned = make("adam", False), make("kfac", False), make("adam", True)

    def whole():
        learned[1](own)
        learned[0]()

    calls = {
        "adam": adam[0],
        "kfac": kfac[0],
        "factors": lambda: kfac[2](False),
        "eigenvectors": lambda: kfac[2](True),
        "own": lambda: learned[1](own),
        "scan": lambda: learned[1](scan, sample),
        "adam, own": whole,
    }
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            times[name].append(float(f"{seconds(calls[name]):.4g}"))
    return {
        "times": times,
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "seconds": round(time.perf_counter() - start, 1),
    }


def agreement(
    folder: pathlib.Path,
    *,
    task: Row,
    epochs: int,
    num_batches: int,
    num_probes: int,
    seed: int,
) -> Row:
    """The variance after some epochs: by batches' own microbatches, and by a scan.

    A probe for each batch, `num_probes` for the scan.
    """
    start = time.perf_counter()
    done = fit(
        folder,
        Task(**task),
        Method("adam", schedule="constant"),
        learning_rate=1e-3,
        damping=1e-4,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        seed=seed,
    )
    (data, _), _ = data_of(folder, Task(**task))
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), num_batches + 1)

    def measure(key, size, **options):
        rows = rng.permutation(len(data[1]))[:size]
        batch = jax.tree.map(lambda x: x[rows], data)
        return hessian.moments(
            done.network.loss_fn, done.params, batch, key, loss_args=(done.rest,),
            batch_size=BATCH_SIZE, **options,
        )  # fmt: skip

    own = [
        float(measure(k, BATCH_SIZE, num_microbatches=8, stderr=False).variance)
        for k in keys[1:]
    ]
    scan = measure(
        keys[0],
        NUM_SCANNED * BATCH_SIZE,
        num_microbatches=NUM_SCANNED,
        num_probes=num_probes,
    )
    return {
        "own": own,
        "scan": float(scan.variance),
        "scan_error": float(scan.variance_stderr),
        "seconds": round(time.perf_counter() - start, 1),
    }
