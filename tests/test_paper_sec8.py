"""Stable rates on quadratics and small networks with known answers; costs by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import dense_hessian, quadratic_loss, symmetric

import rmtdamp
from benchmarks.paper._experiment import record_of
from benchmarks.paper.experiments import cost, stable_rate
from benchmarks.paper.experiments.stable_rate import (
    Problem,
    curvature,
    descend,
    search,
    start,
)
from benchmarks.shared import optimizers
from benchmarks.shared.optimizers import Method, Network, Numbers
from rmtdamp import hessian, kronecker

pytestmark = pytest.mark.usefixtures("standard_promotion")
DAMPING = 0.05


def quadratic(optimizer, damping, seed=0, size=6):
    """x^T A x / 2 with one large eigenvalue, as a problem, its start, and A."""
    matrix = symmetric(jax.random.key(seed), 1, size)[0]
    matrix = matrix @ matrix + 0.1 * jnp.eye(size)
    method, network = Method(optimizer, "constant"), Network(None, quadratic_loss)
    problem = Problem(network, (), matrix[None], method, damping)
    return problem, jnp.ones(size), np.asarray(matrix)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "damping", "divided", "factor"),
    [
        ("sgd", 0.0, 1.0, 1.9),
        pytest.param("adam", 1e60, 1e60, 19.0, marks=pytest.mark.slow),
    ],
)
def test_the_rate_found_on_a_quadratic_brackets_the_predicted_one(
    optimizer, damping, divided, factor
):
    """Adam's gradients stay far below its damping, so that D is constant."""
    problem, params, matrix = quadratic(optimizer, damping)
    predicted = 2 * factor * divided / np.linalg.eigvalsh(matrix)[-1]
    rates = [predicted * x for x in (0.5, 0.97, 1.03, 2.0)]
    row = {"outcomes": search(problem, params, rates, 300), "num_classes": 0}
    # Adam's bias correction makes the first steps ten times as large: from the peak.
    stable = lambda o, _: o["last"] is not None and o["last"] < 1e-6 * o["peak"]
    assert stable_rate.largest_stable([row], stable) == rates[1]
    params, _, opt_state = jax.tree.map(lambda x: x[0], start(problem, params, 1))
    found = curvature(problem, params, opt_state, 0)
    assert found["predicted"] == pytest.approx(predicted, rel=1e-3)
    diagonal = np.abs(np.diag(matrix)).max()
    assert found["bound"] == pytest.approx(2 * factor * divided / diagonal, rel=1e-3)


def test_adam_divides_by_the_second_moment_of_the_moment():
    problem, params, matrix = quadratic("adam", 0.1, seed=1)
    walk = descend(problem, start(problem, params, 1), [1e-2], 20)
    *_, (step, carry, losses) = walk
    params, _, opt_state = jax.tree.map(lambda x: x[0], carry)
    assert step == 20
    assert losses.shape == (1, 10)
    numbers = Numbers(1.0, 0.1, 20)
    tx = optimizers.transformation(problem.method, numbers, problem.network)
    grads = jnp.asarray(matrix) @ params
    # With zero momentum before it, the update is -(1 - b1) g / D / (1 - b1^21).
    still = optax.tree.set(opt_state, mu=jnp.zeros_like(params))
    updates, _ = tx.update(grads, still, params)
    expected = -0.1 / (1 - 0.9**21) * grads / updates
    damped, basis = stable_rate.divisor(problem, params, opt_state, step)
    assert basis is None
    np.testing.assert_allclose(damped, expected, rtol=1e-9)


def _logits(params, x, tape):
    hidden = tape.linear("first", x, x @ params["w1"] + params["b1"][None])
    hidden = jnp.tanh(hidden)
    return tape.linear("second", hidden, hidden @ params["w2"] + params["b2"][None])


def _cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def _network_loss(params, batch):
    logits = _logits(params, batch[0], kronecker.Tape(keep=False))
    return _cross_entropy(logits, batch[1])


