"""KFAC: the gradient divided by Kronecker-factored curvature, whose damping travels in.

How the factors are measured is the business of a `factors_fn` (`rmtdamp.hessian.
FactorsFn`, and `rmtdamp.flax` which makes one from a Flax model).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmtdamp._tree import accumulation_dtype, vdot
from rmtdamp._types import Batch, Params
from rmtdamp.hessian._factors import Curvature

from ._by_hand import (
    check_every,
    only_state,
    replaced,
    warn_of_slow_convolutions,
)
from ._kfac_state import KFACState, Tikhonov, initial_state, measure, precondition
from ._owner import check_whole


@functools.partial(jax.jit, static_argnames="factors_fn")
def _measure(factors_fn, state, params, batch, loss_args, decay, eigen):
    return measure(factors_fn, state, params, batch, loss_args, decay, eigen)


@functools.partial(jax.jit, static_argnames="factors_fn")
def _measure_if(due, factors_fn, state, params, batch, loss_args, decay, eigen):
    return jax.lax.cond(
        due,
        lambda: measure(factors_fn, state, params, batch, loss_args, decay, eigen),
        lambda: state,
    )


def scale_by_kfac(
    factors_fn: Curvature,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    factor_decay: jax.typing.ArrayLike = 0.95,
    factor_every: int | None = 10,
    eigen_every: int = 100,
    tikhonov: Tikhonov = "eigenvalues",
    ekfac: bool = False,
    kl_clip: jax.typing.ArrayLike | None = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide the gradient by Kronecker-factored curvature plus a damping.

    A layer's curvature is A x G (`FactorsFn`), with A = Q_A diag(l_A) Q_A^T and G
    likewise. For D the gradient of its weight matrix, the bias a last row, and delta
    the damping,

        tikhonov="eigenvalues":  U = Q_A [Q_A^T D Q_G / (l_A l_G^T + delta)] Q_G^T,

    which is (A x G + delta I)^-1 vec(D). "factored" divides by
    (l_A + pi sqrt(delta)) (l_G + sqrt(delta)/pi)^T in place of it, pi^2 the ratio of
    the mean eigenvalues of A and G. `ekfac=True` takes for l_A l_G^T the measured
    diagonal of the curvature in this basis. Leaves outside layers have a diagonal
    block: d / (diagonal + delta).

    A and G are averaged with `factor_decay`, debiased, and measured every
    `factor_every` steps, the first included; their eigenvectors follow every
    `eigen_every` steps. delta is added at each step, so a new one acts at once. It is
    that of the owner around (`auto_damping`, `set_damping`), and the argument's where
    there is none. Its unit is a Hessian eigenvalue.

    `kl_clip` shrinks the whole step u to nu u, nu = min(1, sqrt(kl_clip /
    (alpha^2 sum u g))), alpha the `learning_rate`.

    `update(grads, state, params, batch=batch, loss_args=())`. In the state, for
    logging: "kfac_measurements", "kfac_rejections" (not finite; the last good factors
    stay), "eigen_refreshes", "kfac_fallbacks" (steps with damping 0 and a singular
    block: directions without curvature were left out).

    When to measure by hand. `factor_every=None` never measures in the step; call
    `refresh_factors` when it suits: for convolutional networks on a CPU, where XLA
    runs convolutions inside a conditional some thirty times slower, and inside
    `optax.MultiSteps` and under `vmap`, which pay for a measurement at each step.

    Args:
        factors_fn: measures the factors; made once.
        damping: delta, a number or a schedule of the step, for use without an owner.
        factor_decay: weight of the past in the averages, in [0, 1).
        factor_every: steps between measurements, at least 1; None for by hand.
        eigen_every: steps between eigendecompositions, a multiple of `factor_every`.
        tikhonov: "eigenvalues" or "factored".
        ekfac: measure the diagonal in the eigenbasis too, at each measurement.
        kl_clip: bound of the step's squared length in the curvature; None for none.
        learning_rate: alpha, for `kl_clip` alone.
        seed: of sampled labels, which are a function of it and the measurement's
            number: the same on every device and after a restart.

    Returns:
        A transformation whose `update` takes `damping`, a scalar, and `batch`. Updates
        have the gradients' dtypes, all else is float32 or wider.

    Raises:
        ValueError: a number out of its range, an unknown `tikhonov`, EKFAC with
            factored damping; from `init` or `update`: params missing, with holes or
            not those of `factors_fn.blocks`, a missing batch.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import rmtdamp
        >>> from rmtdamp.hessian import FactorsFn, make_blocks
        >>> def model_fn(params, x, tape):
        ...     return tape.linear("dense", x, x @ params["w"])
        >>> def loss_fn(outputs, targets):
        ...     return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))
        >>> params = {"w": jnp.zeros((2, 3))}
        >>> blocks = make_blocks(params, {"dense": {"kernel": "w"}})
        >>> factors_fn = FactorsFn(
        ...     model_fn=model_fn, loss_fn=loss_fn, blocks=blocks, fisher="ggn"
        ... )
        >>> tx = rmtdamp.transforms.scale_by_kfac(factors_fn, damping=0.5)
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
        7: delta added to the products of eigenvalues. KL clip: Ba, Grosse and Martens,
        Distributed second-order optimization using Kronecker-factored approximations,
        2017, section 5.
    """
    _check_arguments(damping, factor_decay, factor_every, eigen_every, tikhonov, ekfac)
    fallback, blocks = damping, factors_fn.blocks
    warned = False

    def init(params):
        check_whole(params, "scale_by_kfac")
        leaves = jax.tree.leaves(params)
        if leaves:
            _check_leaves(blocks, leaves, "params")
        return initial_state(blocks, accumulation_dtype(params), seed, ekfac)

    def update(
        updates,
        state,
        params=None,
        *,
        damping=None,
        batch=None,
        loss_args=(),
        **extra_args,
    ):
        nonlocal warned
        leaves, treedef = jax.tree.flatten(updates)
        if factor_every is not None and leaves:
            _check_present(params, batch)
            arguments = (factors_fn, state, params, batch, loss_args, factor_decay)
            eigen = _due(state.count, eigen_every)
            if isinstance(factor_every, int) and factor_every == 1:
                state = _measure(*arguments, eigen)
            else:
                if not warned:
                    _warn_of_slow_convolutions(factors_fn, params, batch, loss_args)
                    warned = True
                state = _measure_if(_due(state.count, factor_every), *arguments, eigen)
        _check_leaves(blocks, leaves, "the gradient")
        if damping is None:
            damping = fallback(state.count) if callable(fallback) else fallback
        dtype = state.factor_weight.dtype
        delta = jnp.asarray(damping).astype(dtype)
        out, singular = precondition(blocks, state, leaves, delta, tikhonov)
        if kl_clip is not None:
            alpha = learning_rate
            alpha = alpha(state.count) if callable(alpha) else alpha
            alpha, bound = (jnp.asarray(x).astype(dtype) for x in (alpha, kl_clip))
            length = alpha**2 * vdot(out, leaves)
            clips = length > bound
            nu = jnp.where(clips, jnp.sqrt(bound / jnp.where(clips, length, 1)), 1)
            out = [nu * u for u in out]
        state = state._replace(
            count=optax.safe_increment(state.count),
            kfac_fallbacks=state.kfac_fallbacks + singular.astype(jnp.int32),
        )
        out = [u.astype(leaf.dtype) for u, leaf in zip(out, leaves, strict=True)]
        return jax.tree.unflatten(treedef, out), state

    return optax.GradientTransformationExtraArgs(init, update)


