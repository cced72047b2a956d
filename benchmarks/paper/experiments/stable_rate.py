"""Section 8: the largest stable learning rates, found on a grid and predicted.

With D = B + delta, what an optimiser divides by, the prediction is 2 / lambda_max of
D^-1/2 H D^-1/2 times momentum's factor, and eq. 19 an upper bound of it. Both are
measured in the eigenbasis of D: the parameters themselves for SGD and Adam, the
Kronecker factors' eigenvectors for KFAC.
"""

import functools
import itertools
import math
import pathlib
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtdamp
from benchmarks.paper._experiment import Experiment
from benchmarks.shared import optimizers, report, training
from benchmarks.shared.claims import Check, by, error, mean, trend
from benchmarks.shared.optimizers import B2, MOMENTUM, Method, Network, Numbers
from benchmarks.shared.runs import Row, Run
from rmtdamp import hessian, kronecker
from rmtdamp.stability import stable_learning_rate, stable_learning_rate_bound

EVERY = 10  # steps of one compiled call, and between measurements of KFAC's factors
MAX_PRODUCTS = 300  # for lambda_max
NUM_PROBES, NUM_EXACT = 120, 64  # for the diagonal: products, elements made exact
# The KL clip hides the instability that is looked for.
CALLED = {"kfac": "kfac-unclipped", "kfac-clipped": "kfac"}
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
        return optimizers.transformation(self.method, numbers, self.network)

    def measured(self, opt_state, params, batch):
        """The state with KFAC's factors of here."""
        if not self.method.optimizer.startswith("kfac"):
            return opt_state
        here = optimizers.factors_of(self.method, self.network), params, batch
        return rmtdamp.refresh(opt_state, *here, loss_args=self.loss_args)


def problem_of(folder, task, seed, optimizer, damping, schedule="constant"):
    """(problem, initial params, number of classes)."""
    with_factors = optimizer.startswith("kfac")
    found = training.prepare(folder, training.Task(**task), seed, with_factors)
    (train, _), network, params, loss_args, num_classes = found
    method = Method(CALLED.get(optimizer, optimizer), schedule, eigen_every=1)
    return Problem(network, loss_args, train, method, damping), params, num_classes


@functools.partial(jax.jit, static_argnames=("network", "method"))
def _advance(network, method, rest, carry, rates, steps, rows):
    """A few steps at every rate: the carry, losses (rates, steps)."""
    loss_args, data, damping = rest
    problem = Problem(network, loss_args, data, method, damping)

    def one(rate, carry):
        params, loss_args, opt_state = carry
        opt_state = problem.measured(opt_state, params, training.pick(data, rows[0]))
        carry, tx = (params, loss_args, opt_state), problem.transformation(rate, steps)
        return training.take_steps(network, tx, carry, data, rows)

    if method.optimizer.startswith("kfac"):
        # Batched eigendecompositions can block each other for ever on two cores.
        return jax.lax.map(lambda at: one(*at), (rates, carry))
    return jax.vmap(one)(rates, carry)


def start(problem: Problem, params, num: int):
    """(params, loss_args, opt_state), `num` times."""
    carry = params, problem.loss_args, problem.transformation(0.0, 1).init(params)
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], num, 0), carry)


def descend(problem, carry, rates, steps, batch_size=None, seed=0):
    """Yield (step, carry, losses) after every ten of `steps` steps."""
    num, rng = len(jax.tree.leaves(problem.data)[0]), np.random.default_rng(seed)
    rows = np.empty((steps, 0), int)
    if batch_size is not None:
        whole = num // batch_size * batch_size
        epochs = range(math.ceil(steps * batch_size / whole))
        order = [rng.permutation(num)[:whole] for _ in epochs]
        rows = np.concatenate(order).reshape(-1, batch_size)
    network, loss_args, data, method, damping = problem
    rest, rates = (loss_args, data, damping), jnp.asarray(rates, flat(carry[0]).dtype)
    for first in range(0, steps, EVERY):
        at = rates, steps, rows[first : first + EVERY]
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
        part = part.reshape(1, block.rows, block.columns)
        matrix = inputs @ part @ outputs.swapaxes(1, 2)
        found = kronecker.from_matrix(block, matrix)
        for place, leaf in zip(block.leaves, found, strict=True):
            leaves[place] = leaf
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
    for step, carry, losses in descend(problem, begun, [rate], max(at), **options):
        peak = float(np.maximum(peak, np.mean(losses)))  # NaN stays
        if step in at:
            if finite(peak) is None:
                break
            measured.append(measure(carry, step) | {"peak": finite(peak)})
    return {"rate": rate, "measured": measured}


SEEDS = (0, 1, 2)
# (optimiser, damping) -> the exponent, in sixths, of its grid's first rate
FIRST = {("sgd", 0.0): -9, ("adam", 1e-4): -14, ("adam", 0.01): -12, ("adam", 1.0): -5}
FIRST |= {("kfac", 0.01): -15, ("kfac", 1.0): -9}
FIRST |= {("kfac-clipped", 0.01): -9, ("kfac-clipped", 1.0): -9}
NUM_RATES = 15
MODERATE, LIMIT = 0.25, 1.0  # of the first prediction
COMMON = (0.01, 1.0)  # dampings of both Adam and KFAC
LEARNED = 0.9  # of log(num_classes): below it a run has learned something
NAMES = {"sgd": "SGD", "adam": "Adam", "kfac": "KFAC", "kfac-clipped": "KFAC, KL clip"}
SMALL = {"dataset": "fashion-mnist", "model": "mlp", "width": 0.25, "pool": 2}
SMALL |= {"num_train": 500, "num_test": 100}
PATH = {"task": SMALL, "batch_size": None, "num_examples": None}
PATH |= {"at": [0, 10, 20, 40, 100]}
GRID = {"task": SMALL, "steps": 300, "schedule": "constant"}