@pytest.fixture(scope="module")
def network():
    """A tanh network 5-4-3 whose layers KFAC sees, its params, KFAC's state."""
    keys = jax.random.split(jax.random.key(3), 6)
    shapes = {"w1": (5, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}
    params = {
        name: jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), keys, strict=False)
    }
    layers = {
        "first": {"kernel": "w1", "bias": "b1"},
        "second": {"kernel": "w2", "bias": "b2"},
    }
    factors_fn = kronecker.ModelFactors(
        model_fn=_logits,
        criterion=_cross_entropy,
        blocks=kronecker.make_blocks(params, layers),
        fisher="empirical",
    )
    data = (
        jax.random.normal(keys[4], (24, 5)),
        jax.random.randint(keys[5], (24,), 0, 3),
    )
    network = Network(None, _network_loss, factors_fn)
    method = Method("kfac-unclipped", eigen_every=1)
    problem = Problem(network, (), data, method, DAMPING)
    measurer = optimizers.factors_of(method, network)
    kfac = rmtdamp.scale_by_kfac(measurer, damping=DAMPING, refresh_every=None)
    state = rmtdamp.refresh(kfac.init(params), measurer, params, data)
    divide = jax.jit(lambda vector: kfac.update(vector, state, params)[0])
    return problem, params, kfac.init(params), divide


@pytest.mark.slow
def test_kfac_divides_by_what_it_is_said_to_divide_by(network):
    """Q (Q^T v / D), against the transformation's own update."""
    problem, params, opt_state, divide = network
    damped, basis = stable_rate.divisor(problem, params, opt_state, 0)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    rotate = lambda x: stable_rate.from_eigenbasis(
        problem.network.factors_fn.blocks, unflatten, basis, x
    )
    vector = unflatten(jax.random.normal(jax.random.key(0), flat.shape))
    coefficients = jax.vjp(rotate, flat)[1](vector)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12),
        rotate(coefficients / damped),
        divide(vector),
    )


@pytest.mark.slow
def test_kfac_sees_the_eigenvalue_of_the_dense_matrix(network):
    """lambda_max of P^-1 H: dense, by iterating the update, and as measured."""
    problem, params, opt_state, divide = network
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    inverse = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(divide(unflatten(v)))[0])
    dense = np.asarray(inverse(jnp.eye(flat.size))).T @ np.asarray(
        dense_hessian(_network_loss, params, problem.data)
    )
    expected = np.linalg.eigvals(dense).real.max()
    matvec = hessian.hessian_matvec(_network_loss, params, problem.data)
    iterated = hessian.largest_eigenvalue(
        lambda v: divide(matvec(v)), params, jax.random.key(1), num_steps=2000
    )
    assert float(iterated.value) == pytest.approx(expected, rel=1e-4)
    found = curvature(problem, params, opt_state, 0)
    assert found["eigenvalue"] == pytest.approx(expected, rel=1e-3)
    assert found["predicted"] == pytest.approx(3.8 / expected, rel=1e-3)
    assert found["bound"] >= found["predicted"]


def test_batches_go_through_the_data_once_an_epoch():
    """The losses of an epoch of batches are a permutation's means."""
    data = jnp.arange(20.0)
    network = Network(None, lambda params, batch: batch.mean() + 0 * params)
    problem = Problem(network, (), data, Method("sgd", "constant"), 0.0)
    carry = start(problem, jnp.zeros(()), 1)
    ((step, _, losses),) = descend(problem, carry, [0.1], 10, batch_size=4)
    assert step == 10
    epochs = np.asarray(losses).reshape(2, 5)
    np.testing.assert_allclose(epochs.mean(axis=1), data.mean())
    assert not np.allclose(epochs[0], epochs[1])


def _outcome(rate, first=3.0, peak=3.0, last=0.1):
    return {"rate": rate, "first": first, "peak": peak, "last": last}


def test_stable_means_stable_with_all_smaller_rates():
    outcomes = [
        _outcome(0.4),
        _outcome(0.1),
        _outcome(0.3, peak=None, last=None),
        _outcome(0.2, peak=9.0),
    ]
    row = {"outcomes": outcomes, "num_classes": 10}
    assert stable_rate.largest_stable([row], stable_rate.is_calm) == 0.1
    assert stable_rate.largest_stable([row], stable_rate.has_learned) == 0.2
    row["outcomes"] = [_outcome(1.0, last=2.2)]
    assert stable_rate.largest_stable([row], stable_rate.has_learned) == 0
    assert stable_rate.rates_from(-6, 7)[::6] == [0.1, 1.0]


