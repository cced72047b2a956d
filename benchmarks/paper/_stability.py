"""A grid of learning rates at once, and the curvature that an optimiser sees.

With D = B + delta, what an optimiser divides by, the prediction is 2 / lambda_max of
D^-1/2 H D^-1/2 times momentum's factor, and eq. 19 an upper bound of it. Both are
measured in the eigenbasis of D: the parameters themselves for SGD and Adam, the
Kronecker factors' eigenvectors for KFAC.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtdamp
from benchmarks.paper._data import augment
from benchmarks.paper._runs import Row
from benchmarks.paper._train import SCHEDULES, Task, data_of, make_model, network
from rmtdamp import hessian
from rmtdamp.damping import stable_learning_rate, stable_learning_rate_bound

MOMENTUM, B2 = 0.9, 0.999  # b1 of Adam, rho of the others
EVERY = 10  # steps of one compiled call, and between measurements of KFAC's factors
MAX_PRODUCTS = 300  # for lambda_max
NUM_PROBES, NUM_EXACT = 120, 64  # for the diagonal: products, elements made exact
LEARNED = 0.9  # of log(num_classes): below it a run has learned something


class Problem(NamedTuple):
    """A loss and its data."""

    loss_fn: Any  # (params, batch, *loss_args) -> loss
    factors_fn: Any
    loss_args: tuple
    data: Any


def problem_of(folder, task, seed, with_factors):
    """(problem, initial params, number of classes)."""
    task = Task(**task)
    (train, _), num_classes = data_of(folder, task)
    train = jax.tree.map(jnp.asarray, train)
    shape = train[0].shape[1:]
    net = network(task, num_classes, shape, with_factors)
    model = make_model(task, num_classes, shape, seed)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    loss_args = (nnx.as_pure(rest),)
    problem = Problem(net.loss_fn, net.factors_fn, loss_args, train)
    return problem, nnx.as_pure(params), num_classes


def transformation(optimizer, rate, damping, factors_fn):
    """The optimiser at a schedule `rate`; its numbers may be traced."""
    if optimizer == "sgd":
        tx = optax.sgd(rate, momentum=MOMENTUM)
    elif optimizer == "adam":
        tx = rmtdamp.adam_shrinkage(rate, MOMENTUM, B2, damping)
    else:
        tx = rmtdamp.kfac(
            rate,
            factors_fn,
            damping=damping,
            momentum=MOMENTUM,
            # Off by default: it hides the instability that is looked for.
            kl_clip=0.01 if optimizer == "kfac-clipped" else None,
            factor_every=None,
        )
    return optax.with_extra_args_support(tx)


def _measured(optimizer, factors_fn, opt_state, params, batch, loss_args):
    if not optimizer.startswith("kfac"):
        return opt_state
    return rmtdamp.refresh_factors(
        opt_state, factors_fn, params, batch, loss_args=loss_args
    )


@functools.partial(
    jax.jit,
    static_argnames=("loss_fn", "factors_fn", "optimizer", "schedule", "augmented"),
)
def _advance(
    loss_fn, factors_fn, optimizer, schedule, augmented, numbers, params, opt_state,
    data, loss_args, rows, keys,
):  # fmt: skip
    """A few steps at every rate: (params, opt_state, losses (rates, steps))."""
    rates, damping, total_steps = numbers

    def pick(rows, key):
        if rows.size == 0:  # full-batch
            return data
        batch = jax.tree.map(lambda x: x[rows], data)
        if not augmented:
            return batch
        return augment(key, batch[0], pad=batch[0].shape[1] // 8), batch[1]

    def one(rate, params, opt_state):
        rate = SCHEDULES[schedule](rate, total_steps)
        tx = transformation(optimizer, rate, damping, factors_fn)
        opt_state = _measured(
            optimizer, factors_fn, opt_state, params, pick(rows[0], keys[0]), loss_args
        )

        def step(carry, at):
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss_fn)(params, pick(*at), *loss_args)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        carry, losses = jax.lax.scan(step, (params, opt_state), (rows, keys))
        return *carry, losses

    return jax.vmap(one)(rates, params, opt_state)


def start(optimizer, problem, params, rates):
    """(params, opt_state) once for each rate."""
    tx = transformation(
        optimizer, SCHEDULES["constant"](0.0, 1), 1.0, problem.factors_fn
    )
    repeat = lambda x: jnp.repeat(jnp.asarray(x)[None], len(rates), 0)
    return jax.tree.map(repeat, (params, tx.init(params)))


def descend(
    optimizer, damping, problem, carry, rates, steps, *, batch_size=None,
    schedule="constant", augmented=False, total_steps=None, seed=0,
):  # fmt: skip
    """Yield (step, params, opt_state, losses) after every ten of `steps` steps."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    num = len(jax.tree.leaves(problem.data)[0])
    numbers = (
        jnp.asarray(rates, jax.tree.leaves(carry[0])[0].dtype),
        damping,
        total_steps or steps,
    )
    order = np.empty(0, int)
    for step in range(0, steps, EVERY):
        rows = np.empty((EVERY, 0), int)
        if batch_size is not None:
            while len(order) < EVERY * batch_size:
                epoch = rng.permutation(num)[: num // batch_size * batch_size]
                order = np.concatenate([order, epoch])
            taken, order = np.split(order, [EVERY * batch_size])
            rows = taken.reshape(EVERY, batch_size)
        keys = jax.random.split(jax.random.fold_in(key, step), EVERY)
        *carry, losses = _advance(
            problem.loss_fn, problem.factors_fn, optimizer, schedule, augmented,
            numbers, *carry, problem.data, problem.loss_args, jnp.asarray(rows), keys,
        )  # fmt: skip
        yield step + EVERY, *carry, losses


def search(optimizer, damping, problem, params, rates, steps, **options) -> list[Row]:
    """What becomes of the loss at each rate; None where it is not finite."""
    carry = start(optimizer, problem, params, rates)
    walk = descend(optimizer, damping, problem, carry, rates, steps, **options)
    losses = []
    for _, _, _, found in walk:
        losses.append(found)
        if not jnp.isfinite(found).any():
            break
    means = np.stack([np.mean(x, axis=1) for x in losses], axis=1)
    return [
        {
            "rate": rate,
            "first": finite(losses[0][i, 0]),
            "peak": finite(np.max(means[i])),  # of the means of ten steps
            "last": finite(means[i, -1]),
        }
        for i, rate in enumerate(rates)
    ]


def finite(x, digits=5):
    return float(f"{float(x):.{digits}g}") if math.isfinite(x) else None


def divisor(optimizer, damping, problem, params, opt_state, step):
    """D of the step taken here, flat and diagonal, and its basis (None: none needed).

    `step` steps have been taken before, and `problem.data` is the batch.
    """
    ones, _ = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.ones_like, params))
    if optimizer == "sgd":
        return ones, None
    if optimizer == "adam":
        grads = jax.grad(problem.loss_fn)(params, problem.data, *problem.loss_args)
        old = optax.tree.get(opt_state, "nu")
        new = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g**2, old, grads)
        second, _ = jax.flatten_util.ravel_pytree(new)
        return jnp.sqrt(second / (1 - B2 ** (step + 1))) + damping, None
    opt_state = _measured(
        optimizer, problem.factors_fn, opt_state, params, problem.data,
        problem.loss_args,
    )  # fmt: skip
    basis = optax.tree.get(opt_state, "bases")
    values = [b.input_values[0][:, None] * b.output_values[0][None] for b in basis]
    return jnp.concatenate([v.ravel() for v in values]) + damping, basis


