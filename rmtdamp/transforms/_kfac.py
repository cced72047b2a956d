"""KFAC: the gradient divided by Kronecker-factored curvature, whose damping travels in.

    U = Q_A [Q_A^T D Q_G / (l_A l_G^T + delta)] Q_G^T

How the factors are measured and averaged is the business of a `KroneckerMeasurer`.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from rmtdamp._checks import check_choice, check_every, check_range
from rmtdamp._sharding import automatic, typed_like
from rmtdamp._tree import mean, vdot
from rmtdamp.kronecker import (
    Block,
    Eigenbasis,
    FactorsFn,
    KroneckerFactors,
    from_matrix,
    to_matrix,
)

from ._kronecker import KroneckerMeasurer, KroneckerState
from ._measurer import check_whole, refresh_in_step
from ._optimiser import check_damping, damping_in_force, is_one, optimiser

Tikhonov = Literal["eigenvalues", "factored"]


class DampedInverses(NamedTuple):
    """(A + pi sqrt(delta))^-1 and (G + sqrt(delta) / pi)^-1, and what they hold for."""

    factors: tuple[KroneckerFactors, ...]  # per Kronecker block
    dampings: jax.Array  # (Kronecker blocks,), delta; -1 before the first step
    eigen_refreshes: jax.Array  # (), int32, of the eigenbases
    singular: jax.Array  # (), bool, singular directions were left out


class ScaleByKFACState(NamedTuple):
    """State of `scale_by_kfac`.

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
        >>> print(rmtdamp.scale_by_kfac(factors_fn, damping=0.1).init(params).count)
        0
    """

    count: Any  # (), int32, steps taken
    measured: KroneckerState  # changes when the factors are measured
    kfac_fallbacks: jax.Array  # (), int32, steps that left out singular directions
    inverses: Any  # DampedInverses; () unless the damping is factored


def scale_by_kfac(
    measurer: KroneckerMeasurer | FactorsFn,
    *,
    damping: optax.ScalarOrSchedule | None = None,
    tikhonov: Tikhonov = "eigenvalues",
    refresh_every: int | None = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide the gradient by Kronecker-factored curvature plus a damping.

    A layer's curvature is A x G (`rmtdamp.kronecker`), with A = Q_A diag(l_A) Q_A^T and
    G likewise. For D the gradient of its weight matrix, the bias a last row, and delta
    the damping,

        tikhonov="eigenvalues":  U = Q_A [Q_A^T D Q_G / (l_A l_G^T + delta)] Q_G^T,

    which is (A x G + delta I)^-1 vec(D). "factored" divides by
    (l_A + pi sqrt(delta)) (l_G + sqrt(delta)/pi)^T in place of it, pi^2 the ratio of
    the mean eigenvalues of A and G. `KroneckerMeasurer(ekfac=True)` takes for l_A l_G^T
    the measured diagonal of the curvature in this basis. Leaves outside layers have a
    diagonal block: d / (diagonal + delta).

    A step takes four matrix products a layer, "factored" two: it keeps the inverses of
    both damped factors, which costs the memory of A and G once more, and makes them
    anew, for two products with square matrices, when delta or the eigenvectors change.

    A and G are measured and averaged every `refresh_every` steps, the first included;
    their eigenvectors follow more rarely. delta is added at each step, so a new one
    acts at once. It is that of `auto_damping` or `set_damping` around it, and the
    argument's where there is none. Its unit is a Hessian eigenvalue.

    `update(grads, state, params, batch=batch, loss_args=())`. In the state, for
    logging: "kfac_measurements", "kfac_rejections" (not finite; the last good factors
    stay), "eigen_refreshes", "kfac_fallbacks" (steps with damping 0 and a singular
    block: directions without curvature were left out).

    When to measure by hand: `refresh_every=None` never measures in the step; call
    `rmtdamp.refresh` with the measurer, see there.

    Args:
        measurer: measures and averages the factors, or a `factors_fn` for one with the
            defaults.
        damping: delta, a number or a schedule of the step, for use without
            `auto_damping` and `set_damping`. There is no default: 0.001 to 1 have all
            been best for some learning rate and task.
        tikhonov: "eigenvalues" or "factored".
        refresh_every: steps between measurements, at least 1; None for by hand.

    Returns:
        A transformation whose `update` takes `damping`, `relative_damping`, in units
        of the curvature's mean eigenvalue, `batch`, and `curvature_power`, with which
        it is the product with a power of the damped curvature. The dampings are
        scalars, or a tree like params, a scalar for each leaf, of which a layer takes
        the largest. Updates have the gradients' dtypes, all else is float32 or wider.

    Raises:
        ValueError: a number out of its range, an unknown `tikhonov`, EKFAC with
            factored damping; from `init` or `update`: params missing, with holes or
            not those of the factors' blocks, a missing batch, no damping.
        TypeError: `measurer` is something else, such as a loss function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import rmtdamp
        >>> from rmtdamp.kronecker import ModelFactors, make_blocks
        >>> def model_fn(params, x, tape):
        ...     return tape.linear("dense", x, x @ params["w"])
        >>> def criterion(outputs, targets):
        ...     return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))
        >>> params = {"w": jnp.zeros((2, 3))}
        >>> factors_fn = ModelFactors(
        ...     model_fn=model_fn,
        ...     criterion=criterion,
        ...     blocks=make_blocks(params, {"dense": {"kernel": "w"}}),
        ...     fisher="ggn",
        ... )
        >>> tx = rmtdamp.scale_by_kfac(factors_fn, damping=0.5)
        >>> batch = jnp.eye(2), jnp.ones((2, 3))
        >>> updates, state = tx.update(
        ...     {"w": jnp.ones((2, 3))}, tx.init(params), params, batch=batch
        ... )
        >>> print(f"{updates['w'][0, 0]:.3f}")  # A = I / 2, G = I
        1.000

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored
        approximate curvature, 2015, sections 3 to 6. Grosse and Martens, 2016, for
        convolutions. George et al., 2018, for EKFAC. Granziol and Baskerville, section
        7: delta added to the products of eigenvalues.
    """
    if not isinstance(measurer, KroneckerMeasurer):
        measurer = KroneckerMeasurer(measurer)
    check_damping(damping)
    check_choice("tikhonov", tikhonov, get_args(Tikhonov))
    check_every("refresh_every", refresh_every, or_never=True)
    if measurer.ekfac and tikhonov == "factored":
        raise ValueError(
            "ekfac=True has no factors left to damp one by one: take "
            "tikhonov='eigenvalues' with it"
        )
    own, blocks = damping, measurer.factors_fn.blocks

    def init(params):
        check_whole(params, "scale_by_kfac")
        leaves = jax.tree.leaves(params)
        if leaves:
            _check_leaves(blocks, leaves, "params")
        zero = lambda: jnp.zeros((), jnp.int32)
        measured = measurer.init(params)
        inverses = ()
        if tikhonov == "factored":
            # Copies, so that a step may donate its state.
            factors = jax.tree.map(jnp.copy, measured.factors)
            unknown = jnp.full(len(factors), -1, measured.factor_weight.dtype)
            inverses = DampedInverses(factors, unknown, zero(), jnp.asarray(False))
        return ScaleByKFACState(zero(), measured, zero(), inverses)

    def update(
        updates,
        state,
        params=None,
        *,
        damping=None,
        relative_damping=None,
        curvature_power=None,
        **extra_args,
    ):
        leaves, treedef = jax.tree.flatten(updates)
        product = curvature_power is not None
        measured = refresh_in_step(
            "scale_by_kfac",
            measurer,
            None if product else refresh_every,
            state,
            updates,
            params,
            **extra_args,
        )
        _check_leaves(blocks, leaves, "the gradient")
        dtype = measured.factor_weight.dtype
        if is_one(damping):
            damping = damping_in_force(
                "scale_by_kfac", damping, own, state.count, dtype
            )
        deltas = _of_blocks(blocks, damping, dtype)
        if relative_damping is not None:
            kappas, unit = _of_blocks(blocks, relative_damping, dtype), _mean(measured)
            deltas = [d + k * unit for d, k in zip(deltas, kappas, strict=True)]
        power, inverses = curvature_power if product else -1, ()
        if tikhonov == "factored" and not product:
            inverses = _in_force(blocks, measured, deltas, state.inverses)
        out, singular = automatic(
            lambda state, leaves, dampings, inverses: _powered(
                blocks, state, leaves, dampings, tikhonov, power, inverses
            ),
            lambda: typed_like((leaves, state.count)),
            *(measured, leaves, deltas, inverses),
        )
        out = [u.astype(leaf.dtype) for u, leaf in zip(out, leaves, strict=True)]
        out = jax.tree.unflatten(treedef, out)
        if product:
            return out, state
        return out, ScaleByKFACState(
            optax.safe_increment(state.count),
            measured,
            state.kfac_fallbacks + singular.astype(jnp.int32),
            inverses,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    measurer: KroneckerMeasurer | FactorsFn,
    *,
    damping: optax.ScalarOrSchedule | None = None,
    tikhonov: Tikhonov = "eigenvalues",
    refresh_every: int | None = 10,
    kl_clip: jax.typing.ArrayLike | None = 0.01,
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""KFAC as the paper's experiments ran it: KL clip, then momentum, then the rate.

    `scale_by_kfac`, the clip, a sum of past steps that decays by `momentum`, decoupled
    weight decay and the learning rate alpha. With u the divided gradient g, the clip
    shrinks the whole step to nu u, nu = min(1, sqrt(kl_clip / (alpha^2 sum u g))).
    That is each step, before momentum rho adds up 1 / (1 - rho) of them, in a curvature
    that was measured some steps before. `trust_region` around it, without the clip,
    bounds their sum in the curvature that it meets: for deep networks without
    normalisation, whose first steps can ruin them.

    To learn the damping put it inside `auto_damping`; without it and without
    `set_damping`, `damping` must be given.

    Args:
        learning_rate: alpha, a number or a schedule.
        measurer: measures and averages the factors, or a `factors_fn` for a
            `KroneckerMeasurer` with the defaults.
        damping: delta, a number or a schedule, in the unit of a Hessian eigenvalue.
        tikhonov: "eigenvalues" or "factored".
        refresh_every: steps between measurements; None for `rmtdamp.refresh` by hand.
        kl_clip: bound of the step's squared length in the damped curvature, in the unit
            of the loss, nats of a cross-entropy; None for none.
        momentum: decay of the sum of past steps; None for none.
        nesterov: Nesterov momentum.
        weight_decay: decoupled, multiplied by the learning rate, as in `optax.adamw`.
        mask: which params decay: a tree of bools or a function that makes one.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: as `scale_by_kfac`.
        TypeError: as `scale_by_kfac`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> from rmtdamp.kronecker import ModelFactors, make_blocks
        >>> def model_fn(params, x, tape):
        ...     return tape.linear("dense", x, x @ params["w"])
        >>> def criterion(outputs, targets):
        ...     return 0.5 * jnp.mean((outputs - targets) ** 2)
        >>> params = {"w": jnp.zeros((2, 1))}
        >>> factors_fn = ModelFactors(
        ...     model_fn=model_fn,
        ...     criterion=criterion,
        ...     blocks=make_blocks(params, {"dense": {"kernel": "w"}}),
        ...     fisher="ggn",
        ... )
        >>> tx = rmtdamp.kfac(1.0, factors_fn, damping=1e-6, momentum=None)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 9.0]]), jnp.ones((2, 1))
        >>> state = tx.init(params)
        >>> def loss(params):
        ...     return criterion(batch[0] @ params["w"], batch[1])
        >>> for _ in range(20):
        ...     updates, state = tx.update(
        ...         jax.grad(loss)(params), state, params, batch=batch
        ...     )
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{loss(params):.3f}")
        0.000

    References:
        Granziol and Baskerville, section 7. KL clip: Ba, Grosse and Martens,
        Distributed second-order optimization using Kronecker-factored approximations,
        2017, section 5.
    """
    scaled = scale_by_kfac(
        measurer, damping=damping, tikhonov=tikhonov, refresh_every=refresh_every
    )
    check_range("kl_clip", kl_clip, lambda x: x > 0, "above 0, or None for none")
    if kl_clip is not None:
        scaled = _clipped(scaled, learning_rate, kl_clip)
    return optimiser(
        scaled,
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        mask=mask,
    )


def _clipped(inner, learning_rate, kl_clip) -> optax.GradientTransformationExtraArgs:
    """`inner` with its step shortened where alpha^2 u . g exceeds `kl_clip`."""

    def update(updates, state, params=None, **extra_args):
        new, after = inner.update(updates, state, params, **extra_args)
        alpha = learning_rate
        alpha = alpha(state.count) if callable(alpha) else alpha
        dtype = state.measured.factor_weight.dtype
        alpha, bound = (jnp.asarray(x).astype(dtype) for x in (alpha, kl_clip))
        length = alpha**2 * vdot(new, updates).astype(dtype)
        clips = length > bound
        nu = jnp.where(clips, jnp.sqrt(bound / jnp.where(clips, length, 1)), 1)
        return jax.tree.map(lambda u: u * nu.astype(u.dtype), new), after

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _check_leaves(blocks, leaves, name) -> None:
    expected = dict(
        pair for b in blocks for pair in zip(b.leaves, b.shapes, strict=True)
    )
    shapes = [tuple(jnp.shape(leaf)) for leaf in leaves]
    if shapes != [expected[i] for i in sorted(expected)]:
        raise ValueError(
            f"{name} has leaves of shapes {shapes}, and the blocks of factors_fn "
            f"cover {[expected[i] for i in sorted(expected)]}: make factors_fn for the "
            "params that are trained"
        )


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
    a, g = _damped_factors(basis, damping)
    return a[:, :, None] * g[:, None, :]


def _damped_factors(basis: Eigenbasis, damping) -> tuple[jax.Array, jax.Array]:
    """l_A + pi sqrt(delta) and l_G + sqrt(delta) / pi."""
    a, g = basis.input_values, basis.output_values
    # pi^2, the ratio of the mean eigenvalues; 1 where one of the factors is zero
    mean_a, mean_g = jnp.mean(a, axis=1), jnp.mean(g, axis=1)
    usable = (mean_a > 0) & (mean_g > 0)
    ratio = jnp.where(usable, mean_a, 1) / jnp.where(usable, mean_g, 1)
    pi, root = jnp.sqrt(ratio)[:, None], jnp.sqrt(damping)
    return a + pi * root, g + root / pi


def _in_force(blocks, measured, dampings, before: DampedInverses) -> DampedInverses:
    """The inverses of before, or new ones where they hold for something else."""
    of_layers = [d for block, d in zip(blocks, dampings, strict=True) if block.groups]
    if not of_layers:
        return before
    asked, made_of = jnp.stack(of_layers), measured.eigen_refreshes

    def inverse(vectors, values, damping):
        size = values.shape[-1]
        inverted, left_out = _quotient(jnp.ones_like(values), values, damping, size)
        if vectors.ndim == 2:
            return inverted, left_out
        scaled = vectors * inverted[:, None, :]
        return jnp.einsum(
            "kab,kcb->kac", scaled, vectors, precision="highest"
        ), left_out

    def renewed():
        factors, singular = [], jnp.asarray(False)
        for basis, damping in zip(measured.bases, of_layers, strict=True):
            a, g = _damped_factors(basis, damping)
            inputs, left_out = inverse(basis.inputs, a, damping)
            outputs, also = inverse(basis.outputs, g, damping)
            factors.append(KroneckerFactors(inputs, outputs))
            singular |= left_out | also
        return DampedInverses(tuple(factors), asked, made_of, singular)

    stale = jnp.any(before.dampings != asked) | (before.eigen_refreshes != made_of)
    return jax.lax.cond(stale, renewed, lambda: before)


def _of_blocks(blocks: tuple[Block, ...], damping: Any, dtype) -> list[jax.Array]:
    """The damping of each block, the largest of its leaves'."""
    if is_one(damping):
        return [jnp.asarray(damping).astype(dtype)] * len(blocks)
    leaves = [jnp.asarray(x).astype(dtype) for x in jax.tree.leaves(damping)]
    of = lambda block: [leaves[place] for place in block.leaves]
    return [functools.reduce(jnp.maximum, of(block)) for block in blocks]


