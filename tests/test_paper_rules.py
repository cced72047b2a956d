"""How rules are judged over learning rates, on rows made by hand."""

import math
import pathlib

import numpy as np
import pytest

from benchmarks.paper.experiments import rules
from benchmarks.shared.training import Task, data_of

TASK = "digits, MLP"


def row(rate, seed, valid, test):
    """A run of two evaluations; the second is the better one on validation."""
    return {
        "task": rules.TASKS[TASK][0],
        "method": {"optimizer": "kfac"},
        "damping": 0.1,
        "learning_rate": rate,
        "seed": seed,
        "valid_loss": [9.0, valid],
        "test_loss": [0.0, test],
        "test_error": [0.9, 0.1],
    }


def rows(valid, test):
    """Two seeds at each of two rates."""
    made = [
        row(rate, seed, *pair)
        for rate, *pair in zip((0.01, 0.1), valid, test, strict=True)
        for seed in (0, 1)
    ]
    return rules.with_chosen(made)


FOUND = {
    # Validation prefers the first rate, the test data the second.
    (TASK, "a"): rows((1.0, 2.0), (3.0, 2.0)),
    (TASK, "b"): rows((5.0, 4.0), (6.0, 3.1)),
}


def test_validation_chooses_the_epoch_and_the_rate():
    assert {r["best_loss"] for r in FOUND[TASK, "a"]} == {3.0, 2.0}
    assert {r["learning_rate"] for r in rules.best_rate(FOUND[TASK, "a"])} == {0.01}
    assert {r["learning_rate"] for r in rules.best_rate(FOUND[TASK, "b"])} == {0.1}


def test_regret_and_width_in_closed_form():
    logs = np.log([6.0 / 3.0, 3.1 / 3.0])
    np.testing.assert_allclose(rules.regret(FOUND, (TASK, "b")), logs.mean())
    assert rules.near(FOUND, (TASK, "a")) == 2
    assert rules.near(FOUND, (TASK, "b")) == 1


def test_a_run_that_diverged_is_never_chosen_and_counts_as_lost():
    (lost,) = rules.with_chosen([row(0.1, 0, None, None)])
    assert lost["best_loss"] == 0.0  # of the evaluation before
    (gone,) = rules.with_chosen(
        [row(0.1, 0, math.nan, math.nan) | {"valid_loss": [None] * 2}]
    )
    assert gone["chosen_loss"] == math.inf
    check = rules._trains({(TASK, "a"): FOUND[TASK, "a"]}, "a")
    assert check.holds
    bad = {(TASK, "a"): [FOUND[TASK, "a"][0] | {"test_error": [0.1, None]}]}
    assert not rules._trains(bad, "a").holds


def test_every_run_is_asked_for_once():
    for runs, methods in ((rules._kfac_runs(), 16 + 2 * 7), (rules._adam_runs(), 21)):
        keys = [run.key for run in runs]
        assert len(keys) == len(set(keys)) == 3 * methods * 5 * 10
    held_out = rules._kfac_held_out_runs()
    assert len({run.key for run in held_out}) == 2 * 3 * 7 * 5 * 10
    assert len({run.key for run in rules._text_runs()}) == 2 * 5 * 4
    deep = 3 * (6 + 3 + 2) + 2 * (4 + 3 + 2 + 2)
    assert len({run.key for run in rules._deep_kfac_runs()}) == 5 * deep
    assert len({run.key for run in rules._adam_held_out_runs()}) == 2 * 2 * 5 * 10


@pytest.mark.parametrize("num", [0, 100])
def test_validation_is_cut_off_the_training_data(num):
    task = Task("digits", "mlp", num_valid=num)
    (train, _, *valid), _ = data_of(pathlib.Path(), task)
    (whole, _), _ = data_of(pathlib.Path(), Task("digits", "mlp"))
    parts = [train, *valid]
    assert len(parts) == 1 + bool(num)
    for i in (0, 1):
        joined = np.concatenate([np.asarray(part[i]) for part in parts])
        np.testing.assert_array_equal(joined, whole[i])
