"""hvp and hessian_matvec against dense Hessians and finite differences."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp, mlp_batch, mlp_loss

from rmtdamp import DampingLearner, check_loss, spectrum
from rmtdamp.damping import StabilityFloor
from rmtdamp.hessian import (
    check_symmetric,
    dataset_matvec,
    eigsh,
    fisher_matvec,
    ggn_matvec,
    hessian_matvec,
    hvp,
    moments,
    quadratic_form,
    to_dense,
)
from rmtdamp.transforms import Context

PARAMS = mlp(jax.random.key(0))
BATCH = mlp_batch(jax.random.key(1))
VECTOR = mlp(jax.random.key(2))
KEY = jax.random.key(3)


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


@pytest.mark.parametrize("product", ["hvp", "hessian_matvec"])
def test_products_match_the_dense_hessian(product):
    if product == "hvp":
        found = hvp(mlp_loss, PARAMS, BATCH, VECTOR)
    else:
        found = hessian_matvec(mlp_loss, PARAMS, BATCH)(VECTOR)
    exact = dense_hessian(mlp_loss, PARAMS, BATCH) @ flat(VECTOR)
    np.testing.assert_allclose(flat(found), exact, atol=1e-12)
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)


def test_quadratic_form_matches_the_dense_hessian():
    exact = flat(VECTOR) @ dense_hessian(mlp_loss, PARAMS, BATCH) @ flat(VECTOR)
    np.testing.assert_allclose(quadratic_form(mlp_loss, PARAMS, BATCH, VECTOR), exact)
    scaled = lambda params, batch, factor: factor * mlp_loss(params, batch)
    given = quadratic_form(scaled, PARAMS, BATCH, VECTOR, loss_args=(3.0,))
    np.testing.assert_allclose(given, 3 * exact)


def test_product_is_the_derivative_of_the_gradient():
    """Central differences, an oracle that shares no code: error O(eps^2) = 1e-10."""
    eps = 1e-5
    move = lambda sign: jax.tree.map(lambda p, v: p + sign * eps * v, PARAMS, VECTOR)
    gradient = jax.grad(mlp_loss)
    difference = (flat(gradient(move(1), BATCH)) - flat(gradient(move(-1), BATCH))) / (
        2 * eps
    )
    found = flat(hvp(mlp_loss, PARAMS, BATCH, VECTOR))
    np.testing.assert_allclose(found, difference, atol=1e-8)


def test_matvec_compiles_once_for_new_params_data_and_consumers():
    traces = []

    def loss(params, batch):
        traces.append("loss")
        return mlp_loss(params, batch)

    @jax.jit
    def twice(matvec, vector):
        traces.append("consumer")
        return matvec(matvec(vector))

    for seed in range(3):
        params = mlp(jax.random.key(seed))
        matvec = hessian_matvec(loss, params, mlp_batch(jax.random.key(seed)))
        matvec(VECTOR)
        twice(matvec, VECTOR)
        if seed == 0:
            first = list(traces)
    assert traces == first
    assert first.count("consumer") == 1


def test_linearised_product_costs_fewer_flops_than_jvp_of_grad():
    """Two gradients' worth after linearisation instead of three (per notes on cost)."""
    params = mlp(jax.random.key(0), (64, 64, 64, 64), jnp.float32)
    batch = mlp_batch(jax.random.key(1), 64, (64, 64, 64, 64), jnp.float32)
    matvec = hessian_matvec(mlp_loss, params, batch)
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    once = flops(lambda p, v: hvp(mlp_loss, p, batch, v), params, params)
    again = flops(lambda m, v: m(v), matvec, params)
    gradient = flops(jax.grad(mlp_loss), params, batch)
    assert again < 2.1 * gradient
    assert once > 1.25 * again


def test_loss_args_are_traced():
    def loss(params, batch, weight):
        return weight * mlp_loss(params, batch)

    double = hvp(loss, PARAMS, BATCH, VECTOR, loss_args=(jnp.float64(2),))
    single = hvp(mlp_loss, PARAMS, BATCH, VECTOR)
    np.testing.assert_allclose(flat(double), 2 * flat(single))