def _mean(state: KroneckerState) -> jax.Array:
    """The mean eigenvalue of the curvature, over all parameters."""
    values = state.scales or [
        damped_eigenvalues(basis, jnp.zeros(())) for basis in state.bases
    ]
    return mean([*values, *state.diagonal])


def _quotient(numerator, curvature, damping, size):
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


def _powered(
    blocks: tuple[Block, ...],
    state: KroneckerState,
    leaves: list[jax.Array],
    dampings: list[jax.Array],
    tikhonov: Tikhonov,
    power: int,
    inverses: DampedInverses | tuple[()],
) -> tuple[list[jax.Array], jax.Array]:
    """(curvature + delta)^power times the gradient, block by block.

    Args:
        blocks: of the params.
        state: with the bases to use.
        leaves: of the gradient.
        dampings: delta of each block.
        tikhonov: how it is added to Kronecker blocks.
        power: -1, 0 or 1.
        inverses: of the damped factors, for power -1, if they are kept, else ().

    Returns:
        The leaves of the result in the dtype of the factors, and whether singular
        directions were left out.
    """
    dtype = state.factor_weight.dtype
    out: list[jax.Array] = list(leaves)
    singular = inverses.singular if inverses else jnp.asarray(False)
    layer = diagonal = 0
    product = lambda spec, x, y: jnp.einsum(spec, x, y, precision="highest")

    def left(spec, matrix, x):
        """The product; the matrix of an embedding is stored as its diagonal."""
        return matrix[..., None] * x if matrix.ndim == 2 else product(spec, matrix, x)

    def scaled(numerator, curvature, damping, size):
        if power == -1:
            return _quotient(numerator, curvature, damping, size)
        return numerator * curvature**power, jnp.asarray(False)

    for block, damping in zip(blocks, dampings, strict=True):
        chosen = [leaves[place].astype(dtype) for place in block.leaves]
        if block.groups and inverses:
            kept, left_out = inverses.factors[layer], jnp.asarray(False)
            half = left("kab,kbo->kao", kept.inputs, to_matrix(block, chosen))
            results = from_matrix(block, product("kao,kop->kap", half, kept.outputs))
            layer += 1
        elif block.groups:
            basis = state.bases[layer]
            if state.scales:
                curvature = state.scales[layer] + damping
            else:
                curvature = damped_eigenvalues(basis, damping, tikhonov)
            rotated = left("kab,kao->kbo", basis.inputs, to_matrix(block, chosen))
            rotated = product("kbo,kop->kbp", rotated, basis.outputs)
            size = max(block.rows, block.columns)
            divided, left_out = scaled(rotated, curvature, damping, size)
            back = left("kab,kbp->kap", basis.inputs, divided)
            back = product("kap,kop->kao", back, basis.outputs)
            results = from_matrix(block, back)
            layer += 1
        else:
            curvature = state.diagonal[diagonal] + damping
            divided, left_out = scaled(chosen[0], curvature, damping, 1)
            results = [divided]
            diagonal += 1
        for place, result in zip(block.leaves, results, strict=True):
            out[place] = result
        singular |= left_out
    return out, singular
