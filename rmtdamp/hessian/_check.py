"""Is this loss the mean over independent examples that a variance needs?"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._checks import check_scalar
from rmtdamp._tree import check_params, num_examples, random_like, scattered
from rmtdamp._types import Batch, LossFn, Params

# One program for the rows of each number, wherever they stand.
_rows = jax.jit(lambda batch, places: jax.tree.map(lambda x: x[places], batch))


def check_loss(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    loss_args: tuple[Any, ...] = (),
    rtol: float = 1e-3,
) -> None:
    """Raise if the loss is not a mean over independent examples. Eager; run it once.

    The variance of the Hessian is read off microbatches, so the loss of a batch must be
    the mean of its examples' losses. Two comparisons show most ways to break that:

    - the batch in reverse order must give the same loss (dropout draws other masks
      for the same examples);
    - the mean over two halves must be the loss of both together (a sum gives half; so
      do batch statistics or weights normalised over the batch give something else), and
      so must the mean over up to eight single examples (a root of a mean, which halves
      hardly show).

    A rule without moments (`StabilityFloor`) needs none of this, only a mean: its loss
    with BatchNorm in training mode is refused here and is right there.

    Evaluating the same batch twice would show neither. Where the loss is next to zero,
    as a policy gradient's at its start, a slope of it is compared.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`.
        params: pytree of real floating arrays.
        batch: pytree of arrays with one leading axis, at least two examples.
        loss_args: further arguments of the loss.
        rtol: allowed difference, relative to the loss, on top of its dtype's rounding.

    Raises:
        TypeError: params that are not real floats, or a loss that is not a scalar.
        ValueError: an empty or unequal batch, fewer than two examples, a loss that is
            not finite, or one that fails either comparison.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp import check_loss
        >>> check_loss(
        ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), jnp.ones((4, 3))
        ... )
        >>> check_loss(
        ...     lambda w, x: jnp.sum((x @ w) ** 2), jnp.ones(3), jnp.ones((4, 3))
        ... )
        Traceback (most recent call last):
            ...
        ValueError: loss_fn sums over the batch: ...
    """
    check_params(params)
    count = num_examples(batch)
    if count < 2:
        raise ValueError(f"check_loss compares halves, and batch holds {count} example")
    check_scalar(loss_fn, params, batch, loss_args)
    half = count // 2
    places = np.arange(count, dtype=np.int32)
    value = lambda part: float(loss_fn(params, _rows(batch, places[part]), *loss_args))

    whole = value(slice(0, 2 * half))
    if not math.isfinite(whole):
        raise ValueError(
            f"loss_fn gives {whole} on this batch: a curvature measured here would not "
            "be finite; check the data and the learning rate"
        )
    few = min(2 * half, 8)
    single = [slice(i, i + 1) for i in range(few)]
    loss, what, each = value, "", [value(part) for part in single]
    sizes = [abs(x) for x in each if math.isfinite(x)]
    if abs(whole) <= 1e-3 * max(sizes, default=0):
        # Nothing is a sum or a mean of zeros; they have slopes.
        along = random_like(jax.random.key(0), params, scattered)
        slope = jax.jit(
            lambda p, part: jax.jvp(
                lambda p: loss_fn(p, part, *loss_args), (p,), (along,)
            )[1]
        )
        loss = lambda part: float(slope(params, _rows(batch, places[part])))
        what, whole = "'s slope", loss(slice(0, 2 * half))
        each = [loss(part) for part in single]
        sizes = [abs(x) for x in each if math.isfinite(x)]
    reverse = loss(slice(2 * half - 1, None, -1))
    halves = (loss(slice(0, half)) + loss(slice(half, 2 * half))) / 2
    # Rounding is relative to the losses that are summed, not to a mean of both signs:
    # single examples give their size, and sixteen epsilons leave room for the sum.
    dtype = jax.eval_shape(loss_fn, params, batch, *loss_args).dtype
    allowed = rtol + 16 * float(jnp.finfo(dtype).eps)
    largest = max(sizes, default=0)
    differs = lambda a, b: abs(a - b) > allowed * max(abs(a), abs(b), largest)
    if differs(reverse, whole):
        raise ValueError(
            f"loss_fn{what} depends on the order of the examples ({whole:.6g}, "
            f"reversed {reverse:.6g}): dropout or augmentation is left on, where "
            "curvature is measured in evaluation mode; a loss that draws by nature (a "
            "variational or diffusion model) takes a key for each example, in the "
            "batch; examples are along the first axis"
        )
    if differs(halves, whole):
        if abs(2 * halves - whole) <= allowed * abs(whole):
            raise ValueError(
                f"loss_fn{what} sums over the batch: {whole:.6g} for {2 * half} "
                f"examples, {halves:.6g} on average for {half}; return the mean, "
                "jnp.mean(losses)"
            )
        raise ValueError(
            f"loss_fn{what} is not a mean over examples: {whole:.6g} for {2 * half} of "
            f"them, {halves:.6g} on average for their halves. Batch statistics "
            "(BatchNorm in training mode: use the running averages) or weights "
            "normalised over the batch (a mean over tokens: divide by a constant) "
            "couple the examples"
        )
    if len(sizes) < few:
        (lost, *_) = (i for i, x in enumerate(each) if not math.isfinite(x))
        raise ValueError(
            f"loss_fn{what} is not a mean over examples: {whole:.6g} for {2 * half} of "
            f"them, and {each[lost]} for example {lost} alone. Batch statistics, or "
            "weights normalised over the batch (a mean over what a mask leaves: divide "
            "by a constant), couple the examples"
        )
    together, alone = loss(slice(0, few)), sum(each) / few
    if differs(alone, together):
        raise ValueError(
            f"loss_fn{what} is not a mean over examples: {together:.6g} for {few} of "
            f"them, {alone:.6g} on average one by one. A root of the mean, or weights "
            "normalised over the batch (a mean over tokens: divide by a constant), "
            "couple the examples"
        )
