"""nnx model, criterion -> ModelFactors: a copy's layers are tapped from outside."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from rmtdamp._types import Criterion, SampleFn
from rmtdamp.kronecker import (
    Diagonal,
    Fisher,
    ModelFactors,
    Sharing,
    leaf_names,
    make_blocks,
)

from ._hooks import (
    Layers,
    choose_layers,
    refuse_attend,
    taped_convolution,
    taped_dot_general,
)
from ._training import evaluated, state_of


def _name(path: tuple) -> str:
    return "/".join(map(str, path)) or "model"


def _layer(path: tuple, module, leaves: dict[str, tuple]) -> dict | None:
    """The layer's entry for `make_blocks`; None if its block is diagonal."""
    leaf = lambda name: "/".join(map(str, (*path, name)))
    if isinstance(module, nnx.Embed):
        table = leaf("embedding")
        return {"embedding": table} if len(leaves.get(table, ())) == 2 else None
    spec: dict[str, Any] = {"kernel": leaf("kernel")}
    if isinstance(module, nnx.Conv):
        if module.mask is not None:  # its kernel is not what is multiplied
            return None
        spec["groups"] = module.feature_group_count
        shape = tuple(module.kernel_shape)
    elif isinstance(module, nnx.LinearGeneral):
        axes = tuple(module.axis)
        if module.batch_axis or axes != tuple(range(-len(axes), 0)):
            return None
        shape = (*module.in_features, *module.out_features)
        spec["num_outputs"] = math.prod(module.out_features)
    elif isinstance(module, nnx.Linear):
        shape = (module.in_features, module.out_features)
    else:
        return None
    # A stack of layers (nnx.vmap) has another shape; a tied kernel, another name.
    if leaves.get(spec["kernel"]) != shape:
        return None
    if module.bias is not None and leaf("bias") in leaves:
        spec["bias"] = leaf("bias")
    return spec


@functools.cache
def _taped_embed(kind: type[nnx.Embed]) -> type[nnx.Embed]:
    """A class of embeddings that show what they look up; nnx has no hook for it."""

    class TapedEmbed(kind):
        tape: Any

        def __call__(self, inputs, *args, **kwargs):
            return self.tape(inputs, super().__call__(inputs, *args, **kwargs))

        def attend(self, *args, **kwargs):
            refuse_attend(self.tape.args[0])

    return TapedEmbed