def test_precision_reaches_the_loss():
    def loss(params, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return jnp.mean((batch @ params) ** 2)

    seen = []
    hvp(loss, jnp.ones(2), jnp.ones((3, 2)), jnp.ones(2), precision="bfloat16")
    hessian_matvec(loss, jnp.ones(2), jnp.ones((3, 2)), precision="bfloat16")
    assert "bfloat16" in seen
    seen.clear()
    hvp(loss, jnp.ones(2), jnp.ones((3, 2)), jnp.ones(2))
    assert "bfloat16" not in seen


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (jnp.ones(3), "vector has 1 leaves and params have 4"),
        (
            jax.tree.map(lambda x: x.T, VECTOR),
            r"shape \(8, 4\) where params\[0\]\['kernel'\] has shape \(4, 8\)",
        ),
    ],
    ids=["structure", "shape"],
)
@pytest.mark.parametrize("product", ["hvp", "hessian_matvec"])
def test_wrong_vector(product, vector, message):
    if product == "hvp":
        matvec = lambda v: hvp(mlp_loss, PARAMS, BATCH, v)
    else:
        matvec = hessian_matvec(mlp_loss, PARAMS, BATCH)
    with pytest.raises(ValueError, match=message):
        matvec(vector)


def test_a_vector_with_other_names_is_refused():
    """Leaves would be paired in sorted order: the decoder's with the encoder's."""
    loss = lambda p, b: jnp.mean(b @ p["encoder"] @ p["decoder"])
    params = {"encoder": jnp.eye(2), "decoder": jnp.eye(2)}
    for vector in (tuple(params.values()), {"a": jnp.eye(2), "b": jnp.eye(2)}):
        with pytest.raises(ValueError, match=r"where params have 'decoder': a vector"):
            hvp(loss, params, jnp.ones((3, 2)), vector)
    hvp(loss, params, jnp.ones((3, 2)), collections.OrderedDict(sorted(params.items())))


@pytest.mark.parametrize("loss_args", [2.0, jnp.ones(3), {"scale": 1.0}])
def test_loss_args_that_are_no_tuple(loss_args):
    loss, params = lambda p, b, *args: jnp.mean(b @ p), jnp.ones(2)
    given = {"loss_args": loss_args}
    batch = jnp.ones((4, 2)), jnp.ones(4)
    square = lambda z, y: jnp.mean((z - y) ** 2)
    for call in (
        lambda: hvp(loss, params, batch[0], params, **given),
        lambda: hessian_matvec(loss, params, batch[0], **given),
        lambda: moments(loss, params, batch[0], KEY, num_microbatches=2, **given),
        lambda: ggn_matvec(lambda p, x, *_: x @ p, square, params, batch, **given),
        lambda: fisher_matvec(lambda p, x, *_: x @ p, square, params, batch, **given),
        lambda: check_loss(loss, params, batch[0], **given),
    ):
        with pytest.raises(TypeError, match=r"loss_args is .*loss_args=\(x,\)"):
            call()


@pytest.mark.parametrize("product", [hvp, hessian_matvec])
def test_wrong_loss_and_params(product):
    rest = (jnp.ones(2),) if product is hvp else ()
    with pytest.raises(TypeError, match=r"real scalar and returned shape \(2,\)"):
        product(lambda p, b: p * b, jnp.ones(2), jnp.ones(2), *rest)
    with pytest.raises(TypeError, match="params is int64"):
        product(lambda p, b: p.sum(), jnp.arange(2), jnp.ones(2), *rest)
    empty = {"x": jnp.ones((0, 2)), "y": jnp.ones(0)}
    with pytest.raises(ValueError, match="batch holds no examples"):
        product(lambda p, b: (b["x"] @ p).sum(), jnp.ones(2), empty, *rest)


@jax.custom_vjp
def custom(x):
    return jnp.tanh(x)