def curvature(optimizer, damping, problem, params, opt_state, step, seed=0) -> Row:
    """lambda_max of D^-1/2 H D^-1/2 and eq. 19's bound, at the step taken here."""
    matvec = hessian.hessian_matvec(
        problem.loss_fn, params, problem.data, loss_args=problem.loss_args
    )
    damped, basis = divisor(optimizer, damping, problem, params, opt_state, step)
    rotate = functools.partial(
        from_eigenbasis,
        problem.factors_fn.blocks if basis is not None else (),
        jax.flatten_util.ravel_pytree(params)[1],
    )
    seen = functools.partial(_product, rotate)
    product = jax.tree_util.Partial(seen, basis, matvec, 1 / jnp.sqrt(damped))
    key, other = jax.random.split(jax.random.key(seed))
    # Lanczos: at a small damping P^-1 H has a negative eigenvalue as large as the
    # largest one, and power iteration all but stands still.
    found = hessian.eigsh(product, damped, key, k=1, max_products=MAX_PRODUCTS)
    num_probes = min(NUM_PROBES, 3 * damped.size)
    estimate = hessian.diagonal(
        product, damped, other, num_probes=num_probes, method="hutch++"
    ).value
    # The largest of many estimates is too large: the candidates' own elements decide.
    places = jnp.argsort(-jnp.abs(estimate))[:NUM_EXACT]
    exact = _elements(product, damped, places)
    bound = stable_learning_rate_bound(exact, jnp.ones_like(exact))
    factor = functools.partial(
        stable_learning_rate, momentum=MOMENTUM, averaged=optimizer == "adam"
    )
    return {
        "step": step,
        "loss": finite(problem.loss_fn(params, problem.data, *problem.loss_args)),
        "eigenvalue": finite(found.eigenvalues[0]),
        "residual": finite(found.residuals[0], 2),
        "predicted": finite(factor(found.eigenvalues[0])),
        "bound": finite(factor(2.0) * bound),  # momentum's factor alone at 2
    }


