"""Few parameters -> what the page asks for, from whole matrices: no probes, no error.

The first batch is cut into microbatches, and the Hessian of each is made column by
column by one compiled program. Their spread is the noise, the means of the even and of
the odd ones are the Hessians of two halves, and their mean is that of the batch.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._tree import num_examples, size
from rmtdamp._types import Batch, LossFn, Matvec, Mode, Params
from rmtdamp.hessian import (
    Estimate,
    SpectralDensity,
    compare_halves,
    dense_matvec,
    dense_moments,
    eigh,
    halves,
    hessian_matvec,
    restrict,
    to_dense,
)
from rmtdamp.outliers import outliers

from ._check import SPARE, check_product
from ._watch import Watch


@functools.partial(jax.jit, static_argnames="n")
def _part(batch: Batch, i, n: int) -> Batch:
    """Microbatch i of n, strided: `x[i::n]` of as many examples as n divides."""
    take = lambda x: x[: len(x) - len(x) % n].reshape(-1, n, *x.shape[1:])[:, i]
    return jax.tree.map(take, batch)


def _mean(matrices) -> np.ndarray:
    return np.asarray(np.mean(matrices, axis=0, dtype=np.float64))


def _density(matrix: np.ndarray, like: SpectralDensity) -> SpectralDensity:
    """The spectrum of a matrix whose eigenvectors nobody asks for."""
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    return SpectralDensity.from_eigenvalues(jnp.asarray(values, like.nodes.dtype))


def exact(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    first: Batch,
    *,
    k: int,
    num_microbatches: int,
    batch_only: bool,
    blocks: dict[str, Callable[[str], bool]],
    mode: Mode,
    watch: Watch,
) -> tuple[dict[str, Any], Matvec]:
    """The measured fields of a `Report`, and the Hessian of the data set."""
    n, count, p = num_microbatches, num_examples(first), size(params)
    ends = np.cumsum([x.size for x in jax.tree.leaves(params)])

    def hessian(batch):
        return to_dense(hessian_matvec(loss_fn, params, batch, mode=mode), params)

    watch.stage("compiling Hessian-vector products and making the whole Hessian", n)
    parts = []
    for i in range(n):
        parts.append(hessian(_part(first, np.int32(i), n)))
        check_product(np.split(parts[-1].sum(1), ends[:-1]), params)
        watch.step()
    batch = _mean(parts) if count % n == 0 else hessian(first)
    if count % n == 0 and n % 2 == 0:
        a, b = _mean(parts[0::2]), _mean(parts[1::2])
    else:
        even = jax.tree.map(lambda x: x[: count - count % 2], first)
        a, b = (hessian(half) for half in halves(even))
    whole = batch if batch_only else _over(batches, hessian, watch)

    watch.stage("eigenvalues of the whole Hessian")
    pairs = eigh(whole, params)
    density = SpectralDensity.from_eigenvalues(pairs.eigenvalues)
    batch_density = density if batch_only else _density(batch, density)
    layers, matvec = {}, dense_matvec(whole, params)
    for name, chosen in blocks.items():
        _, part = restrict(matvec, params, chosen)
        held = jax.tree.map(lambda x, v: np.full(x.size, v is not None), params, part)
        inside = np.flatnonzero(np.concatenate(jax.tree.leaves(held)))
        layers[name] = _density(whole[np.ix_(inside, inside)], density)
    watch.stage("outliers of the first batch")
    wide = min(k + SPARE, p // 4)
    judged = (
        eigh(matrix, params).leading(wide, "LM") for matrix in ((a + b) / 2, a, b)
    )
    found = outliers(compare_halves(*judged, k=min(k, p // 4)))
    fields = {
        "trace": Estimate(jnp.asarray(np.trace(whole)), jnp.zeros(())),
        "largest": pairs.leading(1, "LA"),
        "smallest": pairs.leading(1, "SA"),
        "leading": pairs.leading(max(k, min(k + SPARE, p)), "LM"),
        "density": density,
        "moments": dense_moments(parts, microbatch_size=count // n, batch_size=count),
        "outliers": found,
        "noise_density": _density((a - b) / 2, density),
        "batch_density": batch_density,
        "layers": layers,
    }
    return fields, matvec


def _over(batches, hessian, watch: Watch) -> np.ndarray:
    """The Hessian of a data set."""
    watch.stage("the whole Hessian of the data set")
    total, seen = np.zeros((1, 1)), 0
    for batch in watch.passing(batches):
        count = num_examples(batch)
        total = total + count * hessian(batch)
        seen += count
    return total / seen