# The forward rule calls the function itself, as attention kernels' do.
custom.defvjp(lambda x: (custom(x),) * 2, lambda y, g: (g * (1 - y**2),))


@jax.custom_vjp
def looped(x):
    return jnp.tanh(x)


def square_in_a_loop(y):
    step = lambda carry: (carry[0] + 1, carry[1] * y)
    return jax.lax.while_loop(lambda c: c[0] < 2, step, (0, jnp.ones_like(y)))[1]


looped.defvjp(
    lambda x: (jnp.tanh(x),) * 2, lambda y, g: (g * (1 - square_in_a_loop(y)),)
)


def loss_with(activation):
    def loss(params, batch):
        return jnp.mean(jnp.sum(activation(batch @ params) ** 2, axis=1))

    return loss


CUSTOM, LOOPED, PLAIN = map(loss_with, (custom, looped, jnp.tanh))
WEIGHTS = jax.random.normal(jax.random.key(5), (3, 2))
INPUTS = jax.random.normal(jax.random.key(6), (8, 3))


@pytest.mark.parametrize(
    ("loss", "mode"),
    [
        (PLAIN, "reverse-over-reverse"),
        (CUSTOM, "reverse-over-reverse"),
        (LOOPED, "forward-over-reverse"),
    ],
    ids=["plain", "custom VJP", "loop in its gradient"],
)
def test_modes_agree(loss, mode):
    vector = jnp.arange(6.0).reshape(3, 2)
    exact = hvp(PLAIN, WEIGHTS, INPUTS, vector)
    once = hvp(loss, WEIGHTS, INPUTS, vector, mode=mode)
    many = hessian_matvec(loss, WEIGHTS, INPUTS, mode=mode)(vector)
    np.testing.assert_allclose(once, exact, atol=1e-12)
    np.testing.assert_allclose(many, exact, atol=1e-12)
    form = quadratic_form(loss, WEIGHTS, INPUTS, vector, mode=mode)
    np.testing.assert_allclose(form, jnp.vdot(vector, exact), atol=1e-12)
    measure = lambda loss, **options: moments(
        loss, WEIGHTS, INPUTS, jax.random.key(7), num_microbatches=2, **options
    )
    np.testing.assert_allclose(
        measure(loss, mode=mode).variance, measure(PLAIN).variance, rtol=1e-12
    )


def test_a_loss_that_cannot_be_differentiated_names_the_other_mode():
    reverse, forward = "reverse-over-reverse", "forward-over-reverse"
    at = lambda function: lambda *args, **kw: function(*args, WEIGHTS, **kw)
    for product in (hessian_matvec, at(hvp), at(quadratic_form)):
        with pytest.raises(TypeError, match=rf'custom VJP .* pass mode="{reverse}"'):
            product(CUSTOM, WEIGHTS, INPUTS)
        with pytest.raises(ValueError, match=rf'unknown length.*pass mode="{forward}"'):
            product(LOOPED, WEIGHTS, INPUTS, mode=reverse)
        with pytest.raises(
            ValueError, match=r"mode is 'reverse': choose from 'forward"
        ):
            product(PLAIN, WEIGHTS, INPUTS, mode="reverse")
    learner = DampingLearner(CUSTOM, num_microbatches=2)
    step = jnp.zeros((), jnp.int32)
    arguments = learner.init(WEIGHTS), Context(step, WEIGHTS, INPUTS, 8)
    with pytest.raises(TypeError, match=rf'pass mode="{reverse}"'):
        learner.refresh(*arguments)
    learner = DampingLearner(CUSTOM, num_microbatches=2, mode=reverse)
    assert learner.refresh(*arguments).measured_variance > 0


def opaque_backward(y, g):
    """The backward pass of `custom` as a kernel that JAX cannot look into."""
    host = lambda y, g: np.asarray(g) * (1 - np.asarray(y) ** 2)
    result = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return (jax.pure_callback(host, result, y, g, vmap_method="broadcast_all"),)


