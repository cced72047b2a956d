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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import draw, lay, pack, unpack, zeros
from rmtdamp._checks import check_mode, check_scalar
from rmtdamp._jax import has_convolution, is_traced, matmul_precision
from rmtdamp._parts import Labels, Parts, as_function, parts_of
from rmtdamp._sharding import placement, regrouped
from rmtdamp._tree import (
    accumulation_dtype,
    aligned,
    check_params,
    num_examples,
    rademacher,
    vdot,
)
from rmtdamp._types import Batch, Execution, Key, LossFn, Mode, Params

from ._products import (
    check_differentiable,
    loss_and_product,
)

_EXECUTIONS = ("scan", "unroll", "vmap", "eager")


class HessianMoments(NamedTuple):
    """Traces of the Hessian and of its sampling noise, each divided by P.

    With labels all but the loss have shape (labels,) and are sums over a label's rows
    of the Hessian, divided by its number of parameters. Units: with [H] the unit of a
    Hessian eigenvalue, `mean` is in [H], `square` and `variance` in [H]^2.

    Example:
        >>> from rmtdamp.hessian import HessianMoments
        >>> found = HessianMoments(mean=0.1, square=0.26, variance=0.02)
        >>> print(f"{found.dispersion:.2f}")
        0.25
    """

    mean: jax.Array  # (), nu = P^-1 Tr H of the expected Hessian
    square: jax.Array  # (), P^-1 Tr H^2 of the expected Hessian, debiased
    variance: jax.Array  # (), m = P^-1 Tr Var(H_B) for a batch of B examples
    probe_stderr: jax.Array | float = float("nan")  # (), of variance, from the probes
    microbatch_stderr: jax.Array | float = float("nan")  # (), from the microbatches
    loss: jax.Array | float = float("nan")  # (), the mean of the microbatches' losses

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


def _execution(loss_fn, params, batch, loss_args, traced: bool) -> Execution:
    """How to run the microbatches, as `moments` documents under `execution`."""
    if jax.default_backend() != "cpu":
        return "vmap"
    if not traced:
        return "eager"
    return "unroll" if has_convolution(loss_fn, params, batch, loss_args) else "scan"


class _Sums(NamedTuple):
    """What has been seen of the y_i so far (Welford: centred all along)."""

    mean: list[jax.Array]  # of the y_i, packed
    total: jax.Array  # () or (labels,), sum_i ||y_i - mean||^2
    loss: jax.Array  # (), sum of the losses


class _Rows(NamedTuple):
    """Packed vectors -> sums over the rows of each label; over all without labels."""

    parts: Parts
    params: Params

    def vdot(self, x: list, y: list) -> jax.Array:
        """Shape () or (labels,)."""
        if self.parts.names is None:
            return vdot(x, y)
        return self.parts.vdot(unpack(x, self.params), unpack(y, self.params))


def _no_sums(rows: _Rows) -> _Sums:
    dtype = accumulation_dtype(rows.params)  # the sums are donated: a buffer each
    return _Sums(
        zeros(jax.eval_shape(pack, rows.params, rows.params)),
        jnp.zeros(rows.parts.shape, dtype),
        jnp.zeros((), dtype),
    )


def _add(rows: _Rows, sums: _Sums, i, loss, product: list) -> _Sums:
    dtype = sums.total.dtype
    seen = jnp.asarray(i, dtype)
    step = jax.tree.map(jnp.subtract, product, sums.mean)
    return _Sums(
        mean=jax.tree.map(lambda mu, d: mu + d / (seen + 1), sums.mean, step),
        total=sums.total + rows.vdot(step, step) * (seen / (seen + 1)),
        loss=sums.loss + loss.astype(dtype),
    )


def _terms(rows: _Rows, products: list, mean: list) -> jax.Array:
    """||y_i - mean||^2 of each of the stacked `products`, (n,) or (n, labels)."""

    def term(product):
        step = jax.tree.map(jnp.subtract, product, mean)
        return rows.vdot(step, step)

    return jax.vmap(term)(products)


def _stacked(products: list) -> Any:
    return jax.tree.map(lambda *ys: jnp.stack(ys), *products)


def _microbatches(batch: Batch, n: int) -> Batch:
    """Microbatch i is `[:, i]`, of strided examples."""
    # A batch sharded over devices stays spread.
    return jax.tree.map(lambda x: regrouped(x, n), batch)


def _microbatch(parts: Batch, i) -> Batch:
    row = functools.partial(jax.lax.dynamic_index_in_dim, axis=1, keepdims=False)
    return jax.tree.map(lambda x: row(x, i), parts)


def _probe(key: Key, number, params: Params) -> list[jax.Array]:
    # +-1 is exact in every dtype, so the unit norm is restored by dividing quadratic
    # forms by P. Signs have the least variance of probes with independent entries.
    return draw(key, params, rademacher, number)


def _evaluate(loss_fn, params, part, probe, loss_args, mode):
    """The loss of a microbatch and its packed product with the probe."""
    vector = aligned(unpack(probe, params), params)
    loss, product = loss_and_product(loss_fn, params, part, vector, loss_args, mode)
    return loss, pack(product, params)


