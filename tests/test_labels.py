"""A damping for each label: against the whole, closed forms and dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import dense_hessian, mlp, mlp_batch, mlp_loss, quadratic_loss

import rmtdamp
import rmtdamp.flax
from rmtdamp.damping import (
    GradientNorm,
    LevenbergMarquardt,
    StabilityFloor,
    by_layer,
    relative_target,
)
from rmtdamp.hessian import moments
from rmtdamp.kronecker import ModelFactors, Tape, make_blocks

pytestmark = pytest.mark.usefixtures("standard_promotion")
close = functools.partial(np.testing.assert_allclose, rtol=1e-6)

PARAMS = {"a": jnp.ones(3), "b": {"x": jnp.ones(2), "y": jnp.ones((2, 1))}}
LABELS = {"a": "one", "b": "two"}  # a prefix


def test_layers_are_named_by_their_paths():
    names = {"a": "", "b": {"x": "b", "y": "b"}}
    assert by_layer(PARAMS) == names
    learner = rmtdamp.DampingLearner(quadratic_loss, labels=by_layer)
    assert learner.label_names(PARAMS) == ("", "b")
    assert rmtdamp.DampingLearner(quadratic_loss).label_names(PARAMS) is None


@pytest.mark.parametrize("execution", ["eager", "scan", "unroll", "vmap"])
def test_moments_of_a_diagonal_hessian_are_those_of_its_parts(execution):
    """One probe of signs is exact there, in each part."""

    def loss_fn(params, batch):
        flat = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])
        return 0.5 * jnp.mean(batch @ flat**2)

    batch = 2 + jax.random.normal(jax.random.key(0), (16, 7))
    found = moments(
        loss_fn,
        PARAMS,
        batch,
        jax.random.key(1),
        num_microbatches=4,
        execution=execution,
        labels=LABELS,
    )
    each = jnp.stack([jnp.mean(batch[i::4], axis=0) for i in range(4)])
    variance, mean = jnp.var(each, axis=0, ddof=1) / 4, jnp.mean(batch, axis=0)
    by_label = lambda x: [jnp.mean(x[:3]), jnp.mean(x[3:])]
    close(found.mean, by_label(mean))
    close(found.variance, by_label(variance))
    close(found.square, by_label(mean**2 - variance))
    assert found.microbatch_stderr.shape == (2,)
    assert found.loss.shape == ()


def test_weighted_by_their_sizes_labels_sum_to_the_whole():
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    settings = {"num_probes": 3, "num_microbatches": 4}
    measure = functools.partial(
        moments, mlp_loss, params, batch, jax.random.key(2), **settings
    )
    whole, parts = measure(), measure(labels=by_layer)
    sizes = np.array([40, 54])
    for name in ("mean", "square", "variance"):
        close(getattr(parts, name) @ sizes / 94, getattr(whole, name))
    assert parts.probe_stderr.shape == (2,)


@pytest.mark.slow
def test_the_moments_of_a_label_estimate_its_rows():
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1), count=16)
    dense = lambda part: dense_hessian(mlp_loss, params, part)
    each = jnp.stack([dense(tuple(x[i::4] for x in batch)) for i in range(4)])
    variance = jnp.var(each, axis=0, ddof=1).sum(axis=1) / 4
    found = moments(
        mlp_loss,
        params,
        batch,
        jax.random.key(2),
        num_microbatches=4,
        num_probes=400,
        labels=by_layer,
    )
    # Leaves are sorted by name: a layer's bias comes before its kernel.
    truth = np.array([variance[:40].mean(), variance[40:].mean()])
    assert np.all(np.abs(found.variance - truth) < 4 * found.probe_stderr)
    assert np.all(found.probe_stderr < 0.1 * truth)


RULES = {
    "eq. 15": rmtdamp.identity_target,
    "floor": StabilityFloor(averaged=True),
    "aware": StabilityFloor(safety=4.0, averaged=True, preconditioned=True),
    "relative": relative_target,
    "gradient": GradientNorm(),
    "LM": LevenbergMarquardt(),
}


def trained(labels, rule, steps=12):
    """The params and the state after some steps of Adam with a learned damping."""
    params, batch = mlp(jax.random.key(0)), mlp_batch(jax.random.key(1))
    learner = rmtdamp.DampingLearner(mlp_loss, rule=rule, labels=labels)
    tx = rmtdamp.auto_damping(
        rmtdamp.adam_shrinkage(0.03), learner, refresh_every=4, learning_rate=0.03
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.grad(mlp_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


SLOWER = pytest.mark.slow  # a rule takes seconds to compile


def few(*names):
    """These rules among the fast tests, the others among the slow ones."""
    marks = lambda name: () if name in names else SLOWER
    return [pytest.param(name, marks=marks(name)) for name in RULES]


@pytest.mark.parametrize("name", few("eq. 15", "aware"))
def test_one_label_for_all_is_no_label(name):
    (params, state), (same, labelled) = (
        trained(labels, RULES[name]) for labels in (None, lambda _: "all")
    )
    jax.tree.map(functools.partial(close, rtol=1e-5), params, same)
    for field in ("damping", "relative_damping", "refresh_rejections"):
        of = optax.tree.get(labelled, field)
        assert of.shape == (1,)
        close(of[0], optax.tree.get(state, field), rtol=1e-5)
    attempts = optax.tree.get(labelled, "refresh_attempts")
    assert int(attempts) == (0 if name == "gradient" else 4)


@pytest.mark.parametrize("name", few("aware", "relative"))
def test_every_rule_decides_for_each_label(name):
    _, state = trained(by_layer, RULES[name])
    field = "relative_damping" if name == "relative" else "damping"
    damping = optax.tree.get(state, field)
    assert damping.shape == (2,)
    assert np.all(np.isfinite(damping))
    assert np.all(optax.tree.get(state, "refresh_rejections") == 0)
    assert (damping[0] != damping[1]) == (name != "LM")  # one ratio for all


def eigenvalues(matrix, products):
    """What the floor's iteration finds for the labels of PARAMS on a fixed Hessian."""
    learner = rmtdamp.DampingLearner(
        quadratic_loss, rule=StabilityFloor(), labels=LABELS
    )
    state = rmtdamp.auto_damping(
        rmtdamp.scale_by_adam_shrinkage(), learner, learning_rate=0.1
    ).init(PARAMS)
    for _ in range(products):
        state = rmtdamp.refresh(state, learner, PARAMS, matrix[None])
    return np.asarray(optax.tree.get(state, "max_eigenvalue"))


