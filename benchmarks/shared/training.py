"""One training run, for every bench: task, method and numbers -> curves.

Between two evaluations the steps and measurements are one compiled scan; or, with
`by_hand`, a compiled call each, as convolutions on a CPU need it. `take_steps` is a
scan of steps alone, for benches that put it under `vmap`. The seed fixes initial
weights and the order of the data.
"""

import functools
import itertools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtdamp.flax
from rmtdamp import hessian
from rmtdamp.damping import by_layer
from rmtdamp.demo._data import load_digits
from rmtdamp.demo._train import cross_entropy, scalar

from . import data, models
from .optimizers import Method, Network, Numbers, dampings, refreshed, transformation
from .runs import Row, rounded, unfinished

LENGTH = 64  # of a text's windows
CURVES = ("train_loss", "train_error", "test_loss", "test_error")
VALID = ("valid_loss", "valid_error")
NUM_CURVATURE_EXAMPLES, NUM_PRODUCTS = 256, 12  # for lambda_1


class Task(NamedTuple):
    """A model and its data."""

    dataset: str
    model: str
    width: float = 1.0
    coarse: bool = False
    num_classes: int | None = None  # the first so many; None: all
    num_train: int | None = None  # None: all
    num_test: int | None = None
    pool: int = 1  # pixels are averaged pool x pool
    num_valid: int = 0  # the last of the training examples, for choices
    imbalance: float = 1.0  # of the rest, the first class's size over the last's
    first_class: int = 0  # the largest; the others in turn


@functools.cache
def data_of(folder: pathlib.Path, task: Task) -> Any:
    """((train, test), number of classes): on the device, standardised, with labels.

    A third part, if the task asks for it, is the training examples for choices.
    """
    if task.imbalance != 1:
        balanced = task._replace(imbalance=1.0, first_class=0)
        (train, *rest), num_classes = data_of(folder, balanced)
        rows = data.long_tail(np.asarray(train[1]), task.imbalance, task.first_class)
        return (tuple(x[rows] for x in train), *rest), num_classes
    if task.num_valid:
        (train, test), num_classes = data_of(folder, task._replace(num_valid=0))
        kept, valid = slice(-task.num_valid), slice(-task.num_valid, None)
        parts = [tuple(x[rows] for x in train) for rows in (kept, valid)]
        return (parts[0], test, parts[1]), num_classes
    if task.dataset == "digits":
        found = load_digits()
        parts = [(x.reshape(-1, 8, 8, 1), y) for x, y in found[1:3]]
        return jax.device_put(tuple(parts)), found.num_classes
    if task.dataset == "tinyshakespeare":
        *texts, vocabulary = data.load_text(folder)

        def windows(tokens, num):
            rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)]
            rows = rows.reshape(-1, LENGTH + 1)[:num]
            return rows[:, :-1], rows[:, 1:]

        parts = map(windows, texts, (task.num_train, task.num_test))
        return jax.device_put(tuple(parts)), len(vocabulary)
    full = data.load(task.dataset, folder, coarse=task.coarse)
    if (num := task.num_classes) is not None:
        train, test = ((x[y < num], y[y < num]) for x, y in full[1:3])
        full = full._replace(train=train, test=test, num_classes=num)
    found = data.take(full, num_train=task.num_train, num_test=task.num_test)
    parts = data.standardise(found, pool=task.pool)
    return jax.device_put(parts), found.num_classes


@functools.cache
def network_of(name, width, num_classes, shape, with_factors=False, factor=1.0):
    """The functions of a model, by its name; `factor` multiplies the loss."""
    model = models.build(name, num_classes, shape, width)
    loss = lambda model, batch: factor * cross_entropy(model(batch[0]), batch[1])
    factors_fn = None
    if with_factors:
        factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy, fisher="empirical")
    loss_fn, train_loss = (
        rmtdamp.flax.curvature_loss(model, loss, batch_statistics=choice)
        for choice in (False, True)
    )
    return Network(nnx.split(model)[0], loss_fn, factors_fn, factor, train_loss)


def initial(task: Task, num_classes, shape, seed):
    """(params, loss_args) of a fresh model."""
    model = models.build(task.model, num_classes, shape, task.width, seed)
    params, rest = map(nnx.as_pure, nnx.split(model, nnx.Param, ...)[1:])
    return params, (rest,)


def prepare(folder, task: Task, seed: int, with_factors=False, factor=1.0):
    """((train, test), network, params, loss_args, number of classes)."""
    parts, num_classes = data_of(folder, task)
    shape = parts[0][0].shape[1:]
    model = task.model, task.width, num_classes, shape
    network = network_of(*model, with_factors, factor)
    return parts, network, *initial(task, num_classes, shape, seed), num_classes


