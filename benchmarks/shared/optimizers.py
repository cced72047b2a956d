"""The optimisers of the training benches, by name; all that they ask of rmtdamp.

A method is what is compiled, its numbers are traced; whoever uses a damping is wrapped
in what holds or learns it. Measurements (the damping, KFAC's factors) are made by
`refreshed`, at the multiples of a period and, as in the paper, at no other step unless
`early` asks for them: in a scan, or from Python, since XLA:CPU runs convolutions thirty
times slower inside a conditional.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import rmtdamp
from rmtdamp.damping import (
    GradientNorm,
    LargestFraction,
    LevenbergMarquardt,
    MeanFraction,
    StabilityFloor,
    by_layer,
    identity_target,
    relative_target,
)
from rmtdamp.demo._train import RULES
from rmtdamp.flatness import trace_penalty

SCHEDULES = {
    "linear": rmtdamp.schedules.linear_anneal_schedule,
    "ramp": rmtdamp.schedules.ramp_anneal_schedule,
    "constant": lambda rate, steps: lambda count: rate,
}
MOMENTUM, B2 = 0.9, 0.999  # b1 of Adam, rho of the others


class Method(NamedTuple):
    """An optimiser; what is compiled depends on this and not on its numbers."""

    optimizer: str  # a name of OPTIMIZERS
    schedule: str = "linear"
    learned: bool = False  # the damping, from a floor; otherwise it is held
    rule: str = "identity"
    form: str = "damping"
    refresh_every: int = 100  # steps between measurements of the damping
    factors_every: int = 10  # steps between those of KFAC's factors
    eigen_every: int = 10  # of these between eigendecompositions
    factor_decay: float = 0.95  # of KFAC's averages
    debias: bool = True  # these; otherwise they begin at the identity
    layers: bool = False  # a damping for each layer
    early: bool = False  # measure at steps 1, 2, 4, ... too, as in the library's step
    batch_statistics: bool = False  # the loss that is measured has BatchNorm's own
    kl_clip: float = 0.01  # KFAC's, of each step
    region: bool = False  # a bound of the whole step, in place of KFAC's clip


class Numbers(NamedTuple):
    """The optimiser's numbers, traced."""

    learning_rate: Any
    damping: Any  # held, or the floor of the learned one
    total_steps: Any
    weight_decay: Any = 0.0
    sharp_divisor: Any = 1.0  # Lanczos-Newton's eta
    seed: Any = 0  # of Lanczos-Newton's first vectors
    trace_penalty: Any = 0.0  # weight of the Hessian's trace, for adam-flat


class Network(NamedTuple):
    """Functions of one architecture, made once so that what is compiled is shared."""

    start: Any  # its graph; None for a loss without a network
    loss_fn: Any  # (params, batch, *loss_args) -> loss, in evaluation mode
    factors_fn: Any = None
    factor: float = 1.0  # of the loss
    train_loss: Any = None  # in training mode


def _sgd(rate, method, numbers, network):
    decay = optax.add_decayed_weights(numbers.weight_decay)
    return optax.chain(decay, optax.sgd(rate, momentum=MOMENTUM))


def _adam(rate, method, numbers, network):
    adam = rmtdamp.scale_by_adam_shrinkage(MOMENTUM, B2, form=method.form)
    decay = optax.add_decayed_weights(numbers.weight_decay)
    return optax.chain(adam, decay, optax.scale_by_learning_rate(rate))


def _adam_like(square, divide, rate):
    """Adam with another second moment of a gradient g, or another m / sqrt(v)."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        empty = jax.tree.map(square, zeros)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, empty)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, MOMENTUM, 1)
        squares = jax.tree.map(square, updates)
        nu = optax.tree.update_moment(squares, state.nu, B2, 1)
        m = optax.tree.bias_correction(mu, MOMENTUM, count)
        v = optax.tree.bias_correction(nu, B2, count)
        return jax.tree.map(divide, m, v), optax.ScaleByAdamState(count, mu, nu)

    scaled = optax.GradientTransformation(init, update)
    return optax.chain(scaled, optax.scale_by_learning_rate(rate))


def _atan2(rate, *_):
    """No eps and no quotient: Everett et al., 2024, with their a = 1.27, b = 1."""
    divide = lambda m, v: 1.27 * jnp.arctan2(m, jnp.sqrt(v))
    return _adam_like(jnp.square, divide, rate)


def _mini(rate, *_):
    """One second moment for an output of a layer: Zhang et al., Adam-mini, 2024."""
    mean = lambda g: jnp.mean(jnp.square(g), axis=0, keepdims=True)
    return _adam_like(mean, lambda m, v: m / (jnp.sqrt(v) + 1e-8), rate)


def _flat(rate, method, numbers, network):
    """Adam on the loss and a share of its Hessian's trace."""

    def init(params):
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates, count, params=None, *, batch, loss_args=(), **extra_args):
        del extra_args
        key = jax.random.fold_in(jax.random.key(numbers.seed), count)
        penalty = functools.partial(trace_penalty, network.loss_fn, loss_args=loss_args)
        slope = jax.grad(lambda p: penalty(p, batch=batch, key=key))(params)
        add = lambda g, t: g + numbers.trace_penalty * t
        return jax.tree.map(add, updates, slope), count + 1

    penalised = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(penalised, optax.adam(rate))


def _kfac(rate, method, numbers, network, **options):
    factors = factors_of(method, network)
    options = {"kl_clip": None if method.region else method.kl_clip} | options
    return rmtdamp.kfac(rate, factors, refresh_every=None, **options)


