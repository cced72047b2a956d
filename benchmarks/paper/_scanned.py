"""One training run of a network without convolutions: a single compiled scan.

Adam with a damping that is held, learned, or learned for each layer, refreshed in the
step every hundred steps, as `auto_adam` does.

A damping per layer comes in two kinds, by what is taken for the layer's noise.

- "block": the variance of the layer's diagonal block of the Hessian, its loss with all
  other weights held. It needs nothing new: each layer has an `auto_damping` of its own,
  whose loss takes the layer's weights as its params and all others through `loss_args`.
- "rows": the variance of the layer's rows of the Hessian, the noise between layers
  included. The mean over layers, weighted by their numbers of weights, is the damping
  that one measurement over all weights gives, and one product measures all layers.
"""

import functools
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
from rmtdamp.damping import LearnedDamping, learn_damping
from rmtdamp.demo._data import load_digits
from rmtdamp.demo._train import RULES, cross_entropy
from rmtdamp.hessian import HessianMoments, hvp

from ._data import load_text
from ._models import build_transformer
from ._runs import Row, rounded
from ._train import (
    Method,
    Network,
    Numbers,
    Task,
    data_of,
    make_model,
    model_loss,
)

EVALUATIONS, LENGTH, EVERY = 10, 64, 100


@functools.cache
def _data(folder, task: Task):
    """(train, test), number of classes; a text is cut into windows."""
    if task.dataset == "digits":
        found = load_digits()
        cut = lambda split: (split[0].reshape(-1, 8, 8, 1), split[1])
        return jax.device_put((cut(found.train), cut(found.test))), found.num_classes
    if task.dataset != "tinyshakespeare":
        return data_of(folder, task)
    *parts, vocabulary = load_text(folder)

    def windows(tokens, num):
        rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)]
        rows = rows.reshape(-1, LENGTH + 1)[:num]
        return rows[:, :-1], rows[:, 1:]

    sizes = task.num_train, task.num_test
    return jax.device_put(tuple(map(windows, parts, sizes))), len(vocabulary)


def _model(task: Task, num_classes, shape, seed) -> nnx.Module:
    if task.model != "transformer":
        return make_model(task, num_classes, shape, seed)
    width = round(LENGTH * task.width)
    return build_transformer(num_classes, LENGTH, width, rngs=nnx.Rngs(seed))


@functools.cache
def _network(task: Task, num_classes, shape) -> Network:
    """Its loss takes (params, batch, rest, factor)."""
    model = _model(task, num_classes, shape, 0)
    loss_fn = rmtdamp.flax.curvature_loss(model, model_loss)
    scaled = lambda params, batch, rest, factor: factor * loss_fn(params, batch, rest)
    return Network(nnx.split(model)[0], scaled, None)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split_layers(params) -> dict[str, dict]:
    """Weights by layer: {"hidden/0": {"bias": ..., "kernel": ...}, ...}."""
    layers: dict[str, dict] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layers.setdefault(_name(path[:-1]), {})[_name(path[-1:])] = leaf
    return layers


def join_layers(layers, like):
    """The tree `like` of the weights by layer."""
    take = lambda path, _: layers[_name(path[:-1])][_name(path[-1:])]
    return jax.tree_util.tree_map_with_path(take, like)


def _layer_loss(loss_fn, name):
    """The loss as a function of one layer; all weights come along, held."""

    def loss(layer, batch, params, *loss_args):
        layers = split_layers(params) | {name: layer}
        return loss_fn(join_layers(layers, params), batch, *loss_args)

    return loss


