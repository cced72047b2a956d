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
import optax
import optax.contrib

import rmtdamp
from rmtdamp.damping import (
    GradientNorm,
    LevenbergMarquardt,
    MeanFraction,
    StabilityFloor,
    relative_target,
)
from rmtdamp.demo._train import RULES

from .layers import adam_per_layer

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
    layers: str | None = None  # a damping for each layer: "block" or "rows"
    early: bool = False  # measure at steps 1, 2, 4, ... too, as in the library's step


class Numbers(NamedTuple):
    """The optimiser's numbers, traced."""

    learning_rate: Any
    damping: Any  # held, or the floor of the learned one
    total_steps: Any
    weight_decay: Any = 0.0
    sharp_divisor: Any = 1.0  # Lanczos-Newton's eta
    seed: Any = 0  # of Lanczos-Newton's first vectors


class Network(NamedTuple):
    """Functions of one architecture, made once so that what is compiled is shared."""

    start: Any  # its graph; None for a loss without a network
    loss_fn: Any  # (params, batch, *loss_args) -> loss, in evaluation mode
    factors_fn: Any = None
    factor: float = 1.0  # of the loss


def _sgd(rate, method, numbers, network):
    decay = optax.add_decayed_weights(numbers.weight_decay)
    return optax.chain(decay, optax.sgd(rate, momentum=MOMENTUM))


def _adam(rate, method, numbers, network):
    adam = rmtdamp.scale_by_adam_shrinkage(MOMENTUM, B2, form=method.form)
    decay = optax.add_decayed_weights(numbers.weight_decay)
    return optax.chain(adam, decay, optax.scale_by_learning_rate(rate))


def _kfac(rate, method, numbers, network, **options):
    factors = factors_of(method, network)
    return rmtdamp.kfac(rate, factors, refresh_every=None, **options)


def _lanczos(rate, method, numbers, network):
    pairs = rmtdamp.RitzMeasurer(network.loss_fn, num_steps=50, seed=numbers.seed)
    options = {"sharp_divisor": numbers.sharp_divisor, "damping": numbers.damping}
    return rmtdamp.lanczos_newton(rate, pairs, momentum=None, **options)


# name -> (rate, method, numbers, network) -> transformation; these take `damping`.
DAMPED = {
    "adam": _adam,
    "kfac": _kfac,
    "kfac-unclipped": lambda *args: _kfac(*args, kl_clip=None),
}
OPTIMIZERS = DAMPED | {
    "gd": lambda rate, *_: optax.sgd(rate),
    "sgd": _sgd,
    "lanczos": _lanczos,
    "muon": lambda rate, *_: optax.contrib.muon(rate),
}


def rule_of(method: Method):
    """The rule of that name; a floor knows the optimiser's momentum."""
    averaged = method.optimizer == "adam"
    floor = functools.partial(StabilityFloor, momentum=MOMENTUM, averaged=averaged)
    rules = RULES | {
        "floor": floor(),
        "aware floor": floor(4.0 if averaged else 64.0, preconditioned=True),
        "relative": relative_target,
        "mean fraction": MeanFraction(0.1),
        "gradient norm": GradientNorm(0.1),
        "Levenberg-Marquardt": LevenbergMarquardt(),
    }
    return rules[method.rule]


def learner_of(method: Method, numbers: Numbers, network: Network, **options):
    """What measures the damping: the training batch's own eight microbatches."""
    options |= {"floor": numbers.damping, "rule": rule_of(method)}
    return rmtdamp.DampingLearner(network.loss_fn, **options)


def factors_of(method: Method, network: Network):
    """What measures KFAC's factors."""
    every = method.eigen_every
    return rmtdamp.KroneckerMeasurer(network.factors_fn, eigen_every=every)


def transformation(method: Method, numbers: Numbers, network: Network):
    """The optax transformation."""
    rate = SCHEDULES[method.schedule](numbers.learning_rate, numbers.total_steps)
    learner = learner_of(method, numbers, network)
    if method.layers:
        inner = adam_per_layer(learner, method.layers, method.refresh_every)
        return optax.chain(inner, optax.scale_by_learning_rate(rate))
    tx = OPTIMIZERS[method.optimizer](rate, method, numbers, network)
    if method.optimizer in DAMPED:
        if method.learned:
            given = {"refresh_every": None, "learning_rate": rate}
            tx = rmtdamp.auto_damping(tx, learner, **given)
        else:
            tx = rmtdamp.set_damping(tx, numbers.damping)
    return optax.with_extra_args_support(tx)


def refreshed(method, network, numbers, carry, batch, step):
    """The carry after the measurements that are due at this step, traced or not."""
    due = []
    if method.optimizer.startswith("kfac"):
        due.append((method.factors_every, factors_of(method, network)))
    if method.learned and not method.layers:
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
    """Every scalar of that name in the state: none, one, or one per layer."""
    return [x for _, x in optax.tree.get_all_with_path(opt_state, name)]
