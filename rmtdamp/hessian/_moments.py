"""loss_fn, params, batch -> HessianMoments: the paper's Algorithm 1, corrected.

The batch at hand is cut into n microbatches of b examples. With a random probe v of
unit norm and y_i = H_i v, the spread of the y_i about their mean is the noise of the
Hessian seen along v, and its expectation over v is the trace:

    E_v sum_i ||y_i - ybar||^2 / (n - 1)  =  P^-1 Tr Var(H_b).

So one Hessian-vector product's FLOPs over one batch measure the quantity of eq. 15.

The algorithm as printed forgets to divide by the number of samples and subtracts
(v^T Hbar v)^2 where ||Hbar v||^2 belongs. We take the form above, centred before it is
squared: the difference of two raw moments loses every digit in float32 once the mean
outweighs the noise.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._tree import (
    accumulation_dtype,
    check_params,
    num_examples,
    random_like,
    size,
    vdot,
)
from rmtdamp._types import Batch, Execution, Key, LossFn, Mode, Params

from ._products import (
    check_differentiable,
    check_mode,
    check_scalar,
    hessian_product,
    matmul_precision,
)

_EXECUTIONS = ("scan", "unroll", "vmap")


class HessianMoments(NamedTuple):
    """Traces of the Hessian and of its sampling noise, each divided by P.

    Units: with [H] the unit of a Hessian eigenvalue, `mean` is in [H], `square` and
    `variance` in [H]^2.
    """

    mean: jax.Array  # (), nu = P^-1 Tr H of the expected Hessian
    square: jax.Array  # (), P^-1 Tr H^2 of the expected Hessian, debiased
    variance: jax.Array  # (), m = P^-1 Tr Var(H_B) for a batch of B examples
    probe_stderr: jax.Array | float = float("nan")  # (), of variance, from the probes
    microbatch_stderr: jax.Array | float = float("nan")  # (), from the microbatches

    @property
    def dispersion(self) -> jax.Array:
        """d^2 = P^-1 ||H - nu I||_F^2, how far the Hessian is from a multiple of I.

        `square` is debiased and the square of `mean` is not: d^2 comes out low by the
        variance of `mean`, which matters only where the Hessian is nearly nu I.
        """
        return self.square - self.mean**2

    @property
    def variance_stderr(self) -> jax.Array:
        """Standard error of `variance`; NaN where either part cannot be known."""
        return jnp.hypot(self.probe_stderr, self.microbatch_stderr)


def has_convolution(loss_fn: LossFn, params: Params, batch: Batch, loss_args) -> bool:
    """Whether the loss contains a convolution, read off its printed jaxpr."""
    jaxpr = jax.make_jaxpr(loss_fn)(params, batch, *loss_args)
    return "conv_general_dilated" in str(jaxpr)


def default_execution(
    loss_fn: LossFn, params: Params, batch: Batch, loss_args
) -> Execution:
    """How to run the microbatches, as `moments` documents under `execution`."""
    if jax.default_backend() != "cpu":
        return "vmap"
    return "unroll" if has_convolution(loss_fn, params, batch, loss_args) else "scan"


def _squared_distances(products: Params, mean: Params, dtype) -> jax.Array:
    """||y_i - mean||^2 of each row of the stacked `products`, shape (n,)."""
    rows = jax.tree.map(
        lambda y, mu: jnp.sum(
            jnp.square(y.astype(dtype) - mu[None]), axis=tuple(range(1, y.ndim))
        ),
        products,
        mean,
    )
    return jnp.sum(jnp.stack(jax.tree.leaves(rows)), axis=0)


def _spread(product, like: Params, parts: Batch, num, execution, stderr, dtype):
    """Mean of y_i = product(parts[:, i]), sum_i ||y_i - mean||^2, and its terms."""
    # The terms, shape (num,), cost the memory of `num` vectors and are None unless
    # `stderr` asks for them. "vmap" has the vectors at hand; "scan" and "unroll" hold
    # one and update mean and sum as they go (Welford), centred all along.
    if execution == "vmap":
        products = jax.vmap(product, in_axes=1)(parts)
        mean = jax.tree.map(lambda y: jnp.mean(y.astype(dtype), axis=0), products)
        terms = _squared_distances(products, mean, dtype)
        return mean, jnp.sum(terms), terms

    def add(carry, i):
        mean, total = carry
        part = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), parts
        )
        y = product(part)
        seen = jnp.asarray(i, dtype)
        step = jax.tree.map(lambda a, mu: a.astype(dtype) - mu, y, mean)
        mean = jax.tree.map(lambda mu, d: mu + d / (seen + 1), mean, step)
        total = total + vdot(step, step) * (seen / (seen + 1))
        return (mean, total), (y if stderr else None)

    mean = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), like)
    carry, products = (mean, jnp.zeros((), dtype)), []
    if execution == "scan":
        carry, products = jax.lax.scan(add, carry, jnp.arange(num))
    else:
        for i in range(num):
            carry, y = add(carry, i)
            products.append(y)
        if stderr:
            products = jax.tree.map(lambda *ys: jnp.stack(ys), *products)
    terms = _squared_distances(products, carry[0], dtype) if stderr else None
    return *carry, terms


@functools.partial(
    jax.jit,
    static_argnames=(
        "loss_fn",
        "num_microbatches",
        "num_probes",
        "batch_size",
        "execution",
        "precision",
        "mode",
        "stderr",
    ),
)
def _moments(
    loss_fn,
    params,
    batch,
    key,
    loss_args,
    num_microbatches,
    num_probes,
    batch_size,
    execution,
    precision,
    mode,
    stderr,
):
    n, b = num_microbatches, num_examples(batch) // num_microbatches
    p, dtype = size(params), accumulation_dtype(params)
    # x.reshape(b, n)[:, i] is x[i::n]: a batch sharded over devices stays spread.
    parts = jax.tree.map(lambda x: jnp.reshape(x, (b, n, *x.shape[1:])), batch)
    microbatch = jax.tree.map(lambda x: x[:, 0], parts)
    check_scalar(loss_fn, params, microbatch, loss_args)
    check_differentiable(loss_fn, params, microbatch, loss_args, mode)
    if execution is None:
        execution = default_execution(loss_fn, params, microbatch, loss_args)

    def measure(probe_key):
        # +-1 is exact in every dtype, so the unit norm is restored by dividing the
        # quadratic forms by P. Rademacher signs have the least variance of all probes
        # with independent entries.
        probe = random_like(probe_key, params, jax.random.rademacher)
        product = lambda part: hessian_product(
            loss_fn, params, part, probe, loss_args, mode
        )
        with matmul_precision(precision):
            mean, total, terms = _spread(
                product, params, parts, n, execution, stderr, dtype
            )
        terms = None if terms is None else terms / p
        return vdot(probe, mean) / p, vdot(mean, mean) / p, total / p, terms

    keys = jax.random.split(key, num_probes)
    if num_probes == 1 or execution == "unroll":
        rows = [measure(k) for k in keys]
        rows = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)
    else:
        rows = jax.lax.map(measure, keys)
    # Shapes: three times (num_probes,), then (num_probes, n) or None.
    mean, raw_square, total, terms = rows

    per_probe = total / (n - 1)  # variance of an H_b
    rescale = b / batch_size
    probe_stderr = microbatch_stderr = jnp.full((), jnp.nan, dtype)
    if num_probes > 1:
        probe_stderr = jnp.std(per_probe, ddof=1) * (rescale / num_probes**0.5)
    if stderr and n > 2:
        # The delete-one jackknife of a sample variance, in closed form.
        terms = jnp.mean(terms, axis=0)
        jackknife = jnp.sum(jnp.square(terms - jnp.mean(terms)))
        microbatch_stderr = jnp.sqrt(jackknife * n / (n - 1)) * (rescale / (n - 2))
    return HessianMoments(
        mean=jnp.mean(mean),
        # ||ybar||^2 carries the noise of the mean of n microbatches; take it off.
        square=jnp.mean(raw_square) - jnp.mean(per_probe) / n,
        variance=jnp.mean(per_probe) * rescale,
        probe_stderr=probe_stderr,
        microbatch_stderr=microbatch_stderr,
    )


def moments(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key,
    *,
    loss_args: tuple = (),
    num_microbatches: int = 8,
    num_probes: int = 1,
    batch_size: int | None = None,
    execution: Execution | None = None,
    precision: str | None = "highest",
    mode: Mode = "forward-over-reverse",
    stderr: bool = True,
) -> HessianMoments:
    r"""Mean, mean square and sampling variance of the Hessian, from one batch.

    The batch is cut into n = `num_microbatches` strided microbatches (`x[i::n]`) of b
    examples. For each of `num_probes` random sign vectors v, scaled to unit norm,
    y_i = H_i v and ybar is their mean. Averaged over probes,

    - `mean` is v^T ybar, unbiased for nu = P^-1 Tr H;
    - `variance` is (b/B) (n-1)^-1 sum_i ||y_i - ybar||^2, unbiased for
      m = P^-1 Tr Var(H_B), the noise of the Hessian of a batch of B = `batch_size`
      independent examples: eq. 15's damping;
    - `square` is ||ybar||^2 - (n (n-1))^-1 sum_i ||y_i - ybar||^2, unbiased for
      P^-1 Tr H^2;

    where H is the expected Hessian. Examples must be independent given params: with
    BatchNorm in training mode they are not (`check_loss` tells), and the three numbers
    then describe the microbatches, not the batch.

    Cost: the FLOPs of `num_probes` Hessian-vector products over `batch`, about three
    gradients each. Memory: the residuals of the microbatches that run at once (one for
    "scan" and "unroll"), a few vectors like `params`, and, for the microbatch part of
    the standard error or under "vmap", `num_microbatches` more.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss; static,
            so define it once.
        params: pytree of P real floating numbers.
        batch: pytree of arrays with one leading axis of examples. The batch of the
            training step, or any other sample: eight of the training batches in one
            array, `num_microbatches=8` and `batch_size` a training batch's size give
            the protocol of the paper's experiments.
        key: a key of `jax.random`, typed or raw.
        loss_args: further arguments of the loss, traced and not split.
        num_microbatches: n, at least 2; must divide the batch.
        num_probes: independent probes to average, each at full cost.
        batch_size: B, the number of examples whose Hessian's variance is asked for;
            default: as many as `batch` holds.
        execution: how the microbatches run, "scan" (one after another, least memory),
            "unroll" (the same outside a loop: longer to compile) or "vmap" (at once).
            Default: on a CPU "unroll" where the loss has a convolution, which XLA:CPU
            runs some thirty times slower inside a loop, else "scan", which measured
            fastest; on accelerators "vmap", which fills them.
        precision: matmul precision; None leaves the global setting.
        mode: how products are differentiated, see `hvp`.
        stderr: whether to compute `microbatch_stderr`; without it (NaN) `moments` is
            two to four times faster on a CPU.

    Returns:
        `HessianMoments`, scalars in float32 or the params' dtype if that is wider. The
        standard error of `variance` has a part from the probes (`probe_stderr`, NaN
        with one probe) and a part from the microbatches (`microbatch_stderr`, a
        delete-one jackknife, NaN with two). What was measured is returned as it is,
        NaN and infinity included.

    Raises:
        TypeError: params that are not real floats, or a loss that is not a scalar.
        ValueError: an empty batch, unequal leading axes, fewer than two microbatches,
            a number of microbatches that does not divide the batch, fewer than one
            probe, or an unknown `execution` or `mode`.

    Example:
        A loss whose Hessian is diag(batch mean); each entry has variance 1/B:

        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import moments
        >>> def loss_fn(params, batch):
        ...     return 0.5 * jnp.mean(batch @ params**2)
        >>> batch = 3.0 + jax.random.normal(jax.random.key(0), (64, 1000))
        >>> measured = moments(loss_fn, jnp.ones(1000), batch, jax.random.key(1))
        >>> print(f"{measured.mean:.1f} {measured.square:.0f}")
        3.0 9
        >>> print(f"{64 * measured.variance:.1f}")
        1.0

    References:
        Granziol and Baskerville, A random matrix theory approach to damping in deep
        learning, Algorithm 1 and eq. 15. We depart from the printed algorithm as the
        head of this module says, use n - 1 in place of n, sign probes in place of
        Gaussian ones, and the microbatches of the batch in place of a pass over 10,000
        examples.
    """
    check_params(params)
    count = num_examples(batch)
    if num_microbatches < 2:
        raise ValueError(
            f"num_microbatches is {num_microbatches}, and a variance needs at least 2"
        )
    if count % num_microbatches:
        divisors = [n for n in range(2, count + 1) if count % n == 0]
        raise ValueError(
            f"num_microbatches={num_microbatches} does not divide the {count} examples "
            f"of batch: "
            + (
                f"take one of {divisors[:8]}, or "
                f"{count - count % num_microbatches} of the examples"
                if count >= num_microbatches
                else f"take at most {count}, or more examples"
            )
        )
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}, and at least 1 is needed")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, and at least 1 is needed")
    if execution is not None and execution not in _EXECUTIONS:
        raise ValueError(
            f"execution is {execution!r}: choose from {', '.join(_EXECUTIONS)}, or "
            "None for the rule that the documentation states"
        )
    check_mode(mode)
    return _moments(
        loss_fn,
        params,
        batch,
        key,
        loss_args,
        num_microbatches,
        num_probes,
        count if batch_size is None else batch_size,
        execution,
        precision,
        mode,
        stderr,
    )
