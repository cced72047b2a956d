"""The optimisers of the training benches, by name; all that they ask of rmtdamp.

A method is what is compiled, its numbers are traced; whoever uses a damping is wrapped
in what holds or learns it. Measurements (the damping, KFAC's factors) are made in the
step, or by hand by `refreshed`: XLA:CPU runs convolutions thirty times slower inside a
conditional.
"""

from typing import Any, NamedTuple

import optax

import rmtdamp
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
    every: int = 100  # steps between refreshes of the damping
    factor_every: int | None = 10  # steps between measurements of KFAC's factors
    eigen_every: int = 100
    layers: str | None = None  # a damping for each layer: "block" or "rows"


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
    options |= {"factor_every": method.factor_every, "eigen_every": method.eigen_every}
    return rmtdamp.kfac(rate, network.factors_fn, **options)


def _lanczos(rate, method, numbers, network):
    options = {"sharp_divisor": numbers.sharp_divisor, "seed": numbers.seed}
    options |= {"damping": numbers.damping, "num_steps": 50}
    return rmtdamp.lanczos_newton(rate, network.loss_fn, **options)


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
}


def learner_of(method: Method, numbers: Numbers, network: Network, **options):
    """What measures the damping: the training batch's own eight microbatches."""
    options |= {"floor": numbers.damping, "rule": RULES[method.rule]}
    return rmtdamp.DampingLearner(network.loss_fn, **options)


def transformation(method: Method, numbers: Numbers, network: Network, in_step=True):
    """The optax transformation; it measures in the step, or never by itself."""
    if not in_step:
        method = method._replace(factor_every=None)
    rate = SCHEDULES[method.schedule](numbers.learning_rate, numbers.total_steps)
    learner = learner_of(method, numbers, network)
    if method.layers:
        inner = adam_per_layer(learner, method.layers, method.every)
        return optax.chain(inner, optax.scale_by_learning_rate(rate))
    tx = OPTIMIZERS[method.optimizer](rate, method, numbers, network)
    if method.optimizer in DAMPED:
        if method.learned:
            every = method.every if in_step else None
            tx = rmtdamp.auto_damping(tx, learner, every=every)
        else:
            tx = rmtdamp.set_damping(tx, numbers.damping)
    return optax.with_extra_args_support(tx)


def refreshed(method, numbers, network, opt_state, step, params, batch, loss_args):
    """The state after the measurements that are due at this step, made by hand."""
    here = params, batch, loss_args
    if method.optimizer.startswith("kfac") and step % method.factor_every == 0:
        eigen = step % method.eigen_every == 0
        opt_state = refresh_factors(network, opt_state, *here, eigen=eigen)
    if method.learned and step % method.every == 0:
        learner = learner_of(method, numbers, network)
        opt_state = refresh_damping(opt_state, learner, *here)
    return opt_state


def refresh_factors(network, opt_state, params, batch, loss_args, **options):
    """KFAC's factors, measured now."""
    here = network.factors_fn, params, batch
    return rmtdamp.refresh_factors(opt_state, *here, loss_args=loss_args, **options)


def refresh_damping(opt_state, learner, params, batch, loss_args, **options):
    """The damping, measured now."""
    here = learner, params, batch
    return rmtdamp.refresh_damping(opt_state, *here, loss_args=loss_args, **options)


def dampings(opt_state, name="damping") -> list:
    """Every scalar of that name in the state: none, one, or one per layer."""
    return [x for _, x in optax.tree.get_all_with_path(opt_state, name)]