def step(network, tx, carry, batch):
    """(params, loss_args, opt_state), batch -> the same after a step, and the loss."""
    params, loss_args, opt_state = carry

    def loss(params):
        if not jax.tree.leaves(loss_args):  # training and evaluation are one
            return network.loss_fn(params, batch, *loss_args), loss_args
        model = nnx.merge(network.start, params, *loss_args, copy=True)
        value = network.factor * cross_entropy(model(batch[0]), batch[1])
        return value, (nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param))),)

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
    extra = {"batch": batch, "loss_args": loss_args}
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return (optax.apply_updates(params, updates), new, opt_state), value


def pick(parts, rows):
    """The batch of these rows; all data where there are none."""
    return jax.tree.map(lambda x: x[rows], parts) if rows.size else parts


def take_steps(network, tx, carry, parts, rows):
    """A scan over `rows`, (steps, batch size): the carry at its end, all losses."""
    one = lambda carry, rows: step(network, tx, carry, pick(parts, rows))
    return jax.lax.scan(one, carry, rows)


@functools.partial(jax.jit, static_argnames=("method", "network"))
def _scanned(method, network, numbers, carry, parts, rows, first):
    made = method, network, numbers

    def one(carry, at):
        batch = pick(parts, at[1])
        return stepped(*made, refreshed(*made, carry, batch, at[0]), batch), None

    counts = first + jnp.arange(len(rows))
    return jax.lax.scan(one, carry, (counts, rows))[0]


@functools.partial(jax.jit, static_argnames=("method", "network"))
def stepped(method, network, numbers, carry, batch):
    """One step, after what is measured at it."""
    tx = transformation(method, numbers, network)
    return step(network, tx, carry, batch)[0]


def _by_hand(method, network, numbers, carry, parts, rows, first):
    made, take = (method, network, numbers), jax.jit(pick)
    for count, some in enumerate(rows, first):
        batch = take(parts, some)
        carry = stepped(*made, refreshed(*made, carry, batch, count), batch)
    return carry