def refresh_factors(
    opt_state: optax.OptState,
    factors_fn: Curvature,
    params: Params,
    batch: Batch,
    *,
    loss_args: tuple = (),
    factor_decay: jax.typing.ArrayLike = 0.95,
    eigen: bool = True,
) -> optax.OptState:
    """Measure the factors now: the by-hand twin of `scale_by_kfac`'s measurement.

    One compiled call of its own, outside the training step. The state of KFAC is found
    in any chain or wrapper (`auto_damping`, `optax.MultiSteps`, ...).

    Args:
        opt_state: the optimiser's state, with one `scale_by_kfac` in it.
        factors_fn: the one that `scale_by_kfac` was given.
        params: pytree of real floating arrays.
        batch: the training batch.
        loss_args: further arguments of the model.
        factor_decay: weight of the past in the averages.
        eigen: whether to renew the eigenbases too.

    Returns:
        `opt_state` with new factors; all else is untouched.

    Raises:
        ValueError: none or several KFAC states in `opt_state`, or a bad batch.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> from rmtdamp.hessian import FactorsFn, make_blocks
        >>> factors_fn = FactorsFn(
        ...     model_fn=lambda params, x, tape: x @ params,
        ...     loss_fn=lambda z, y: 0.5 * jnp.mean((z - y) ** 2),
        ...     blocks=make_blocks(jnp.zeros(2), {}),
        ...     fisher="ggn",
        ... )
        >>> params, batch = jnp.zeros(2), (jnp.eye(2), jnp.ones(2))
        >>> tx = rmtdamp.transforms.scale_by_kfac(factors_fn, factor_every=None)
        >>> state = tx.init(params)
        >>> state = rmtdamp.transforms.refresh_factors(state, factors_fn, params, batch)
        >>> int(optax.tree.get(state, "kfac_measurements"))
        1
    """
    state = only_state(
        opt_state,
        KFACState,
        "KFAC",
        "refresh_factors needs exactly one: put one scale_by_kfac or kfac into the "
        "chain",
    )
    new = _measure(factors_fn, state, params, batch, loss_args, factor_decay, eigen)
    return replaced(opt_state, state, new)


