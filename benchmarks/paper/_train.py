"""One training run of an image model, as the paper's experiments train.

Every measurement (the damping, KFAC's factors) is made by hand between steps, never in
a conditional: XLA runs convolutions thirty times slower there on a CPU.
"""

import functools
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtdamp
import rmtdamp.flax
from rmtdamp import hessian
from rmtdamp.demo._train import RULES, cross_entropy, scalar

from . import _models
from ._data import augment, load, standardise, take
from ._runs import Row

SCHEDULES = {
    "linear": rmtdamp.schedules.linear_anneal_schedule,
    "ramp": rmtdamp.schedules.ramp_anneal_schedule,
    "constant": lambda rate, steps: lambda count: rate,
}
NUM_CURVATURE_EXAMPLES = 256
CURVES = (
    "epoch",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
    "damping_curve",
    "measured_variance",
)


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
    augmented: bool = False


class Method(NamedTuple):
    """An optimiser; what is compiled depends on this and not on its numbers."""

    optimizer: str  # sgd, adam or kfac
    schedule: str = "linear"
    learned: bool = False  # the damping, from a floor; otherwise it is held
    rule: str = "identity"
    form: str = "damping"
    every: int = 100  # steps between refreshes of the damping
    factor_every: int = 10  # steps between measurements of KFAC's factors
    eigen_every: int = 100


class Numbers(NamedTuple):
    """The optimiser's numbers, traced."""

    learning_rate: float
    damping: float  # held, or the floor of the learned one
    weight_decay: float
    total_steps: int


class Network(NamedTuple):
    """Functions of one architecture, made once so that what is compiled is shared."""

    start: nnx.GraphDef
    loss_fn: object  # (params, batch, rest) -> loss, in evaluation mode
    factors_fn: object


@functools.cache
def data_of(folder: pathlib.Path, task: Task):
    """(train, test) on the device: standardised images, labels."""
    full = load(task.dataset, folder, coarse=task.coarse)
    if task.num_classes is not None:
        kept = lambda x, y: (x[y < task.num_classes], y[y < task.num_classes])
        full = full._replace(
            train=kept(*full.train),
            test=kept(*full.test),
            num_classes=task.num_classes,
        )
    found = take(full, num_train=task.num_train, num_test=task.num_test)
    return jax.device_put(standardise(found, pool=task.pool)), found.num_classes


def make_model(task: Task, num_classes: int, image_shape, seed: int) -> nnx.Module:
    """The task's model, fresh."""
    return _models.build(
        task.model,
        num_classes=num_classes,
        image_shape=image_shape,
        width=task.width,
        rngs=nnx.Rngs(seed),
    )


def model_loss(model, batch):
    """The mean loss of a model over a batch."""
    return cross_entropy(model(batch[0]), batch[1])


@functools.cache
def network(task: Task, num_classes: int, image_shape, with_factors: bool) -> Network:
    """The functions of the task's model."""
    model = make_model(task, num_classes, image_shape, 0)
    return Network(
        start=nnx.split(model)[0],
        loss_fn=rmtdamp.flax.curvature_loss(model, model_loss),
        factors_fn=(
            rmtdamp.flax.nnx_factors(model, cross_entropy, fisher="empirical")
            if with_factors
            else None
        ),
    )


def transformation(method: Method, numbers: Numbers, network: Network):
    """The optax transformation; `numbers` may be traced."""
    rate = SCHEDULES[method.schedule](numbers.learning_rate, numbers.total_steps)
    decay = optax.add_decayed_weights(numbers.weight_decay)
    if method.optimizer == "sgd":
        return optax.with_extra_args_support(
            optax.chain(decay, optax.sgd(rate, momentum=0.9))
        )
    if method.optimizer == "adam":
        inner = optax.chain(
            rmtdamp.scale_by_adam_shrinkage(form=method.form),
            decay,
            optax.scale_by_learning_rate(rate),
        )
    else:
        inner = rmtdamp.kfac(rate, network.factors_fn, factor_every=None)
    if method.learned:
        return rmtdamp.auto_damping(
            inner, learner_of(method, numbers, network), every=None
        )
    return rmtdamp.set_damping(inner, numbers.damping)


def learner_of(method: Method, numbers: Numbers, network: Network):
    """What measures the damping: the training batch's own eight microbatches."""
    return rmtdamp.DampingLearner(
        network.loss_fn, floor=numbers.damping, rule=RULES[method.rule]
    )


@functools.partial(jax.jit, static_argnames=("augmented",))
def _batch(data, rows, key, augmented):
    images, labels = data[0][rows], data[1][rows]
    if augmented:
        images = augment(key, images, pad=images.shape[1] // 8)
    return images, labels


@functools.partial(
    jax.jit, static_argnames=("method", "network"), donate_argnames=("opt_state",)
)
def _step(method, network, numbers, params, rest, opt_state, batch):
    tx = transformation(method, numbers, network)

    def loss(params):
        model = nnx.merge(network.start, params, rest, copy=True)
        return model_loss(model, batch), nnx.as_pure(
            nnx.state(model, nnx.Not(nnx.Param))
        )

    grads, rest = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), rest, opt_state