def _said(rows: _Rows, probe: list, sums: _Sums, products: list | None) -> tuple:
    """What one probe says: v^T ybar, ||ybar||^2, sum_i ||y_i - ybar||^2, its terms."""
    terms = None if products is None else _terms(rows, products, sums.mean)
    mean = sums.mean
    return rows.vdot(probe, mean), rows.vdot(mean, mean), sums.total, terms, sums.loss


@functools.partial(
    jax.jit,
    static_argnames=(
        "loss_fn", "num_microbatches", "num_probes", "execution", "precision", "mode",
        "stderr", "labelled",
    ),
)  # fmt: skip
def _in_graph(
    loss_fn, params, batch, key, loss_args, batch_size, *, num_microbatches, num_probes,
    execution, precision, mode, stderr, labelled,
):  # fmt: skip
    n, rows = num_microbatches, _Rows(labelled, params)
    parts = _microbatches(batch, n)
    _check(loss_fn, params, _microbatch(parts, 0), loss_args, mode)

    def measure(number):
        probe = _probe(key, number, params)
        evaluate = lambda part: _evaluate(loss_fn, params, part, probe, loss_args, mode)

        def take(sums, i):
            loss, product = evaluate(_microbatch(parts, i))
            return _add(rows, sums, i, loss, product), (product if stderr else None)

        with matmul_precision(precision):
            if execution == "vmap":
                losses, products = jax.vmap(evaluate, in_axes=1)(parts)
                mean = [jnp.mean(y, axis=0) for y in products]
                total = jnp.sum(_terms(rows, products, mean), axis=0)
                sums = _Sums(mean, total, jnp.sum(losses.astype(total.dtype)))
            elif execution == "scan":
                sums, products = jax.lax.scan(take, _no_sums(rows), jnp.arange(n))
            else:
                sums, products = _no_sums(rows), []
                for i in range(n):
                    sums, product = take(sums, i)
                    products.append(product)
                products = _stacked(products) if stderr else None
        return _said(rows, probe, sums, products if stderr else None)

    if num_probes == 1 or execution == "unroll":
        said = _stacked([measure(number) for number in range(num_probes)])
    else:
        said = jax.lax.map(measure, jnp.arange(num_probes))
    rescale = len(jax.tree.leaves(parts)[0]) / batch_size
    return _summary(said, labelled.sizes(params), n, rescale)


def _check(loss_fn, params, microbatch, loss_args, mode) -> None:
    check_scalar(loss_fn, params, microbatch, loss_args)
    check_differentiable(loss_fn, params, microbatch, loss_args, mode)


@functools.partial(
    jax.jit,
    static_argnames=(
        "loss_fn", "num_microbatches", "precision", "mode", "stderr", "labelled",
    ),
    donate_argnames="sums",
)  # fmt: skip
def _take(
    loss_fn, params, batch, probe, loss_args, sums, i, *, num_microbatches, precision,
    mode, stderr, labelled,
):  # fmt: skip
    part = _microbatch(_microbatches(batch, num_microbatches), i)
    _check(loss_fn, params, part, loss_args, mode)
    with matmul_precision(precision):
        loss, product = _evaluate(loss_fn, params, part, probe, loss_args, mode)
    rows = _Rows(labelled, params)
    return _add(rows, sums, i, loss, product), (product if stderr else None)


@functools.partial(jax.jit, static_argnames=("labelled", "where"))
def _start(params, labelled, where):
    sums = _no_sums(_Rows(labelled, params))
    return sums._replace(mean=lay(sums.mean, params, where))


@functools.partial(jax.jit, static_argnames="labelled")
def _said_of_list(params, probe, sums, products, labelled):
    products = _stacked(products) if products else None
    return _said(_Rows(labelled, params), probe, sums, products)


@functools.partial(jax.jit, static_argnames=("p", "n"))
def _finish(said, p, n, rescale):
    return _summary(_stacked(said), p, n, rescale)


def _from_python(
    loss_fn, params, batch, key, loss_args, batch_size, *, num_microbatches, num_probes,
    stderr, labelled, **options,
):  # fmt: skip
    """One compiled call a microbatch: that of one is all that is compiled."""
    n, said = num_microbatches, []
    for number in range(num_probes):
        probe = _probe(key, np.int32(number), params)
        sums = _start(params, labelled, placement(params))
        products = []
        for i in range(n):
            sums, product = _take(
                loss_fn, params, batch, probe, loss_args, sums, np.int32(i),
                num_microbatches=n, stderr=stderr, labelled=labelled, **options,
            )  # fmt: skip
            products.append(product)
        products = products if stderr else []
        said.append(_said_of_list(params, probe, sums, products, labelled))
    rescale = num_examples(batch) // n / batch_size
    return _finish(said, labelled.sizes(params), n, rescale)


