"""What a model shows to its tape, looked at before anything is measured.

The model is traced, and its jaxpr says whether the factors of a layer would be those of
its own parameter: that its outputs depend on the examples, that it sits in no
transformed part, that it multiplies by its parameter, does nothing else, and shares it
with nobody; and that the model goes on with what the tape returns.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp

from rmtdamp._jax import depends, is_traced
from rmtdamp._tree import num_examples


def zeros_like_outputs(seen, blocks, params, inputs, loss_args):
    """Zeros for each call of a layer, whose place in the model is looked at first.

    Args:
        seen: (names or None, params, inputs, loss_args) -> outputs and kernels by name,
            and what the model returns.
        blocks: of the params.
        params: pytree of arrays.
        inputs: of the model.
        loss_args: further arguments of the model.

    Returns:
        Per layer a list of arrays.

    Raises:
        ValueError: a layer's outputs belong to the inside of a scan, vmap, ..., or do
            not depend on the inputs, or its kernel is not its parameter.
    """

    def trace(names):
        look = jax.make_jaxpr(functools.partial(seen, names), return_shape=True)
        try:
            traced, found = look(params, inputs, loss_args)
        except jax.errors.UnexpectedTracerError:
            return None
        # What came from neither arguments nor constants.
        return None if is_traced(traced.consts) else (traced.jaxpr, *found)

    whole = trace(None)
    if whole is None:
        named = [block.name for block in blocks if block.groups]
        inside = [name for name in named if trace({name}) is None]
        raise ValueError(
            f"layers {', '.join(inside or named)} sit inside a transformed part of the "
            "model (scan, vmap, jit, checkpoint), from which their inputs cannot be "
            "handed out: leave them to diagonal blocks (layers=)"
        )
    jaxpr, outputs, kernels, _ = whole
    first = len(jax.tree.leaves(params))
    last = first + len(jax.tree.leaves(inputs))
    follows = depends(jaxpr, jaxpr.invars[first:last])
    for name, calls in outputs.items():
        # A state of zeros is none of the inputs, at a layer's first call of several.
        of_calls = [next(follows) for _ in calls]
        shape = calls[0].shape
        # Rows for each example may be there without depending on it (positions
        # spread over the batch); the axis of a tap came first.
        spread = len(shape) > 3 and shape[1] == num_examples(inputs)
        if not any(of_calls) and not spread:
            raise ValueError(
                f"layer {name!r} has outputs of shape {shape[1:]} that do not "
                "depend on the inputs, such as an embedding of positions: the "
                "examples share them, so their gradients cannot be told apart; leave "
                "it to a diagonal block (layers=, embeddings=)"
            )
    _check_kernels(jaxpr, blocks, outputs, kernels)
    return jax.tree.map(lambda y: jnp.zeros(y.shape[1:], y.dtype), outputs)


def _check_kernels(jaxpr, blocks, outputs, kernels) -> None:
    """Refuse a layer whose product is not that with its own parameter, and that alone.

    Args:
        jaxpr: params first; returns `outputs`, `kernels` and what the model returns.
        blocks: of the params.
        outputs: per layer a list, one for each call.
        kernels: the same, of the layers that show theirs.

    Raises:
        ValueError: there is one.
    """
    arguments, sources, uses, factors = _sources(jaxpr)
    number = len(jax.tree.leaves(outputs))
    returned = sources[number + len(jax.tree.leaves(kernels)) :]
    passed_by = {id(x) for x in returned} | uses.keys()
    own_outputs = iter(sources[:number])
    for name, calls in outputs.items():
        if any(id(next(own_outputs)) in passed_by for _ in calls):
            raise ValueError(
                f"the model goes on with its own outputs of layer {name!r}, and not "
                "with what the tape returned, so the layer's gradient cannot be seen: "
                "y = tape.linear(name, x, y)"
            )
    shown, made = iter(sources[number:]), iter(factors)
    multiplied = {name: [next(made) for _ in calls] for name, calls in outputs.items()}
    own = {block.name: [arguments[i] for i in block.leaves] for block in blocks}
    for name, calls in kernels.items():
        of_calls = [next(shown) for _ in calls]
        if name not in own:  # a layer without a block of its own
            continue
        if any(x not in own[name] for x in of_calls):
            raise ValueError(
                f"layer {name!r} does not multiply by its parameter, but by what is "
                "computed from it (WeightNorm, SpectralNorm, weight standardisation), "
                "whose factors are not the parameter's: leave it to a diagonal block "
                "(layers=)"
            )
        if not all(map(set.__contains__, multiplied[name], map(id, of_calls))):
            raise ValueError(
                f"layer {name!r} does more than multiply by its kernel (a dot_general "
                "or conv_general_dilated of one's own that scales or rounds), and its "
                "factors are those of the product alone: leave it to a diagonal block "
                "(layers=)"
            )
        if uses[id(of_calls[0])] > len(calls):
            raise ValueError(
                f"layer {name!r} shares its kernel with another part of the model "
                "(tied weights), whose curvature its Kronecker block would miss: leave "
                "it to a diagonal block (layers=)"
            )


# What leaves an array's numbers as they are; what calls another jaxpr, one input each.
_SAME = {"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"}
_SAME |= {"copy", "sharding_constraint", "reshard", "pvary"}
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}
_CALLS |= {"checkpoint", "remat", "remat2"}


def _operations(jaxpr, given: list) -> tuple[list, list]:
    """(name, inputs, outputs) of each operation, calls opened, and what it returns.

    Returns:
        Operations on objects that stand for arrays; the objects returned.
    """
    known = dict(zip(jaxpr.invars, given, strict=True))
    read = lambda x: x if hasattr(x, "val") else known.setdefault(x, object())
    found = []
    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        bodies = [getattr(p, "jaxpr", p) for p in equation.params.values()]
        bodies = [body for body in bodies if hasattr(body, "eqns")]
        if equation.primitive.name in _CALLS and len(bodies) == 1:
            more, outputs = _operations(bodies[0], inputs)
            found += more
        else:
            outputs = [object() for _ in equation.outvars]
            found.append((equation.primitive.name, inputs, outputs))
        known.update(zip(equation.outvars, outputs, strict=True))
    return found, [read(x) for x in jaxpr.outvars]


def _sources(jaxpr) -> tuple[list, list, Counter, list[set[int]]]:
    """Where the numbers of each output come from, unchanged.

    Returns:
        Objects that stand for the arguments; for each output one of these, or that of
        an array that was computed; how many operations use the numbers of each, by its
        id, of those on which an output depends; and for each output the ids of what was
        multiplied to make it, perhaps with a bias added.
    """
    arguments = [object() for _ in jaxpr.invars]
    operations, outputs = _operations(jaxpr, arguments)
    source, alive = {}, {id(x) for x in outputs}
    origin = lambda x: source.get(id(x), x)
    for name, inputs, made in operations:
        if name in _SAME:
            source[id(made[0])] = origin(inputs[0])
    uses = Counter()
    for name, inputs, made in reversed(operations):
        if alive.isdisjoint(map(id, made)):
            continue
        alive.update(map(id, inputs))
        # What has no gradient adds nothing to the parameter's curvature, and the
        # barrier is the tape's.
        if name not in _SAME | {"stop_gradient", "optimization_barrier"}:
            uses.update({id(origin(x)) for x in inputs})
    maker = {id(x): operation for operation in operations for x in operation[2]}

    def factors(x) -> set[int]:
        name, inputs, _ = maker.get(id(origin(x)), ("", [], []))
        if name in ("add", "add_any"):
            return set().union(*map(factors, inputs))
        products = "dot_general", "conv_general_dilated"
        return {id(origin(y)) for y in inputs} if name in products else set()

    return arguments, [origin(x) for x in outputs], uses, list(map(factors, outputs))