def _lanczos(rate, method, numbers, network):
    pairs = rmtdamp.RitzMeasurer(network.loss_fn, num_steps=50, seed=numbers.seed)
    options = {"sharp_divisor": numbers.sharp_divisor, "damping": numbers.damping}
    return rmtdamp.lanczos_newton(rate, pairs, momentum=None, **options)


def _subspace(rate, method, numbers, network):
    """Eq. 9 with a random start in each step, in fewer directions than the paper's."""
    pairs = rmtdamp.RitzMeasurer(network.loss_fn, num_steps=20, seed=numbers.seed)
    return rmtdamp.lanczos_newton(rate, pairs, momentum=None)


# name -> (rate, method, numbers, network) -> transformation; these take `damping`.
DAMPED = {
    "subspace": _subspace,
    "adam": _adam,
    "kfac": _kfac,
    "kfac-unclipped": lambda *args: _kfac(*args, kl_clip=None),
}
OPTIMIZERS = DAMPED | {
    "gd": lambda rate, *_: optax.sgd(rate),
    "sgd": _sgd,
    "lanczos": _lanczos,
    "adam-atan2": _atan2,
    "adam-mini": _mini,
    "adamw": lambda rate, *_: optax.adamw(rate, weight_decay=1e-2),
    "adam-flat": _flat,
    "muon": lambda rate, *_: optax.contrib.muon(rate),
    "shampoo": lambda rate, *_: rmtdamp.shampoo(rate),
    "spectral": lambda rate, *_: rmtdamp.spectral_descent(
        rate, damping=0.0, method="svd", momentum=None
    ),
    "normalised": lambda rate, *_: optax.chain(
        optax.normalize_by_update_norm(), optax.scale_by_learning_rate(rate)
    ),
}


def _at_full_width(known):
    """Eq. 15 as it would be for VGG-16 at eight times the width: P m stays."""
    return identity_target(known._replace(variance=known.variance / 64))


def rule_of(method: Method):
    """The rule of that name; a floor knows the optimiser's momentum."""
    averaged = method.optimizer == "adam"
    momentum = 0.0 if method.optimizer == "subspace" else MOMENTUM
    floor = functools.partial(StabilityFloor, momentum=momentum, averaged=averaged)
    rules = RULES | {
        "floor": floor(safety=8.0),
        **{f"floor, c = {c}": floor(safety=float(c)) for c in (1, 2, 4, 12, 16)},
        "aware floor": StabilityFloor.for_adam(MOMENTUM)
        if averaged
        else floor(safety=64.0, preconditioned=True),
        **{
            f"aware floor, c = {c}": floor(safety=float(c), preconditioned=True)
            for c in (8, 16)
        },
        "relative": relative_target,
        "mean fraction": MeanFraction(0.1),
        "largest fraction": LargestFraction(0.01),
        "gradient norm": GradientNorm(0.1),
        "Levenberg-Marquardt": LevenbergMarquardt(),
        "full width": _at_full_width,
    }
    return rules[method.rule]


def learner_of(method: Method, numbers: Numbers, network: Network, **options):
    """What measures the damping: the training batch's own eight microbatches."""
    options |= {"floor": numbers.damping, "rule": rule_of(method)}
    options |= {"labels": by_layer if method.layers else None}
    loss_fn = network.train_loss if method.batch_statistics else network.loss_fn
    return rmtdamp.DampingLearner(loss_fn, **options)


def factors_of(method: Method, network: Network):
    """What measures KFAC's factors."""
    options = {"decay": method.factor_decay, "debias": method.debias}
    options["eigen_every"] = method.eigen_every
    return rmtdamp.KroneckerMeasurer(network.factors_fn, **options)


def transformation(method: Method, numbers: Numbers, network: Network):
    """The optax transformation."""
    rate = SCHEDULES[method.schedule](numbers.learning_rate, numbers.total_steps)
    learner = learner_of(method, numbers, network)
    tx = OPTIMIZERS[method.optimizer](rate, method, numbers, network)
    if method.optimizer in DAMPED:
        if method.learned:
            given = {"refresh_every": None, "learning_rate": rate}
            tx = rmtdamp.auto_damping(tx, learner, **given)
        else:
            tx = rmtdamp.set_damping(tx, numbers.damping)
    if method.region:
        tx = rmtdamp.trust_region(tx, network.train_loss)
    return optax.with_extra_args_support(tx)


def refreshed(method, network, numbers, carry, batch, step):
    """The carry after the measurements that are due at this step, traced or not."""
    due = []
    if method.optimizer.startswith("kfac"):
        due.append((method.factors_every, factors_of(method, network)))
    if method.learned:
        due.append((method.refresh_every, learner_of(method, numbers, network)))
    params, loss_args, state = carry
    for every, measurer in due:
        measure = lambda state, measurer=measurer: rmtdamp.refresh(
            state, measurer, params, batch, loss_args=loss_args
        )
        is_due = rmtdamp.transforms.is_due if method.early else lambda i, n: i % n == 0
        if isinstance(step, jax.Array):
            state = jax.lax.cond(is_due(step, every), measure, lambda x: x, state)
        elif is_due(step, every):
            state = measure(state)
    return params, loss_args, state


def dampings(opt_state, name="damping") -> list:
    """The number of that name in the state: none, one, or one per layer."""
    found = optax.tree.get(opt_state, name)
    return [] if found is None else np.ravel(found).tolist()