def outcomes(network, params, loss_args, batch):
    """For each example of a batch, in evaluation mode: the loss, and is it wrong?"""
    model = nnx.merge(network.start, params, *loss_args, copy=True)
    model.eval()
    logits = model(batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return losses, logits.argmax(-1) != batch[1]


def judge(network, params, loss_args, batch):
    """Sums over a batch: the loss and the errors."""
    return jnp.stack([x.sum() for x in outcomes(network, params, loss_args, batch)])


_outcomes, _judge = (jax.jit(x, static_argnames="network") for x in (outcomes, judge))


def evaluate(network, params, loss_args, data_, size=1000):
    """(mean loss, error) over a data set."""
    starts = range(0, len(data_[1]), size)
    parts = [tuple(x[i : i + size] for x in data_) for i in starts]
    sums = [_judge(network, params, loss_args, part) for part in parts]
    return np.sum(sums, axis=0, dtype=float) / data_[1].size


def class_errors(network, params, loss_args, data_):
    """The error of each class, by label."""
    wrong, labels = _outcomes(network, params, loss_args, data_)[1], data_[1]
    return np.bincount(labels, wrong) / np.bincount(labels)


class Trained(NamedTuple):
    """A run's end, for experiments that look at it."""

    network: Network
    params: Any
    loss_args: tuple
    opt_state: Any
    data: Any  # (train, test), each (inputs, labels)
    curves: Row  # the steps of the evaluations, and what was seen there


def fit(
    folder: pathlib.Path, task: Task, method: Method, *, learning_rate: float,
    damping: float, epochs: int, seed: int, batch_size: int = 128,
    weight_decay: float = 0.0, eval_every: int | None = None,
    num_evaluations: int | None = None, by_hand: bool = True, factor: float = 1.0,
    until: float = -math.inf, trace_penalty: float = 0.0,
) -> Trained:  # fmt: skip
    """Train, evaluating every so many epochs and at the end, or so many times.

    The latter ends with the last evaluation, each of as many training as test examples.
    A training loss of at most `until` ends the run. After a kill, what `perform` makes
    goes on from an evaluation.
    """
    asked = sorted(dict(locals(), folder=None).items())
    with_factors = method.optimizer.startswith("kfac")
    found = prepare(folder, task, seed, with_factors, factor)
    (train, test, *valid), network, params, loss_args, _ = found
    num, num_batches = len(train[1]), len(train[1]) // batch_size
    if num_evaluations is None:
        every, judged = eval_every or epochs, train
        seen = [n for n in range(1, epochs + 1) if n == epochs or n % every == 0]
        ends = [n * num_batches for n in seen]
    else:
        per = epochs * num_batches // num_evaluations
        ends = [per * (i + 1) for i in range(num_evaluations)]
        judged = tuple(x[: len(test[1])] for x in train)
    rng = np.random.default_rng(seed)
    order = [rng.permutation(num)[: num_batches * batch_size] for _ in range(epochs)]
    numbers = Numbers(learning_rate, damping, ends[-1] if ends else 0, weight_decay)
    numbers = numbers._replace(trace_penalty=trace_penalty)
    tx = transformation(method, numbers, network)
    carry = params, loss_args, tx.init(params)
    advance = _by_hand if by_hand else _scanned
    names = (*CURVES, *(VALID if valid else ()))
    curves: Row = {name: [] for name in ("step", *names, "damping", "variance")}
    if task.imbalance != 1:
        curves["class_errors"] = []
    kept = unfinished(asked)
    if (found := kept.load(carry)) is not None:
        carry, curves = found
    done = curves["step"]
    for start, end in itertools.pairwise([0, *ends]):
        if end in done:
            continue
        rows = np.concatenate(order).reshape(-1, batch_size)[start:end].astype(np.int32)
        carry = advance(method, network, numbers, carry, train, rows, start)
        parts = judged, test, *valid
        scores = np.ravel([evaluate(network, *carry[:2], x) for x in parts])
        new = [end, *rounded(scores), rounded(dampings(carry[2]))]
        new += [None if method.layers else scalar(carry[2], "measured_variance")]
        if task.imbalance != 1:
            new.append(rounded(class_errors(network, *carry[:2], test)))
        for name, value in zip(curves, new, strict=True):
            curves[name].append(value)
        if by_hand and not until < scores[0] < math.inf:
            break
        kept.save(carry, curves)
    return Trained(network, *carry, (train, test), curves)


def largest(done: Trained) -> float:
    """lambda_1 of the Hessian of the first 256 training images, by Lanczos."""
    batch = tuple(x[:NUM_CURVATURE_EXAMPLES] for x in done.data[0])
    loss_fn, params = done.network.loss_fn, done.params
    matvec = hessian.hessian_matvec(loss_fn, params, batch, loss_args=done.loss_args)
    sizes = {"num_steps": NUM_PRODUCTS, "num_probes": 1}
    found = hessian.spectral_density(matvec, params, jax.random.key(0), **sizes)
    return float(found.nodes.max())


def train(
    folder: pathlib.Path, *, task: Row, method: Row, batch_size: int, eval_every=1,
    with_spectral_norm=False, **numbers,
) -> Row:  # fmt: skip
    """Measured by hand; its curves by epoch, and lambda_1 at the end if asked for."""
    numbers |= {"batch_size": batch_size, "eval_every": eval_every}
    made = Task(**task), Method(**method)
    done = fit(folder, *made, **numbers)
    seen, per = done.curves, len(done.data[0][1]) // batch_size
    row: Row = {"epoch": [n / per for n in seen["step"]]}
    row |= {name: seen[name] for name in CURVES}
    row["damping_curve"] = [x[0] if x else None for x in seen["damping"]]
    row["measured_variance"] = [
        None if x is None else rounded(x)[0] for x in seen["variance"]
    ]
    return row | ({"spectral_norm": largest(done)} if with_spectral_norm else {})


def train_scanned(
    folder: pathlib.Path, *, task: Row, method: Row, loss_factor: float = 1.0, **numbers
) -> Row:  # fmt: skip
    """Judged ten times; measured in the step, or by hand where convolutions need it."""
    numbers = {"by_hand": False} | numbers
    numbers |= {"factor": loss_factor, "num_evaluations": 10}
    made = Task(**task), Method(**method)
    done = fit(folder, *made, **numbers)
    names = (name for name in (*CURVES, *VALID) if name in done.curves)
    row = {name: done.curves[name] for name in ("step", *names)}
    curves = np.transpose(done.curves["damping"]).tolist()
    layers = sorted(set(jax.tree.leaves(by_layer(done.params))))
    held = dict(zip(layers, curves, strict=False))
    row["damping_curve"] = held if made[1].layers else next(iter(curves), [])
    return row | {"refused": int(sum(dampings(done.opt_state, "refresh_rejections")))}
