"""Adam with a damping for each layer, in two kinds, by what is taken for its noise.

- "block": the variance of the layer's diagonal block of the Hessian, all other weights
  held.
- "rows": that of the layer's rows, the noise between layers included: the layers' mean,
  weighted by their sizes, is the variance of the whole. One product measures all.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import rmtdamp
from rmtdamp.damping import LearnedDamping, learn_damping
from rmtdamp.hessian import HessianMoments, hvp
from rmtdamp.kronecker import leaf_names
from rmtdamp.transforms import Context


def split_layers(params) -> dict[str, dict]:
    """Weights by layer: {"hidden/0": {"bias": ..., "kernel": ...}, ...}."""
    layers: dict[str, dict] = {}
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        layer, _, part = name.rpartition("/")
        layers.setdefault(layer, {})[part] = leaf
    return layers


def join_layers(layers, like):
    """The tree `like` of the weights by layer."""
    names = [name.rpartition("/") for name in leaf_names(like)]
    leaves = [layers[layer][part] for layer, _, part in names]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


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
        spread = jnp.sum((y - ybar[None]) ** 2) / (num - 1) / v.size  # of a microbatch
        square = ybar @ ybar / v.size - spread / num
        return HessianMoments(v @ ybar / v.size, square, spread / num)

    return {name: of(name) for name in products}


def _by_rows(learner, learned, count, params, batch, loss_args):
    (attempt, *_) = (x.refresh_attempts for x in learned.values())
    key = jax.random.fold_in(jax.random.key(learner.seed), attempt)
    leaves, treedef = jax.tree.flatten(params)
    draw = lambda key, x: jax.random.rademacher(key, x.shape, x.dtype)
    signs = map(draw, jax.random.split(key, len(leaves)), leaves)
    here = batch, jax.tree.unflatten(treedef, signs), loss_args
    found = row_moments(learner.loss_fn, params, *here, learner.num_microbatches)
    names = ("rule", "floor", "decay", "min_shrinkage")
    rule = {name: getattr(learner, name) for name in names}
    return {
        k: learn_damping(old, found[k], count, **rule) for k, old in learned.items()
    }


def _by_block(learner, learned, count, params, batch, loss_args):
    layers = split_layers(params)

    def of(name, old):
        def loss_fn(layer, *args):
            joined = join_layers(layers | {name: layer}, params)
            return learner.loss_fn(joined, *args)

        own = dataclasses.replace(learner, loss_fn=loss_fn)
        size = len(jax.tree.leaves(batch)[0])
        return own.refresh(old, Context(count, layers[name], batch, size, loss_args))

    return {name: of(name, old) for name, old in learned.items()}


KINDS = {"block": _by_block, "rows": _by_rows}


class LayersState(NamedTuple):
    """State of `adam_per_layer`."""

    count: Any  # (), int32, steps taken
    learned: dict[str, LearnedDamping]  # of each layer
    inner: Any  # Adam's


def adam_per_layer(learner, kind: str, every: int):
    """Adam's rescaling, its damping learned for each layer from the layer's noise."""
    adam = rmtdamp.scale_by_adam_shrinkage()

    def init(params):
        learned = {name: learner.init(x) for name, x in split_layers(params).items()}
        return LayersState(jnp.zeros((), jnp.int32), learned, adam.init(params))

    def update(updates, state, params=None, *, batch, loss_args=()):
        count, old, inner = state
        refresh = lambda: KINDS[kind](learner, old, count, params, batch, loss_args)
        learned = jax.lax.cond(count % every == 0, refresh, lambda: old)
        # Adam's moments know no damping; what is not taken is not computed.
        layers = {}
        for name, of in learned.items():
            new, inner = adam.update(updates, state.inner, params, damping=of.damping)
            layers[name] = split_layers(new)[name]
        state = LayersState(optax.safe_increment(count), learned, inner)
        return join_layers(layers, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