def rates_from(first, num) -> list[float]:
    """`num` rates, six to a factor of ten, from 10^(first/6)."""
    return [float(f"{10 ** (k / 6):.3g}") for k in range(first, first + num)]


def _runs():
    runs = []
    for seed, ((optimizer, damping), first) in itertools.product(SEEDS, FIRST.items()):
        method = {"optimizer": optimizer, "damping": damping, "seed": seed}
        rates = GRID | {"rates": rates_from(first, NUM_RATES)}
        clipped = optimizer == "kfac-clipped"
        for size in (100,) if clipped else (None, 100):
            runs.append(Run(stable_rate, method | rates | {"batch_size": size}))
        for fraction in () if clipped else (MODERATE, LIMIT):
            runs.append(Run(sharpness, method | PATH | {"fraction": fraction}))
    return runs


def is_calm(outcome, num_classes) -> bool:
    """No ten steps had a larger mean loss than the first step."""
    return outcome["peak"] is not None and outcome["peak"] <= outcome["first"]


def has_learned(outcome, num_classes) -> bool:
    """The last ten steps' loss is clearly below that of a guess."""
    last = outcome["last"]
    return last is not None and last < LEARNED * math.log(num_classes)


def largest_stable(rows, stable) -> float:
    """The largest rate that is stable with all rates below it; 0 if there is none."""
    found = 0.0
    outcomes = [(o, row["num_classes"]) for row in rows for o in row["outcomes"]]
    for outcome, num_classes in sorted(outcomes, key=lambda o: o[0]["rate"]):
        if not stable(outcome, num_classes):
            break
        found = outcome["rate"]
    return found


def _rates(rows):
    """{(test, batch size): the largest stable rate of every seed}."""
    sizes = by([row for row in rows if "rates" in row], itemgetter("batch_size"))
    seeds = lambda of: by(of, itemgetter("seed")).values()
    tests = {"calm": is_calm, "learns": has_learned}
    return {
        (name, size): [largest_stable(of_seed, test) for of_seed in seeds(of)]
        for size, of in sizes.items()
        for name, test in tests.items()
    }


def _calm(row):
    """What was measured while the run was calm."""
    first = row["measured"][0]["loss"]
    return [m for m in row["measured"] if m["peak"] <= first and m["predicted"]]


def _first(rows, name):
    """One number per seed, at the start of its run."""
    return [r["measured"][0][name] for r in rows if r.get("fraction") == MODERATE]


def _cell(values):
    """Mean ± standard error, to two digits and one."""
    plain = f"{mean(values):.2g}"
    return plain if len(values) < 2 else f"{plain} ± {error(values):.1g}"


def _line(key, found):
    rows, line = found[key], {}
    if path := [row for row in rows if row.get("fraction") == MODERATE]:
        least = [min(m["predicted"] for m in _calm(row)) for row in path]
        later = [
            [row["rate"] / m["predicted"] for m in _calm(row)[1:]]
            for row in rows
            if row.get("fraction") == LIMIT
        ]
        used = [max(ratios) for ratios in later if ratios]
        line = {
            "predicted at the start": _cell(_first(rows, "predicted")),
            "least predicted on the way": _cell(least),
            "eq. 19 at the start": _cell(_first(rows, "bound")),
            "run at the prediction / that of the moment, most": (
                _cell(used) if used else "not calm"
            ),
        }
    batches = lambda n: "full batch" if n is None else f"batches of {n}"
    rates = _rates(rows).items()
    return line | {f"{k}, {batches(n)}": _cell(v) for (k, n), v in rates}


def _over(found, name):
    """The calm rates over what is said of them, means over seeds; full-batch first."""
    ratios = []
    for rows in found.values():
        calm, said = next(iter(_rates(rows).values())), _first(rows, name)
        if said:
            ratios.append(mean([a / b for a, b in zip(calm, said, strict=True)]))
    return ratios


def _checks(found):
    ratios, most = _over(found, "predicted"), max(_over(found, "bound"))
    near, num = sum(0.5 <= ratio <= 2 for ratio in ratios), len(ratios)
    text = f"Calm rates are within a factor of 2 of the prediction for all {num}"
    below = "They are below eq. 19's bound: at most so much of it"
    checks = [
        Check(f"{text} methods: for so many", near, None, near == num),
        Check(below, most, None, most < 1),
    ]
    learns = lambda *key: list(_rates(found[key]).values())[-1]  # in batches
    for d in COMMON:
        along = [learns("SGD", None), learns("Adam", d), learns("KFAC", d)]
        text = f"At delta {d:g} the rates that learn in batches grow from SGD to Adam"
        checks.append(trend(f"{text} to KFAC: KFAC's less SGD's", along))
    return checks


def _limits(rows):
    lines = [
        report.Line(
            f"run at the prediction, {report.label(list(_heads(row).values()))}",
            [m["step"] for m in _calm(row)],
            [row["rate"] / m["predicted"] for m in _calm(row)],
            "o-",
        )
        for row in rows
        if row.get("fraction") == LIMIT
    ]
    axes = {"yscale": "log", "xlabel": "step, while calm", "xscale": "symlog"}
    return [report.curves(lines, **axes, title="rate / prediction then")]


def _heads(row):
    return {"optimiser": NAMES[row["optimizer"]], "delta": row["damping"] or None}


SHOWN = ("predicted at the start", "eq. 19 at the start", "calm, full batch")
SHOWN += ("learns, full batch", "learns, batches of 100")
PICTURES = [("log", *SHOWN), _limits]
EXPERIMENTS = [Experiment("sec8_stable_rate", _runs, _heads, _line, _checks, PICTURES)]
