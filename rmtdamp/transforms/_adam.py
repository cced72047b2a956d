"""Adam with damping as a first-class hyper-parameter.

Adam's damping is its eps. So Adam with shrinkage is optax's own Adam whose eps arrives
with the step, and every optax factory with such a constant can take part in the same
way (`with_damping`); its arithmetic and its state stay optax's, to the last bit.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from rmtdamp._checks import check_choice, check_decays, check_range
from rmtdamp._tree import mean, norm, size

from ._optimiser import by_learning_rate, check_damping, check_one, is_one

Form = Literal["damping", "shrinkage", "length", "avagrad"]


def _cast_like(tree, like):
    """`tree` with the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(
        lambda new, old: jnp.asarray(new).astype(jnp.result_type(old)),
        tree,
        like,
    )


def _update_damped(factory, damping, updates, state, params, extra_args):
    """The update of `factory(damping)`, in the dtypes of what went in."""
    # A traced damping is a float32 scalar, which standard promotion lets win over
    # bfloat16 and float16: the division is in float32 and is rounded once, at the end.
    with jax.numpy_dtype_promotion("standard"):
        inner = optax.with_extra_args_support(factory(damping))
        new, new_state = inner.update(updates, state, params, **extra_args)
    return _cast_like(new, updates), _cast_like(new_state, state)


# Arguments that are never a damping, whatever the factory.
_NO_DAMPING = {"learning_rate", "momentum", "nesterov", "weight_decay", "mask", "seed"}
_NO_DAMPING |= {"b1", "b2", "accumulator_dtype", "mu_dtype"}