def random_matrix(seed=0):
    x = jax.random.uniform(jax.random.key(seed), (7, 7))
    return x + x.T


def test_the_eigenvalues_of_a_block_diagonal_hessian_are_those_of_its_blocks():
    matrix = jax.scipy.linalg.block_diag(*(random_matrix()[i, i] for i in CUTS))
    truth = [np.linalg.eigvalsh(matrix[i, i]).max() for i in CUTS]
    close(eigenvalues(matrix, 30), truth, rtol=1e-4)


CUTS = (slice(0, 3), slice(3, 7))


def test_divided_by_the_eigenvalues_of_its_labels_a_positive_hessian_has_norm_one():
    """Perron and Frobenius: the positive vector belongs to the largest eigenvalue."""
    matrix = random_matrix() * jnp.where(jnp.arange(7) < 3, 1.0, 0.1)[:, None]
    matrix = matrix * jnp.where(jnp.arange(7) < 3, 1.0, 0.1)[None]
    found = np.repeat(eigenvalues(matrix, 40), (3, 4))
    scaled = matrix / np.sqrt(found[:, None] * found[None])
    close(np.abs(np.linalg.eigvalsh(scaled)).max(), 1.0, rtol=1e-4)


def test_one_wild_label_leaves_the_others_alone():
    """A part of the Hessian that is not finite is refused; the rest learns."""

    def loss_fn(params, batch):
        bad = jnp.where(batch[0, 0] > 0, jnp.inf, 1.0)
        return jnp.mean(batch**2) * (bad * params["a"] ** 2 + params["b"] ** 2).sum()

    learner = rmtdamp.DampingLearner(
        loss_fn, rule=StabilityFloor(), labels={"a": "a", "b": "b"}
    )
    tx = rmtdamp.auto_damping(
        rmtdamp.scale_by_adam_shrinkage(), learner, learning_rate=0.1
    )
    params, batch = {"a": jnp.ones(2), "b": jnp.ones(2)}, -jnp.ones((8, 1))
    state = rmtdamp.refresh(tx.init(params), learner, params, batch)
    state = rmtdamp.refresh(state, learner, params, -batch)
    close(optax.tree.get(state, "max_eigenvalue"), [2.0, 2.0])
    np.testing.assert_array_equal(optax.tree.get(state, "refresh_rejections"), [1, 0])


