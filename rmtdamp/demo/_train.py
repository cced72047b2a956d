"""One training run: a Flax network, an optax transformation, a record per epoch."""

import functools
import itertools
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtdamp
import rmtdamp.flax
from rmtdamp.damping import StabilityFloor

from ._data import Dataset
from ._unfinished import Unfinished

FAST = "-fast"  # at the end of a method's name: at a hundred times the learning rate
DEFAULT_METHODS = (
    "sgd",
    "adam",
    "auto-adam",
    "adam-fast",
    "auto-adam-fast",
    "adam-region-fast",
)
METHODS = (
    *DEFAULT_METHODS,
    "adam-region",
    "adam-shrinkage",
    "auto-lanczos",
    "kfac",
    "auto-kfac",
    "auto-spectral",
    "auto-shampoo",
)


class Settings(NamedTuple):
    """What one run is made with; each field is an option of the command line."""

    epochs: int = 60
    batch_size: int = 128
    width: int = 128
    learning_rate: float = 1e-3
    sgd_learning_rate: float = 0.05
    damping: float = 1e-3
    floor: float = 1e-8
    every: int = 20
    rule: str = "stability-floor"
    form: str = "damping"


RULES = {
    "stability-floor": StabilityFloor(),
    "identity": rmtdamp.identity_target,
    "scaled-identity": rmtdamp.scaled_identity_target,
}


class Record(NamedTuple):
    """The state of a run at the end of an epoch."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    damping: float | None  # None where the optimiser holds no damping in its state
    measured_variance: float | None
    steps_per_second: float

    @property
    def diverged(self) -> bool:
        """Whether a loss is no longer finite."""
        return not (math.isfinite(self.train_loss) and math.isfinite(self.test_loss))


class Classifier(nnx.Module):
    """A multilayer perceptron with two hidden layers."""

    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)
        )

    def __call__(self, x):
        """Logits of flat images."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def build(sizes: tuple[int, ...], seed: int):
    """(loss_fn, predict, params) of a fresh network; the functions are shared."""
    model = Classifier(sizes, nnx.Rngs(seed))
    loss_fn, predict = _functions(sizes)
    return loss_fn, predict, nnx.as_pure(nnx.state(model, nnx.Param))


def cross_entropy(logits, labels):
    """The mean loss over a batch."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


@functools.cache
def _functions(sizes):
    """One pair per architecture, so that seeds and methods share what is compiled."""
    graphdef, _ = nnx.split(Classifier(sizes, nnx.Rngs(0)))

    def predict(params, images):
        return nnx.merge(graphdef, params)(images)

    def loss_fn(params, batch):
        images, labels = batch
        return cross_entropy(predict(params, images), labels)

    return loss_fn, predict


@functools.cache
def _factors(sizes):
    return rmtdamp.flax.nnx_factors(Classifier(sizes, nnx.Rngs(0)), cross_entropy)


@functools.cache
def transformation(method: str, settings: Settings, sizes, total_steps: int):
    """The optimiser that a method's name stands for; one object, compiled once."""
    return optax.with_extra_args_support(
        _optimiser(method, settings, sizes, total_steps)
    )


