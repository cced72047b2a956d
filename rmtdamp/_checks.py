"""Checks on arguments: what is wrong, the value, the bound and the way out."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ._tree import num_examples
from ._types import Batch, LossFn, Mode, Params


def check_range(
    name: str, value: Any, inside: Callable[[Any], bool], bound: str
) -> None:
    """Refuse a Python number outside its range; schedules and traced values pass.

    Raises:
        ValueError: `value` is a number and not `inside`.
        TypeError: it is a string.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is the string {value!r}: hand over a number")
    if isinstance(value, int | float | np.number) and not inside(value):
        raise ValueError(f"{name} is {value}, and must be {bound}")


def check_decays(**decays: Any) -> None:
    """Refuse decays of averages and sums that are no share of the past.

    Raises:
        ValueError: a Python number outside [0, 1).
    """
    for name, decay in decays.items():
        check_range(name, decay, lambda x: 0 <= x < 1, "in [0, 1)")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: `value` is none of them.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(
            f"{name} is {value!r}: choose from {', '.join(map(repr, choices))}"
        )


FORWARD, REVERSE, DIFFERENCE = get_args(Mode)


def check_mode(mode: str) -> None:
    """Refuse an unknown way to differentiate.

    Raises:
        ValueError: `mode` is none of the three.
    """
    check_choice("mode", mode, get_args(Mode))


def check_every(name: str, every: Any, *, or_never: bool = False) -> None:
    """Refuse a period that is no whole number of steps; arrays pass.

    An array stands for a number that `optax.inject_hyperparams` has taken in.

    Raises:
        ValueError: a Python number below 1, or not an int.
    """
    if isinstance(every, jax.Array) or (every is None and or_never):
        return
    if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
        never = ", or None for never in the step" if or_never else ""
        raise ValueError(
            f"{name} is {every!r}: take a whole number of at least 1{never}"
        )


def refuse_one_batch(batches: Any) -> None:
    """Refuse a pair (inputs, targets), which would be read as two batches.

    Raises:
        ValueError: `batches` is a tuple of unlike arrays.
    """
    if isinstance(batches, tuple) and all(hasattr(x, "shape") for x in batches):
        kinds = {(len(x.shape), str(x.dtype)) for x in batches}
        if len(kinds) > 1:
            raise ValueError(
                f"batches is a tuple of arrays of shapes {[x.shape for x in batches]}, "
                "which looks like one batch: hand over a list of batches, "
                "[(inputs, targets)] for a single one"
            )


def check_loss_args(loss_args: Any) -> None:
    """Refuse further arguments of a loss that are not in a tuple.

    Raises:
        TypeError: they are not.
    """
    if not isinstance(loss_args, tuple | list):
        kind = type(loss_args).__name__
        kind = "array" if isinstance(loss_args, jax.Array) else kind  # or traced
        raise TypeError(
            f"loss_args is of type {kind}: hand over a tuple of the loss's further "
            "arguments, loss_args=(x,) for a single one"
        )


def check_scalar(loss_fn: LossFn, params: Params, batch: Batch, loss_args) -> None:
    """Refuse a loss that is not one real number; costs an abstract evaluation.

    Raises:
        TypeError: the loss does not take (params, batch, *loss_args), or returns
            anything but a real floating scalar.
        ValueError: a batch of arrays of which none has an example.
    """
    check_loss_args(loss_args)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if shapes and all(shape[:1] == (0,) for shape in shapes):
        raise ValueError("batch holds no examples: its leading axes have length 0")
    out = _abstract(loss_fn, params, batch, loss_args)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(
            f"loss_fn must return one scalar and returned a {type(out).__name__}: "
            "return the mean loss alone, without auxiliary output"
        )
    if out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn must return a real scalar and returned shape {out.shape}, dtype "
            f"{out.dtype}: return the mean over the batch, jnp.mean(losses)"
        )


def _abstract(loss_fn, params, batch, loss_args):
    """What the loss returns, as shapes; errors of the call itself are explained."""
    try:
        inspect.signature(loss_fn).bind(params, batch, *loss_args)
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        raise TypeError(
            f"loss_fn is called as loss_fn(params, batch, *loss_args) with "
            f"{len(loss_args)} of loss_args, and cannot be: {error}. A loss of several "
            "arrays takes them as one batch, "
            "lambda params, batch: loss(params, *batch); what is no example goes "
            "through loss_args"
        ) from error
    try:
        return jax.eval_shape(loss_fn, params, batch, *loss_args)
    except (TypeError, AttributeError) as error:
        origin = {base.__module__.partition(".")[0] for base in type(params).__mro__}
        if "flax" in origin:
            raise TypeError(
                f"loss_fn failed on the params of an nnx model, a State ({error}): a "
                "loss of the model itself, loss(model, batch), goes through "
                "rmtdamp.flax.curvature_loss(model, loss)"
            ) from error
        if "equinox" in origin:
            raise TypeError(
                f"loss_fn failed on the filtered Equinox model that are its params "
                f"({error}): partition it, params, static = eqx.partition(model, "
                "eqx.is_inexact_array), and let the loss put it together again, "
                "loss(eqx.combine(params, static), batch)"
            ) from error
        raise


def check_outputs(outputs: Params, inputs: Batch) -> None:
    """Refuse outputs of a model without a row per example.

    Raises:
        ValueError: an output has another leading axis than the inputs.
    """
    count = num_examples(inputs, "inputs")
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        if leaf.ndim == 0 or leaf.shape[0] != count:
            raise ValueError(
                f"model_fn's output{jax.tree_util.keystr(path)} has shape {leaf.shape} "
                f"for {count} inputs: outputs need one row per example"
            )


def pair(batch: Batch) -> tuple[Batch, Batch]:
    """A batch as (inputs, targets).

    Returns:
        The two.

    Raises:
        ValueError: it is no pair, empty, or of unequal leading axes.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = f"of type {type(batch).__name__}"
        if isinstance(batch, tuple | list):
            kind += f" and length {len(batch)}"
        elif (shape := getattr(batch, "shape", None)) is not None:
            kind = f"an array of shape {shape}"
        raise ValueError(
            f"batch is {kind}, and must be a pair (inputs, targets): the model sees "
            "the first and the loss the second"
        )
    num_examples(batch)
    return tuple(batch)


def check_mesh(mesh: Any) -> None:
    """Refuse what is neither a mesh of devices nor None.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(mesh, Mesh | None):
        raise TypeError(
            f"mesh is of type {type(mesh).__name__}, and has to be a "
            "jax.sharding.Mesh, such as jax.make_mesh makes one, or None"
        )


def most_rejected(tried: Any, rejected: Any) -> bool:
    """Whether a run, or one of many, has had more than half of what it tried rejected.

    Args:
        tried: count, with an axis of runs under `vmap`.
        rejected: count of those that were not finite.

    Returns:
        A bool; eager, and in numpy: jax would compile the comparison.
    """
    return bool((2 * np.asarray(rejected) > np.asarray(tried)).any())