@jax.custom_vjp
def opaque(x):
    return jnp.tanh(x)


opaque.defvjp(lambda x: (opaque(x),) * 2, opaque_backward)


@jax.custom_vjp
def inlined(x):
    return jnp.tanh(x)


inlined.defvjp(lambda x: (jnp.tanh(x),) * 2, opaque_backward)
OPAQUE, INLINED = map(loss_with, (opaque, inlined))
DIFFERENCE = "finite-difference"


def relative_error(found, exact):
    widened = [flat(tree).astype(jnp.float64) for tree in (found, exact)]
    return jnp.linalg.norm(widened[0] - widened[1]) / jnp.linalg.norm(widened[1])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.float16, jnp.bfloat16])
def test_finite_difference_is_as_exact_as_it_says(dtype):
    """Along random and sharp directions and a single parameter, in any unit of v."""
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    params, (inputs, labels) = cast(PARAMS, dtype), BATCH
    exact = dense_hessian(mlp_loss, cast(params, jnp.float64), BATCH)
    _, vectors = jnp.linalg.eigh(exact)
    _, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    batch = inputs.astype(dtype), labels
    matvec = hessian_matvec(mlp_loss, params, batch, mode=DIFFERENCE)
    # A few times eps^(2/3), the error that the documentation states.
    bound = min(0.2, 20 * float(jnp.finfo(dtype).eps) ** (2 / 3))
    for vector in (1e-3 * flat(VECTOR), vectors[:, -1], 1e3 * jnp.eye(94)[3]):
        given = cast(unravel(vector), dtype)
        found = matvec(given)
        assert relative_error(found, exact @ flat(given).astype(float)) < bound
        assert [x.dtype for x in jax.tree.leaves(found)] == [dtype] * 4


def test_finite_difference_of_a_zero_vector_and_at_zero_params():
    found = hvp(PLAIN, WEIGHTS, INPUTS, jnp.zeros((3, 2)), mode=DIFFERENCE)
    np.testing.assert_array_equal(found, 0)
    zeros, vector = jnp.zeros((3, 2)), jnp.ones((3, 2))
    found = hvp(PLAIN, zeros, INPUTS, vector, mode=DIFFERENCE)
    np.testing.assert_allclose(found, hvp(PLAIN, zeros, INPUTS, vector), rtol=1e-9)


def test_finite_difference_knows_that_a_loss_computes_in_bfloat16():
    """A step made for float32 params would vanish in what the loss rounds."""

    def loss(params, batch):
        x = jnp.tanh(batch.astype(jnp.bfloat16) @ params.astype(jnp.bfloat16))
        return jnp.mean(jnp.sum(x.astype(jnp.float32) ** 2, axis=1))

    params, inputs = WEIGHTS.astype(jnp.float32), INPUTS.astype(jnp.float32)
    vector = jnp.arange(6.0, dtype=jnp.float32).reshape(3, 2) - 2
    exact = hvp(PLAIN, params, inputs, vector)
    found = hvp(loss, params, inputs, vector, mode=DIFFERENCE)
    assert relative_error(found, exact) < 0.2


def test_finite_difference_of_params_split_over_devices():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    draw = lambda seed, rows: jax.random.normal(jax.random.key(seed), (rows, 4))
    arrays = draw(8, 4), draw(9, 8), draw(10, 4)
    params, inputs, vector = jax.device_put(arrays, split)
    found = hvp(PLAIN, params, inputs, vector, mode=DIFFERENCE)
    assert relative_error(found, hvp(PLAIN, params, inputs, vector)) < 1e-9
    assert len(found.sharding.device_set) == 4