def nnx_factors(
    model: nnx.Module,
    criterion: Criterion,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    layers: Layers = None,
    embeddings: Layers = (),
    full: Layers = (),
    wrt: Any = nnx.Param,
    fisher: Fisher = "sampled",
    sample_fn: SampleFn | None = None,
    sharing: Sharing = "expand",
    diagonal: Diagonal = "examples",
    num_terms: float | None = None,
    precision: str | None = "highest",
) -> ModelFactors:
    """Kronecker factors of an unchanged nnx model, for `scale_by_kfac`.

    `nnx.Linear`, `nnx.LinearGeneral` (with it `nnx.MultiHeadAttention`) and `nnx.Conv`
    of any stride, padding, dilation and feature groups get a Kronecker block, the bias
    folded in; all else (bare `nnx.Param`s, layers of `nnx.vmap`, and without
    `embeddings` and `full` embeddings and norms) a diagonal one.
    `rmtdamp.kronecker.block_table(factors_fn.blocks)` says which. Measured in
    evaluation mode, as `curvature_loss`.

    Args:
        model: only its structure is used, and it is left as it is.
        criterion: `criterion(outputs, targets) -> scalar`, the mean loss.
        forward: `forward(model, inputs) -> outputs`; default `model(inputs)`. The
            batch is a pair (inputs, targets).
        layers: which layers get a Kronecker block: names or patterns such as
            "encoder/*", or a function of the name; default all.
        embeddings: which embeddings get a Kronecker block, in the same way; default
            none. Not one of positions, which the examples share, or one that is the
            output layer too.
        full: of which modules the parameters outside layers get a full block together,
            in the same way; default none. For norms: ("*norm*",).
        wrt: the variables that are trained, as for `nnx.Optimizer`.
        fisher: "sampled", "empirical" or "ggn"; this and the rest: see `ModelFactors`.
        sample_fn: draws targets.
        sharing: "expand" or "reduce".
        diagonal: "examples" or "signs".
        num_terms: what brings gradients to the Hessian's scale; None finds it.
        precision: matmul precision.

    Returns:
        `factors_fn(params, batch, key, state)`, where the state is that of
        `rmtdamp.flax.loss_args(model)`, and may be left out for a model without state.
        Make it once.

    Raises:
        ValueError: `layers`, `embeddings` or `full` matches nothing; when measured, an
            embedding that does not see the examples, or is the output layer too.
        TypeError: `model` is no nnx module.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jax
        >>> from flax import nnx
        >>> import rmtdamp, rmtdamp.flax
        >>> from rmtdamp.kronecker import block_table
        >>> def cross_entropy(logits, labels):
        ...     return optax.softmax_cross_entropy_with_integer_labels(
        ...         logits, labels
        ...     ).mean()
        >>> def model_loss(model, batch):
        ...     return cross_entropy(model(batch[0]), batch[1])
        >>> model = nnx.Sequential(
        ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
        ...     nnx.relu,
        ...     nnx.LayerNorm(8, rngs=nnx.Rngs(1)),
        ...     nnx.Linear(8, 3, rngs=nnx.Rngs(2)),
        ... )
        >>> factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
        >>> print(block_table(factors_fn.blocks))
        layer           params        block
        layers/0        (4, 8), (8,)  Kronecker 5 x 8
        layers/2/bias   (8,)          diagonal
        layers/2/scale  (8,)          diagonal
        layers/3        (8, 3), (3,)  Kronecker 9 x 3
        >>> tx = rmtdamp.auto_damping(
        ...     rmtdamp.kfac(0.1, factors_fn),
        ...     rmtdamp.flax.curvature_loss(model, model_loss),
        ... )
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> @nnx.jit
        ... def step(model, optimizer, batch):
        ...     grads = nnx.grad(model_loss)(model, batch)
        ...     state = rmtdamp.flax.loss_args(model)
        ...     optimizer.update(model, grads, batch=batch, loss_args=state)
        >>> step(model, optimizer, (jnp.ones((16, 4)), jnp.arange(16) % 3))
        >>> int(optax.tree.get(optimizer.opt_state, "kfac_measurements")[...])
        1
    """
    copy = evaluated(model, "nnx_factors")
    graphdef, params, rest = nnx.split(copy, wrt, ...)
    leaves = {
        name: tuple(leaf.shape)
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    }
    found = {}
    for path, module in nnx.iter_modules(copy):
        spec = _layer(path, module, leaves)
        if spec is not None:
            found[_name(path)] = spec
    entries, taped = choose_layers(params, found, layers, embeddings, full)

    def model_fn(params, inputs, tape, *state):
        state = state_of(rest, state, "nnx_factors")
        tapped = nnx.merge(graphdef, params, state, copy=True)
        for path, module in nnx.iter_modules(tapped):
            name = _name(path)
            if name not in taped:
                continue
            if isinstance(module, nnx.Conv):
                hook = module.conv_general_dilated
                module.conv_general_dilated = taped_convolution(tape, name, hook)
            elif isinstance(module, nnx.Linear | nnx.LinearGeneral):
                hook = module.dot_general
                module.dot_general = taped_dot_general(tape, name, hook)
            elif isinstance(module, nnx.Embed):
                embed: Any = module
                embed.__class__ = _taped_embed(type(module))
                embed.tape = functools.partial(tape.embedding, name)
        return tapped(inputs) if forward is None else forward(tapped, inputs)

    return ModelFactors(
        model_fn=model_fn,
        criterion=criterion,
        blocks=make_blocks(params, entries),
        fisher=fisher,
        sample_fn=sample_fn,
        sharing=sharing,
        diagonal=diagonal,
        num_terms=num_terms,
        precision=precision,
    )
