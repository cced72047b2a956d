"""linen model as a function, criterion -> ModelFactors: layers are met when called.

Inside `flax.linen.intercept_methods` a layer's call is answered by a clone of the layer
whose product is shown to the tape.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from rmtdamp._types import Criterion, Params, SampleFn
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

_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed)


def _name(module: nn.Module) -> str:
    return "/".join(module.path) or "model"


def _intercept(answer: Callable) -> Any:
    """Let `answer(call, context, args, kwargs)` answer layers' calls, but for None."""
    inside = False

    def interceptor(next_fun, args, kwargs, context):
        nonlocal inside
        module = context.module
        of_layer = context.method_name in ("__call__", "attend")
        if not isinstance(module, _LAYERS) or not of_layer or inside:
            return next_fun(*args, **kwargs)
        inside = True  # the clone's own call goes its way
        try:
            outputs = answer(next_fun, context, args, kwargs)
        finally:
            inside = False
        return next_fun(*args, **kwargs) if outputs is None else outputs

    return nn.intercept_methods(interceptor)


def _function(module, attribute: str) -> Callable | None:
    made = getattr(module, f"{attribute}_cls", None)
    return made() if made else getattr(module, attribute, None)


def _taped_call(tape, next_fun, context, args, kwargs):
    module, name = context.module, _name(context.module)
    if context.method_name == "attend":
        refuse_attend(name)
    if isinstance(module, nn.Embed):
        return tape.embedding(name, _inputs(args, kwargs), next_fun(*args, **kwargs))
    if isinstance(module, nn.Conv):
        attribute, wrap = "conv_general_dilated", taped_convolution
    else:
        attribute, wrap = "dot_general", taped_dot_general
    hooks: dict[str, Any] = {f"{attribute}_cls": None}
    hooks[attribute] = wrap(tape, name, _function(module, attribute))
    clone = module.clone(parent=None, **hooks)
    return clone.apply({"params": module.variables["params"]}, *args, **kwargs)


def _inputs(args, kwargs):
    return args[0] if args else kwargs["inputs"]


def _layer(module, inputs, leaves: dict[str, tuple]) -> dict | None:
    """The layer's entry for `make_blocks`; None if its block is diagonal."""
    leaf = lambda name: "/".join((*module.path, name))
    if isinstance(module, nn.Embed):
        table = leaf("embedding")
        return {"embedding": table} if len(leaves.get(table, ())) == 2 else None
    spec: dict[str, Any] = {"kernel": leaf("kernel")}
    if isinstance(module, nn.Conv):
        if module.mask is not None:  # its kernel is not what is multiplied
            return None
        spec["groups"] = module.feature_group_count
    elif isinstance(module, nn.DenseGeneral):
        axes = [module.axis] if isinstance(module.axis, int) else module.axis
        axes = [axis % inputs.ndim for axis in axes]
        trailing = list(range(inputs.ndim - len(axes), inputs.ndim))
        if module.batch_dims or axes != trailing:
            return None
        features = module.features
        spec["num_outputs"] = (
            features if isinstance(features, int) else math.prod(features)
        )
    kernel = module.variables["params"]["kernel"]
    shapes = [leaf.shape for leaf in jax.tree.leaves(kernel)]
    # Params of another model, or under another name, are none of ours.
    if [leaves.get(spec["kernel"])] != shapes:
        return None
    if module.use_bias and leaf("bias") in leaves:
        spec["bias"] = leaf("bias")
    return spec


