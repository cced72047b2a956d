"""auto_damping: the owner that learns; and its by-hand twin, refresh_damping."""

import functools

import jax
import jax.numpy as jnp
import optax

from rmtdamp._tree import check_params, num_examples
from rmtdamp._types import Batch, LossFn, Params

from ._by_hand import check_every, only_state, replaced
from ._learner import DampingLearner
from ._owner import (
    AutoDampingState,
    check_inside,
    check_no_outer_owner,
    check_uses_damping,
    check_whole,
)


@functools.partial(jax.jit, static_argnames="batch_size")
def _refresh(learner, learned, step, params, batch, loss_args, batch_size):
    return learner.refresh(learned, step, params, batch, loss_args, batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _refresh_if(due, learner, learned, step, params, batch, loss_args, batch_size):
    learner.warn_of_slow_convolutions(params, batch, loss_args)
    return jax.lax.cond(
        due,
        lambda: learner.refresh(learned, step, params, batch, loss_args, batch_size),
        lambda: learned,
    )


def auto_damping(
    inner: optax.GradientTransformation,
    learner: DampingLearner | LossFn,
    *,
    every: int | None = 100,
) -> optax.GradientTransformationExtraArgs:
    """Learn the damping of any transformation that takes one, while training runs.

    Every `every` steps, the first included, the Hessian's moments are measured on the
    batch of the step and the damping follows them (`DampingLearner`); at each step the
    transformation inside is handed the damping in force. With `identity_target` this is
    the paper's learner: delta <- 0.7 delta + 0.3 (floor + P^-1 Tr Var(H)).

    `update(grads, state, params, batch=batch, loss_args=(), curvature_batch=None)`:

    - `params` whole (not masked) and `batch` are needed; `loss_args` are further
      arguments of the loss, traced and not split (batch statistics, keys);
    - `curvature_batch` is another sample to measure on; the noise meant is still that
      of `batch`.

    A measurement that cannot be used (not finite, or without a valid damping) leaves
    the damping as it was and is counted. In the state, for logging:
    `optax.tree.get(opt_state, name)` with "damping", "measured_variance",
    "last_refresh", "refresh_attempts", "refresh_rejections", "refresh_caps".

    When to measure by hand. `every=None` never measures in the step; call
    `refresh_damping` when it suits. Do so (a) for convolutional networks on a CPU,
    where XLA runs convolutions inside a conditional some thirty times slower, (b)
    inside `optax.MultiSteps` and under `vmap`, which turn the conditional into a
    selection and pay for a measurement at each step.

    Args:
        inner: a transformation whose `update` uses the extra argument `damping`:
            `scale_by_adam_shrinkage`, an optax factory through `with_damping`, or a
            chain with one of them.
        learner: a `DampingLearner`, or a loss function for one with the defaults.
        every: steps between refreshes, at least 1; None for never in the step.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: from `update`: params or batch missing, empty or unequal batch,
            params with holes, an inner transformation that ignores `damping`; from
            `init` or `update`: a second owner of the damping; `every` below 1.
        TypeError: params that are not real floats, or a loss that is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> learner = rmtdamp.DampingLearner(loss_fn, floor=1e-3)
        >>> tx = optax.chain(
        ...     optax.clip_by_global_norm(1.0),
        ...     rmtdamp.auto_damping(rmtdamp.scale_by_adam_shrinkage(), learner),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> batch = jax.random.normal(jax.random.key(0), (32, 4))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> grads = jax.grad(loss_fn)(params, batch)
        >>> updates, state = tx.update(grads, state, params, batch=batch)
        >>> variance = optax.tree.get(state, "measured_variance")
        >>> damping = optax.tree.get(state, "damping")
        >>> print(f"{damping - variance:.3f}")
        0.001

    References:
        Granziol and Baskerville, section 7: eq. 15, Algorithm 1, the averaging of
        section 7.1 (the first damping is floor + variance).
    """
    if not isinstance(learner, DampingLearner):
        learner = DampingLearner(learner)
    check_every("every", every, or_never=True)
    inner = optax.with_extra_args_support(inner)
    checked = False

    def init(params):
        check_whole(params, "auto_damping")
        inner_state = inner.init(params)
        check_inside(inner_state)
        return AutoDampingState(
            count=jnp.zeros((), jnp.int32),
            learned=learner.init(params),
            inner_state=inner_state,
        )

    def update(
        updates,
        state,
        params=None,
        *,
        batch=None,
        loss_args=(),
        curvature_batch=None,
        **extra_args,
    ):
        nonlocal checked
        check_no_outer_owner(extra_args)
        if params is None:
            raise ValueError(
                "auto_damping needs params, where it measures the curvature: "
                "tx.update(grads, state, params, batch=batch)"
            )
        check_whole(params, "auto_damping")
        learned = state.learned
        if every is not None and jax.tree.leaves(params):
            check_params(params)
            data = batch if curvature_batch is None else curvature_batch
            if data is None:
                raise ValueError(
                    "auto_damping needs the batch to measure the curvature on: "
                    "tx.update(grads, state, params, batch=batch), or every=None and "
                    "refresh_damping by hand"
                )
            size = num_examples(data if batch is None else batch)
            num_examples(
                data, "batch" if curvature_batch is None else "curvature_batch"
            )
            arguments = (learner, learned, state.count, params, data, loss_args, size)
            if isinstance(every, int) and every == 1:
                learned = _refresh(*arguments)
            else:
                learned = _refresh_if(state.count % every == 0, *arguments)

        given = {"batch": batch, "curvature_batch": curvature_batch}
        extra_args |= {name: x for name, x in given.items() if x is not None}
        extra_args |= {"loss_args": loss_args, "damping_target": learned.damping_target}
        if not checked:
            check_uses_damping(
                inner, updates, state.inner_state, params, learned.damping, extra_args
            )
            checked = True
        updates, inner_state = inner.update(
            updates, state.inner_state, params, damping=learned.damping, **extra_args
        )
        count = optax.safe_increment(state.count)
        return updates, AutoDampingState(count, learned, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def refresh_damping(
    opt_state: optax.OptState,
    learner: DampingLearner | LossFn,
    params: Params,
    batch: Batch,
    *,
    loss_args: tuple = (),
    curvature_batch: Batch | None = None,
) -> optax.OptState:
    """Measure and learn now: the by-hand twin of `auto_damping`'s refresh.

    One compiled call of its own, outside the training step. The `auto_damping` is found
    in any chain or wrapper (`optax.MultiSteps`, `optax.masked`, ...).

    Args:
        opt_state: the optimiser's state, with one `auto_damping` in it.
        learner: a `DampingLearner`, as a rule the one that `auto_damping` was given, or
            a loss function for one with the defaults. Make it once.
        params: pytree of real floating arrays.
        batch: the training batch.
        loss_args: further arguments of the loss.
        curvature_batch: another sample to measure on.

    Returns:
        `opt_state` with the new damping and its counters; all else is untouched.

    Raises:
        ValueError: none or several `auto_damping` in `opt_state`, or a bad batch.
        TypeError: params that are not real floats, or a loss that is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> learner = rmtdamp.DampingLearner(loss_fn, floor=1e-3)
        >>> adam = rmtdamp.scale_by_adam_shrinkage()
        >>> tx = rmtdamp.auto_damping(adam, learner, every=None)
        >>> batch = jax.random.normal(jax.random.key(0), (32, 4))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> state = rmtdamp.refresh_damping(state, learner, params, batch)
        >>> int(optax.tree.get(state, "refresh_attempts"))
        1
    """
    if not isinstance(learner, DampingLearner):
        learner = DampingLearner(learner)
    state = only_state(
        opt_state,
        AutoDampingState,
        "auto_damping",
        "refresh_damping needs exactly one: wrap one transformation of the chain in "
        "auto_damping",
    )
    size = num_examples(batch)
    data = batch if curvature_batch is None else curvature_batch
    num_examples(data, "curvature_batch")
    learned = _refresh(
        learner, state.learned, state.count, params, data, loss_args, size
    )
    return replaced(opt_state, state, state._replace(learned=learned))