@pytest.mark.parametrize("form", ["damping", "shrinkage"])
def test_adam_takes_a_damping_for_each_leaf(form):
    adam = rmtdamp.scale_by_adam_shrinkage(form=form)
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    dampings = {"a": 0.1, "b": {"x": 0.2, "y": 0.3}}
    state = adam.init(PARAMS)
    for _ in range(3):
        before = state
        found, state = adam.update(grads, before, PARAMS, damping=dampings)
    for (path, leaf), damping in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(dampings), strict=True
    ):
        whole, after = adam.update(grads, before, PARAMS, damping=damping)
        np.testing.assert_array_equal(
            leaf, dict(jax.tree.leaves_with_path(whole))[path]
        )
        jax.tree.map(np.testing.assert_array_equal, state, after)


@pytest.mark.parametrize("form", ["damping", "shrinkage"])
def test_dampings_of_ones_own_for_subtrees(form):
    adam = rmtdamp.scale_by_adam_shrinkage(form=form)
    schedule = lambda count: {"a": 0.1, "b": 0.2 / (1 + count)}
    tx = rmtdamp.set_damping(adam, schedule, target=0.5)
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    state, plain = tx.init(PARAMS), adam.init(PARAMS)
    for b in (0.2, 0.1):
        found, state = jax.jit(tx.update)(grads, state, PARAMS)
        given = {"a": 0.1, "b": {"x": b, "y": b}}
        target = jax.tree.map(lambda _: 0.5, given)
        expected, plain = adam.update(
            grads, plain, PARAMS, damping=given, damping_target=target
        )
        jax.tree.map(close, found, expected)
    close(optax.tree.get(state, "damping")["b"], 0.1)
    schedules = {"a": optax.linear_schedule(0.3, 0.1, 1), "b": 0.2}
    scheduled = rmtdamp.set_damping(adam, schedules)
    after = scheduled.init(PARAMS)
    _, after = scheduled.update(PARAMS, after, PARAMS)
    _, after = scheduled.update(PARAMS, after, PARAMS)
    close(optax.tree.get(after, "damping")["a"], 0.1)
    with pytest.raises(ValueError, match=r"damping is a tree .* each leaf of params"):
        rmtdamp.set_damping(adam, {"a": 0.1}).init(PARAMS)
    with pytest.raises(ValueError, match="damping is -1, and must be at least 0"):
        rmtdamp.set_damping(adam, {"a": 0.1, "b": -1})


@pytest.mark.parametrize("form", ["length", "avagrad"])
def test_the_length_is_that_of_all_leaves(form):
    adam = rmtdamp.scale_by_adam_shrinkage(form=form)
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    state, norm = adam.init(PARAMS), optax.tree.norm
    even, uneven = 0.1, {"a": 0.1, "b": {"x": 0.2, "y": 0.3}}
    (whole, _), (found, _) = (
        adam.update(grads, state, PARAMS, damping=d) for d in (even, uneven)
    )
    if form == "length":
        close(norm(found), norm(whole))
    ratio = 0.4 / 0.5  # of the divisors of a and b/x: sqrt(v) is 0.3
    close(found["b"]["x"][0] / found["a"][0], ratio)


def test_relative_dampings_have_the_unit_of_the_whole():
    """In units of the mean over all leaves: an intensity each, one target."""
    adam = rmtdamp.scale_by_adam_shrinkage()
    grads = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([11.0])}
    params = jax.tree.map(jnp.zeros_like, grads)
    zero, relative = {"a": 0.0, "b": 0.0}, {"a": 0.2, "b": 1.0}
    _, state = adam.update(grads, adam.init(params), params, damping=1e-8)
    found, _ = adam.update(
        grads, state, params, damping=zero, relative_damping=relative
    )
    close(found["a"], [1 / 2, 3 / 4], rtol=1e-5)
    close(found["b"], [11 / 16], rtol=1e-5)


def kfac_problem():
    params = {
        name: {
            "kernel": jax.random.normal(jax.random.key(i), shape),
            "bias": jnp.zeros(2),
        }
        for i, (name, shape) in enumerate({"in": (3, 2), "out": (2, 2)}.items())
    }

    def model_fn(params, x, tape):
        for name in ("in", "out"):
            layer = params[name]
            y = x @ layer["kernel"] + layer["bias"][None]
            x = jnp.tanh(tape.linear(name, x, y))
        return x

    def criterion(outputs, targets):
        return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))

    leaves = lambda name: {"kernel": f"{name}/kernel", "bias": f"{name}/bias"}
    factors = ModelFactors(
        model_fn=model_fn,
        criterion=criterion,
        blocks=make_blocks(params, {name: leaves(name) for name in params}),
        fisher="ggn",
    )
    inputs = jax.random.normal(jax.random.key(2), (16, 3))
    return params, factors, (inputs, jnp.ones((16, 2)))


