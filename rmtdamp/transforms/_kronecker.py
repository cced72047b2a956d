"""A KroneckerMeasurer: averaged Kronecker factors and their eigenbases. No optax state.

Factors are averaged at each measurement; eigenbases follow the averages more rarely.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rmtdamp._checks import check_decays, check_every, check_mesh, most_rejected
from rmtdamp._jax import is_traced
from rmtdamp._sharding import spread
from rmtdamp._tree import accumulation_dtype
from rmtdamp._types import Params
from rmtdamp.kronecker import (
    Block,
    Eigenbasis,
    FactorsFn,
    KroneckerFactors,
    eigenbasis,
    second_moments,
)

from ._measurer import Context, is_due, with_numbers


class KroneckerState(NamedTuple):
    """What a `KroneckerMeasurer` knows; factors are in float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> from rmtdamp.kronecker import ModelFactors, make_blocks
        >>> params = {"w": jnp.ones((4, 3))}
        >>> factors_fn = ModelFactors(
        ...     model_fn=lambda params, x, tape: tape.linear(
        ...         "layer", x, x @ params["w"]
        ...     ),
        ...     criterion=lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
        ...     blocks=make_blocks(params, {"layer": {"kernel": "w"}}),
        ...     fisher="ggn",
        ... )
        >>> measured = rmtdamp.KroneckerMeasurer(factors_fn).init(params)
        >>> measured.factors[0].inputs.shape
        (1, 4, 4)
    """

    # every measurement
    factors: tuple[KroneckerFactors, ...]  # per Kronecker block, averaged
    diagonal: tuple[jax.Array, ...]  # per diagonal block, shaped like its leaf
    factor_weight: jax.Array  # (), 1 - decay^k; 1 without debiasing
    scales: tuple[jax.Array, ...]  # EKFAC: (groups, rows, columns) per Kronecker block
    scale_weight: jax.Array  # (), of the measurements in the bases of now
    kfac_measurements: jax.Array  # (), int32, tried
    kfac_rejections: jax.Array  # (), int32, of them not finite
    # every eigendecomposition
    bases: tuple[Eigenbasis, ...]  # per Kronecker block
    eigen_refreshes: jax.Array  # (), int32

    @property
    def waits(self) -> jax.Array:
        """Whether nothing has been measured."""
        return self.kfac_measurements == 0

    def problems(self) -> list[str]:
        """What a user should know of a run, in words; eager."""
        if most_rejected(self.kfac_measurements, self.kfac_rejections):
            return [
                "most measurements of the Kronecker factors were not finite "
                '(optax.tree.get(opt_state, "kfac_rejections")), so the curvature is '
                "the last that was, or the identity: look at the loss, the data and "
                "the learning rate; of a loss whose scale cannot be found, num_terms "
                "of the factors tells"
            ]
        return []


@with_numbers("decay", "seed")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerMeasurer:
    """Measures and averages the Kronecker factors of a model, for `scale_by_kfac`.

    The averages A <- decay A + (1 - decay) A_batch, and G likewise, begin at the first
    measurement and are debiased, or begin at the identity (`debias=False`): then the
    identity fades like decay^k, a damping of its own over the first few times
    1 / (1 - decay) measurements. The authors' experiments did the latter.

    A measurer holds no state, and all its settings: hand the same one to `kfac` and to
    `rmtdamp.refresh`. It is a pytree; its numbers are leaves, the rest is static.

    Args:
        factors_fn: measures the factors of a batch, `rmtdamp.flax.nnx_factors`,
            `linen_factors`, or a `rmtdamp.kronecker.ModelFactors` of your own.
        decay: weight of the past in the averages, in [0, 1).
        eigen_every: measurements between eigendecompositions, at least 1, the first
            measurement included; and 1, 2, 4, ... below half of that.
        ekfac: measure the diagonal of the curvature in the eigenbasis too. Eigenvectors
            of a side without an eigenvalue, below rounding, are arbitrary, and each
            gets the mean of theirs.
        debias: whether averages begin at the first measurement or at the identity.
        seed: of sampled labels, which are a function of it and the measurement's
            number: the same on every device and after a restart.
        mesh: devices over which the eigendecompositions are spread, each layer's on
            one, the dearest first; what they find is on all of them. None: each device
            makes all of them, as it holds all factors.

    Raises:
        ValueError: a number out of its range.
        TypeError: `factors_fn` or `mesh` is something else.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> from rmtdamp.kronecker import ModelFactors, make_blocks
        >>> params = {"w": jnp.ones((4, 3))}
        >>> factors_fn = ModelFactors(
        ...     model_fn=lambda params, x, tape: tape.linear(
        ...         "layer", x, x @ params["w"]
        ...     ),
        ...     criterion=lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
        ...     blocks=make_blocks(params, {"layer": {"kernel": "w"}}),
        ...     fisher="ggn",
        ... )
        >>> measurer = rmtdamp.KroneckerMeasurer(factors_fn)
        >>> tx = rmtdamp.kfac(0.1, measurer, damping=0.1)
        >>> batch = jnp.eye(4), jnp.ones((4, 3))
        >>> state = rmtdamp.refresh(tx.init(params), measurer, params, batch)

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored
        approximate curvature, 2015, section 5. George et al., 2018, for EKFAC.
    """

    state_type: ClassVar[type] = KroneckerState

    factors_fn: FactorsFn = dataclasses.field(kw_only=False)
    decay: Any = 0.95
    eigen_every: int = 10
    ekfac: bool = False
    debias: bool = True
    seed: Any = 0
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.factors_fn, "blocks"):
            raise TypeError(
                f"factors_fn is of type {type(self.factors_fn).__name__} and has no "
                "blocks: KFAC needs to see a model's layers, through "
                "rmtdamp.flax.nnx_factors(model, criterion), "
                "rmtdamp.flax.linen_factors(...) or rmtdamp.kronecker.ModelFactors; a "
                "loss function does not show them"
            )
        check_decays(decay=self.decay)
        check_every("eigen_every", self.eigen_every)
        check_mesh(self.mesh)

    def init(self, params: Params) -> KroneckerState:
        """Before any measurement: the curvature is the identity, gradients are kept."""
        dtype = accumulation_dtype(params)
        blocks = self.factors_fn.blocks
        layers = [block for block in blocks if block.groups]
        zero = lambda: jnp.zeros((), jnp.int32)  # not shared, so that a step may donate
        ones = lambda *shape: jnp.ones(shape, dtype)

        def eye(n, groups):
            return jnp.tile(jnp.eye(n, dtype=dtype)[None], (groups, 1, 1))

        def eye_inputs(block):  # an embedding's is its diagonal
            if block.kind == "embedding":
                return ones(block.groups, block.rows)
            return eye(block.rows, block.groups)

        return KroneckerState(
            factors=tuple(
                KroneckerFactors(eye_inputs(b), eye(b.columns, b.groups))
                for b in layers
            ),
            diagonal=tuple(ones(*b.shapes[0]) for b in blocks if not b.groups),
            # An average that has weight 1 before its first measurement keeps what it
            # began with.
            factor_weight=jnp.asarray(0 if self.debias else 1, dtype),
            scales=tuple(
                ones(b.groups, b.rows, b.columns) for b in layers if self.ekfac
            ),
            scale_weight=jnp.zeros((), dtype),
            kfac_measurements=zero(),
            kfac_rejections=zero(),
            bases=tuple(
                Eigenbasis(
                    eye_inputs(b),
                    eye(b.columns, b.groups),
                    ones(b.groups, b.rows),
                    ones(b.groups, b.columns),
                )
                for b in layers
            ),
            eigen_refreshes=zero(),
        )

    def refresh(self, measured: KroneckerState, context: Context) -> KroneckerState:
        """Measure on the batch and average; decompose where it is due.

        What is not finite is counted, and all else stays as it was.

        Returns:
            The state after the measurement.
        """
        if is_traced(measured, context):
            found = _measure(self, measured, context)
            due = _decomposes(self, measured)
            bases_of = lambda state: jax.lax.cond(
                due,
                functools.partial(_eigenbases, self.mesh),
                lambda _: state.bases,
                state.factors,
            )
            averaged = _average(self, measured, found)
            return _accept(self, measured, averaged, found, bases_of(averaged), due)
        found = _compiled_measure(self, measured, context)
        averaged = _compiled_average(self, measured, found)
        due = _decomposes(self, measured)
        bases = measured.bases
        if due:
            bases = _compiled_eigenbases(self.mesh, averaged.factors)
        return _compiled_accept(self, measured, averaged, found, bases, due)


def _measure(measurer, state, context):
    key = jax.random.fold_in(jax.random.key(measurer.seed), state.kfac_measurements)
    factors_fn = measurer.factors_fn
    found = factors_fn(context.params, context.batch, key, *context.loss_args)
    _check_measured(factors_fn.blocks, state, found, measurer.ekfac)
    dtype = state.factor_weight.dtype
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # no embedding's indices
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, found)


def _check_measured(blocks: tuple[Block, ...], state, found, ekfac) -> None:
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    measured = shapes((found.kronecker, found.diagonal))
    expected = shapes((state.factors, state.diagonal))
    if measured != expected:
        raise ValueError(
            f"factors_fn returned factors of shapes {measured}, and its blocks "
            f"({', '.join(block.name for block in blocks)}) need {expected}"
        )
    if ekfac and len(found.records) != len(state.factors):
        raise ValueError(
            f"ekfac=True needs the record of each of the {len(state.factors)} layers, "
            f"and factors_fn returned {len(found.records)}: fill Factors.records"
        )


def _mixed(old, new, weight, decay):
    """A debiased exponential average and its weight; from weight 0 it is `new`."""
    decay = jnp.asarray(decay).astype(weight.dtype)
    total = decay * weight + (1 - decay)
    rate = (1 - decay) / total
    mix = lambda x, y: jnp.where(weight == 0, y, (1 - rate) * x + rate * y)
    return jax.tree.map(mix, old, new), total


def _all_finite(tree) -> jax.Array:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)


def _select(condition, new, old):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _average(measurer, state, found) -> KroneckerState:
    """The state with new averages, unless what was found is not finite."""
    old, new = (state.factors, state.diagonal), (found.kronecker, found.diagonal)
    averages, weight = _mixed(old, new, state.factor_weight, measurer.decay)
    (factors, diagonal), weight = _select(
        _all_finite(new), (averages, weight), (old, state.factor_weight)
    )
    return state._replace(factors=factors, diagonal=diagonal, factor_weight=weight)


def _decomposes(measurer, state):
    """Whether this measurement renews the bases: in turn, or because none ever did."""
    in_turn = is_due(state.kfac_measurements, measurer.eigen_every)
    return in_turn | (state.eigen_refreshes == 0)


def _eigenbases(mesh, factors) -> tuple[Eigenbasis, ...]:
    cost = lambda layer: sum(x.size * x.shape[-1] for x in layer)  # n^3
    return tuple(spread(eigenbasis, factors, list(map(cost, factors)), mesh))


def _known_moments(record, basis):
    """`second_moments`, evened out over the eigenvectors of each side without a value.

    They are arbitrary, a matter of rounding, and steps must not depend on it. Rows of
    an embedding are its tokens.

    Returns:
        (groups, rows, columns).
    """
    moments = second_moments(record, basis)
    sides = [(2, basis.output_values)]
    if basis.inputs.ndim == 3:
        sides.append((1, basis.input_values))
    for axis, values in sides:
        top = jnp.max(values, axis=1, keepdims=True)
        unseen = values <= values.shape[1] * jnp.finfo(values.dtype).eps * top
        unseen = jnp.expand_dims(unseen, 3 - axis)
        total = jnp.sum(jnp.where(unseen, moments, 0), axis, keepdims=True)
        count = jnp.maximum(jnp.sum(unseen, axis, keepdims=True), 1)
        moments = jnp.where(unseen, total / count, moments)
    return moments


def _accept(measurer, before, averaged, found, bases, due) -> KroneckerState:
    """The state after a measurement, or the one before where it was not finite."""
    scales, weight = before.scales, before.scale_weight
    if measurer.ekfac:
        moments = tuple(map(_known_moments, found.records, bases))
        # A new basis begins a new average: old entries belong to other directions.
        scales, weight = _mixed(
            scales, moments, jnp.where(due, 0, weight), measurer.decay
        )
    good = _all_finite((found.kronecker, found.diagonal, bases, scales))
    after = averaged._replace(
        scales=scales,
        scale_weight=weight,
        bases=bases,
        eigen_refreshes=before.eigen_refreshes + jnp.asarray(due).astype(jnp.int32),
    )
    return _select(good, after, before)._replace(
        kfac_measurements=before.kfac_measurements + 1,
        kfac_rejections=before.kfac_rejections + (~good).astype(jnp.int32),
    )


_compiled_measure = jax.jit(_measure)
_compiled_average = jax.jit(_average)
_compiled_eigenbases = jax.jit(_eigenbases, static_argnums=0)
_compiled_accept = jax.jit(_accept)
