"""Section 8's runs: a grid of learning rates at once, and the curvature that is met.

With D = B + delta, what an optimiser divides by, the prediction is 2 / lambda_max of
D^-1/2 H D^-1/2 times momentum's factor, and eq. 19 an upper bound of it. Both are
measured in the eigenbasis of D: the parameters themselves for SGD and Adam, the
Kronecker factors' eigenvectors for KFAC.
"""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.shared import optimizers, training
from benchmarks.shared.optimizers import B2, MOMENTUM, Method, Network, Numbers
from benchmarks.shared.runs import Row
from rmtdamp import hessian
from rmtdamp.damping import stable_learning_rate, stable_learning_rate_bound

EVERY = 10  # steps of one compiled call, and between measurements of KFAC's factors
MAX_PRODUCTS = 300  # for lambda_max
NUM_PROBES, NUM_EXACT = 120, 64  # for the diagonal: products, elements made exact
# The KL clip hides the instability that is looked for.
NAMES = {"kfac": "kfac-unclipped", "kfac-clipped": "kfac"}
flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]


class Problem(NamedTuple):
    """A loss, its data, and the optimiser that is to go down it."""

    network: Network
    loss_args: tuple
    data: Any
    method: Method
    damping: Any

    def transformation(self, rate, total_steps):
        numbers = Numbers(rate, self.damping, total_steps)
        return optimizers.transformation(self.method, numbers, self.network, False)

    def measured(self, opt_state, params, batch):
        """The state with KFAC's factors of here."""
        if not self.method.optimizer.startswith("kfac"):
            return opt_state
        here = params, batch, self.loss_args
        return optimizers.refresh_factors(self.network, opt_state, *here)


def problem_of(folder, task, seed, optimizer, damping, schedule="constant"):
    """(problem, initial params, number of classes)."""
    with_factors = optimizer.startswith("kfac")
    found = training.prepare(folder, training.Task(**task), seed, with_factors)
    (train, _), network, params, loss_args, num_classes = found
    method = Method(NAMES.get(optimizer, optimizer), schedule)
    return Problem(network, loss_args, train, method, damping), params, num_classes


@functools.partial(jax.jit, static_argnames=("network", "method", "augmented"))
def _advance(network, method, rest, carry, rates, steps, rows, key, first, augmented):
    """A few steps at every rate: the carry, losses (rates, steps)."""
    problem = Problem(network, rest[0], rest[1], method, rest[2])

    def one(rate, carry):
        params, loss_args, opt_state = carry
        batch = training.pick(problem.data, rows[0], key, first, augmented)
        carry = params, loss_args, problem.measured(opt_state, params, batch)
        at = problem.data, rows, key, first, augmented
        return training.take_steps(
            network, problem.transformation(rate, steps), carry, *at
        )

    if problem.method.optimizer.startswith("kfac"):
        # Batched eigendecompositions can block each other for ever on two cores.
        return jax.lax.map(lambda at: one(*at), (rates, carry))
    return jax.vmap(one)(rates, carry)


def start(problem: Problem, params, num: int):
    """(params, loss_args, opt_state), `num` times."""
    carry = params, problem.loss_args, problem.transformation(0.0, 1).init(params)
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num, 0), carry)