def _due(count, every):
    # Under inject_hyperparams `every` is an array, of a floating dtype at that.
    every = every if isinstance(every, int) else jnp.asarray(every).astype(count.dtype)
    return count % every == 0


def _check_arguments(damping, decay, factor_every, eigen_every, tikhonov, ekfac):
    number = int | float | np.number
    if isinstance(damping, number) and damping < 0:
        raise ValueError(f"damping is {damping}, and must be at least 0")
    if isinstance(decay, number) and not 0 <= decay < 1:
        raise ValueError(f"factor_decay is {decay}, and must be in [0, 1)")
    check_every("factor_every", factor_every, or_never=True)
    check_every("eigen_every", eigen_every, or_never=False)
    both = isinstance(factor_every, int) and isinstance(eigen_every, int)
    if both and eigen_every % factor_every:
        raise ValueError(
            f"eigen_every is {eigen_every}, and must be a multiple of factor_every, "
            f"{factor_every}: bases are renewed when factors are measured"
        )
    if tikhonov not in Tikhonov.__args__:
        raise ValueError(
            f"tikhonov is {tikhonov!r}: choose from {', '.join(Tikhonov.__args__)}"
        )
    if ekfac and tikhonov == "factored":
        raise ValueError(
            "ekfac=True has no factors left to damp one by one: take "
            "tikhonov='eigenvalues' with it"
        )


def _check_present(params, batch) -> None:
    if params is None:
        raise ValueError(
            "scale_by_kfac needs params, where it measures the factors: "
            "tx.update(grads, state, params, batch=batch)"
        )
    check_whole(params, "scale_by_kfac")
    if batch is None:
        raise ValueError(
            "scale_by_kfac needs the batch to measure the factors on: "
            "tx.update(grads, state, params, batch=batch), or factor_every=None and "
            "refresh_factors by hand"
        )


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


def _warn_of_slow_convolutions(factors_fn, params, batch, loss_args) -> None:
    warn_of_slow_convolutions(
        lambda p, b, *args: factors_fn(p, b, jax.random.key(0), *args),
        params,
        batch,
        loss_args,
        subject="model",
        place="the conditional of a training step",
        way_out="factor_every=None and call refresh_factors by hand every 10 steps",
        stacklevel=3,
    )