@pytest.mark.parametrize("ekfac", [False, pytest.param(True, marks=SLOWER)])
def test_kfac_takes_a_damping_for_each_layer(ekfac):
    params, factors, batch = kfac_problem()
    measurer = rmtdamp.KroneckerMeasurer(factors, ekfac=ekfac)
    tx = rmtdamp.scale_by_kfac(measurer)
    one, two = jnp.float64(0.1), jnp.float64(0.7)
    tree = {
        "in": dict.fromkeys(params["in"], one),
        "out": dict.fromkeys(params["out"], two),
    }
    step = lambda **given: tx.update(
        params, tx.init(params), params, batch=batch, **given
    )[0]
    found, first, second = (step(damping=d) for d in (tree, one, two))
    jax.tree.map(np.testing.assert_array_equal, found["in"], first["in"])
    jax.tree.map(np.testing.assert_array_equal, found["out"], second["out"])
    # Multiplied with what it was divided by, it is what it was.
    zeros = jax.tree.map(jnp.zeros_like, tree)
    relative = step(damping=zeros, relative_damping=tree)
    back = tx.update(
        relative,
        tx.update(params, tx.init(params), params, batch=batch, damping=one)[1],
        params,
        damping=zeros,
        relative_damping=tree,
        curvature_power=1,
    )[0]
    jax.tree.map(functools.partial(close, atol=1e-12), back, params)


@pytest.mark.parametrize("preconditioned", [pytest.param(False, marks=SLOWER), True])
def test_kfac_learns_a_damping_for_each_layer(preconditioned):
    params, factors, batch = kfac_problem()
    rule = StabilityFloor(safety=8.0, preconditioned=preconditioned)
    learner = rmtdamp.DampingLearner(_loss(factors), rule=rule, labels=by_layer)
    tx = rmtdamp.auto_damping(
        rmtdamp.kfac(0.1, factors), learner, learning_rate=0.1, refresh_every=2
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(_loss(factors))(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state, before = tx.init(params), _loss(factors)(params, batch)
    for _ in range(10):
        params, state = step(params, state)
    assert _loss(factors)(params, batch) < 0.7 * before
    assert optax.tree.get(state, "damping").shape == (2,)
    assert np.all(optax.tree.get(state, "refresh_rejections") == 0)


def _loss(factors):
    return lambda params, batch: factors.criterion(
        factors.model_fn(params, batch[0], Tape(keep=False)), batch[1]
    )


@pytest.mark.slow
def test_the_layers_of_an_nnx_model_by_name():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rise = nnx.Linear(3, 4, rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.rise(x)))

    model_loss = lambda model, batch: jnp.mean((model(batch[0]) - batch[1]) ** 2)
    model = Model(nnx.Rngs(0))
    learner = rmtdamp.DampingLearner(
        rmtdamp.flax.curvature_loss(model, model_loss), labels=by_layer
    )
    optimizer = nnx.Optimizer(model, rmtdamp.auto_adam(0.01, learner), wrt=nnx.Param)
    batch = jax.random.normal(jax.random.key(0), (16, 3)), jnp.ones((16, 1))

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(model_loss)(model, batch)
        optimizer.update(model, grads, batch=batch)

    step(model, optimizer, batch)
    assert learner.label_names(nnx.state(model, nnx.Param)) == ("out", "rise")
    found = optax.tree.get(optimizer.opt_state, "damping")[...]
    assert found.shape == (2,)
    assert np.all(found > 1e-4)


def test_what_takes_one_damping_says_so():
    learner = rmtdamp.DampingLearner(quadratic_loss, labels=LABELS)
    batch = jnp.eye(7)[None].repeat(8, 0)
    for inner in (
        rmtdamp.with_damping(optax.amsgrad)(0.1),
        rmtdamp.scale_by_shampoo(),
        rmtdamp.scale_by_lanczos(rmtdamp.RitzMeasurer(quadratic_loss, num_steps=2)),
    ):
        tx = rmtdamp.auto_damping(inner, learner)
        with pytest.raises(ValueError, match="takes one damping and was handed a tree"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=batch)


def test_labels_that_do_not_fit_are_refused():
    learner = rmtdamp.DampingLearner(quadratic_loss, labels={"a": "one"})
    with pytest.raises(
        ValueError, match=r"labels is a tree .* each leaf of params, or"
    ):
        learner.init(PARAMS)
    learner = rmtdamp.DampingLearner(quadratic_loss, labels={"a": 1, "b": "two"})
    with pytest.raises(TypeError, match="a label is 1: take strings"):
        learner.init(PARAMS)