def _optimiser(method, settings, sizes, total_steps):
    anneal = rmtdamp.schedules.linear_anneal_schedule
    peak = settings.learning_rate * (100 if method.endswith(FAST) else 1)
    rate, method = anneal(peak, total_steps), method.removesuffix(FAST)
    every, rule = settings.every, RULES[settings.rule]
    if method == "auto-adam" and isinstance(rule, StabilityFloor):
        rule = StabilityFloor.for_adam()
    learner = rmtdamp.DampingLearner(
        _functions(sizes)[0], floor=settings.floor, rule=rule
    )
    subspace = rmtdamp.RitzMeasurer(learner.loss_fn, num_steps=20)
    kfac = lambda: rmtdamp.kfac(rate, _factors(sizes))
    make = {
        "sgd": lambda: optax.sgd(
            anneal(settings.sgd_learning_rate, total_steps), momentum=0.9
        ),
        "adam": lambda: optax.adam(rate),
        "adam-region": lambda: rmtdamp.trust_region(optax.adam(rate), learner.loss_fn),
        "adam-shrinkage": lambda: rmtdamp.set_damping(
            rmtdamp.adam_shrinkage(rate, form=settings.form), settings.damping
        ),
        "auto-adam": lambda: rmtdamp.auto_adam(
            rate, learner, refresh_every=every, form=settings.form
        ),
        "kfac": lambda: rmtdamp.set_damping(kfac(), settings.damping),
    }
    learned = {
        "auto-lanczos": lambda: rmtdamp.lanczos_newton(
            rate, subspace, refresh_every=every, momentum=None
        ),
        "auto-kfac": kfac,
        "auto-spectral": lambda: rmtdamp.spectral_descent(rate),
        "auto-shampoo": lambda: rmtdamp.shampoo(rate, eigen_every=every),
    }
    if method in make:
        return make[method]()
    if method in learned:
        return rmtdamp.auto_damping(
            learned[method](), learner, refresh_every=every, learning_rate=rate
        )
    raise ValueError(f"method is {method!r}: choose from {', '.join(METHODS)}")


@functools.partial(jax.jit, static_argnames=("tx", "loss_fn"))
def _train_epoch(tx, loss_fn, params, opt_state, data, order):
    def step(carry, rows):
        params, opt_state = carry
        batch = jax.tree.map(lambda x: x[rows], data)
        grads = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), order)[0]


@functools.partial(jax.jit, static_argnames=("predict",))
def _evaluate(predict, params, data):
    logits = predict(params, data[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data[1])
    return jnp.mean(losses), jnp.mean(jnp.argmax(logits, axis=1) == data[1])


def scalar(opt_state, name) -> float | None:
    """A number of the optimiser's state, None where it has none of that name."""
    value = optax.tree.get(opt_state, name)
    return None if value is None or math.isnan(value) else float(value)


def train(
    data: Dataset,
    method: str,
    settings: Settings,
    seed: int,
    unfinished: Unfinished = Unfinished(None),  # noqa: B008, holds no state
) -> Iterator[Record]:
    """Train once, yielding a record per epoch; those that `unfinished` kept come first.

    The seed fixes the initial weights and the order of the data, so that the methods
    at one seed differ in nothing else. The first epoch's speed may hold compilation. A
    run whose training loss is no longer finite ends there.
    """
    sizes = (data.train[0].shape[1], settings.width, settings.width, data.num_classes)
    loss_fn, predict, params = build(sizes, seed)
    num_batches = len(data.train[1]) // settings.batch_size
    tx = transformation(method, settings, sizes, settings.epochs * num_batches)
    opt_state = tx.init(params)
    train_data, test_data = jax.device_put((data.train, data.test))
    rng = np.random.default_rng(seed)
    records = []
    if (kept := unfinished.load((params, opt_state))) is not None:
        (params, opt_state), rows = kept
        records = [Record(*row) for row in rows]
    yield from records
    for epoch in range(1, settings.epochs + 1):
        order = rng.permutation(len(data.train[1]))[: num_batches * settings.batch_size]
        if epoch <= len(records):
            continue
        order = jnp.asarray(order.reshape(num_batches, -1))
        start = time.perf_counter()
        params, opt_state = jax.block_until_ready(
            _train_epoch(tx, loss_fn, params, opt_state, train_data, order)
        )
        seconds = time.perf_counter() - start
        record = Record(
            epoch,
            *map(float, _evaluate(predict, params, train_data)),
            *map(float, _evaluate(predict, params, test_data)),
            damping=scalar(opt_state, "damping"),
            measured_variance=scalar(opt_state, "measured_variance"),
            steps_per_second=num_batches / seconds,
        )
        records.append(record)
        yield record
        if record.diverged:
            return
        unfinished.save((params, opt_state), records)