def by_block(make) -> optax.GradientTransformationExtraArgs:
    """`make(name)` of each layer: a transformation and a state of its own."""

    def init(params):
        return {n: make(n).init(part) for n, part in split_layers(params).items()}

    def update(updates, state, params=None, *, batch, loss_args=()):
        grads, weights = split_layers(updates), split_layers(params)
        found = {
            name: make(name).update(
                grads[name],
                state[name],
                weights[name],
                batch=batch,
                loss_args=(params, *loss_args),
            )
            for name in grads
        }
        new = join_layers({n: x for n, (x, _) in found.items()}, updates)
        return new, {n: x for n, (_, x) in found.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def row_moments(loss_fn, params, batch, key, loss_args, num) -> dict:
    """Layer -> moments of its rows of the Hessian, all from one probe."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    probe = jax.tree.unflatten(treedef, signs)
    micro = jax.tree.map(lambda x: x.reshape(-1, num, *x.shape[1:]), batch)
    micro = jax.tree.map(lambda x: x.swapaxes(0, 1), micro)
    product = lambda part: hvp(loss_fn, params, part, probe, loss_args=loss_args)
    products, probes = split_layers(jax.lax.map(product, micro)), split_layers(probe)

    def of(name):
        flat = lambda xs, n: jnp.concatenate([x.reshape(n, -1) for x in xs], axis=1)
        y = flat(products[name].values(), num)
        v = flat(probes[name].values(), 1)[0]
        ybar = y.mean(0)
        spread = jnp.sum((y - ybar) ** 2) / (num - 1) / v.size  # of a microbatch
        square = ybar @ ybar / v.size - spread / num
        return HessianMoments(v @ ybar / v.size, square, spread / num)

    return {name: of(name) for name in products}


class RowsState(NamedTuple):
    """State of `by_rows`."""

    count: Any  # (), int32, steps taken
    learned: dict[str, LearnedDamping]  # of each layer
    inner: dict  # Adam's, of each layer


def by_rows(
    learner: rmtdamp.DampingLearner, every: int = EVERY
) -> optax.GradientTransformationExtraArgs:
    """Adam's rescaling with a damping for each layer, learned from its rows."""
    adam = rmtdamp.scale_by_adam_shrinkage()

    def init(params):
        layers = split_layers(params)
        return RowsState(
            jnp.zeros((), jnp.int32),
            {name: learner.init(layer) for name, layer in layers.items()},
            {name: adam.init(layer) for name, layer in layers.items()},
        )

    def update(updates, state, params=None, *, batch, loss_args=()):
        def refresh():
            (attempt, *_) = (x.refresh_attempts for x in state.learned.values())
            key = jax.random.fold_in(jax.random.key(learner.seed), attempt)
            num = learner.num_microbatches
            found = row_moments(learner.loss_fn, params, batch, key, loss_args, num)
            options = {n: getattr(learner, n) for n in
                       ("rule", "floor", "decay", "max_damping")}  # fmt: skip
            return {
                name: learn_damping(old, found[name], state.count, **options)
                for name, old in state.learned.items()
            }

        due = state.count % every == 0
        learned = jax.lax.cond(due, refresh, lambda: state.learned)
        grads, weights = split_layers(updates), split_layers(params)
        new = {
            name: adam.update(
                grads[name],
                state.inner[name],
                weights[name],
                damping=learned[name].damping,
            )
            for name in grads
        }
        count = optax.safe_increment(state.count)
        inner = {name: x for name, (_, x) in new.items()}
        new = join_layers({name: x for name, (x, _) in new.items()}, updates)
        return new, RowsState(count, learned, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _transformation(network: Network, method: Method, layers, numbers: Numbers):
    rate = rmtdamp.schedules.linear_anneal_schedule(
        numbers.learning_rate, numbers.total_steps
    )
    if not method.learned:
        return rmtdamp.set_damping(rmtdamp.adam_shrinkage(rate), numbers.damping)
    options = {"floor": numbers.damping, "rule": RULES[method.rule]}
    if layers is None:
        return rmtdamp.auto_adam(rate, network.loss_fn, every=EVERY, **options)
    if layers == "rows":
        inner = by_rows(rmtdamp.DampingLearner(network.loss_fn, **options))
        return optax.chain(inner, optax.scale_by_learning_rate(rate))

    def make(name):
        loss_fn = _layer_loss(network.loss_fn, name)
        learner = rmtdamp.DampingLearner(loss_fn, **options)
        adam = rmtdamp.scale_by_adam_shrinkage()
        return rmtdamp.auto_damping(adam, learner, every=EVERY)

    return optax.chain(by_block(make), optax.scale_by_learning_rate(rate))


def _all(opt_state, name):
    """Every scalar of that name in the state: one, or one per layer."""
    return jnp.stack([x for _, x in optax.tree.get_all_with_path(opt_state, name)])


@functools.partial(jax.jit, static_argnames=("network", "method", "layers"))
def _fit(network, method, layers, numbers, factor, params, rest, parts, order):
    """Train on the rows that `order` names; after each of its chapters, (numbers)."""
    tx = _transformation(network, method, layers, numbers)
    data, parts = parts[0], [[x[: len(parts[1][1])] for x in part] for part in parts]

    def step(carry, rows):
        params, state = carry
        batch = data[0][rows], data[1][rows]
        grads = jax.grad(network.loss_fn)(params, batch, rest, factor)
        updates, state = tx.update(
            grads, state, params, batch=batch, loss_args=(rest, factor)
        )
        return (optax.apply_updates(params, updates), state), None

    def judge(params, part):
        logits = nnx.merge(network.start, params, rest, copy=True)(part[0])
        wrong = logits.argmax(-1) != part[1]
        return [cross_entropy(logits, part[1]), wrong.mean()]

    def chapter(carry, rows):
        carry, _ = jax.lax.scan(step, carry, rows)
        scores = [x for part in parts for x in judge(carry[0], part)]
        return carry, (jnp.stack(scores), _all(carry[1], "damping"))

    (_, state), seen = jax.lax.scan(chapter, (params, tx.init(params)), order)
    refused = _all(state, "refresh_rejections") if method.learned else jnp.zeros(1)
    return *seen, refused


def train_scanned(
    folder: pathlib.Path,
    *,
    task: Row,
    method: Row,
    learning_rate: float,
    damping: float,
    epochs: int,
    batch_size: int,
    seed: int,
    loss_factor: float = 1.0,
    layers: str | None = None,
) -> Row:
    """A run; its curves, the damping's for each layer if `layers` has it learned so."""
    start = time.perf_counter()
    parts, num_classes = _data(folder, Task(**task))
    shape = parts[0][0].shape[1:]
    network = _network(Task(**task), num_classes, shape)
    model = _model(Task(**task), num_classes, shape, seed)
    params, rest = map(nnx.as_pure, nnx.split(model, nnx.Param, ...)[1:])
    rng, num = np.random.default_rng(seed), len(parts[0][1])
    num_batches = num // batch_size
    order = [rng.permutation(num)[: num_batches * batch_size] for _ in range(epochs)]
    per = epochs * num_batches // EVALUATIONS
    order = np.concatenate(order)[: EVALUATIONS * per * batch_size]
    order = order.reshape(EVALUATIONS, per, batch_size).astype(np.int32)
    scores, dampings, refused = _fit(
        network,
        Method(**method),
        layers,
        Numbers(learning_rate, damping, 0.0, EVALUATIONS * per),
        loss_factor,
        params,
        rest,
        parts,
        order,
    )
    names = ("train_loss", "train_error", "test_loss", "test_error")
    row: Row = {"step": [per * (i + 1) for i in range(EVALUATIONS)]}
    row |= {n: rounded(x) for n, x in zip(names, np.asarray(scores).T, strict=True)}
    row["damping_curve"] = rounded(dampings[:, 0])
    if layers is not None:
        found = zip(split_layers(params), np.asarray(dampings).T, strict=True)
        row["damping_curve"] = {name: rounded(x) for name, x in found}
    row["refused"] = int(refused.sum())
    return row | {"seconds": round(time.perf_counter() - start, 1)}
