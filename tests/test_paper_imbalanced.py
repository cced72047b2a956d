"""Linear networks on a Gaussian mixture against their closed forms; choices by hand."""

import json
import pathlib

import numpy as np
import optax
import pytest

from benchmarks.paper._experiment import RESULTS
from benchmarks.paper.experiments import imbalanced_data
from benchmarks.paper.experiments.imbalanced_theory import (
    CLASSES,
    CURVATURES as L,
    END,
    PRIORS,
    START,
    STRENGTHS as S,
    descend,
    gradient_flow,
    mixture,
    problem,
    spectral_flow,
)
from benchmarks.shared.optimizers import OPTIMIZERS
from benchmarks.shared.runs import load, path_of

pytestmark = pytest.mark.usefixtures("standard_promotion")
T = np.geomspace(1e-3, 10, 200)
DEPTHS = [1, 2, pytest.param(3, marks=pytest.mark.slow)]


def test_the_true_moments_are_those_of_the_mixture():
    """Jointly diagonal with s and l; and those of examples, to their standard error."""
    v, (strength, curvature), _ = problem(np.random.default_rng(0), 1, 0)
    np.testing.assert_allclose(v @ v.T, np.eye(CLASSES), atol=1e-12)
    np.testing.assert_allclose(strength, S[:, None] * v, atol=1e-12)
    np.testing.assert_allclose(v @ curvature @ v.T, np.diag(L), atol=1e-12)
    num = 40_000
    drawn, (some, square), _ = problem(np.random.default_rng(0), 1, num)
    np.testing.assert_allclose(drawn, v)
    # A class's sum has deviation sqrt(p) and its prior |mu| sqrt(p): 5 of them.
    bound = 5 * 3 * np.sqrt(PRIORS / num)
    assert (np.abs(some @ v.T - np.diag(S)) < bound[:, None]).all()
    assert np.abs(np.diag(v @ square @ v.T) / L - 1).max() < 0.05


def test_gradient_flow_in_closed_form():
    """Depth 1: exponential; depth 2: logistic; deeper: it solves its equation."""
    t = T[:, None]
    linear = END + (START - END) * np.exp(-L * t)
    np.testing.assert_allclose(gradient_flow(1, T), linear, rtol=1e-4)
    logistic = END / (1 + (END / START - 1) * np.exp(-2 * S * t))
    np.testing.assert_allclose(gradient_flow(2, T), logistic, rtol=1e-4)
    for depth in (3, 4):
        t = np.linspace(0, 100, 100_001)
        w = gradient_flow(depth, t)
        slope = depth * w ** (2 - 2 / depth) * (S - L * w)
        assert np.abs(np.gradient(w, t, axis=0) - slope).max() < 1e-3 * slope.max()


def followed(optimizer, depth, time, num_steps):
    """The components on the way, and t."""
    v, moments, layers = problem(np.random.default_rng(1), depth, 0)
    steps = np.arange(1, num_steps + 1)
    w = descend(optimizer, steps, time / num_steps, layers, *moments)
    return np.einsum("nkd,kd->nk", w, v), steps * time / num_steps


@pytest.mark.parametrize("depth", DEPTHS)
def test_spectral_descent_learns_all_components_at_equal_rates(depth):
    """A layer's component is never more than one step from eps + t, up to its end; and
    until the first has arrived all are equal."""
    root = lambda w: np.maximum(w, 0) ** (1 / depth)
    w, t = followed("spectral", depth, 0.6, 300)
    off = np.abs(root(w) - root(spectral_flow(depth, t)))
    assert off.max() < (1 + 1e-9) * t[0]
    early = t + START ** (1 / depth) < root(END).min()
    assert early.sum() > 5
    np.testing.assert_allclose(w[early], np.tile(w[early, :1], CLASSES), rtol=1e-9)


@pytest.mark.parametrize("depth", DEPTHS)
def test_gradient_descent_follows_its_flow_to_the_first_order(depth):
    """The error is of discretisation: half of it at half of the rate."""
    errors = []
    for num_steps in (400, 800):
        w, t = followed("gd", depth, {1: 3.0, 2: 10.0, 3: 20.0}[depth], num_steps)
        errors.append(np.abs(w - gradient_flow(depth, t)).max())
    assert errors[0] < 0.1 * END[0]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)


def test_normalised_steps_are_as_long_as_spectral_ones():
    depth, rate = 2, 1e-3
    grads = problem(np.random.default_rng(0), depth, 0)[2]
    longer = rate * (CLASSES * depth) ** 0.5
    for name, rate_of in (("spectral", rate), ("normalised", longer)):
        tx = OPTIMIZERS[name](rate_of, None, None, None)
        length = optax.tree.norm(tx.update(grads, tx.init(grads))[0])
        np.testing.assert_allclose(length, longer, rtol=1e-4)


@pytest.mark.slow
def test_a_committed_run_comes_out_again():
    """To the accuracies of a few test examples: another machine rounds otherwise."""
    config = {"depth": 1, "num_train": 5000, "seed": 3}
    rows = load(path_of(mixture, RESULTS))
    committed = rows[json.dumps(config, sort_keys=True)]
    row = mixture(pathlib.Path("unused"), **config)
    for name in ("spectral", "gd", "normalised"):
        found, expected = row["accuracy"][name], committed["accuracy"][name]
        np.testing.assert_allclose(found, expected, atol=2e-3)
    assert row["lag"]["gd"] == pytest.approx(committed["lag"]["gd"], rel=0.02)


def row(rate, valid, balanced):
    return {"learning_rate": rate, "valid_error": valid, "balanced": balanced}


def test_validation_chooses_the_rate_and_the_epoch():
    slow = [row(0.1, [0.6, 0.3], [40.0, 60.0]), row(0.1, [0.6, 0.3], [41.0, 61.0])]
    fast = [row(1.0, [0.5, 0.45], [45.0, 99.0]), row(1.0, [0.4, 0.45], [46.0, 98.0])]
    assert imbalanced_data.at_best(slow + fast) == slow
    assert imbalanced_data.at_best(slow + fast, slice(1)) == fast
    assert imbalanced_data.chosen(fast, "balanced") == [99.0, 46.0]