def linen_factors(
    model_fn: Callable[..., Any],
    criterion: Criterion,
    params: Params,
    inputs: Any,
    *,
    loss_args: tuple[Any, ...] = (),
    layers: Layers = None,
    embeddings: Layers = (),
    full: Layers = (),
    fisher: Fisher = "sampled",
    sample_fn: SampleFn | None = None,
    sharing: Sharing = "expand",
    diagonal: Diagonal = "examples",
    num_terms: float | None = None,
    precision: str | None = "highest",
) -> ModelFactors:
    """Kronecker factors of an unchanged linen model, for `scale_by_kfac`.

    `nn.Dense`, `nn.DenseGeneral` (with it attention) and `nn.Conv` of any stride,
    padding, dilation and feature groups get a Kronecker block, the bias folded in; all
    else (bare params, layers inside `nn.scan`, and without `embeddings` and `full`
    embeddings and norms) a diagonal one.
    `rmtdamp.kronecker.block_table(factors_fn.blocks)` says which.

    Args:
        model_fn: `model_fn(params, inputs, *loss_args) -> outputs`, in evaluation mode;
            as a rule `lambda params, x: model.apply({"params": params}, x)`.
        criterion: `criterion(outputs, targets) -> scalar`, the mean loss.
        params: as trained, for shapes.
        inputs: an example of the model's inputs, for shapes.
        loss_args: an example of further arguments (batch statistics), for shapes.
        layers: which layers get a Kronecker block: names or patterns such as
            "encoder/*", or a function of the name; default all.
        embeddings: which embeddings get a Kronecker block, in the same way; default
            none. Not one of positions, which the examples share, or one that is the
            output layer too.
        full: of which modules the parameters outside layers get a full block together,
            in the same way; default none. For norms: ("*norm*",).
        fisher: "sampled", "empirical" or "ggn"; this and the rest: see `ModelFactors`.
        sample_fn: draws targets.
        sharing: "expand" or "reduce".
        diagonal: "examples" or "signs".
        num_terms: what brings gradients to the Hessian's scale; None finds it.
        precision: matmul precision.

    Returns:
        `factors_fn(params, batch, key, *loss_args)`, batch a pair (inputs, targets).
        Make it once.

    Raises:
        ValueError: `layers`, `embeddings` or `full` matches nothing; when measured, an
            embedding that does not see the examples, or is the output layer too.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import flax.linen as nn
        >>> import rmtdamp, rmtdamp.flax
        >>> from rmtdamp.kronecker import block_table
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> def model_fn(params, x):
        ...     return model.apply({"params": params}, x)
        >>> def criterion(logits, labels):
        ...     return optax.softmax_cross_entropy_with_integer_labels(
        ...         logits, labels
        ...     ).mean()
        >>> x = jnp.ones((16, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> factors_fn = rmtdamp.flax.linen_factors(model_fn, criterion, params, x)
        >>> print(block_table(factors_fn.blocks))
        layer     params        block
        layers_0  (4, 8), (8,)  Kronecker 5 x 8
        layers_2  (8, 3), (3,)  Kronecker 9 x 3
    """
    if hasattr(model_fn, "lower"):  # jitted: what it remembers would escape the tape
        model_fn = getattr(model_fn, "__wrapped__", model_fn)
    leaves = {
        name: tuple(leaf.shape)
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    }
    found: dict[str, dict] = {}

    def discover(next_fun, context, args, kwargs):
        module = context.module
        if context.method_name == "__call__":
            spec = _layer(module, _inputs(args, kwargs), leaves)
            if spec is not None:
                found[_name(module)] = spec

    with _intercept(discover):
        # A function of its own: JAX remembers the shapes of one that it has met.
        jax.eval_shape(lambda *args: model_fn(*args), params, inputs, *loss_args)
    entries, taped = choose_layers(params, found, layers, embeddings, full)

    def taped_fn(params, inputs, tape, *loss_args):
        def answer(next_fun, context, args, kwargs):
            if _name(context.module) in taped:
                return _taped_call(tape, next_fun, context, args, kwargs)
            return None

        with _intercept(answer):
            return model_fn(params, inputs, *loss_args)

    return ModelFactors(
        model_fn=taped_fn,
        criterion=criterion,
        blocks=make_blocks(params, entries),
        fisher=fisher,
        sample_fn=sample_fn,
        sharing=sharing,
        diagonal=diagonal,
        num_terms=num_terms,
        precision=precision,
    )
