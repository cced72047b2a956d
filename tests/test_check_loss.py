"""check_loss finds what breaks the mean over independent examples, and nothing else."""

import jax
import jax.numpy as jnp
import pytest

from rmtdamp import check_loss

PARAMS = jnp.array([0.5, -1.0, 2.0])
BATCH = jax.random.normal(jax.random.key(0), (16, 3))


def losses(params, batch):
    return (batch.astype(params.dtype) @ params) ** 2


def mean(params, batch):
    return jnp.mean(losses(params, batch))


def dropout(params, batch, key):
    mask = jax.random.bernoulli(key, 0.5, batch.shape)
    return mean(params, jnp.where(mask, batch, 0))


def batch_statistics(params, batch):
    return mean(params, (batch - batch.mean(0)[None]) / batch.std(0)[None])


def token_weighting(params, batch):
    weight = (batch[:, 0] > 0).astype(params.dtype)
    return jnp.sum(weight * losses(params, batch)) / jnp.sum(weight)


def test_an_example_alone_that_has_no_loss_is_refused():
    """Weights normalised over as many examples in each half; the first has none."""
    sign = jnp.where(jnp.arange(16) % 2 == 0, -1, 1)
    batch = BATCH.at[:, 0].set(sign * jnp.abs(BATCH[:, 0]))
    with pytest.raises(
        ValueError, match=r"for 16 of them, and nan for example 0 alone"
    ):
        check_loss(token_weighting, PARAMS, batch)


def test_a_root_of_a_mean_is_refused_where_halves_do_not_show_it():
    batch = jnp.concatenate([BATCH[:8], BATCH[:8]])
    root = lambda params, batch: jnp.sqrt(mean(params, batch))
    with pytest.raises(ValueError, match=r"for 8 of them, .* one by one. A root"):
        check_loss(root, PARAMS, batch)


@pytest.mark.parametrize("count", [2, 7, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_mean_passes(count, dtype):
    check_loss(mean, PARAMS.astype(dtype), BATCH[:count])


@pytest.mark.parametrize(
    ("loss_fn", "loss_args", "message"),
    [
        (
            dropout,
            (jax.random.PRNGKey(1),),
            "depends on the order .* a key for each",
        ),
        (batch_statistics, (), "not a mean over examples.*BatchNorm"),
        (token_weighting, (), "not a mean over examples.*mean over tokens"),
        (lambda p, b: jnp.sum(losses(p, b)), (), "sums over the batch: .* jnp.mean"),
        (lambda p, b: mean(p, b) / 0, (), "gives inf on this batch"),
    ],
    ids=["dropout", "batch statistics", "token weighting", "sum", "infinite"],
)
def test_what_is_not_a_mean_fails(loss_fn, loss_args, message):
    with pytest.raises(ValueError, match=message):
        check_loss(loss_fn, PARAMS.astype(jnp.float64), BATCH, loss_args=loss_args)


@pytest.mark.parametrize("reduce", [jnp.mean, jnp.sum])
def test_a_loss_of_zero_is_judged_by_its_slope(reduce):
    """A policy gradient with centred advantages and a head of zeros."""
    advantages = BATCH[:, 0] - BATCH[:, 0].mean()

    def loss(params, batch):
        actions, advantage = batch
        logp = jax.nn.log_sigmoid(jnp.where(actions > 0, 1, -1) * (BATCH[0] @ params))
        return reduce(logp * advantage)

    batch = BATCH[:, 1], advantages
    params = jnp.zeros(3)
    assert abs(loss(params, batch)) < 1e-5
    if reduce is jnp.mean:
        check_loss(loss, params, batch)
        return
    with pytest.raises(ValueError, match="loss_fn's slope sums over the batch"):
        check_loss(loss, params, batch)


def test_rounding_is_not_an_error():
    """bfloat16 sums, and a float32 loss of both signs whose mean is near zero."""
    for seed in range(10):
        batch = jax.random.normal(jax.random.key(seed), (16, 3), jnp.bfloat16)
        check_loss(mean, PARAMS.astype(jnp.bfloat16), batch)
        centred = (batch - batch.mean(0)[None]).astype(jnp.float32)
        signed = lambda p, b: jnp.mean(b @ p)
        check_loss(signed, PARAMS.astype(jnp.float32), centred)


def test_bad_input():
    with pytest.raises(ValueError, match="compares halves, and batch holds 1 example"):
        check_loss(mean, PARAMS.astype(jnp.float64), BATCH[:1])
    with pytest.raises(TypeError, match="mean loss alone"):
        check_loss(lambda p, b: {"loss": 0.0}, PARAMS, BATCH)
