"""KFAC's state: how factors are averaged, and how a gradient is divided by them.

Three clocks run at rates of their own: factors are measured and averaged (every 10
steps), eigenbases follow the averages (every 100), and each step divides by

    U = Q_A [Q_A^T D Q_G / (l_A l_G^T + delta)] Q_G^T

with the damping delta of that step.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp.hessian._factors import Curvature
from rmtdamp.hessian._kronecker import (
    Block,
    Eigenbasis,
    KroneckerFactors,
    eigenbasis,
    from_matrix,
    second_moments,
    to_matrix,
)

Tikhonov = Literal["eigenvalues", "factored"]


class KFACState(NamedTuple):
    """State of `scale_by_kfac`; factors are in float32 or wider."""

    count: Any  # (), int32, steps taken
    kfac_key: jax.Array  # (2,), uint32, folded with the number of the measurement
    # every measurement; averages are debiased, the first one is the measurement itself
    factors: tuple[KroneckerFactors, ...]  # per Kronecker block
    diagonal: tuple[jax.Array, ...]  # per diagonal block, shaped like its leaf
    factor_weight: jax.Array  # (), 1 - decay^k
    scales: tuple[jax.Array, ...]  # EKFAC: (groups, rows, columns) per Kronecker block
    scale_weight: jax.Array  # (), of the measurements in the bases of now
    kfac_measurements: jax.Array  # (), int32, tried
    kfac_rejections: jax.Array  # (), int32, of them not finite
    # every eigendecomposition
    bases: tuple[Eigenbasis, ...]  # per Kronecker block
    eigen_refreshes: jax.Array  # (), int32
    # every step
    kfac_fallbacks: jax.Array  # (), int32, steps that left out singular directions


def initial_state(blocks: tuple[Block, ...], dtype, seed, ekfac: bool) -> KFACState:
    """Before any measurement: the curvature is the identity, gradients are kept."""

    def eye(n, groups):
        return jnp.tile(jnp.eye(n, dtype=dtype)[None], (groups, 1, 1))

    layers = [block for block in blocks if block.groups]
    zero = lambda: jnp.zeros((), jnp.int32)  # not shared, so that a step may donate
    ones = lambda *shape: jnp.ones(shape, dtype)
    return KFACState(
        count=zero(),
        kfac_key=jax.random.key_data(jax.random.key(seed)),
        factors=tuple(
            KroneckerFactors(eye(b.rows, b.groups), eye(b.columns, b.groups))
            for b in layers
        ),
        diagonal=tuple(ones(*b.shapes[0]) for b in blocks if not b.groups),
        factor_weight=jnp.zeros((), dtype),
        scales=tuple(ones(b.groups, b.rows, b.columns) for b in layers if ekfac),
        scale_weight=jnp.zeros((), dtype),
        kfac_measurements=zero(),
        kfac_rejections=zero(),
        bases=tuple(
            Eigenbasis(
                eye(b.rows, b.groups),
                eye(b.columns, b.groups),
                ones(b.groups, b.rows),
                ones(b.groups, b.columns),
            )
            for b in layers
        ),
        eigen_refreshes=zero(),
        kfac_fallbacks=zero(),
    )


def _average(old, new, weight, decay):
    """A debiased exponential average and its weight; from weight 0 it is `new`."""
    total = decay * weight + (1 - decay)
    rate = (1 - decay) / total
    mix = lambda x, y: jnp.where(weight == 0, y, (1 - rate) * x + rate * y)
    return jax.tree.map(mix, old, new), total


def _all_finite(tree) -> jax.Array:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)


def _check_measured(blocks, state, measured, ekfac) -> None:
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    found = shapes((measured.kronecker, measured.diagonal))
    expected = shapes((state.factors, state.diagonal))
    if found != expected:
        raise ValueError(
            f"factors_fn returned factors of shapes {found}, and its blocks "
            f"({', '.join(block.name for block in blocks)}) need {expected}"
        )
    if ekfac and len(measured.records) != len(state.factors):
        raise ValueError(
            f"ekfac=True needs the record of each of the {len(state.factors)} layers, "
            f"and factors_fn returned {len(measured.records)}: fill Factors.records"
        )


def measure(
    factors_fn: Curvature, state: KFACState, params, batch, loss_args, decay, eigen
) -> KFACState:
    """Measure on `batch` and average; decompose if `eigen`, or if it never was.

    What is not finite is counted, and all else stays as it was.

    Returns:
        The state after the measurement.
    """
    ekfac = len(state.scales) > 0
    key = jax.random.wrap_key_data(state.kfac_key)
    key = jax.random.fold_in(key, state.kfac_measurements)
    found = factors_fn(params, batch, key, *loss_args)
    _check_measured(factors_fn.blocks, state, found, ekfac)
    dtype = state.factor_weight.dtype
    found = jax.tree.map(lambda x: x.astype(dtype), found)
    decay = jnp.asarray(decay).astype(dtype)

    old = state.factors, state.diagonal
    new = found.kronecker, found.diagonal
    good = _all_finite(new)
    averages, factor_weight = _average(old, new, state.factor_weight, decay)
    # Nothing that is not finite enters the decomposition.
    factors, diagonal = _select(good, averages, old)
    due = eigen | (state.eigen_refreshes == 0)
    bases = jax.lax.cond(
        due, lambda: tuple(map(eigenbasis, factors)), lambda: state.bases
    )
    scales, scale_weight = state.scales, state.scale_weight
    if ekfac:
        moments = tuple(map(second_moments, found.records, bases))
        # A new basis begins a new average: old entries belong to other directions.
        scale_weight = jnp.where(due, 0, scale_weight)
        scales, scale_weight = _average(scales, moments, scale_weight, decay)
    good &= _all_finite((bases, scales))
    measured = state._replace(
        factors=factors,
        diagonal=diagonal,
        factor_weight=factor_weight,
        scales=scales,
        scale_weight=scale_weight,
        bases=bases,
        eigen_refreshes=state.eigen_refreshes + due.astype(jnp.int32),
    )
    return _select(good, measured, state)._replace(
        kfac_measurements=state.kfac_measurements + 1,
        kfac_rejections=state.kfac_rejections + (~good).astype(jnp.int32),
    )


def _select(condition, new, old):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def damped_eigenvalues(
    basis: Eigenbasis, damping: jax.Array, tikhonov: Tikhonov = "eigenvalues"
) -> jax.Array:
    """l_A l_G + delta, or (l_A + pi sqrt(delta)) (l_G + sqrt(delta) / pi).

    Returns:
        (groups, rows, columns), the damped curvature in the eigenbasis.
    """
    a, g = basis.input_values, basis.output_values
    if tikhonov == "eigenvalues":
        return a[:, :, None] * g[:, None, :] + damping
    # pi^2, the ratio of the mean eigenvalues; 1 where one of the factors is zero
    mean_a, mean_g = jnp.mean(a, axis=1), jnp.mean(g, axis=1)
    usable = (mean_a > 0) & (mean_g > 0)
    ratio = jnp.where(usable, mean_a, 1) / jnp.where(usable, mean_g, 1)
    pi, root = jnp.sqrt(ratio)[:, None], jnp.sqrt(damping)
    return (a + pi * root)[:, :, None] * (g + root / pi)[:, None, :]


def _divide(numerator, curvature, damping, size):
    """Quotient, and whether directions without curvature or damping were left out.

    With a damping any curvature will do; without, what is below the rounding of an
    eigendecomposition of `size` rows is zero, and nothing moves there.

    Returns:
        The quotient, and a bool.
    """
    epsilon = size * jnp.finfo(curvature.dtype).eps
    largest = jnp.max(curvature, initial=0)
    regular = curvature > jnp.where(damping > 0, 0, epsilon * largest)
    quotient = numerator / jnp.where(regular, curvature, 1)
    return jnp.where(regular, quotient, 0), ~jnp.all(regular)


def precondition(
    blocks: tuple[Block, ...],
    state: KFACState,
    leaves: list[jax.Array],
    damping: jax.Array,
    tikhonov: Tikhonov,
) -> tuple[list[jax.Array], jax.Array]:
    """(curvature + delta)^-1 times the gradient, block by block.

    Args:
        blocks: of the params.
        state: with the bases to use.
        leaves: of the gradient.
        damping: delta.
        tikhonov: how it is added to Kronecker blocks.

    Returns:
        The leaves of the result in the dtype of the factors, and whether singular
        directions were left out.
    """
    dtype = state.factor_weight.dtype
    out: list[jax.Array] = list(leaves)
    singular = jnp.asarray(False)
    layer = diagonal = 0
    product = lambda spec, x, y: jnp.einsum(spec, x, y, precision="highest")
    for block in blocks:
        chosen = [leaves[place].astype(dtype) for place in block.leaves]
        if block.groups:
            basis = state.bases[layer]
            if state.scales:
                curvature = state.scales[layer] + damping
            else:
                curvature = damped_eigenvalues(basis, damping, tikhonov)
            rotated = product("kab,kao->kbo", basis.inputs, to_matrix(block, chosen))
            rotated = product("kbo,kop->kbp", rotated, basis.outputs)
            size = max(block.rows, block.columns)
            divided, left_out = _divide(rotated, curvature, damping, size)
            back = product("kab,kbp->kap", basis.inputs, divided)
            back = product("kap,kop->kao", back, basis.outputs)
            results = from_matrix(block, back)
            layer += 1
        else:
            curvature = state.diagonal[diagonal] + damping
            divided, left_out = _divide(chosen[0], curvature, damping, 1)
            results = [divided]
            diagonal += 1
        for place, result in zip(block.leaves, results, strict=True):
            out[place] = result
        singular |= left_out
    return out, singular