def from_eigenbasis(blocks, unflatten, basis, vector):
    """A vector of coefficients -> params. `basis` is KFAC's, None for no rotation."""
    if basis is None:
        return unflatten(vector)
    params = unflatten(vector)
    leaves, treedef = jax.tree.flatten(params)
    first = 0
    for block, (inputs, outputs, *_) in zip(blocks, basis, strict=True):
        size = block.rows * block.columns
        matrix = vector[first : first + size].reshape(block.rows, block.columns)
        matrix = inputs[0] @ matrix @ outputs[0].T  # kernel, and the bias below it
        first += size
        ends = np.cumsum([math.prod(s) // block.columns for s in block.shapes])
        parts = jnp.split(matrix, ends[:-1])
        for place, shape, part in zip(block.leaves, block.shapes, parts, strict=True):
            leaves[place] = part.reshape(shape)
    return jax.tree.unflatten(treedef, leaves)


def _product(rotate, basis, matvec, root, vector):
    """D^-1/2 Q^T H Q D^-1/2 v."""
    params, back = jax.vjp(functools.partial(rotate, basis), root * vector)
    return root * back(matvec(params))[0]


@jax.jit
def _elements(product, like, places):
    """The diagonal's elements there."""
    unit = lambda i: jnp.zeros_like(like).at[i].set(1)
    return jax.lax.map(lambda i: product(unit(i))[i], places)


def grid(first, num) -> list[float]:
    """`num` rates, six to a factor of ten, from 10^(first/6)."""
    return [float(f"{10 ** (k / 6):.3g}") for k in range(first, first + num)]


def is_calm(outcome, num_classes) -> bool:
    """No ten steps had a larger mean loss than the first step."""
    del num_classes
    return outcome["peak"] is not None and outcome["peak"] <= outcome["first"]


def has_learned(outcome, num_classes) -> bool:
    """The last ten steps' loss is clearly below that of a guess."""
    last = outcome["last"]
    return last is not None and last < LEARNED * math.log(num_classes)


def largest_stable(outcomes, stable) -> float:
    """The largest rate that is stable with all rates below it; 0 if there is none."""
    found = 0.0
    for outcome in sorted(outcomes, key=lambda o: o["rate"]):
        if not stable(outcome):
            break
        found = outcome["rate"]
    return found