def with_damping(
    factory: Callable[..., optax.GradientTransformation], argument: str = "eps"
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Let an optax factory take its eps from `damping`.

    `with_damping(optax.amsgrad)(1e-3)` is `optax.amsgrad(1e-3)` whose `eps` is whatever
    `auto_damping` or `set_damping` around it says, and the factory's own value where
    there is neither. The state is that of the factory.

    Units: those of the factory's argument. Where eps stands beside sqrt(v) (adam,
    adamw, nadam, amsgrad, adabelief, rmsprop with `eps_in_sqrt=False`) it is that of a
    gradient; inside the root it is that of a squared gradient.

    Args:
        factory: a function that returns a gradient transformation and whose state does
            not depend on the argument's value.
        argument: the name of the argument to be fed.

    Returns:
        A factory with the same arguments, whose transformation takes the extra
        argument `damping`.

    Raises:
        TypeError: `factory` has no such argument, or one that is no damping.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import rmtdamp
        >>> adam = rmtdamp.with_damping(optax.scale_by_adam)()
        >>> params, grads = jnp.zeros(2), jnp.array([1.0, 2.0])
        >>> updates, _ = adam.update(grads, adam.init(params), params, damping=1.0)
        >>> [round(float(u), 3) for u in updates]
        [0.5, 0.667]
    """
    if not callable(factory):
        raise TypeError(
            f"factory is a {type(factory).__name__}, a transformation that is already "
            "made: hand over the function that makes it, with its arguments after, "
            "with_damping(optax.adam)(1e-3)"
        )
    signature = inspect.signature(factory)
    if argument not in signature.parameters or argument in _NO_DAMPING:
        known = ", ".join(x for x in signature.parameters if x not in _NO_DAMPING)
        raise TypeError(
            f"{getattr(factory, '__name__', factory)} has no damping {argument!r}: "
            + (f"name what stands beside its curvature, of {known}; " if known else "")
            + "an optimiser that divides by no curvature, as sgd and lion, has no "
            "damping to learn"
        )

    @functools.wraps(factory)
    def damped_factory(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()

        def at(damping):
            arguments = dict(bound.arguments) | {argument: damping}
            fed = inspect.BoundArguments(signature, arguments)
            return factory(*fed.args, **fed.kwargs)

        constant = bound.arguments[argument]
        init = at(constant).init

        def update(updates, state, params=None, *, damping=None, **extra_args):
            check_one("with_damping", damping)
            damping = constant if damping is None else damping
            return _update_damped(at, damping, updates, state, params, extra_args)

        return optax.GradientTransformationExtraArgs(init, update)

    return damped_factory


def _quotient(x, y) -> jax.Array:
    """X / y, and 1 where y is not above 0, as for a gradient of zero."""
    positive = y > 0
    return jnp.where(positive, x / jnp.where(positive, y, 1), 1)


def scale_by_adam_shrinkage(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    damping: optax.ScalarOrSchedule = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    form: Form = "damping",
    target: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's rescaling with a damping that can be set, scheduled or learned.

    With Adam's bias-corrected moments m, v (`b1`, `b2`, `eps_root`), delta the damping
    and tau the target,

        form="damping":    u = m / (sqrt(v) + delta)
        form="shrinkage":  u = m / (beta sqrt(v) + (1 - beta) tau) = (1 + delta/tau)
                               * m / (sqrt(v) + delta),   beta = 1 / (1 + delta/tau)
        form="length":     u = c m / (sqrt(v) + delta),   ||u|| = ||m / sqrt(v)||
        form="avagrad":    u = eta m / rms(eta),   eta = 1 / (sqrt(v) + delta).

    The shrinkage form keeps the step's size as the damping grows: it tends to m / tau,
    momentum SGD, where the damping form tends to m / delta. (The authors' experiments
    multiply the learning rate by 1 + delta, which is the shrinkage form at tau = 1.)
    A damping changes a step's length and its direction. With "length" it changes the
    direction alone: the step is as long as undamped Adam's, over all parameters.
    "avagrad" makes the mean square of the factors eta one, whatever the gradient: its
    learning rates are those of momentum SGD.

    The damping is that of `auto_damping` or `set_damping` around it, and the
    argument's where there is neither. At damping 1e-8 the damping form is
    `optax.adam`, to the last bit. The state is optax's `ScaleByAdamState`.

    Units: sqrt(v) is a gradient, and so is delta. Eq. 15's damping is a squared Hessian
    eigenvalue over a unit target; that it may serve here is an experimental finding,
    and section 7.3 of the paper warns that the square root makes it harsh.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        damping: delta, a number or a schedule of the step, for use without
            `auto_damping` and `set_damping`.
        eps_root: added to v inside the root.
        mu_dtype: dtype of the first moment; default: that of the params.
        nesterov: Nesterov momentum.
        form: "damping", "shrinkage", "length" or "avagrad".
        target: tau, for the same use, in the unit of a gradient.

    Returns:
        A transformation whose `update` takes `damping` and `damping_target`,
        `relative_damping`, in units of the mean of sqrt(v) one step before, and
        `curvature_power`, with which it is the product with a power of sqrt(v) + delta.
        The dampings are scalars, or a tree like params, a scalar for each leaf.
        Updates have the gradients' dtype; the division is done in float32 or wider
        when the damping comes from around it.

    Raises:
        ValueError: an unknown `form`, or a negative damping.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> adam = rmtdamp.scale_by_adam_shrinkage(damping=1.0, form="shrinkage")
        >>> params, grads = jnp.zeros(2), jnp.array([1.0, 3.0])
        >>> updates, _ = adam.update(grads, adam.init(params), params)
        >>> [round(float(u), 3) for u in updates]
        [1.0, 1.5]

    References:
        Kingma and Ba, Adam, Algorithm 1. Granziol and Baskerville, eqs. 11 and 13.
        Savarese et al., Domain-independent dominance of adaptive methods, 2019, for
        AvaGrad, which takes v of the step before.
    """
    check_choice("form", form, get_args(Form))
    check_damping(damping)
    check_decays(b1=b1, b2=b2)
    check_range("target", target, lambda x: x > 0, "above 0")

    def adam(eps):
        return optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)

    fallback, fallback_target = damping, target

    def updated_by_leaf(dampings, updates, state, extra_args):
        """Adam leaf by leaf, which is the same: it is elementwise."""
        found = []
        trees = dampings, updates, state.mu, state.nu
        for eps, grad, mu, nu in zip(*map(jax.tree.leaves, trees), strict=True):
            of = state._replace(mu=mu, nu=nu)
            found.append(_update_damped(adam, eps, grad, of, None, extra_args))
        new = jax.tree.unflatten(jax.tree.structure(updates), [x for x, _ in found])
        mu, nu = (
            jax.tree.unflatten(
                jax.tree.structure(old), [getattr(x, name) for _, x in found]
            )
            for name, old in (("mu", state.mu), ("nu", state.nu))
        )
        return new, state._replace(
            count=optax.safe_increment(state.count), mu=mu, nu=nu
        )

    def root(state):
        """The tree of sqrt(v), bias-corrected; zero before the first step."""
        correction = 1 - jnp.asarray(b2, jnp.float32) ** state.count
        correction = jnp.where(state.count > 0, correction, 1)
        return jax.tree.map(
            lambda v: jnp.sqrt(v / correction.astype(v.dtype) + eps_root), state.nu
        )

    def update(
        updates,
        state,
        params=None,
        *,
        damping=None,
        damping_target=None,
        relative_damping=None,
        curvature_power=None,
        **extra_args,
    ):
        if damping is None:
            damping = fallback
            if callable(fallback):
                damping = jnp.maximum(fallback(state.count), 0)
        if damping_target is None:
            damping_target = jax.tree.map(lambda _: fallback_target, damping)
        per_leaf = lambda x: jax.tree.map(lambda _: x, updates) if is_one(x) else x
        if relative_damping is not None:
            unit = mean(root(state))
            relative = lambda d, kappa: d + kappa * unit
            damping = jax.tree.map(relative, damping, relative_damping)
        if curvature_power is not None:
            with jax.numpy_dtype_promotion("standard"):
                product = lambda u, b, d: u * (b + d) ** curvature_power
                new = jax.tree.map(product, updates, root(state), per_leaf(damping))
            return _cast_like(new, updates), state

        plainly = lambda eps: _update_damped(
            adam, eps, updates, state, params, extra_args
        )
        if is_one(damping):
            damped, after = plainly(damping)
        else:
            damped, after = updated_by_leaf(damping, updates, state, extra_args)
        if form == "damping":
            return damped, after
        if form == "shrinkage":
            boost = jax.tree.map(lambda d, t: 1 + d / t, damping, damping_target)
        elif form == "length":
            plain, _ = plainly(1e-8)
            boost = _quotient(norm(plain), norm(damped))
        else:
            factor = lambda b, d: 1 / (b + d)
            factors = jax.tree.map(factor, root(after), per_leaf(damping))
            boost = _quotient(size(factors) ** 0.5, norm(factors))
        longer = lambda u, boost: u * jnp.asarray(boost).astype(u.dtype)
        return jax.tree.map(longer, damped, per_leaf(boost)), after

    return optax.GradientTransformationExtraArgs(adam(0.0).init, update)


