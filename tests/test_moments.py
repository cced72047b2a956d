"""moments against dense Hessians, against algebra, and against its standard error."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    dense_hessian,
    mlp,
    mlp_batch,
    mlp_loss,
    quadratic_loss,
    symmetric,
)

from rmtdamp._basis import draw
from rmtdamp._tree import rademacher
from rmtdamp.hessian import moments


def dense_moments(hessians, batch_size_ratio=1.0):
    """The probe-averaged estimates, in closed form from the microbatch Hessians."""
    n, p, _ = hessians.shape
    mean = hessians.mean(0)
    spread = hessians - mean[None]
    variance = jnp.einsum("ipq,ipq->", spread, spread) / (n - 1) / p
    square = jnp.sum(mean**2) / p - variance / n
    return jnp.trace(mean) / p, square, variance * batch_size_ratio


def microbatch_hessians(params, batch, n):
    parts = [jax.tree.map(lambda x, i=i: x[i::n], batch) for i in range(n)]
    return jnp.stack([dense_hessian(mlp_loss, params, part) for part in parts])


def test_probe_mean_and_variance_match_dense_hessians_by_z_scores():
    """200 keys on a network with P = 94: the estimate less the dense truth for the same
    microbatches is probe noise alone, and its z-scores must look like N(0, 1)."""
    params = mlp(jax.random.key(0))
    batch = mlp_batch(jax.random.key(1))
    truth = dense_moments(microbatch_hessians(params, batch, 8), 4 / 32)
    measure = lambda key: moments(mlp_loss, params, batch, key, num_probes=64)
    keys = jax.random.split(jax.random.key(2), 200)
    measured = jax.jit(lambda keys: jax.lax.map(measure, keys))(keys)
    z = (measured.variance - truth[2]) / measured.probe_stderr
    assert abs(float(z.mean())) < 4 / 200**0.5
    assert 0.75 < float(z.var()) < 1.25
    for estimate, exact in zip(measured[:2], truth[:2], strict=True):
        standard_error = float(estimate.std()) / 200**0.5
        assert abs(float(estimate.mean()) - float(exact)) < 4 * standard_error


def test_one_identity_like_probe_is_exact():
    """Multiples of I give every probe the same answer: no probe noise, closed form."""
    scales = jnp.array([1.0, 2.0, 4.0, 7.0])
    batch = scales[:, None, None] * jnp.eye(5)[None]
    found = moments(
        quadratic_loss, jnp.ones(5), batch, jax.random.key(0), num_microbatches=4
    )
    variance = scales.var(ddof=1)
    chex.assert_trees_all_close(found.mean, scales.mean())
    chex.assert_trees_all_close(found.variance, variance / 4)
    chex.assert_trees_all_close(found.square, scales.mean() ** 2 - variance / 4)


def test_unbiased_over_data():
    """Gaussian A_i of known law: m = P^-1 Tr Var(A)/B, and the debiased square."""
    p, count = 6, 8
    # Entries: variance 1/2 off the diagonal, 1 on it.
    variance = (p * (p - 1) / 2 + p) / p
    keys = jax.random.split(jax.random.key(3), (4000, 2))

    def measure(pair):
        batch = symmetric(pair[0], count, p, mean=0.3)
        return moments(quadratic_loss, jnp.ones(p), batch, pair[1], num_microbatches=4)

    found = jax.jit(jax.vmap(measure))(keys)
    truths = (0.3, 0.3**2, variance / count)
    for estimate, truth in zip(found[:3], truths, strict=True):
        assert abs(estimate.mean() - truth) < 4 * estimate.std() / 4000**0.5
    # The jackknife is conservative on average, not by much (Gaussian data).
    actual = float(found.variance.std())
    typical = float(jnp.sqrt(jnp.mean(found.microbatch_stderr**2)))
    assert 0.75 * actual < typical < 1.25 * actual


def test_jackknife_is_the_delete_one_jackknife():
    batch = symmetric(jax.random.key(4), 6, 5)
    found = moments(
        quadratic_loss, jnp.ones(5), batch, jax.random.key(5), num_microbatches=6
    )
    (probe,) = draw(jax.random.fold_in(jax.random.key(5), 0), jnp.ones(5), rademacher)
    rows = np.asarray(batch @ probe) / 5**0.5

    def sample_variance(rows):
        return ((rows - rows.mean(0)) ** 2).sum() / (len(rows) - 1) / 6

    left_out = np.array([sample_variance(np.delete(rows, i, 0)) for i in range(6)])
    jackknife = np.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
    np.testing.assert_allclose(found.variance, sample_variance(rows), rtol=1e-12)
    np.testing.assert_allclose(found.microbatch_stderr, jackknife, rtol=1e-12)


def test_batch_size_rescales_the_variance_alone():
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    at = lambda size: moments(
        mlp_loss, params, batch, jax.random.key(2), batch_size=size
    )
    chex.assert_trees_all_close(at(None), at(32))
    chex.assert_trees_all_close(at(128).variance, at(32).variance / 4)
    chex.assert_trees_all_close(at(128).microbatch_stderr, at(32).microbatch_stderr / 4)
    chex.assert_trees_all_close(at(128)[:2], at(32)[:2])


@pytest.mark.parametrize(
    ("execution", "num_probes"),
    [("unroll", 3), ("vmap", 1), ("eager", 1), ("eager", 2)],
)
def test_executions_agree(execution, num_probes):
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    at = lambda how: moments(
        mlp_loss,
        params,
        batch,
        jax.random.key(2),
        num_probes=num_probes,
        execution=how,
    )
    chex.assert_trees_all_close(at(execution), at("scan"), rtol=1e-10)


def test_standard_errors_are_nan_where_they_cannot_be_known():
    batch = symmetric(jax.random.key(0), 4, 5)
    at = lambda n, k: moments(
        quadratic_loss,
        jnp.ones(5),
        batch,
        jax.random.key(1),
        num_microbatches=n,
        num_probes=k,
    )
    assert jnp.isnan(at(4, 1).probe_stderr)
    assert jnp.isfinite(at(4, 1).microbatch_stderr)
    assert jnp.isnan(at(4, 1).variance_stderr)
    assert jnp.isnan(at(2, 2).microbatch_stderr)
    assert jnp.isfinite(at(2, 2).probe_stderr)
    assert jnp.isfinite(at(4, 2).variance_stderr)


def test_centred_accumulation_survives_float32():
    """A mean Hessian of 3e4 with noise of 1: raw moments differ by less than the
    rounding of their squares, the centred form does not care."""
    noise = symmetric(jax.random.key(0), 8, 50, dtype=jnp.float32)
    batch = noise + 3e4 * jnp.eye(50, dtype=jnp.float32)[None]
    params = jnp.ones(50, jnp.float32)
    found = moments(quadratic_loss, params, batch, jax.random.key(1))
    exact = moments(
        quadratic_loss,
        params.astype(jnp.float64),
        batch.astype(jnp.float64),
        jax.random.key(1),
    )
    assert found.variance.dtype == jnp.float32
    np.testing.assert_allclose(found.variance, exact.variance, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_params_are_measured_in_float32(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), mlp(jax.random.key(0)))
    inputs, labels = mlp_batch(jax.random.key(1))
    found = moments(mlp_loss, params, (inputs.astype(dtype), labels), jax.random.key(2))
    exact = moments(
        mlp_loss, mlp(jax.random.key(0)), (inputs, labels), jax.random.key(2)
    )
    assert found.variance.dtype == jnp.float32
    np.testing.assert_allclose(found.variance, exact.variance, rtol=0.1)


def test_loss_args_are_traced_and_not_split():
    def weighted(params, batch, weight):
        return weight * quadratic_loss(params, batch)

    batch = symmetric(jax.random.key(0), 8, 5)
    at = lambda w: moments(
        weighted, jnp.ones(5), batch, jax.random.key(1), loss_args=(jnp.float64(w),)
    )
    chex.assert_trees_all_close(at(3.0).variance, 9 * at(1.0).variance)


def test_new_params_and_data_do_not_retrace():
    traces = []

    def loss(params, batch):
        traces.append(None)
        return quadratic_loss(params, batch)

    for seed in range(3):
        batch = symmetric(jax.random.key(seed), 8, 5)
        moments(loss, jnp.full(5, seed + 1.0), batch, jax.random.key(seed))
        if seed == 0:
            first = len(traces)
    assert len(traces) == first


def test_non_finite_values_come_back_as_measured():
    batch = symmetric(jax.random.key(0), 8, 5).at[0].set(jnp.nan)
    found = moments(quadratic_loss, jnp.ones(5), batch, jax.random.key(1))
    assert jnp.isnan(found.variance)


def test_sharded_batch_gives_the_same_numbers():
    """Four devices: params replicated, batch spread, no code of ours for either."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    assert mesh.size == 4
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    here = moments(mlp_loss, params, batch, jax.random.key(2))
    there = moments(mlp_loss, params, jax.device_put(batch, spread), jax.random.key(2))
    chex.assert_trees_all_close(here, there, rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_microbatches": 1}, ValueError, "num_microbatches is 1, .* at least 2"),
        (
            {"num_microbatches": 3},
            ValueError,
            r"=3 does not divide the 8 .* one of \[2, 4, 8\], or 6 of",
        ),
        (
            {"num_microbatches": 16},
            ValueError,
            "=16 does not divide .* one of .2, 4, 8., or more",
        ),
        ({"num_probes": 0}, ValueError, "num_probes is 0, and at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, and at least 1"),
        ({"execution": "pmap"}, ValueError, "'pmap': choose from scan, unroll, vmap"),
        ({"batch": {}}, ValueError, "batch holds no arrays"),
        ({"batch": jnp.zeros((0, 5, 5))}, ValueError, "batch holds no examples"),
        ({"batch": jnp.float64(1.0)}, ValueError, "without an axis of examples"),
        (
            {"batch": (jnp.zeros(8), jnp.zeros(4))},
            ValueError,
            r"unequal leading axes \(batch\[0\]: 8, batch\[1\]: 4\)",
        ),
        ({"params": jnp.arange(5)}, TypeError, "params is int64, .* real floating"),
        (
            {"params": {"w": jnp.ones(5, complex)}},
            TypeError,
            r"params\['w'\] is complex128",
        ),
        ({"params": {"w": 1.0}}, TypeError, r"params\['w'\] is float, "),
        ({"params": {}}, ValueError, "params hold no elements"),
        (
            {"loss_fn": lambda p, b: b @ p},
            TypeError,
            r"real scalar and returned shape \(1, 5\)",
        ),
        ({"loss_fn": lambda p, b: (0.0, 1.0)}, TypeError, "returned a tuple"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(change, error, message):
    given = {
        "loss_fn": quadratic_loss,
        "params": jnp.ones(5),
        "batch": symmetric(jax.random.key(0), 8, 5),
        "key": jax.random.key(1),
    } | change
    with pytest.raises(error, match=message):
        moments(**given)