@functools.partial(jax.jit, static_argnames=("network",))
def _losses(network, params, rest, batch):
    """Sums over a batch, in evaluation mode: the loss and the errors."""
    model = nnx.merge(network.start, params, rest, copy=True)
    model.eval()
    logits = model(batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.stack([losses.sum(), (logits.argmax(1) != batch[1]).sum()])


def evaluate(network, params, rest, data, size=1000):
    """(mean loss, error) over a data set."""
    total, n = np.zeros(2), len(data[1])
    for i in range(0, n, size):
        total += np.asarray(
            _losses(
                network, params, rest, (data[0][i : i + size], data[1][i : i + size])
            )
        )
    return float(total[0] / n), float(total[1] / n)


def largest(network, params, rest, data, seed=0, num_products=12) -> float:
    """lambda_1 of the Hessian of the first 256 training images, by Lanczos."""
    batch = (data[0][:NUM_CURVATURE_EXAMPLES], data[1][:NUM_CURVATURE_EXAMPLES])
    matvec = hessian.hessian_matvec(network.loss_fn, params, batch, loss_args=(rest,))
    spectrum = hessian.spectral_density(
        matvec, params, jax.random.key(seed), num_steps=num_products, num_probes=1
    )
    return float(jnp.max(spectrum.nodes))


class Trained(NamedTuple):
    """A run's end, for experiments that look at it."""

    network: Network
    params: object
    rest: object
    opt_state: object
    data: Any  # (train, test), each (images, labels)
    curves: Row


def fit(
    folder: pathlib.Path,
    task: Task,
    method: Method,
    *,
    learning_rate: float,
    damping: float,
    epochs: int,
    seed: int,
    batch_size: int = 128,
    weight_decay: float = 0.0,
    eval_every: int | None = None,
) -> Trained:
    """Train; the seed fixes initial weights, the order of the data and the crops.

    Evaluated every so many epochs, if asked for, and at the end.
    """
    (train, test), num_classes = data_of(folder, task)
    shape = train[0].shape[1:]
    net = network(task, num_classes, shape, method.optimizer == "kfac")
    _, params, rest = nnx.split(
        make_model(task, num_classes, shape, seed), nnx.Param, ...
    )
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    num_batches = len(train[1]) // batch_size
    numbers = Numbers(learning_rate, damping, weight_decay, epochs * num_batches)
    opt_state = transformation(method, numbers, net).init(params)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    curves: Row = {name: [] for name in CURVES}
    step = 0
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(train[1]))[: num_batches * batch_size]
        for rows in order.reshape(num_batches, batch_size):
            batch = _batch(train, rows, jax.random.fold_in(key, step), task.augmented)
            if method.optimizer == "kfac" and step % method.factor_every == 0:
                opt_state = rmtdamp.refresh_factors(
                    opt_state,
                    net.factors_fn,
                    params,
                    batch,
                    loss_args=(rest,),
                    eigen=step % method.eigen_every == 0,
                )
            if method.learned and step % method.every == 0:
                opt_state = rmtdamp.refresh_damping(
                    opt_state,
                    learner_of(method, numbers, net),
                    params,
                    batch,
                    loss_args=(rest,),
                )
            params, rest, opt_state = _step(
                method, net, numbers, params, rest, opt_state, batch
            )
            step += 1
        if epoch == epochs or (eval_every and epoch % eval_every == 0):
            seen = [
                *evaluate(net, params, rest, train),
                *evaluate(net, params, rest, test),
            ]
            seen += [
                scalar(opt_state, "damping"),
                scalar(opt_state, "measured_variance"),
            ]
            for name, value in zip(curves, [epoch, *seen], strict=True):
                curves[name].append(value if value is None else float(f"{value:.5g}"))
            if not math.isfinite(seen[0]):
                break
    return Trained(net, params, rest, opt_state, (train, test), curves)


def train(
    folder: pathlib.Path,
    *,
    task: Row,
    method: Row,
    learning_rate: float,
    damping: float,
    epochs: int,
    batch_size: int,
    seed: int,
    weight_decay: float = 0.0,
    eval_every: int = 1,
    with_spectral_norm: bool = False,
) -> Row:
    """A run of `fit` as a row: its curves, and lambda_1 at the end if asked for."""
    start = time.perf_counter()
    done = fit(
        folder,
        Task(**task),
        Method(**method),
        learning_rate=learning_rate,
        damping=damping,
        weight_decay=weight_decay,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        eval_every=eval_every,
    )
    row = {**done.curves}
    if with_spectral_norm:
        row["spectral_norm"] = largest(
            done.network, done.params, done.rest, done.data[0]
        )
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row
