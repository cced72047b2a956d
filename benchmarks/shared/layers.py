"""Adam with a damping for each layer, in two kinds, by what is taken for its noise.

- "block": the variance of the layer's diagonal block of the Hessian, that of the loss
  as a function of the layer alone, with all other weights held.
- "rows": the variance of the layer's rows of the Hessian, the noise between layers
  included. The mean over layers, weighted by their numbers of weights, is the damping
  that one measurement over all weights gives, and one product measures all layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import rmtdamp
from rmtdamp.damping import LearnedDamping, learn_damping
from rmtdamp.hessian import HessianMoments, hvp, moments


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


def row_moments(loss_fn, params, batch, probe, loss_args, num) -> dict:
    """Layer -> moments of its rows of the Hessian, from one probe of signs.

    With y_i the product of microbatch i of `num`, and l a layer of P_l weights:
    nu = P_l^-1 v_l^T ybar_l, and the microbatches' variance of y_l over P_l.
    """
    micro = jax.tree.map(
        lambda x: x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1), batch
    )
    product = lambda part: hvp(loss_fn, params, part, probe, loss_args=loss_args)
    products, probes = split_layers(jax.lax.map(product, micro)), split_layers(probe)
    flat = lambda xs, n: jnp.concatenate([x.reshape(n, -1) for x in xs], axis=1)

    def of(name):
        y, (v,) = flat(products[name].values(), num), flat(probes[name].values(), 1)
        ybar = y.mean(0)
        spread = jnp.sum((y - ybar) ** 2) / (num - 1) / v.size  # of a microbatch
        square = ybar @ ybar / v.size - spread / num
        return HessianMoments(v @ ybar / v.size, square, spread / num)

    return {name: of(name) for name in products}


def _by_rows(learner, params, batch, key, loss_args):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = lambda key, x: jax.random.rademacher(key, x.shape, x.dtype)
    probe = jax.tree.unflatten(treedef, map(draw, keys, leaves))
    num = learner.num_microbatches
    return row_moments(learner.loss_fn, params, batch, probe, loss_args, num)


def _by_block(learner, params, batch, key, loss_args):
    layers = split_layers(params)

    def of(name):
        def loss_fn(layer, batch, *loss_args):
            return learner.loss_fn(
                join_layers(layers | {name: layer}, params), batch, *loss_args
            )

        return moments(
            loss_fn,
            layers[name],
            batch,
            key,
            loss_args=loss_args,
            num_microbatches=learner.num_microbatches,
            precision=learner.precision,
            stderr=False,
        )

    return {name: of(name) for name in layers}


KINDS = {"block": _by_block, "rows": _by_rows}


class LayersState(NamedTuple):
    """State of `adam_per_layer`."""

    count: Any  # (), int32, steps taken
    learned: dict[str, LearnedDamping]  # of each layer
    inner: Any  # Adam's


def adam_per_layer(
    learner, kind: str, every: int
) -> optax.GradientTransformationExtraArgs:
    """Adam's rescaling, its damping learned for each layer from the layer's noise."""
    adam = rmtdamp.scale_by_adam_shrinkage()
    options = {
        n: getattr(learner, n) for n in ("rule", "floor", "decay", "max_damping")
    }

    def init(params):
        learned = {name: learner.init(x) for name, x in split_layers(params).items()}
        return LayersState(jnp.zeros((), jnp.int32), learned, adam.init(params))

    def update(updates, state, params=None, *, batch, loss_args=()):
        def refresh():
            attempt = next(iter(state.learned.values())).refresh_attempts
            key = jax.random.fold_in(jax.random.key(learner.seed), attempt)
            found = KINDS[kind](learner, params, batch, key, loss_args)
            return {
                name: learn_damping(old, found[name], state.count, **options)
                for name, old in state.learned.items()
            }

        due = state.count % every == 0
        learned = jax.lax.cond(due, refresh, lambda: state.learned)
        # Adam's moments know no damping; what is not taken is not computed.
        layers, inner = {}, state.inner
        for name, of in learned.items():
            new, inner = adam.update(updates, state.inner, params, damping=of.damping)
            layers[name] = split_layers(new)[name]
        count = optax.safe_increment(state.count)
        return join_layers(layers, updates), LayersState(count, learned, inner)

    return optax.GradientTransformationExtraArgs(init, update)
