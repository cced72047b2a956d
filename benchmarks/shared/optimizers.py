"""The optimisers of the training benches, by name; all that they ask of rmtdamp.

    method, numbers, network -> an optax transformation

A method is what is compiled, its numbers are traced. `OPTIMIZERS` has one line per
optimiser; whoever uses a damping is wrapped in what holds or learns it. Measurements
(the damping, KFAC's factors) are made in the step, or by hand by `refreshed`: XLA:CPU
runs convolutions thirty times slower inside a conditional.
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
    factor_every: int = 10  # steps between measurements of KFAC's factors
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


def _adam(rate, method, numbers, network):
    return optax.chain(
        rmtdamp.scale_by_adam_shrinkage(MOMENTUM, B2, form=method.form),
        optax.add_decayed_weights(numbers.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _kfac(rate, method, numbers, network, **options):
    every, eigen = method.factor_every, method.eigen_every
    return rmtdamp.kfac(
        rate, network.factors_fn, factor_every=every, eigen_every=eigen, **options
    )


# name -> (rate, method, numbers, network) -> transformation that takes `damping`
DAMPED = {
    "adam": _adam,
    "kfac": _kfac,
    "kfac-unclipped": lambda *args: _kfac(*args, kl_clip=None),
}
OPTIMIZERS = {
    "gd": lambda rate, method, numbers, network: optax.sgd(rate),
    "sgd": lambda rate, method, numbers, network: optax.chain(
        optax.add_decayed_weights(numbers.weight_decay),
        optax.sgd(rate, momentum=MOMENTUM),
    ),
    "lanczos": lambda rate, method, numbers, network: rmtdamp.lanczos_newton(
        rate,
        network.loss_fn,
        num_steps=50,
        damping=numbers.damping,
        sharp_divisor=numbers.sharp_divisor,
        seed=numbers.seed,
    ),
    **DAMPED,
}


def learner_of(method: Method, numbers: Numbers, network: Network, **options):
    """What measures the damping: the training batch's own eight microbatches."""
    rule = RULES[method.rule]
    return rmtdamp.DampingLearner(
        network.loss_fn, floor=numbers.damping, rule=rule, **options
    )


def transformation(method: Method, numbers: Numbers, network: Network, in_step=True):
    """The optax transformation; it measures in the step, or never by itself."""
    learner = learner_of(method, numbers, network) if method.learned else None
    every = method.every if in_step else None
    if not in_step:
        method = method._replace(factor_every=None)
    rate = SCHEDULES[method.schedule](numbers.learning_rate, numbers.total_steps)
    if method.layers:
        inner = adam_per_layer(learner, method.layers, every)
        return optax.chain(inner, optax.scale_by_learning_rate(rate))
    tx = OPTIMIZERS[method.optimizer](rate, method, numbers, network)
    if method.optimizer in DAMPED and learner is not None:
        tx = rmtdamp.auto_damping(tx, learner, every=every)
    elif method.optimizer in DAMPED:
        tx = rmtdamp.set_damping(tx, numbers.damping)
    return optax.with_extra_args_support(tx)


def refreshed(method, numbers, network, opt_state, step, params, batch, loss_args):
    """The state after the measurements that are due at this step, made by hand."""
    if method.optimizer.startswith("kfac") and step % method.factor_every == 0:
        eigen = step % method.eigen_every == 0
        opt_state = refresh_factors(
            network, opt_state, params, batch, loss_args, eigen=eigen
        )
    if method.learned and step % method.every == 0:
        learner = learner_of(method, numbers, network)
        opt_state = refresh_damping(opt_state, learner, params, batch, loss_args)
    return opt_state


def refresh_factors(network, opt_state, params, batch, loss_args, **options):
    """KFAC's factors, measured now."""
    return rmtdamp.refresh_factors(
        opt_state, network.factors_fn, params, batch, loss_args=loss_args, **options
    )


def refresh_damping(opt_state, learner, params, batch, loss_args, **options):
    """The damping, measured now."""
    return rmtdamp.refresh_damping(
        opt_state, learner, params, batch, loss_args=loss_args, **options
    )


def dampings(opt_state, name="damping") -> list:
    """Every scalar of that name in the state: none, one, or one per layer."""
    return [x for _, x in optax.tree.get_all_with_path(opt_state, name)]
