"""CONTRIBUTING's page on adding things, followed to the letter by somebody new."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp

pytestmark = pytest.mark.usefixtures("standard_promotion")

PAGE = (pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
GRADS = jax.grad(mlp_loss)(PARAMS, BATCH)


def defined(block):
    names = {"__name__": __name__}
    exec(compile(block, "CONTRIBUTING", "exec"), names)
    return names


def test_the_rule_is_learned_with():
    rule = defined(BLOCKS[0])["root_of_the_noise"]
    learner = rmtdamp.DampingLearner(mlp_loss, floor=0.0, rule=rule, num_probes=8)
    tx = rmtdamp.auto_adam(1e-3, learner)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    variance = optax.tree.get(state, "measured_variance")
    np.testing.assert_allclose(optax.tree.get(state, "damping"), variance**0.5)


def test_the_measurer_runs_in_the_step_and_by_hand():
    names = defined(BLOCKS[1])
    measurer = names["LossMeasurer"](mlp_loss)
    loss = mlp_loss(PARAMS, BATCH)
    expected = jax.tree.map(lambda g: g * jnp.minimum(1, loss), GRADS)

    tx = optax.chain(names["scale_by_loss"](measurer, refresh_every=2))
    step = jax.jit(lambda state: tx.update(GRADS, state, PARAMS, batch=BATCH))
    updates, state = step(tx.init(PARAMS))
    jax.tree.map(np.testing.assert_allclose, updates, expected)
    np.testing.assert_allclose(optax.tree.get(state, "batch_loss"), loss)

    by_hand = optax.chain(names["scale_by_loss"](measurer, refresh_every=None))
    state = rmtdamp.refresh(by_hand.init(PARAMS), measurer, PARAMS, BATCH)
    updates, _ = by_hand.update(GRADS, state, PARAMS)
    jax.tree.map(np.testing.assert_allclose, updates, expected)


def test_it_is_as_short_as_promised():
    code = [line for line in BLOCKS[1].splitlines() if line.strip()]
    assert len([line for line in code if not line.startswith(("import", "from"))]) < 40
