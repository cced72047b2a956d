"""loss_fn, params, batches -> Report: every question of the page, asked once.

The Hessian of the data set tells where the model stands (trace, extreme eigenvalues,
density), that of the first batch how noisy a training step sees it (variance, damping,
outliers).
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._tree import check_params, size, without_box
from rmtdamp._types import Batch, Key, LossFn, Matvec, Mode, Params
from rmtdamp.hessian import (
    EigenPairs,
    Estimate,
    HessianMoments,
    SpectralDensity,
    dataset_matvec,
    eigsh,
    halves,
    hessian_matvec,
    hvp,
    moments,
    noise_matvec,
    restrict,
    spectral_density,
    split_half_eigsh,
    subspace_overlap,
    sum_matvec,
    trace,
)
from rmtdamp.kronecker import (
    FactorsFn,
    dataset_factors,
    eigenbasis,
    restrict_to_block,
    top_eigenpairs,
)
from rmtdamp.outliers import Outliers, outliers

from ._check import MIN_EXAMPLES, SPARE, check_factors, check_product, look
from ._exact import exact
from ._watch import Watch

# With at most so many parameters the whole matrix costs less than the estimates.
_FEW = 1000
_TRACE_PRODUCTS = 32
# Relative residual asked of eigenvalues, whose error is of the order of its square.
_TOL = 1e-3
# More of them leave less error in the variance, and cost the same FLOPs in smaller
# pieces.
_MOST_MICROBATCHES = 32


class LayerOverlap(NamedTuple):
    """How much of a layer's sharp space its Kronecker factors show.

    Example:
        >>> from rmtdamp.spectrum import LayerOverlap
        >>> found = LayerOverlap(k=9, overlap=0.6, random=9 / 650)
        >>> print(f"{found.overlap:.0%} against {found.random:.0%} by chance")
        60% against 1% by chance
    """

    k: int  # the dimensions of either space
    overlap: float  # k^-1 ||U^T V||_F^2, in [0, 1]
    random: float  # what a random space has on average, k over the parameters


class Report(NamedTuple):
    """What was measured; [H] is the unit of a Hessian eigenvalue.

    With `batch_only` the first batch stands for the data set everywhere.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.spectrum import measure
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2) / 2
        >>> data = jax.random.normal(jax.random.key(0), (2, 64, 8))
        >>> report = measure(loss_fn, jnp.ones(8), list(data), jax.random.key(1))
        >>> report.num_parameters, report.num_batches, report.batch_size
        (8, 2, 64)
    """

    num_parameters: int  # P
    num_examples: int  # of the data set
    num_batches: int
    batch_size: int  # B, the examples of the first batch
    batch_only: bool
    loss: float  # mean over the examples
    trace: Estimate  # (), of the data set's Hessian, in [H]
    largest: EigenPairs  # one: its largest eigenvalue
    smallest: EigenPairs  # one: its smallest, negative at most places
    leading: EigenPairs  # k + 2 of largest magnitude
    density: SpectralDensity  # of the data set's Hessian
    moments: HessianMoments  # from the first batch, variance for batches of B
    outliers: Outliers  # of the first batch, k or P / 4 of them
    noise_density: SpectralDensity  # of the noise of the first batch's Hessian
    batch_density: SpectralDensity  # of the first batch's Hessian
    layers: dict[str, SpectralDensity]  # of diagonal blocks of the data set's Hessian
    notes: list[str]  # what a reader must know to read the rest
    kronecker: dict[str, LayerOverlap]  # of the layers whose factors are measured
    num_microbatches: int  # of the first batch, for `moments`
    num_probes: int  # of `moments`; 0 for exact traces


def _num_microbatches(count: int) -> int:
    """From 4 to 32: as few examples left over, then as many microbatches, as can be."""
    most = min(_MOST_MICROBATCHES, count)
    return min(range(MIN_EXAMPLES, most + 1), key=lambda n: (count % n, -n))


def _rows(batch: Batch, count: int) -> Batch:
    return jax.tree.map(lambda x: x[:count], batch)


def _blocks(params: Params, select: Sequence[str] | None) -> dict:
    """Name of each block -> what `restrict` selects it by."""
    if select is not None:
        return {expression: expression for expression in select}
    keystr, layers = jax.tree_util.keystr, {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        inner = without_box(path)
        # A leaf at the top is a layer of its own.
        layers.setdefault(keystr(inner[:-1] or inner), set()).add(keystr(path))
    return {name: leaves.__contains__ for name, leaves in layers.items()}


def layer_spectra(
    matvec: Matvec,
    params: Params,
    key: Key,
    *,
    select: Sequence[str] | None = None,
    num_steps: int = 80,
    num_probes: int = 4,
) -> dict[str, SpectralDensity]:
    """The spectra of a Hessian's diagonal blocks, layer by layer. Eager.

    Cost: num_probes * num_steps products with the whole matrix for each block.

    Args:
        matvec: v -> H v for vectors like `params`.
        params: the whole params, a pytree.
        key: a key of `jax.random`.
        select: for each block a part of its leaves' paths, or a regular expression that
            is searched for in them, as in `rmtdamp.hessian.restrict`. Default: a block
            per layer, that is, of the leaves whose paths agree in all but the last key.
        num_steps: points per probe; cut to the number of parameters of a block.
        num_probes: independent probes.

    Returns:
        A dict from path or expression to `SpectralDensity`, for
        `rmtdamp.plot.layer_densities`.

    Raises:
        TypeError: params that are not real floats.
        ValueError: an expression that selects no leaf, or what `spectral_density`
            refuses.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.spectrum import layer_spectra
        >>> scale = {"a": {"w": 2 * jnp.ones(6)}, "b": {"w": 3 * jnp.ones(4)}}
        >>> matvec = lambda v: jax.tree.map(jnp.multiply, scale, v)
        >>> spectra = layer_spectra(matvec, scale, jax.random.key(0))
        >>> {name: f"{s.moment(1)[0]:.2f}" for name, s in spectra.items()}
        {"['a']": '2.00', "['b']": '3.00'}
    """
    check_params(params)
    blocks = {
        name: restrict(matvec, params, chosen)
        for name, chosen in _blocks(params, select).items()
    }
    keys = jax.random.split(key, len(blocks))
    return {
        name: spectral_density(
            block, part, k, num_steps=min(num_steps, size(part)), num_probes=num_probes
        )
        for (name, (block, part)), k in zip(blocks.items(), keys, strict=True)
    }


def _kronecker_overlaps(
    factors_fn: FactorsFn, matvec: Matvec, params: Params, batches: Iterable[Batch],
    key: Key, blocks: dict, k: int,
) -> dict[str, LayerOverlap]:  # fmt: skip
    """For each block of the Hessian that is a layer with factors, kernel and bias."""
    layers = {}
    for name, chosen in blocks.items():
        _, part = restrict(matvec, params, chosen)
        held = jax.tree.map(lambda _, x: x is not None, params, part)
        layers[frozenset(np.flatnonzero(jax.tree.leaves(held)).tolist())] = name
    wanted = [block for block in factors_fn.blocks if block.groups]
    first, *keys = jax.random.split(key, 1 + len(wanted))
    factors, found = dataset_factors(factors_fn, params, batches, first), {}
    for block, measured, each in zip(wanted, factors, keys, strict=True):
        name = layers.get(frozenset(block.leaves))
        if name is not None:
            layer, part = restrict_to_block(matvec, params, block)
            few = min(k, size(part))
            true = eigsh(layer, part, each, k=few, tol=_TOL)
            estimate = top_eigenpairs(block, eigenbasis(measured), params, k=few)
            overlap = subspace_overlap(true, estimate)
            found[name] = LayerOverlap(few, overlap, few / size(part))
    return found


def measure(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    key: Key,
    *,
    k: int | None = None,
    num_steps: int = 80,
    num_probes: int = 4,
    batch_only: bool = False,
    layers: Sequence[str] | None = (),
    factors_fn: FactorsFn | None = None,
    mode: Mode = "forward-over-reverse",
    dense: bool | None = None,
    watch: Watch | None = None,
) -> Report:
    r"""Everything that `python -m rmtdamp spectrum` prints. Eager.

    Of the data set's Hessian: the trace (Hutchinson, 32 products), the largest and the
    smallest eigenvalue, the k of largest magnitude and the spectral density. Of the
    first batch: m = P^-1 Tr Var(H_B) (`moments`), the outliers (`outliers`), the
    density, and that of its noise.

    Cost: about num_probes * num_steps + 150 products over the data set, twice as many
    over the first batch, and num_probes * num_steps over the data set for each layer.
    Memory: that of `eigsh` with k, and 4 k vectors like `params`; or the 32 of
    `moments` if these are more.

    Of at most 1,000 parameters the whole Hessian is made instead, at P products over
    the data set and the first batch: trace, eigenvalues, densities and `moments` are
    exact then, their standard errors 0 but for that of the variance, whose traces are
    exact and whose microbatches are at most 32.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss.
        params: pytree of P real floating numbers, P at least 4.
        batches: iterable of batches that can be read again and again; the first, of B
            examples, stands for a training step's.
        key: a key of `jax.random`.
        k: eigenvalues of largest magnitude; default 9, or P if that is less. No more
            than P / 4 of the first batch are judged.
        num_steps: points per probe of each density; cut to P.
        num_probes: probes of each density, and of `moments`.
        batch_only: let the first batch stand for the data set.
        layers: regular expressions for `layer_spectra`; None for every layer.
        factors_fn: measures Kronecker factors, such as `ModelFactors` or
            `rmtdamp.flax.nnx_factors`, best with `fisher="ggn"`; for each of `layers`
            that is one of its blocks, the overlap of the k sharpest directions with
            those of the factors' product.
        mode: how products are differentiated, see `rmtdamp.hessian.hvp`.
        dense: whether to make the whole Hessian; default: of at most 1,000 parameters.
        watch: told how far things are.

    Returns:
        `Report`.

    Raises:
        TypeError: params that are not real floats, a loss that is not a scalar,
            batches that are not an iterable of batches or can be read only once.
        ValueError: batches that are empty, exhausted or different on the second pass,
            a first batch of fewer than 4 examples, a loss or a Hessian that is not
            finite, fewer than 4 parameters, a `factors_fn` of another model or one that
            fails, or what `eigsh` and `spectral_density` refuse.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.spectrum import measure
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2) / 2
        >>> data = jax.random.normal(jax.random.key(0), (8, 64, 20)).at[..., 0].mul(5)
        >>> report = measure(loss_fn, jnp.ones(20), list(data), jax.random.key(1))
        >>> print(report.num_examples, f"{report.largest.eigenvalues[0]:.0f}")
        512 27
    """
    watch = Watch() if watch is None else watch
    watch.stage("looking at the data")
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    problem = look(loss_fn, params, batches, mode=mode, batch_only=batch_only)
    first, count = problem.first, problem.counts[0]
    batch_only = batch_only or len(problem.counts) == 1
    p, n = size(params), _num_microbatches(count)
    k = min(9, p) if k is None else k
    if not 1 <= k <= p:
        raise ValueError(f"k is {k}, and must lie between 1 and the {p} parameters")
    about = {
        "num_parameters": p,
        "num_examples": sum(problem.counts),
        "num_batches": len(problem.counts),
        "batch_size": count,
        "batch_only": batch_only,
        "loss": problem.loss,
        "notes": problem.notes,
        "num_microbatches": n,
    }
    blocks = _blocks(params, layers) if layers is None or layers else {}
    if factors_fn is not None:
        check_factors(factors_fn, params, first)

    def overlaps(matvec):
        if factors_fn is None or not blocks:
            return {}
        watch.stage("Kronecker factors of the layers")
        data = [first] if batch_only else batches
        at = matvec, params, data, next(keys), blocks, k
        return _kronecker_overlaps(factors_fn, *at)

    if p <= _FEW if dense is None else dense:
        found, matvec = exact(
            loss_fn,
            params,
            batches,
            first,
            k=k,
            num_microbatches=n,
            batch_only=batch_only,
            blocks=blocks,
            mode=mode,
            watch=watch,
        )
        return Report(**about, **found, kronecker=overlaps(matvec), num_probes=0)

    watch.stage("compiling Hessian-vector products")
    a, b = (
        hessian_matvec(loss_fn, params, half, mode=mode)
        for half in halves(_rows(first, count - count % 2))
    )
    # The halves' compiled product serves for the batch, too.
    matvec = sum_matvec((a, b), (0.5, 0.5))
    if count % 2:
        matvec = hessian_matvec(loss_fn, params, first, mode=mode)
    whole = matvec
    if not batch_only:
        other = functools.partial(hessian_matvec, mode=mode)
        whole = dataset_matvec(
            loss_fn,
            params,
            batches,
            matvec_fn=None if mode == "forward-over-reverse" else other,
            wrap=watch.passing,
        )
    wide = max(k, min(k + SPARE, p))
    basis_size = min(p, max(2 * wide + 1, 20))
    pairs = functools.partial(
        eigsh,
        whole,
        params,
        tol=_TOL,
        basis_size=basis_size,
        max_products=max(num_steps * num_probes, 2 * basis_size),
    )

    # The quickest to refuse comes first.
    watch.stage("eigenvalues of largest magnitude")
    leading = pairs(next(keys), k=wide, which="LM")
    if not np.all(np.isfinite(leading.eigenvalues)):
        probe = jax.tree.map(jnp.ones_like, params)
        check_product(hvp(loss_fn, params, first, probe, mode=mode), params)
    watch.stage("largest eigenvalue")
    largest = pairs(next(keys), k=1, which="LA")
    watch.stage("smallest eigenvalue")
    smallest = pairs(next(keys), k=1, which="SA")
    watch.stage("trace", _TRACE_PRODUCTS)
    total = trace(whole, params, next(keys), num_probes=_TRACE_PRODUCTS)
    num_steps = min(num_steps, p)
    density_of = functools.partial(
        spectral_density, like=params, num_steps=num_steps, num_probes=num_probes
    )
    watch.stage("density", num_steps * num_probes)
    density = density_of(whole, key=next(keys))

    watch.stage("noise of the first batch")
    noise = moments(
        loss_fn,
        params,
        _rows(first, count - count % n),
        next(keys),
        num_microbatches=n,
        num_probes=num_probes,
        batch_size=count,
        mode=mode,
    )
    watch.stage("outliers of the first batch")
    found = outliers(
        split_half_eigsh(
            a, b, params, next(keys), k=min(k, p // 4), spare=SPARE, tol=_TOL
        )
    )
    noise_density = density_of(noise_matvec(a, b), key=next(keys))
    batch_density = density
    if not batch_only:
        batch_density = density_of(matvec, key=next(keys))

    spectra = {}
    if blocks:
        watch.stage("layers")
        spectra = layer_spectra(
            whole,
            params,
            next(keys),
            select=layers,
            num_steps=num_steps,
            num_probes=num_probes,
        )
    return Report(
        **about,
        trace=total,
        largest=largest,
        smallest=smallest,
        leading=leading,
        density=density,
        moments=noise,
        outliers=found,
        noise_density=noise_density,
        batch_density=batch_density,
        layers=spectra,
        kronecker=overlaps(whole),
        num_probes=num_probes,
    )
