"""Section 8's threshold alone, where it is meant: at a minimum, D held fixed.

A small tanh network is brought to a true minimum in float64, displaced a little along
the sharpest direction of D^-1/2 H D^-1/2, and followed there by steps of a little less
and a little more than 2 f / lambda_max, f momentum's factor.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import optax

from benchmarks.paper._experiment import Experiment
from benchmarks.shared import report
from benchmarks.shared.claims import Check
from benchmarks.shared.optimizers import B2, MOMENTUM
from benchmarks.shared.runs import Row, runs_of
from rmtdamp.stability import stable_learning_rate

from .stable_rate import finite

SIZES, NUM_EXAMPLES = (4, 6, 3), 200
RIDGE = 1e-3  # without it a saturated unit has no minimum to come to
PRECONDITIONERS = {
    "none": 1.0,
    "Adam, delta 0.001": 1e-3,
    "Adam, delta 0.1": 1e-1,
    "Gauss-Newton, delta 0.001": 1e-3,
    "Gauss-Newton, delta 0.1": 1e-1,
}
# name -> (what is between gradient and rate, momentum, averaged)
MOMENTA = {
    "none": (optax.identity(), 0.0, False),
    "heavy ball": (optax.trace(MOMENTUM), MOMENTUM, False),
    "averaged": (optax.ema(MOMENTUM, debias=False), MOMENTUM, True),
}
RATIOS, STEPS, DISPLACED = (0.9, 0.98, 1.02, 1.1), 2000, 1e-6


def outputs(weights, inputs):
    """A network with one hidden layer, its weights in one vector."""
    rows, hidden, columns = SIZES
    first, last = jnp.split(weights, [rows * hidden])
    seen = jnp.tanh(inputs @ first.reshape(rows, hidden))
    return seen @ last.reshape(hidden, columns)


def loss_fn(weights, inputs, targets):
    """Half the mean squared error, and a little of the weights' own squares."""
    errors = jnp.sum((outputs(weights, inputs) - targets) ** 2, axis=1)
    return 0.5 * (jnp.mean(errors) + RIDGE * jnp.sum(weights**2))


@functools.cache  # for all preconditioners and momenta
def minimum(seed):
    """(weights, the data) where the gradient is rounding, in float64."""
    return _minimum(jax.random.key(seed))


@jax.jit
def _minimum(key):
    keys = jax.random.split(key, 3)
    rows, hidden, columns = SIZES
    inputs = jax.random.normal(keys[0], (NUM_EXAMPLES, rows))
    truth = jax.random.normal(keys[1], (rows * hidden + hidden * columns,))
    noise = 0.3 * jax.random.normal(keys[2], (NUM_EXAMPLES, columns))
    data = inputs, outputs(truth, inputs) + noise
    loss = lambda w: loss_fn(w, *data)
    slope = jax.grad(loss)
    eye = jnp.eye(truth.size)
    # Gauss and Newton's steps, damped; then Newton's, to the last digits.
    near = lambda _, w: (
        w - jnp.linalg.solve(gauss_newton(w, inputs) + 1e-2 * eye, slope(w))
    )
    newton = lambda _, w: w - jnp.linalg.solve(jax.hessian(loss)(w), slope(w))
    w = jax.lax.fori_loop(0, 3000, near, truth)
    return jax.lax.fori_loop(0, 5, newton, w), data


def gauss_newton(w, inputs):
    """The Gauss-Newton matrix, dense."""
    jacobian = jax.jacobian(outputs)(w, inputs).reshape(-1, w.size)
    return jacobian.T @ jacobian / len(inputs)


def divisor(name, w, data):
    """D, dense: what the gradient is divided by."""
    kind, delta, eye = name.partition(",")[0], PRECONDITIONERS[name], jnp.eye(w.size)
    if kind == "Adam":  # v of single examples, as small batches would leave it
        one = lambda x, y: jax.grad(loss_fn)(w, x[None], y[None])
        second = (1 - B2) * jnp.sum(jax.vmap(one)(*data) ** 2, axis=0)
        return jnp.diag(jnp.sqrt(second)) + delta * eye
    if kind == "Gauss-Newton":
        return gauss_newton(w, data[0]) + delta * eye
    return eye