def _summary(said, p: int | tuple, n: int, rescale) -> HessianMoments:
    """Averages over probes, each divided by P; variances are multiplied by b/B."""
    *forms, losses = said
    per = lambda x: x / jnp.broadcast_to(jnp.asarray(p, x.dtype), x.shape)
    mean, raw_square, total, terms = jax.tree.map(per, forms)
    num_probes, dtype = len(mean), mean.dtype
    per_probe = total / (n - 1)  # variance of an H_b
    rescale = jnp.asarray(rescale).astype(dtype)
    probe_stderr = microbatch_stderr = jnp.full(mean.shape[1:], jnp.nan, dtype)
    if num_probes > 1:
        spread = jnp.std(per_probe, axis=0, ddof=1)
        probe_stderr = spread * (rescale / num_probes**0.5)
    if terms is not None and n > 2:
        # The delete-one jackknife of a sample variance, in closed form.
        terms = jnp.mean(terms, axis=0)
        centred = terms - jnp.mean(terms, axis=0, keepdims=True)
        jackknife = jnp.sum(jnp.square(centred), axis=0)
        microbatch_stderr = jnp.sqrt(jackknife * n / (n - 1)) * (rescale / (n - 2))
    return HessianMoments(
        mean=jnp.mean(mean, axis=0),
        # ||ybar||^2 carries the noise of the mean of n microbatches; take it off.
        square=jnp.mean(raw_square, axis=0) - jnp.mean(per_probe, axis=0) / n,
        variance=jnp.mean(per_probe, axis=0) * rescale,
        probe_stderr=probe_stderr,
        microbatch_stderr=microbatch_stderr,
        loss=jnp.mean(losses) / n,
    )


def moments(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key,
    *,
    loss_args: tuple[Any, ...] = (),
    num_microbatches: int = 8,
    num_probes: int = 1,
    batch_size: int | None = None,
    execution: Execution | None = None,
    precision: str | None = "highest",
    mode: Mode = "forward-over-reverse",
    stderr: bool = True,
    labels: Labels | None = None,
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
    gradients each. Memory: the residuals of the microbatches that run at once (all of
    them for "vmap", else one), a few vectors like `params`, and, for the microbatch
    part of the standard error or under "vmap", `num_microbatches` more.

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
        execution: how the microbatches run: "eager" (driven from Python, one compiled
            call each, outside `jit` alone: compiles in the time of one), "scan" (one
            after another in a loop), "unroll" (the same without the loop: n times as
            long to compile) or "vmap" (at once). Default: on a CPU "eager" where
            nothing is traced, else "unroll" for a loss with a convolution, which
            XLA:CPU runs some thirty times slower inside a loop, and "scan" for others;
            on accelerators "vmap", which fills them.
        precision: matmul precision; None leaves the global setting.
        mode: how products are differentiated, see `hvp`.
        stderr: whether to compute `microbatch_stderr`; without it (NaN) `moments` is
            two to four times faster on a CPU.
        labels: a pytree of names like params, or a prefix of one, or a function from
            params to one (`rmtdamp.damping.by_layer`): moments of each label, in the
            sorted order of the names, from the same products. For a label with the
            P_l parameters l: P_l^-1 Tr H_ll, P_l^-1 Tr (H^2)_ll and the variances of
            the rows l, over P_l, the noise between labels included. Weighted by P_l
            their mean is what is measured without labels.

    Returns:
        `HessianMoments`, scalars in float32 or the params' dtype if that is wider. The
        standard error of `variance` has a part from the probes (`probe_stderr`, NaN
        with one probe) and a part from the microbatches (`microbatch_stderr`, a
        delete-one jackknife, NaN with two). What was measured is returned as it is,
        NaN and infinity included.

    Raises:
        TypeError: params that are not real floats, a loss that is not a scalar, or
            labels that are no strings.
        ValueError: an empty batch, unequal leading axes, labels that are no prefix of
            params, fewer than two microbatches, a number of microbatches that does not
            divide the batch, fewer than one probe, or an unknown `execution` or `mode`.

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
                else f"take one of {divisors}, or more examples"
                if count > 1
                else "one example has no variance, take more"
            )
        )
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}, and at least 1 is needed")
    given = isinstance(batch_size, int | np.integer)
    if given and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, and at least 1 is needed")
    if execution is not None and execution not in _EXECUTIONS:
        raise ValueError(
            f"execution is {execution!r}: choose from {', '.join(_EXECUTIONS)}, or "
            "None for the rule that the documentation states"
        )
    check_mode(mode)
    traced = is_traced(params, batch, key, loss_args)
    if execution is None:
        execution = _execution(loss_fn, params, batch, loss_args, traced)
    if execution == "eager" and traced:
        raise ValueError(
            "execution is 'eager', which is driven from Python and cannot be traced: "
            "choose 'scan', 'unroll' or 'vmap' inside jit, or None"
        )
    options = {
        "num_microbatches": num_microbatches,
        "num_probes": num_probes,
        "precision": precision,
        "mode": mode,
        "stderr": stderr,
        "labelled": parts_of(as_function(labels), params),
    }
    arguments = (
        loss_fn, params, batch, key, loss_args,
        count if batch_size is None else batch_size,
    )  # fmt: skip
    if execution == "eager":
        return _from_python(*arguments, **options)
    return _in_graph(*arguments, execution=execution, **options)
