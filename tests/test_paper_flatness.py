"""The experiments on flatness and on section 8's threshold, at sizes of a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.paper.experiments import flatness, threshold
from rmtdamp.flatness import least_linear_network_trace


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_flattest_factorisation_is_found():
    matrix = jnp.array([[2.0, 0.3], [0.1, 0.5]])
    every = jnp.eye(4).reshape(4, 2, 2) * 2  # E[A x A] = identity
    some, least = flatness.flattest(matrix, every, jax.random.key(0), 3, steps=2000)
    np.testing.assert_allclose(least, least_linear_network_trace(matrix, 3), rtol=1e-3)
    assert some > least


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_penalty_recovers_what_gradient_descent_does_not():
    sizes = {"depth": 2, "num_measurements": 80, "steps": 3000, "seeds": [0]}
    find = lambda method: flatness.recovery(None, method=method, **sizes)
    plain, ours = find("gradient descent"), find("closed form")
    assert ours["error"][0] < 0.02 < plain["error"][0]
    assert ours["nuclear"][0] == pytest.approx(2, abs=0.1)


def test_rows_of_a_run_are_those_of_its_seeds():
    names = ("rate", "strength", "train_loss", "error", "nuclear")
    run = {"seeds": [3, 5], "depth": 2} | {name: [1.0, 2.0] for name in names}
    first, second = flatness.by_seed([run])
    assert (first["seed"], second["seed"]) == (3, 5)
    assert (first["error"], second["error"]) == (1, 2)


def rows_of(**errors):
    """Rows of every case; the relative error of a method by its name."""
    return [
        {"depth": depth, "num_measurements": n, "method": method, "seed": seed}
        | {"error": errors.get(method.split()[0], 0.5) + 0.01 * seed}
        for depth in flatness.DEPTHS
        for n in flatness.MEASUREMENTS
        for method in flatness.STRENGTHS
        for seed in flatness.SEEDS
    ]


def test_recovery_is_judged_against_gradient_descent():
    experiment = next(x for x in flatness.EXPERIMENTS if "recovery" in x.name)
    heads = lambda row: (row["depth"], row["num_measurements"], row["method"])

    def held(rows):
        found = {}
        for row in rows:
            found.setdefault(heads(row), []).append(row)
        return {c.statement: c.holds for c in experiment.checks(found)}

    better = held(rows_of(trace=0.1, SAM=0.9))
    text = "Depth 3: the relative error is smaller than gradient descent's with"
    assert better[f"{text} the trace penalty"]
    assert not better[f"{text} SAM"]
    assert better["Depth 3: the penalty's error is no larger than with SAM"]
    assert not held(rows_of(trace=0.6))[f"{text} the trace penalty"]


def test_a_threshold_holds_where_all_contract_below_and_all_diverge_above():
    (experiment,) = threshold.EXPERIMENTS
    row = {"gradient": 1e-16, "smallest": 0.1, "predicted": 1.0}
    good = row | {"last": [0.0, 0.01, 3.0, None], "most": [1.0, 2.0, 50.0, None]}
    slow = row | {"last": [0.0, 0.5, 3.0, 9.0], "most": [1.0, 2.0, 9.0, 50.0]}
    holds = lambda *rows: [c.holds for c in experiment.checks({"D": list(rows)})]
    assert holds(good) == [True] * 6
    assert holds(good, slow) == [True, False, False, True, True, True]


@pytest.mark.slow
def test_the_threshold_is_where_it_is_predicted():
    found = threshold.threshold(
        None, preconditioner="Gauss-Newton, delta 0.1", momentum="averaged", seed=1
    )
    assert threshold.contracts(found)[:2] == [True, True]
    assert threshold.diverges(found)[2:] == [True, True]
    assert found["gradient"] < 1e-12