@functools.partial(jax.jit, static_argnames="momentum")
def measured(w, data, d, momentum):
    """The predicted rate, and a displacement followed at each ratio to it."""
    loss = lambda x: loss_fn(x, *data)
    hessian = jax.hessian(loss)(w)
    values, vectors = jnp.linalg.eigh(d)
    root = (vectors / jnp.sqrt(values)[None]) @ vectors.T  # D^-1/2
    sharpness, directions = jnp.linalg.eigh(root @ hessian @ root)
    along = root @ directions[:, -1]
    inverse, start = root @ root, w + DISPLACED * along / jnp.linalg.norm(along)
    average, decay, averaged = MOMENTA[momentum]
    predicted = stable_learning_rate(sharpness[-1], momentum=decay, averaged=averaged)

    def followed(rate):
        divide = optax.stateless(lambda g, _: inverse @ g)
        tx = optax.chain(divide, average, optax.scale_by_learning_rate(rate))

        def one(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state, x)
            x = x + updates
            return (x, state), jnp.linalg.norm(x - w) / DISPLACED

        return jax.lax.scan(one, (start, tx.init(start)), length=STEPS)[1]

    far = jax.vmap(followed)(predicted * jnp.array(RATIOS))
    return {
        "gradient": jnp.linalg.norm(jax.grad(loss)(w)),
        "smallest": jnp.linalg.eigvalsh(hessian)[0],
        "predicted": predicted,
        "last": far[:, -1],
        "most": far.max(axis=1),  # NaN stays
    }


def threshold(folder: pathlib.Path, *, preconditioner, momentum, seed) -> Row:
    """How far a displacement from a minimum has grown, at each ratio."""
    del folder
    with jax.enable_x64(True):
        w, data = minimum(seed)
        found = measured(w, data, divisor(preconditioner, w, data), momentum)
        one = {name: float(found[name]) for name in ("gradient", "smallest")}
        one["predicted"] = float(found["predicted"])
        # JSON has no number for what has overflowed.
        several = {name: list(map(finite, found[name])) for name in ("last", "most")}
        return one | several


def contracts(row) -> list[bool]:
    """At each ratio: has the displacement gone by its end?"""
    return [x is not None and x < 0.1 for x in row["last"]]


def diverges(row) -> list[bool]:
    """At each ratio: has it grown tenfold at some time?"""
    return [x is None or x > 10 for x in row["most"]]


def _checks(found):
    rows = [row for of in found.values() for row in of]
    share = lambda test, i: sum(test(row)[i] for row in rows) / len(rows)
    checks = []
    for i, ratio in enumerate(RATIOS):
        way, test = ("contracts", contracts) if ratio < 1 else ("diverges", diverges)
        text = f"At {ratio:g} of the prediction it {way}: share of the runs"
        checks.append(Check(text, share(test, i), None, share(test, i) == 1))
    steepest = max(row["gradient"] for row in rows)
    text = "It is a minimum: the largest gradient, below 1e-10"
    checks.append(Check(text, steepest, None, steepest < 1e-10))
    flat = min(row["smallest"] for row in rows)
    text = "The smallest eigenvalue of its Hessian is positive"
    return [*checks, Check(text, flat, None, flat > 0)]


def _heads(row):
    return {"D": row["preconditioner"], "momentum": row["momentum"]}


def _line(key, found):
    line: Row = {"predicted": f"{found[key][0]['predicted']:.3g} (seed 0)"}
    for i, ratio in enumerate(RATIOS):
        name, test = ("contract", contracts) if ratio < 1 else ("diverge", diverges)
        count = sum(test(row)[i] for row in found[key])
        line[f"{name} at {ratio:g}"] = f"{count} of {len(found[key])}"
    return line


def _panels(rows):
    lines = [
        report.Line(row["momentum"], RATIOS, row["last"], "o")
        for row in rows
        if row["preconditioner"] == "none"
    ]
    axes = {"yscale": "log", "xlabel": "rate over the predicted one"}
    return [report.curves(lines, **axes, title="displacement after 2,000 steps, D = I")]


def _runs():
    axes = {"preconditioner": PRECONDITIONERS, "momentum": MOMENTA, "seed": range(5)}
    return runs_of(threshold, {}, **axes)


EXPERIMENTS = [Experiment("sec8_threshold", _runs, _heads, _line, _checks, [_panels])]
