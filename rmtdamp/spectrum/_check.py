"""Can the Hessian of this problem be measured? Asked before the long part begins."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from rmtdamp._checks import check_mode, check_scalar, refuse_one_batch
from rmtdamp._tree import check_params, num_examples, size
from rmtdamp._types import Batch, LossFn, Mode, Params
from rmtdamp.hessian import check_loss

MIN_EXAMPLES = 4
MIN_PARAMETERS = 4  # a quarter as many eigenvectors can be judged
# Overlaps are with the span of so many more than are shown, as in `split_half_eigsh`:
# where eigenvalues are close the last vectors mix with the next.
SPARE = 2


class Problem(NamedTuple):
    """What a first look at the data gives."""

    first: Batch  # the first batch
    counts: list[int]  # examples of each batch
    loss: float  # mean over the examples
    notes: list[str]  # what speaks against reading the noise off this loss


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def _check_batches(batches: Any) -> None:
    """Refuse what is not an iterable of batches that can be read again."""
    kind = type(batches).__name__
    if isinstance(batches, dict) or hasattr(batches, "shape"):
        raise TypeError(
            f"batches is a single {kind}, and must be an iterable of batches: return "
            "[batch] for a single one"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is of type {kind}, and must be an iterable of batches, such as a "
            "list or a loader"
        )
    refuse_one_batch(batches)
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is of type {kind}, which is exhausted after one pass, and every "
            "product is a pass: return a list or a loader"
        )


def _losses(compiled, params, batches) -> tuple[float, list[int]]:
    """Mean loss over the examples, and the sizes of the batches."""
    total, counts = 0.0, []
    for i, batch in enumerate(batches):
        count = num_examples(batch, f"batch {i}")
        try:
            loss = float(compiled(params, batch))
        except Exception as error:
            raise ValueError(
                f"loss_fn(params, batch) fails on batch {i}: {_one_line(error)}; call "
                "it by itself for the traceback"
            ) from error
        if loss - loss != 0:
            raise ValueError(
                f"loss_fn gives {loss} on batch {i}: no curvature there would be "
                "finite; check the data and the params"
            )
        total += loss * count
        counts.append(count)
    return total / max(sum(counts), 1), counts


def _check_passes(before, after) -> None:
    """Two passes must have read the same data, in whatever order."""
    (loss, counts), (again, second) = before, after
    if not second:
        raise ValueError(
            "batches gave no batch on the second pass, and every product is a pass: "
            "return a list or a loader"
        )
    same = abs(again - loss) <= 1e-4 * max(abs(loss), abs(again)) + 1e-7
    if sum(counts) != sum(second) or not same:
        raise ValueError(
            f"batches differ from pass to pass: loss {loss:.6g} over {sum(counts)} "
            f"examples, then {again:.6g} over {sum(second)}; switch augmentation and "
            "sampling off, or pass --batch-only"
        )


def check_product(product: Params, params: Params) -> None:
    """Refuse a product with the first batch's Hessian that is not finite."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, _), leaf in zip(paths, jax.tree.leaves(product), strict=True):
        if not np.all(np.isfinite(leaf)):
            raise ValueError(
                "the Hessian of batch 0 is not finite at params"
                f"{jax.tree_util.keystr(path)}, though the loss is: look for a square "
                "root, a norm or a logarithm at 0"
            )


def check_factors(factors_fn: Any, params: Params, first: Batch) -> None:
    """Refuse what measures no Kronecker factors, or those of another model."""
    blocks = getattr(factors_fn, "blocks", None)
    if blocks is None or not callable(factors_fn):
        raise TypeError(
            f"factors_fn is of type {type(factors_fn).__name__}, and must measure "
            "Kronecker factors: take rmtdamp.kronecker.ModelFactors, or "
            "rmtdamp.flax.nnx_factors"
        )
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    for block in blocks:
        if [shapes[i : i + 1] for i in block.leaves] != [[x] for x in block.shapes]:
            raise ValueError(
                f"factors_fn has a block {block.name!r} of shapes {block.shapes}, and "
                "params have others there: make it of the same model"
            )
    try:
        jax.eval_shape(factors_fn, params, first, jax.random.key(0))
    except Exception as error:
        raise ValueError(
            f"factors_fn(params, batch, key) fails on batch 0: {_one_line(error)}; "
            "call it by itself for the traceback"
        ) from error


def look(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    mode: Mode,
    batch_only: bool,
) -> Problem:
    """A first look: two passes of the loss.

    Returns:
        `Problem`.

    Raises:
        TypeError: params that are not real floats, a loss that is not a scalar,
            batches that are not an iterable of batches or can be read only once.
        ValueError: fewer than 5 parameters, batches that are empty, exhausted or
            different on the second pass, a first batch of fewer than 4 examples, or a
            loss that fails or is not finite.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is of type {type(loss_fn).__name__}, and must be a function "
            "loss_fn(params, batch) -> mean loss"
        )
    check_params(params)
    if size(params) < MIN_PARAMETERS:
        raise ValueError(
            f"params hold {size(params)} numbers, and the noise is judged from "
            f"{MIN_PARAMETERS} on: with so few, jax.hessian gives the whole matrix"
        )
    check_mode(mode)
    _check_batches(batches)
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("batches is empty, and at least one batch is needed")
    count = num_examples(first, "batch 0")
    if count < MIN_EXAMPLES:
        raise ValueError(
            f"batch 0 holds {count} examples, and its noise can be measured from "
            f"{MIN_EXAMPLES} on: make the batches larger"
        )
    try:
        jax.eval_shape(loss_fn, params, first)
    except Exception as error:
        raise ValueError(
            f"loss_fn(params, batch) fails on batch 0: {_one_line(error)}; call it by "
            "itself for the traceback, and return [batch] if there is a single batch"
        ) from error
    check_scalar(loss_fn, params, first, ())
    compiled = jax.jit(loss_fn)
    found = _losses(compiled, params, [first] if batch_only else batches)
    if not batch_only:
        _check_passes(found, _losses(compiled, params, batches))
    notes = []
    if count % 2:
        notes.append(
            f"batch 0 holds {count} examples, an odd number: its outliers are those of "
            f"the first {count - 1}"
        )
    try:
        check_loss(compiled, params, first)
    except ValueError as error:
        notes.append(f"do not trust variance, damping and outliers: {error}")
    return Problem(first, found[1], found[0], notes)
