"""What a run holds: the damping in force and what led to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._types import Params


class Probe(NamedTuple):
    """A power iteration on (B + delta)^-1 H, between its two halves.

    Scalars, or with labels an entry for each part of the vector.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.damping import initial_damping
        >>> learned = initial_damping(1e-3, "float32", probe=jnp.array([1.0, 0.0]))
        >>> bool(learned.probe.waits)
        False
    """

    vector: Params  # parts of unit norm: v, or its product H v / ||H v|| that waits
    scale: jax.Array  # ||H v||
    cosine: jax.Array  # |v^T H v| / ||H v||
    # Neither NaN nor a bool: optax.contrib.sam selects states by multiplication.
    kept: jax.Array  # (), what is left of the eigenvalue before
    waits: jax.Array  # int32, 1 while the product has not been used


class LearnedDamping(NamedTuple):
    """The damping in force and what led to it.

    All but the last two fields are scalars. With labels (`DampingLearner`) those that
    are no counter, and the counters of rejections, caps and failures, have shape
    (labels,), in the order of `DampingLearner.label_names`. Field names are
    distinctive, so that `optax.tree.get(opt_state, "damping")` finds each of them in
    any chain.

    Example:
        >>> import jax.numpy as jnp, optax, rmtdamp
        >>> tx = rmtdamp.auto_adam(1e-2, lambda params, batch: jnp.mean(batch @ params))
        >>> state = tx.init(jnp.zeros(4))
        >>> print(
        ...     optax.tree.get(state, "last_refresh"),
        ...     f"{state[0].measured.damping:.0e}",
        ... )
        -1 1e-08
    """

    damping: jax.Array  # delta in force
    damping_target: jax.Array  # tau in force
    relative_damping: jax.Array  # kappa in force, in units of the preconditioner's mean
    measured_variance: jax.Array  # m as last measured, NaN before
    average_mean: jax.Array  # decayed average of nu over refreshes, NaN before
    average_dispersion: jax.Array  # decayed average of d^2, NaN before
    average_variance: jax.Array  # decayed average of m, NaN before
    max_eigenvalue: jax.Array  # largest |lambda| of H, see `learn_damping`, NaN before
    effective_eigenvalue: jax.Array  # see `settle_probe`, NaN before
    # int32, step of the last attempt, -1 before, -2 where the rule needs none
    last_refresh: jax.Array
    refresh_attempts: jax.Array  # int32, measurements made
    refresh_rejections: jax.Array  # int32, of which changed nothing
    refresh_caps: jax.Array  # int32, of which met the bound of the shrinkage
    loss_mismatches: jax.Array  # int32, of which found a loss that is no mean
    power_failures: jax.Array  # int32, of which the power iteration had not settled
    eigenvector: Params = None  # where the power iteration is; None where none is asked
    probe: Any = None  # a `Probe`, of a power iteration that waits for a preconditioner

    @property
    def waits(self) -> jax.Array:
        """Whether the rule needs a measurement and has had none."""
        return self.last_refresh == -1

    def problems(self) -> list[str]:
        """What a user should know of a run, in words; eager."""
        found = []
        if (np.asarray(self.loss_mismatches) > 0).any():
            found.append(
                "the loss of a batch is not the mean of its microbatches' losses, so "
                "what is measured has not the scale of a mean, nor its noise: a sum in "
                "place of a mean, dropout, batch statistics? "
                "rmtdamp.check_loss(loss_fn, params, batch) tells"
            )
        tried, rejected = map(
            np.asarray, (self.refresh_attempts, self.refresh_rejections)
        )
        # Under `vmap` a counter has an entry for each run, before those of labels. Of a
        # run that goes well some are rejected too: those far from all before them.
        tried = tried.reshape(tried.shape + (1,) * (rejected.ndim - tried.ndim))
        if ((tried != 1) & (rejected > 0) & (rejected >= tried)).any():
            found.append(
                "no measurement of the damping could be used "
                '(optax.tree.get(opt_state, "refresh_rejections")): it stays at its '
                "floor; the Hessian is not finite or zero, a batch holds one example, "
                "the learning rate is no positive number, or the rule finds no valid "
                "damping, as one that reads what it does not name among its `needs`"
            )
        if (np.asarray(self.refresh_caps) > 0).any():
            found.append(
                "the learned damping meets the bound of its learner, min_shrinkage: "
                "the noise outweighs the target a hundredfold at the default; under "
                "eq. 15 a loss of large scale does that, for which there is "
                "scaled_identity_target"
            )
        return found


def initial_damping(
    damping: jax.typing.ArrayLike,
    dtype: Any,
    shape: tuple[int, ...] = (),
    eigenvector: Params = None,
    probe: Params = None,
) -> LearnedDamping:
    """Before any measurement: `damping` in force, towards 1.

    Returns:
        The state, with NaN for what nobody has measured.

    Example:
        >>> from rmtdamp.damping import initial_damping
        >>> learned = initial_damping(0.5, "float32")
        >>> print(learned.damping, learned.measured_variance, learned.refresh_attempts)
        0.5 nan 0
    """
    # Copies, one per field: a training step may donate the state, which deletes its
    # buffers and refuses to see one of them twice.
    number = lambda x: jnp.full(shape, jnp.array(x, dtype, copy=True))
    count = lambda x, shape=(): jnp.full(shape, x, jnp.int32)
    return LearnedDamping(
        damping=number(damping),
        damping_target=number(1),
        relative_damping=number(0),
        measured_variance=number(jnp.nan),
        average_mean=number(jnp.nan),
        average_dispersion=number(jnp.nan),
        average_variance=number(jnp.nan),
        max_eigenvalue=number(jnp.nan),
        effective_eigenvalue=number(jnp.nan),
        last_refresh=count(-1),
        refresh_attempts=count(0),
        refresh_rejections=count(0, shape),
        refresh_caps=count(0, shape),
        loss_mismatches=count(0),
        power_failures=count(0, shape),
        eigenvector=eigenvector,
        probe=None
        if probe is None
        else Probe(
            vector=probe,
            scale=number(jnp.nan),
            cosine=number(jnp.nan),
            kept=jnp.ones((), dtype),
            waits=count(0, shape),
        ),
    )