def descend(problem, carry, rates, steps, batch_size=None, augmented=False, seed=0):
    """Yield (step, carry, losses) after every ten of `steps` steps."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    num, size = len(jax.tree.leaves(problem.data)[0]), batch_size or 0
    rows = np.empty((steps, 0), int)
    if batch_size is not None:
        epochs = math.ceil(steps / (num // size))
        order = [rng.permutation(num)[: num // size * size] for _ in range(epochs)]
        rows = np.concatenate(order).reshape(-1, size)
    network, loss_args, data, method, damping = problem
    rest = loss_args, data, damping
    rates = jnp.asarray(rates, jax.tree.leaves(carry)[0].dtype)
    for first in range(0, steps, EVERY):
        at = rates, steps, rows[first : first + EVERY], key, first, augmented
        carry, losses = _advance(network, method, rest, carry, *at)
        yield first + EVERY, carry, losses


def search(problem, params, rates, steps, **options) -> list[Row]:
    """What becomes of the loss at each rate; None where it is not finite."""
    losses = []
    walk = descend(problem, start(problem, params, len(rates)), rates, steps, **options)
    for _, _, found in walk:
        losses.append(np.asarray(found))
        if not np.isfinite(losses[-1]).any():
            break
    means = np.stack([np.mean(x, axis=1) for x in losses], axis=1)  # of ten steps
    ends = losses[0][:, 0], np.max(means, axis=1), means[:, -1]
    names = ("rate", "first", "peak", "last")
    return [
        dict(zip(names, (rate, *map(finite, row)), strict=True))
        for rate, *row in zip(rates, *ends, strict=True)
    ]


def finite(x, digits=5):
    """Rounded; None where there is no number for it in JSON."""
    return float(f"{float(x):.{digits}g}") if math.isfinite(x) else None


def divisor(problem, params, opt_state, step):
    """D of the step taken here, flat and diagonal, and its basis (None: none needed).

    `step` steps have been taken before, and `problem.data` is the batch.
    """
    optimizer, data = problem.method.optimizer, problem.data
    if optimizer == "sgd":
        return jnp.ones_like(flat(params)), None
    if optimizer == "adam":
        grads = jax.grad(problem.network.loss_fn)(params, data, *problem.loss_args)
        old = flat(optax.tree.get(opt_state, "nu"))
        second = B2 * old + (1 - B2) * flat(grads) ** 2
        return jnp.sqrt(second / (1 - B2 ** (step + 1))) + problem.damping, None
    basis = optax.tree.get(problem.measured(opt_state, params, data), "bases")
    values = [b.input_values[0][:, None] * b.output_values[0][None] for b in basis]
    return jnp.concatenate([v.ravel() for v in values]) + problem.damping, basis


def curvature(problem, params, opt_state, step, seed=0) -> Row:
    """lambda_max of D^-1/2 H D^-1/2 and eq. 19's bound, at the step taken here."""
    loss_fn, loss_args = problem.network.loss_fn, problem.loss_args
    matvec = hessian.hessian_matvec(loss_fn, params, problem.data, loss_args=loss_args)
    damped, basis = divisor(problem, params, opt_state, step)
    blocks = problem.network.factors_fn.blocks if basis is not None else ()
    unflatten = jax.flatten_util.ravel_pytree(params)[1]
    rotate = functools.partial(from_eigenbasis, blocks, unflatten)
    seen = functools.partial(_product, rotate)
    product = jax.tree_util.Partial(seen, basis, matvec, 1 / jnp.sqrt(damped))
    key, other = jax.random.split(jax.random.key(seed))
    # Lanczos: at a small damping P^-1 H has a negative eigenvalue as large as the
    # largest one, and power iteration all but stands still.
    found = hessian.eigsh(product, damped, key, k=1, max_products=MAX_PRODUCTS)
    options = {"num_probes": min(NUM_PROBES, 3 * damped.size), "method": "hutch++"}
    estimate = hessian.diagonal(product, damped, other, **options).value
    # The largest of many estimates is too large: the candidates' own elements decide.
    exact = _elements(product, damped, jnp.argsort(-jnp.abs(estimate))[:NUM_EXACT])
    bound = stable_learning_rate_bound(exact, jnp.ones_like(exact))
    averaged = problem.method.optimizer == "adam"
    rate = lambda x: stable_learning_rate(x, momentum=MOMENTUM, averaged=averaged)
    return {
        "step": step,
        "loss": finite(loss_fn(params, problem.data, *loss_args)),
        "eigenvalue": finite(found.eigenvalues[0]),
        "residual": finite(found.residuals[0], 2),
        "predicted": finite(rate(found.eigenvalues[0])),
        "bound": finite(rate(2.0) * bound),  # momentum's factor alone at 2
    }


def from_eigenbasis(blocks, unflatten, basis, vector):
    """A vector of coefficients -> params. `basis` is KFAC's, None for no rotation."""
    params = unflatten(vector)
    if basis is None:
        return params
    leaves, treedef = jax.tree.flatten(params)
    sizes = np.cumsum([block.rows * block.columns for block in blocks])
    parts = jnp.split(vector, sizes[:-1])
    for block, (inputs, outputs, *_), part in zip(blocks, basis, parts, strict=True):
        matrix = inputs[0] @ part.reshape(block.rows, block.columns) @ outputs[0].T
        ends = np.cumsum([math.prod(s) // block.columns for s in block.shapes])
        rows = jnp.split(matrix, ends[:-1])  # the kernel, and the bias below it
        for place, shape, some in zip(block.leaves, block.shapes, rows, strict=True):
            leaves[place] = some.reshape(shape)
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


def stable_rate(
    folder: pathlib.Path, *, task, optimizer, damping, rates, steps, schedule, **options
) -> Row:
    """What becomes of the training loss at each rate; `batch_size` None: full-batch."""
    made = task, options["seed"], optimizer, damping, schedule
    problem, params, num_classes = problem_of(folder, *made)
    options["augmented"] = task.get("augmented", False)
    outcomes = search(problem, params, rates, steps, **options)
    return {"outcomes": outcomes, "num_classes": num_classes}


def sharpness(
    folder: pathlib.Path, *, task, optimizer, damping, fraction, at, num_examples,
    **options,
) -> Row:  # fmt: skip
    """The prediction along a run at `fraction` of the first one, at steps `at`."""
    problem, params, _ = problem_of(folder, task, options["seed"], optimizer, damping)
    seen = problem._replace(data=tuple(x[:num_examples] for x in problem.data))
    begun = start(problem, params, 1)

    def measure(carry, step):
        params, _, opt_state = jax.tree.map(lambda x: x[0], carry)
        return curvature(seen, params, opt_state, step)

    measured = [measure(begun, 0)]
    rate = fraction * measured[0]["predicted"]
    peak = measured[0]["peak"] = measured[0]["loss"]
    options["augmented"] = task.get("augmented", False)
    for step, carry, losses in descend(problem, begun, [rate], max(at), **options):
        peak = float(np.maximum(peak, np.mean(losses)))  # NaN stays
        if step in at:
            if finite(peak) is None:
                break
            measured.append(measure(carry, step) | {"peak": finite(peak)})
    return {"rate": rate, "measured": measured}
