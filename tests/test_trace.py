"""trace and diagonal against closed forms, matfree, and their own standard errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from matfree import stochtrace
from problems import dense_hessian, mlp, mlp_batch, mlp_loss, symmetric

from rmtdamp._tree import rademacher
from rmtdamp.hessian import hessian_matvec
from rmtdamp.hessian._trace import diagonal, trace

TRACE = ["hutchinson", "hutch++", "xtrace"]
# The same with what takes seconds to compile among the slow tests.
TRACE_SLOW = [TRACE[0], *(pytest.param(x, marks=pytest.mark.slow) for x in TRACE[1:])]
DIAGONAL = ["hutchinson", "hutch++"]
PAIRS = [(trace, method) for method in TRACE] + [(diagonal, m) for m in DIAGONAL]


def dense(matrix):
    return jax.tree_util.Partial(jnp.matmul, matrix)


def decaying(key, size=40, rate=0.7, bulk=0.05):
    """A few large eigenvalues of either sign over a bulk of small ones."""
    basis = jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]
    values = 3 * (-rate) ** jnp.arange(float(size)) + bulk
    return (basis * values[None]) @ basis.T


def low_rank(key, size, rank, dtype=jnp.float64):
    factors = jax.random.normal(key, (size, rank))
    signs = (-1.0) ** jnp.arange(float(rank))
    return ((factors * signs[None]) @ factors.T).astype(dtype)


def over_keys(estimator, matrix, count, seed=7, **options):
    """One estimate per key, all in one compiled loop."""
    like = jnp.zeros(len(matrix), matrix.dtype)
    one = lambda key: estimator(dense(matrix), like, key, **options)
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=50))(keys)


def drawn(key, half, count, size, sampler):
    """The random vectors of one phase, as the module draws them."""
    key = jax.random.split(key)[half]
    keys = [jax.random.fold_in(key, i) for i in range(count)]
    return jnp.stack([sampler(k, (size,), jnp.float64) for k in keys])


def counted(matrix):
    calls = []
    return calls, lambda v: (jax.debug.callback(lambda: calls.append(1)), matrix @ v)[1]


@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
def test_identity_is_exact(method):
    """For "hutch++" it is not: the part of a sign vector off the basis varies."""
    run = functools.partial(trace, lambda v: 2.5 * v, jnp.zeros(12), num_probes=6)
    found = run(jax.random.key(0), method=method)
    chex.assert_trees_all_close(found.value, 30.0, rtol=1e-12)
    assert found.stderr < 1e-12


def test_diagonal_matrix_is_exact_from_one_probe():
    scales = jnp.arange(12.0) - 3
    run = lambda f: f(lambda v: scales * v, scales, jax.random.key(0), num_probes=1)
    chex.assert_trees_all_equal(run(diagonal).value, scales)
    chex.assert_trees_all_close(run(trace).value, scales.sum(), rtol=1e-12)


SLOW_METHODS = [pytest.param(m, marks=pytest.mark.slow) for m in TRACE[1:]]
SLOW_RANKS = [pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [*SLOW_RANKS, 3])
@pytest.mark.parametrize(
    ("estimator", "method"), [pair for pair in PAIRS if pair[1] != "hutchinson"]
)
def test_low_rank_is_exact_with_a_sketch_of_twenty(estimator, method, rank):
    matrix = low_rank(jax.random.key(0), 50, rank)
    truth = jnp.diagonal(matrix) if estimator is diagonal else jnp.trace(matrix)
    for num_probes in (60, 12):
        found = estimator(
            dense(matrix),
            jnp.zeros(50),
            jax.random.key(1),
            num_probes=num_probes if method == "hutch++" else num_probes // 3 * 2,
            method=method,
        )
        chex.assert_trees_all_close(found.value, truth, rtol=0, atol=1e-11)
        assert jnp.all(found.stderr < 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "num_probes"), [("hutch++", 36), ("xtrace", 24)])
def test_a_sketch_of_every_direction_is_exact(method, num_probes):
    matrix = decaying(jax.random.key(2), 12)
    for estimator in (trace,) if method == "xtrace" else (trace, diagonal):
        found = estimator(
            dense(matrix),
            jnp.zeros(12),
            jax.random.key(3),
            num_probes=num_probes,
            method=method,
        )
        truth = jnp.trace(matrix) if estimator is trace else jnp.diagonal(matrix)
        chex.assert_trees_all_close(found.value, truth, atol=1e-9)


@pytest.mark.slow
def test_a_steep_spectrum_leaves_no_nan():
    """Thirty orders of magnitude: the last vectors of the sketch are rounding alone."""
    values = 10.0 ** -jnp.arange(30.0)
    for method in ("hutch++", "xtrace"):
        found = trace(
            lambda v: values * v,
            jnp.zeros(30),
            jax.random.key(0),
            num_probes=60,
            method=method,
        )
        chex.assert_trees_all_close(found.value, values.sum(), rtol=1e-12)


@pytest.mark.parametrize("unit", [1e25, 1e-25])
@pytest.mark.parametrize("method", TRACE_SLOW)
def test_a_matrix_whose_norm_has_no_square_in_float32(method, unit):
    """unit (2 I + 9 u u^T) against the same without its unit, standard error too."""
    u = jax.random.normal(jax.random.key(0), (40,), jnp.float32)
    u = u / jnp.linalg.norm(u)
    run = lambda matvec, key: trace(matvec, u, key, num_probes=12, method=method)
    plain = run(lambda v: 2 * v + 9 * u * (u @ v), jax.random.key(1))
    scaled = run(
        lambda v: (2 * v + 9 * u * (u @ v)) * jnp.float32(unit), jax.random.key(1)
    )
    np.testing.assert_allclose(scaled.value / np.float32(unit), plain.value, rtol=1e-5)
    np.testing.assert_allclose(
        scaled.stderr / np.float32(unit), plain.stderr, rtol=1e-3, atol=1e-4
    )


def test_hutchinson_is_matfree_with_the_same_probes():
    matrix, like = decaying(jax.random.key(0)), jnp.zeros(40)
    key, count = jax.random.key(1), 9
    probes = drawn(key, 1, count, 40, rademacher)
    for estimator, integrand in (
        (trace, stochtrace.monte_carlo_trace()),
        (diagonal, stochtrace.monte_carlo_diagonal()),
    ):
        theirs = stochtrace.estimator_monte_carlo_mean_and_sem(
            integrand, sampler=lambda _: probes
        )
        value, sem = theirs(lambda v: matrix @ v, None)
        found = estimator(dense(matrix), like, jax.random.clone(key), num_probes=count)
        chex.assert_trees_all_close(found.value, value, rtol=1e-12)
        # Theirs divides the squares by n, ours by n - 1.
        chex.assert_trees_all_close(found.stderr, sem * (9 / 8) ** 0.5, rtol=1e-10)


@pytest.mark.slow
def test_xtrace_is_matfree_with_the_same_test_vectors():
    matrix, key = decaying(jax.random.key(0)), jax.random.key(1)
    tests = drawn(key, 0, 8, 40, jax.random.normal)
    theirs = stochtrace.estimator_leave_one_out_mean_and_sem(
        stochtrace.leave_one_out_xtrace(), sampler=lambda _: tests
    )
    # Theirs relies on implicit promotion of dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value, sem = theirs(lambda v: matrix @ v, None)
    found = trace(
        dense(matrix),
        jnp.zeros(40),
        jax.random.clone(key),
        num_probes=16,
        method="xtrace",
    )
    chex.assert_trees_all_close(found.value, value, rtol=1e-9)
    chex.assert_trees_all_close(found.stderr, sem * (8 / 7) ** 0.5, rtol=1e-9)


@pytest.mark.slow
def test_xtrace_from_its_definition():
    """Each t_i from a fresh QR without test vector i, dense."""
    matrix, key = np.asarray(decaying(jax.random.key(4), 20)), jax.random.key(5)
    tests = np.asarray(drawn(key, 0, 6, 20, jax.random.normal))
    samples = []
    for i in range(6):
        q = np.linalg.qr(matrix @ np.delete(tests, i, 0).T)[0]
        rest = tests[i] - q @ (q.T @ tests[i])
        form = rest @ matrix @ rest * 15 / (rest @ rest)
        samples.append(np.trace(q.T @ matrix @ q) + form)
    found = trace(
        dense(jnp.asarray(matrix)),
        jnp.zeros(20),
        jax.random.clone(key),
        num_probes=12,
        method="xtrace",
    )
    chex.assert_trees_all_close(found.value, np.mean(samples), rtol=1e-10)
    stderr = np.std(samples, ddof=1) / 6**0.5
    chex.assert_trees_all_close(found.stderr, stderr, rtol=1e-8)


@pytest.mark.parametrize("method", TRACE_SLOW)
def test_trace_is_unbiased(method):
    """Over 4,000 keys; for the methods with independent samples the mean of stderr^2 is
    the variance itself, and must match what the estimates do."""
    matrix = decaying(jax.random.key(0))
    found = over_keys(trace, matrix, 4000, num_probes=12, method=method)
    typical = jnp.sqrt(jnp.mean(found.stderr**2))
    actual = jnp.std(found.value, ddof=1)
    predicted = actual if method == "xtrace" else typical
    assert abs(found.value.mean() - jnp.trace(matrix)) < 4 * predicted / 4000**0.5
    if method != "xtrace":
        chex.assert_trees_all_close(actual, typical, rtol=0.08)


@pytest.mark.parametrize("method", DIAGONAL)
def test_diagonal_is_unbiased(method):
    matrix = decaying(jax.random.key(0))
    found = over_keys(diagonal, matrix, 4000, num_probes=12, method=method)
    variance = jnp.mean(found.stderr**2, axis=0)
    z = (found.value.mean(0) - jnp.diagonal(matrix)) / jnp.sqrt(variance / 4000)
    assert jnp.max(jnp.abs(z)) < 4.5
    assert abs(jnp.mean(z**2) - 1) < 4 * (2 / 40) ** 0.5
    actual = jnp.var(found.value, axis=0, ddof=1)
    chex.assert_trees_all_close(actual, variance, rtol=0.25)
    if method == "hutchinson":
        closed = (jnp.sum(matrix**2, axis=1) - jnp.diagonal(matrix) ** 2) / 12
        chex.assert_trees_all_close(variance, closed, rtol=0.1)


@pytest.mark.slow
def test_hutchinson_variance_in_closed_form():
    matrix = symmetric(jax.random.key(0), 1, 30)[0]
    found = over_keys(trace, matrix, 4000, num_probes=5)
    closed = 2 * (jnp.sum(matrix**2) - jnp.sum(jnp.diagonal(matrix) ** 2)) / 5
    # The relative standard error of a variance of 4,000 near-normal values is 2.2 %.
    chex.assert_trees_all_close(jnp.var(found.value, ddof=1), closed, rtol=0.1)
    chex.assert_trees_all_close(jnp.mean(found.stderr**2), closed, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "samples", "keys", "lowest", "highest"),
    [
        ("hutchinson", 100, 4000, 0.935, 0.965),
        ("hutch++", 34, 2000, 0.93, 0.97),
        ("xtrace", 50, 1000, 0.84, 0.97),
    ],
)
def test_coverage_of_the_interval(
    method, samples, keys, lowest, highest, record_property
):
    """The 95 % t-interval, 100 products, a spectrum all bulk.

    Measured over 4,000 keys: 95.5 %, 95.2 % and 88.0 %. XTrace's samples share their
    test vectors, and its standard error is a fifth too small where there is nothing to
    deflate.
    """
    size = 200
    matrix = symmetric(jax.random.key(0), 1, size, mean=3.0)[0]
    found = over_keys(trace, matrix, keys, num_probes=100, method=method)
    reach = scipy.stats.t.ppf(0.975, samples - 1) * found.stderr
    covered = jnp.mean(jnp.abs(found.value - jnp.trace(matrix)) < reach)
    record_property("coverage", float(covered))
    assert lowest <= covered <= highest


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("estimator", "method"), PAIRS)
def test_products_are_counted(estimator, method, traced):
    matrix = decaying(jax.random.key(0), 10)
    for num_probes in (4, 8, 14):
        calls, matvec = counted(matrix)
        run = functools.partial(
            estimator, matvec, jnp.zeros(10), num_probes=num_probes, method=method
        )
        jax.block_until_ready((jax.jit(run) if traced else run)(jax.random.key(0)))
        jax.effects_barrier()
        assert len(calls) == num_probes


@pytest.mark.slow
def test_standard_errors_are_nan_where_they_cannot_be_known():
    matvec = dense(decaying(jax.random.key(0)))
    run = lambda **options: trace(matvec, jnp.zeros(40), jax.random.key(0), **options)
    known = [("hutchinson", 2), ("hutch++", 5), ("xtrace", 4)]
    unknown = [("hutchinson", 1), ("hutch++", 3), ("xtrace", 2)]
    for method, num_probes in known:
        assert jnp.isfinite(run(num_probes=num_probes, method=method).stderr)
    for method, num_probes in unknown:
        found = run(num_probes=num_probes, method=method)
        assert jnp.isfinite(found.value)
        assert jnp.isnan(found.stderr)
    found = diagonal(lambda v: 2 * v, jnp.ones(3), jax.random.key(0), num_probes=1)
    assert jnp.all(jnp.isnan(found.stderr))


@pytest.mark.parametrize("method", TRACE)
def test_nan_in_the_products_is_nan_in_the_estimate(method):
    matvec = lambda v: v * jnp.array([1.0, jnp.nan, 1.0, 1.0])
    found = trace(matvec, jnp.ones(4), jax.random.key(0), num_probes=6, method=method)
    assert jnp.isnan(found.value)


def tree_problem():
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    grad = jax.grad(mlp_loss)
    matvec = lambda v: jax.jvp(lambda p: grad(p, batch), (params,), (v,))[1]
    return params, matvec, dense_hessian(mlp_loss, params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRACE_SLOW)
def test_network_eager_traced_and_dense(method):
    params, matvec, hessian = tree_problem()
    run = functools.partial(
        trace, jax.tree_util.Partial(matvec), params, num_probes=48, method=method
    )
    found = run(jax.random.key(2))
    chex.assert_trees_all_close(found, jax.jit(run)(jax.random.key(2)), rtol=1e-8)
    assert abs(found.value - jnp.trace(hessian)) < 5 * found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", DIAGONAL)
def test_network_diagonal_eager_traced_and_dense(method):
    params, matvec, hessian = tree_problem()
    run = functools.partial(diagonal, matvec, params, num_probes=48, method=method)
    found = run(jax.random.key(2))
    chex.assert_trees_all_equal_shapes_and_dtypes(found.value, params)
    chex.assert_trees_all_close(found, jax.jit(run)(jax.random.key(2)), rtol=1e-7)
    flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
    error = flat(found.value) - jnp.diagonal(hessian)
    assert jnp.all(jnp.abs(error) < 6 * flat(found.stderr) + 1e-12)
    total = trace(matvec, params, jax.random.key(2), num_probes=48, method=method)
    chex.assert_trees_all_close(flat(found.value).sum(), total.value, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.05)])
@pytest.mark.parametrize("method", [TRACE[0], *SLOW_METHODS])
def test_narrow_dtypes(method, dtype, rtol):
    """Exactness degrades to the rounding of the products, and no further."""
    factors = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (60, 3)))[0]
    matrix = ((factors * jnp.array([9.0, 5.0, 2.0])[None]) @ factors.T).astype(dtype)
    like = {"a": jnp.zeros((5, 8), dtype), "b": jnp.zeros(20, dtype)}

    def matvec(v):
        assert v["a"].dtype == dtype
        out = matrix @ jnp.concatenate([v["a"].ravel(), v["b"]])
        return {"a": out[:40].reshape(5, 8), "b": out[40:]}

    found = trace(matvec, like, jax.random.key(1), num_probes=30, method=method)
    assert found.value.dtype == found.stderr.dtype == jnp.float32
    assert abs(found.value - 16) < 5 * found.stderr + 16 * rtol
    if method == "xtrace":
        chex.assert_trees_all_close(found.value, jnp.float32(16), rtol=rtol)
        return
    one = diagonal(matvec, like, jax.random.key(2), num_probes=30, method=method)
    assert one.value["a"].dtype == one.stderr["b"].dtype == jnp.float32
    error = one.value["b"] - jnp.diagonal(matrix)[40:].astype(jnp.float32)
    assert jnp.all(jnp.abs(error) < 6 * one.stderr["b"] + 10 * rtol)


@pytest.mark.slow
def test_keys_may_be_raw_and_matvecs_may_be_mapped():
    matrix = decaying(jax.random.key(0), 10)
    for method in TRACE:
        run = functools.partial(trace, num_probes=6, method=method)
        typed = run(dense(matrix), jnp.zeros(10), jax.random.key(3))
        raw = run(dense(matrix), jnp.zeros(10), jax.random.PRNGKey(3))
        chex.assert_trees_all_close(typed, raw)
        one = lambda factor, run=run: run(
            dense(factor * matrix), jnp.zeros(10), jax.random.key(3)
        )
        mapped = jax.vmap(one)(jnp.array([1.0, 2.0]))
        chex.assert_trees_all_close(mapped.value[1], 2 * typed.value, rtol=1e-9)


@pytest.mark.slow
def test_eager_products_are_compiled_once():
    traces = []
    matvec = lambda v: (traces.append(1), 2 * v)[1]
    for method in TRACE:
        trace(matvec, jnp.ones(5), jax.random.key(0), num_probes=6, method=method)
    diagonal(matvec, jnp.ones(5), jax.random.key(0), num_probes=6, method="hutch++")
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("estimator", "num_probes", "method", "message"),
    [
        (trace, 4, "magic", r"'magic': choose from hutchinson, hutch\+\+, xtrace"),
        (diagonal, 4, "xtrace", r"'xtrace': choose from hutchinson, hutch\+\+"),
        (trace, 0, "hutchinson", "num_probes is 0, and 'hutchinson' needs at least 1"),
        (diagonal, 2, "hutch++", r"num_probes is 2, and 'hutch\+\+' needs at least 3"),
        (trace, 7, "xtrace", "is 7, and 'xtrace' needs an even number: take 8"),
        (
            trace,
            12,
            "xtrace",
            "is 12, and 'xtrace' needs a sketch of 6 vectors, more than the 5",
        ),
        (trace, 18, "hutch++", r"a sketch of 6 vectors, more than the 5 .* unit vec"),
    ],
)
def test_errors(estimator, num_probes, method, message):
    with pytest.raises(ValueError, match=message):
        estimator(
            lambda v: v,
            jnp.ones(5),
            jax.random.key(0),
            num_probes=num_probes,
            method=method,
        )


def test_errors_from_like_and_products():
    run = functools.partial(trace, key=jax.random.key(0), num_probes=2)
    with pytest.raises(TypeError, match="curvature needs arrays of a real floating"):
        run(lambda v: v, jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        run(lambda v: v[:2], jnp.ones(3))
    loss = lambda params, batch: jnp.mean((batch @ params) ** 2)
    matvec = hessian_matvec(loss, jnp.ones(3), jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=r"the function comes first, trace\(matvec"):
        run(jnp.ones(3), matvec)