def test_finite_difference_where_nothing_else_differentiates():
    """Every way to hand a mode on, on a loss whose backward pass is a callback."""
    vector = jnp.arange(6.0).reshape(3, 2)
    exact = to_dense(hessian_matvec(PLAIN, WEIGHTS, INPUTS), WEIGHTS)
    once = hvp(OPAQUE, WEIGHTS, INPUTS, vector, mode=DIFFERENCE)
    assert relative_error(once, exact @ flat(vector)) < 1e-9
    matvec = hessian_matvec(OPAQUE, WEIGHTS, INPUTS, mode=DIFFERENCE)
    np.testing.assert_allclose(to_dense(matvec, WEIGHTS), exact, atol=1e-9)
    check_symmetric(matvec, WEIGHTS, jax.random.key(0))
    matvec_fn = functools.partial(hessian_matvec, mode=DIFFERENCE)
    halves = INPUTS[:4], INPUTS[4:]
    whole = dataset_matvec(OPAQUE, WEIGHTS, halves, matvec_fn=matvec_fn)
    top = eigsh(whole, WEIGHTS, jax.random.key(1), k=1).eigenvalues[0]
    np.testing.assert_allclose(top, np.linalg.eigvalsh(exact)[-1], rtol=1e-8)


@pytest.mark.parametrize("execution", ["eager", "scan", "unroll", "vmap"])
def test_moments_by_finite_difference(execution):
    measure = lambda loss, **options: moments(
        loss, WEIGHTS, INPUTS, jax.random.key(7), num_microbatches=2, **options
    )
    exact = measure(PLAIN)
    found = measure(OPAQUE, mode=DIFFERENCE, execution=execution)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_a_learner_by_finite_difference():
    """The moments, and the power iteration of a rule that asks for an eigenvalue."""
    context = Context(jnp.zeros((), jnp.int32), WEIGHTS, INPUTS, 8)
    for rule, name in (
        (DampingLearner(PLAIN).rule, "measured_variance"),
        (StabilityFloor(), "max_eigenvalue"),
    ):
        refreshed = []
        for loss, mode in ((PLAIN, "forward-over-reverse"), (OPAQUE, DIFFERENCE)):
            learner = DampingLearner(loss, rule=rule, num_microbatches=2, mode=mode)
            refreshed.append(learner.refresh(learner.init(WEIGHTS), context))
        values = [getattr(state, name) for state in refreshed]
        assert values[0] > 0
        np.testing.assert_allclose(values[1], values[0], rtol=1e-8)


@pytest.mark.parametrize("dense", [True, False])
def test_a_page_by_finite_difference(dense):
    measure = lambda loss, mode: spectrum.measure(
        loss, WEIGHTS, [INPUTS], jax.random.key(2), mode=mode, dense=dense, k=1
    )
    found, exact = measure(OPAQUE, DIFFERENCE), measure(PLAIN, "forward-over-reverse")
    largest = lambda report: report.largest.eigenvalues
    np.testing.assert_allclose(largest(found), largest(exact), rtol=1e-8)
    np.testing.assert_allclose(
        found.moments.variance, exact.moments.variance, rtol=1e-8
    )


@pytest.mark.parametrize("loss", [OPAQUE, INLINED], ids=["custom VJP", "inlined"])
@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
def test_a_gradient_without_a_derivative_names_finite_difference(loss, mode):
    for product in (
        lambda: hvp(loss, WEIGHTS, INPUTS, WEIGHTS, mode=mode),
        lambda: hessian_matvec(loss, WEIGHTS, INPUTS, mode=mode),
        lambda: moments(
            loss, WEIGHTS, INPUTS, jax.random.key(0), num_microbatches=2, mode=mode
        ),
    ):
        with pytest.raises(TypeError, match=rf'pass mode=.*"{DIFFERENCE}"'):
            product()


def test_a_loss_without_a_gradient_is_not_blamed_on_the_mode():
    """No mode would help a loss that calls back to Python without a rule."""

    def loss(params, batch):
        result = jax.ShapeDtypeStruct((), params.dtype)
        return jax.pure_callback(lambda p: p.sum(), result, batch @ params)

    for mode in ("forward-over-reverse", "reverse-over-reverse", DIFFERENCE):
        with pytest.raises(ValueError, match="callbacks do not support JVP"):
            hvp(loss, WEIGHTS, INPUTS, WEIGHTS, mode=mode)