def _stable_rows(limits):
    """Rows as if every method's stable rate and prediction were its limit."""
    rows = []
    cases = [(*key, limit, s) for key, limit in limits.items() for s in (0, 1)]
    for optimizer, damping, limit, seed in cases:
        common = {"optimizer": optimizer, "damping": damping, "seed": seed}
        rates = [limit / 2, limit, 2 * limit]
        outcomes = [_outcome(r, last=0.1 if r <= limit else None) for r in rates]
        outcomes[2]["peak"] = None
        for size in (None, 100):
            grid = {"rates": rates, "outcomes": outcomes, "num_classes": 10}
            rows.append(common | grid | {"batch_size": size})
        moment = {"loss": 3.0, "peak": 3.0, "predicted": limit, "bound": 3 * limit}
        measured = [moment | {"step": 0}, moment | {"step": 10}]
        rows += [
            common | {"fraction": f, "rate": f * limit, "measured": measured}
            for f in (stable_rate.MODERATE, stable_rate.LIMIT)
            if optimizer != "kfac-clipped"
        ]
    return rows


def verdict_on(experiment, rows):
    record = record_of(experiment, rows)
    json.dumps(record, allow_nan=False)
    return record["verdict"]


LIMITS = {
    method: {"sgd": 0.01, "adam": 0.1, "kfac": 0.3, "kfac-clipped": 1.0}[method[0]]
    for method in stable_rate.FIRST
}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "reproduced"),
        ({("kfac", 1.0): 0.05}, "partly"),
        ({("adam", 0.01): 0.5, ("adam", 1.0): 0.001}, "partly"),
    ],
)
def test_the_verdict_follows_from_the_rates(changed, verdict):
    rows = _stable_rows(LIMITS | changed)
    assert verdict_on(stable_rate.EXPERIMENTS[0], rows) == verdict


def test_nothing_is_reproduced_if_no_check_holds():
    rows = _stable_rows(LIMITS | {("kfac", 0.01): 0.05, ("kfac", 1.0): 0.05})
    for row in rows:
        for moment in row.get("measured", ())[:1]:
            moment["predicted"] *= 3
            moment["bound"] /= 9
    assert verdict_on(stable_rate.EXPERIMENTS[0], rows) == "not reproduced"


def _cost_rows(scan=1.0, own=0.1, losses=(0.5, 0.5), shift=0.0):
    """Rows of constant times: 100 steps take 10 s with Adam, 12 s with KFAC."""
    pieces = {"adam": 1.0, "kfac": 1.0, "factors": 0.1, "eigenvectors": 1.1}
    pieces |= {"own": own, "scan": scan, "adam, own": 1.0 + own}
    timed = {
        "times": {name: [value] * 5 for name, value in pieces.items()},
        "task": {"model": "mlp"},
        "batches_per_call": 78,
        "seed": 0,
    }
    rng = np.random.default_rng(0)
    compared = [
        {
            "own": list(1 + shift + 0.1 * rng.standard_normal(16)),
            "scan": 1.0,
            "scan_error": 0.01,
            "epochs": epochs,
            "seed": seed,
        }
        for epochs in cost.EPOCHS
        for seed in range(3)
    ]
    trained = [
        {
            "method": {"optimizer": optimizer, "learned": True, "refresh_every": gap},
            "seed": seed,
            "epoch": [1],
            **{name: [loss + 0.01 * seed] for name in ("train_loss", "test_loss")},
            "damping_curve": [0.02],
        }
        for seed in range(3)
        for optimizer in cost.NAMES
        for gap, loss in zip(cost.GAPS, losses, strict=True)
    ]
    return [timed, *compared, *trained]


def test_an_epoch_is_the_sum_of_its_pieces():
    rows = _cost_rows(scan=5.0)
    rows[0]["batches_per_call"] = 39  # the scan is twice what was timed
    ratio = lambda *of: cost.ratio_of(rows[0], *of)["ratio"]
    assert ratio("adam", "scan", 100) == pytest.approx(2)
    assert ratio("adam", "own", 10) == pytest.approx(1.1)
    assert ratio("kfac", "scan", 10) == pytest.approx(1 + 100 / 12)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "reproduced"),
        ({"scan": 20.0}, "partly"),
        ({"losses": (0.5, 0.4)}, "partly"),
        ({"shift": 1.0}, "partly"),
        ({"scan": 20.0, "losses": (0.5, 0.4), "shift": 1.0}, "not reproduced"),
    ],
)
def test_the_verdict_follows_from_the_costs(changed, verdict):
    assert verdict_on(cost.EXPERIMENTS[0], _cost_rows(**changed)) == verdict