def adam_shrinkage(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    damping: optax.ScalarOrSchedule = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    form: Form = "damping",
    target: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam with damping as a hyper-parameter; at 1e-8 it is `optax.adam`.

    `scale_by_adam_shrinkage` followed by the learning rate. To learn the damping, put
    `scale_by_adam_shrinkage` (or this) inside `auto_damping`, or take `auto_adam`.

    Args:
        learning_rate: alpha, a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        damping: delta, a number or a schedule, in the unit of a gradient.
        eps_root: added to v inside the root.
        mu_dtype: dtype of the first moment; default: that of the params.
        nesterov: Nesterov momentum.
        form: "damping", "shrinkage", "length" or "avagrad".
        target: tau of the shrinkage form.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: an unknown `form`, a negative damping or learning rate, another
            number out of its range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import rmtdamp
        >>> tx = rmtdamp.adam_shrinkage(0.1, damping=1e-2)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     grads = jax.grad(lambda p: jnp.sum(p**2))(params)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.max(jnp.abs(params)) < 0.05)
        True

    References:
        Granziol and Baskerville, sections 6 and 7.
    """
    return optax.chain(
        scale_by_adam_shrinkage(
            b1,
            b2,
            damping,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            form=form,
            target=target,
        ),
        by_learning_rate(learning_rate),
    )


def adamw_shrinkage(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    damping: optax.ScalarOrSchedule = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    form: Form = "damping",
    target: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """`adam_shrinkage` with decoupled weight decay; at 1e-8 it is `optax.adamw`.

    Args:
        learning_rate: alpha, a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        damping: delta, a number or a schedule, in the unit of a gradient.
        eps_root: added to v inside the root.
        mu_dtype: dtype of the first moment; default: that of the params.
        weight_decay: multiplied by the learning rate, as in `optax.adamw`.
        mask: which params decay: a tree of bools or a function that makes one.
        nesterov: Nesterov momentum.
        form: "damping", "shrinkage", "length" or "avagrad".
        target: tau of the shrinkage form.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: an unknown `form`, a negative damping or learning rate, another
            number out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> tx = rmtdamp.adamw_shrinkage(1e-3, damping=1e-3, weight_decay=1e-2)
        >>> params = jnp.ones(2)
        >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)

    References:
        Loshchilov and Hutter, Decoupled weight decay regularization. Granziol and
        Baskerville, figure 9.
    """
    return optax.chain(
        scale_by_adam_shrinkage(
            b1,
            b2,
            damping,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            form=form,
            target=target,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        by_learning_rate(learning_rate),
    )
