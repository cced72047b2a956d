"""Flax with BatchNorm and Dropout: fresh state, evaluation mode, checkpoints."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmtdamp
import rmtdamp.flax
from rmtdamp import DampingLearner
from rmtdamp.damping import Shrinkage, Sum, needs
from rmtdamp.hessian import moments
from rmtdamp.transforms import Context

pytestmark = pytest.mark.usefixtures("standard_promotion")


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


BATCH = (
    3 + jax.random.normal(jax.random.key(0), (32, 4), jnp.float32),
    jnp.arange(32) % 3,
)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.dense(x)))))


def nnx_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@nnx.jit
def nnx_step(model, optimizer, batch):
    grads = nnx.grad(nnx_loss)(model, batch)
    state = rmtdamp.flax.loss_args(model)
    optimizer.update(model, grads, batch=batch, loss_args=state)


def nnx_training(**options):
    model = Model(nnx.Rngs(0))
    loss_fn = rmtdamp.flax.curvature_loss(model, nnx_loss)
    learner = DampingLearner(loss_fn, floor=1e-3)
    adam = rmtdamp.adam_shrinkage(1e-2)
    tx = rmtdamp.auto_damping(adam, learner, **options)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), learner


def value(optimizer, name):
    return np.asarray(optax.tree.get(optimizer.opt_state, name)[...])


def test_curvature_loss_is_a_mean_and_the_training_loss_is_not():
    model, _, learner = nnx_training()
    params = nnx.state(model, nnx.Param)
    args = rmtdamp.flax.loss_args(model)
    rmtdamp.check_loss(learner.loss_fn, params, BATCH, loss_args=args)

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    training = lambda p, b, r: nnx_loss(nnx.merge(graphdef, p, r, copy=True), b)
    with pytest.raises(ValueError, match=r"depends on the order|not a mean"):
        rmtdamp.check_loss(training, params, BATCH, loss_args=(rest,))
    assert not model.norm.use_running_average


def test_nnx_measures_at_the_statistics_of_the_moment():
    model, optimizer, learner = nnx_training(refresh_every=1)
    for _ in range(5):
        nnx_step(model, optimizer, BATCH)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))
    nnx_step(model, optimizer, BATCH)
    # The last measurement: params before the step, running averages during it.
    expected = moments(
        learner.loss_fn,
        before,
        BATCH,
        jax.random.fold_in(jax.random.key(0), 5),
        loss_args=nnx.as_pure(rmtdamp.flax.loss_args(model)),
    )
    np.testing.assert_allclose(
        value(optimizer, "measured_variance"), expected.variance, rtol=1e-4
    )
    frozen = moments(
        learner.loss_fn,
        before,
        BATCH,
        jax.random.fold_in(jax.random.key(0), 5),
        loss_args=nnx.as_pure(rmtdamp.flax.loss_args(Model(nnx.Rngs(0)))),
    )
    assert abs(frozen.variance / expected.variance - 1) > 5e-3


def test_nnx_refresh_by_hand():
    model, optimizer, learner = nnx_training(refresh_every=None)
    nnx_step(model, optimizer, BATCH)
    assert value(optimizer, "refresh_attempts") == 0
    rmtdamp.flax.refresh(optimizer, learner, model, BATCH)
    assert value(optimizer, "refresh_attempts") == 1
    damping = value(optimizer, "damping")
    assert damping > 1e-3
    nnx_step(model, optimizer, BATCH)
    assert value(optimizer, "damping") == damping


def test_a_forgotten_state_says_how_to_pass_it():
    model, optimizer, _ = nnx_training()
    grads = nnx.grad(nnx_loss)(model, BATCH)
    with pytest.raises(
        ValueError, match=r"state of the moment .*got 0: pass loss_args=rmtdamp.flax"
    ):
        optimizer.update(model, grads, batch=BATCH)


def test_curvature_batch_reaches_the_measurement():
    model, optimizer, learner = nnx_training(refresh_every=None)
    large = jax.tree.map(lambda x: jnp.concatenate([x, x + 1]), BATCH)
    rmtdamp.flax.refresh(optimizer, learner, model, BATCH, curvature_batch=large)
    expected = moments(
        learner.loss_fn,
        nnx.as_pure(nnx.state(model, nnx.Param)),
        large,
        jax.random.fold_in(jax.random.key(0), 0),
        loss_args=nnx.as_pure(rmtdamp.flax.loss_args(model)),
        batch_size=32,
    )
    np.testing.assert_allclose(
        value(optimizer, "measured_variance"), expected.variance, rtol=1e-4
    )


def test_train_state_keeps_what_flax_overwrites():
    """fp8 scales ride in the gradients and replace the old ones."""
    name = "_overwrite_with_gradient"
    state = rmtdamp.flax.TrainState.create(
        apply_fn=None,
        params={"params": {"w": jnp.ones(2)}, name: {"scale": jnp.ones(1)}},
        tx=optax.sgd(0.5),
    )
    grads = {"params": {"w": jnp.ones(2)}, name: {"scale": jnp.full(1, 7.0)}}
    state = state.apply_gradients(grads=grads)
    np.testing.assert_allclose(state.params["params"]["w"], 0.5)
    np.testing.assert_allclose(state.params[name]["scale"], 7.0)


def test_train_state_still_takes_plain_optax():
    state = rmtdamp.flax.TrainState.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5)
    )
    state = state.apply_gradients(grads={"w": jnp.ones(2)}, extra_args={"batch": None})
    np.testing.assert_allclose(state.params["w"], 0.5)


@pytest.mark.parametrize(
    "accumulate",
    [
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    ],
    ids=["MultiSteps", "its transformation"],
)
def test_train_state_hands_extra_arguments_through_multi_steps(accumulate):
    def loss_fn(params, batch):
        return jnp.mean((batch @ params["w"] - 1.0) ** 2)

    batch = jax.random.normal(jax.random.key(0), (16, 4))
    state = rmtdamp.flax.TrainState.create(
        apply_fn=None,
        params={"w": jnp.zeros(4)},
        tx=accumulate(rmtdamp.auto_adam(1e-2, loss_fn, refresh_every=1)),
    )
    grads = jax.grad(loss_fn)(state.params, batch)
    for _ in range(2):
        state = state.apply_gradients(grads=grads, extra_args={"batch": batch})
    assert optax.tree.get(state.opt_state, "refresh_attempts") == 1
    assert state.params["w"][0] != 0


@pytest.mark.slow
def test_a_model_without_state_needs_no_loss_args():
    """Neither in the step, nor by hand, nor for KFAC's factors."""
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    learner = DampingLearner(rmtdamp.flax.curvature_loss(model, nnx_loss))
    measurer = rmtdamp.KroneckerMeasurer(rmtdamp.flax.nnx_factors(model, cross_entropy))
    tx = rmtdamp.auto_damping(rmtdamp.kfac(0.1, measurer), learner)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(nnx_loss)(model, batch)
        optimizer.update(model, grads, batch=batch)

    step(model, optimizer, BATCH)
    for by_hand in (learner, measurer):
        rmtdamp.flax.refresh(optimizer, by_hand, model, BATCH)
    assert value(optimizer, "refresh_attempts") == 2
    assert value(optimizer, "kfac_measurements") == 2


def test_the_state_of_an_nnx_optimizer_is_sent_to_its_own_refresh():
    model, optimizer, learner = nnx_training(refresh_every=None)
    params = nnx.state(model, nnx.Param)
    for given in (optimizer, optimizer.opt_state):
        with pytest.raises(TypeError, match=r"rmtdamp\.flax\.refresh\(optimizer, meas"):
            rmtdamp.refresh(given, learner, params, BATCH)


def test_params_that_are_variables_are_refreshed_by_hand_as_in_the_step():
    """Flax nnx, and a state of plain optax."""
    model = Model(nnx.Rngs(0))
    learner = DampingLearner(rmtdamp.flax.curvature_loss(model, nnx_loss))
    variables = nnx.state(model, nnx.Param)
    given = {"loss_args": rmtdamp.flax.loss_args(model)}
    found = []
    for params in (variables, nnx.as_pure(variables)):
        state = rmtdamp.auto_adam(1e-3, learner, refresh_every=None).init(params)
        state = rmtdamp.refresh(state, learner, params, BATCH, **given)
        found.append(optax.tree.get(state, "measured_variance"))
    assert found[0] == found[1] > 0


def test_a_tuple_in_a_tuple_is_pointed_out():
    model = Model(nnx.Rngs(0))
    loss_fn = rmtdamp.flax.curvature_loss(model, nnx_loss)
    nested = (rmtdamp.flax.loss_args(model),)
    with pytest.raises(ValueError, match=r"a tuple for its state: .* whole tuple"):
        loss_fn(nnx.state(model, nnx.Param), BATCH, *nested)


def test_a_loss_of_the_model_itself_is_sent_to_curvature_loss():
    model = Model(nnx.Rngs(0))
    tx = rmtdamp.auto_adam(1e-3, nnx_loss)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(nnx_loss)(model, BATCH)
    with pytest.raises(TypeError, match=r"flax.curvature_loss\(model, loss\)"):
        optimizer.update(model, grads, batch=BATCH)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name)
        for name, make in {
            "auto_adam": lambda rate, loss, fn: rmtdamp.auto_adam(rate, loss),
            "adamw": lambda rate, loss, fn: rmtdamp.adamw_shrinkage(rate),
            "nadam": lambda rate, loss, fn: rmtdamp.with_damping(optax.nadam)(rate),
            "lanczos": lambda rate, loss, fn: rmtdamp.lanczos_newton(
                rate, loss, damping=0.1
            ),
            "kfac": lambda rate, loss, fn: rmtdamp.kfac(rate, fn, damping=0.1),
            "spectral": lambda rate, loss, fn: rmtdamp.spectral_descent(rate),
            "shampoo": lambda rate, loss, fn: rmtdamp.shampoo(rate),
        }.items()
    ],
)
def test_an_nnx_optimizer_takes_every_transformation(make):
    """Its step is that of the plain params, and its state finds its way back."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
    tx = make(0.05, rmtdamp.flax.curvature_loss(model, nnx_loss), factors_fn)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(nnx_loss)(model, batch)
        optimizer.update(model, grads, batch=batch)

    @jax.jit
    def plain(params, state):
        loss = lambda p: nnx_loss(nnx.merge(graphdef, p), BATCH)
        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=BATCH)
        return optax.apply_updates(params, updates), state

    pure = nnx.as_pure(params)
    state = tx.init(pure)
    for _ in range(3):
        step(model, optimizer, BATCH)
        pure, state = plain(pure, state)
    trained = nnx.as_pure(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(trained, pure, rtol=1e-5, atol=1e-6)


def test_a_module_in_place_of_its_params_is_refused():
    """Its running averages would count as parameters."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    loss = lambda model, batch: jnp.mean(model(batch) ** 2)
    with pytest.raises(TypeError, match=r"BatchStat .* nnx.state\(model, nnx.Param\)"):
        rmtdamp.hessian.hessian_matvec(loss, model, jnp.ones((8, 4)))
    with pytest.raises(TypeError, match=r"RngCount|RngKey"):
        rmtdamp.check_loss(loss, nnx.state(nnx.Dropout(0.5, rngs=rngs)), jnp.ones(8))


def largest_by_hand(params, batch):
    """Of the loss with BatchNorm by the batch and Dropout off, dense."""

    def loss(params, batch):
        p = jax.tree.map(jnp.atleast_2d, params)
        z = batch[0] @ p["dense"]["kernel"] + p["dense"]["bias"]
        mean, var = (f(z, axis=0, keepdims=True) for f in (jnp.mean, jnp.var))
        z = (z - mean) / jnp.sqrt(var + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        logits = jax.nn.relu(z) @ p["out"]["kernel"] + p["out"]["bias"]
        return cross_entropy(logits, batch[1])

    matvec = rmtdamp.hessian.hessian_matvec(loss, params, batch)
    dense = rmtdamp.hessian.to_dense(matvec, params)
    return loss(params, batch), np.abs(np.linalg.eigvalsh(dense)).max()


FLOOR = rmtdamp.StabilityFloor()


@pytest.mark.parametrize(
    ("rule", "batch_statistics"),
    [(FLOOR, None), (FLOOR, True), (Sum(rmtdamp.identity_target, FLOOR), None)],
)
def test_what_bounds_a_step_is_of_the_loss_in_training_mode(rule, batch_statistics):
    """BatchNorm by the batch, Dropout off; a noise stays that of evaluation mode."""
    model = Model(nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = rmtdamp.flax.loss_args(model)
    loss_fn = rmtdamp.flax.curvature_loss(
        model, nnx_loss, batch_statistics=batch_statistics
    )
    in_training = getattr(loss_fn, "in_training", loss_fn)
    expected, largest = largest_by_hand(params, BATCH)
    found = in_training(params, BATCH, *state)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    averages = rmtdamp.flax.curvature_loss(model, nnx_loss, batch_statistics=False)
    other = averages(params, BATCH, *state)
    assert abs(other - expected) > 0.01
    if batch_statistics is None:
        assert loss_fn(params, BATCH, *state) == other
    learner = DampingLearner(loss_fn, rule=rule)
    adam = rmtdamp.adam_shrinkage(0.1)
    tx = rmtdamp.auto_damping(adam, learner, learning_rate=0.1, refresh_every=None)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(30):
        rmtdamp.flax.refresh(optimizer, learner, model, BATCH)
    np.testing.assert_allclose(value(optimizer, "max_eigenvalue"), largest, rtol=1e-2)
    rmtdamp.check_state(optimizer.opt_state)


def test_the_reduction_ratio_is_of_the_loss_in_training_mode():
    model = Model(nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    grads = nnx.grad(nnx_loss)(model, BATCH)
    context = Context(
        step=1,
        params=jax.tree.map(lambda x, g: x - 0.01 * g, params, nnx.as_pure(grads)),
        batch=BATCH,
        batch_size=32,
        loss_args=rmtdamp.flax.loss_args(model),
        previous_params=params,
    )

    @needs("reduction_ratio")
    def rule(evidence):
        return Shrinkage(jnp.exp(evidence.reduction_ratio))

    found = []
    for choice in (None, True, False):
        loss_fn = rmtdamp.flax.curvature_loss(model, nnx_loss, batch_statistics=choice)
        learner = DampingLearner(loss_fn, rule=rule)
        found.append(float(learner.refresh(learner.init(params), context).damping))
    assert found[0] == found[1] != found[2]


def test_batch_norm_that_is_frozen_stays_so():
    """A model that is tuned with its running averages has its gradients at them."""
    model = Model(nnx.Rngs(0))
    model.norm.use_running_average = True
    assert not hasattr(rmtdamp.flax.curvature_loss(model, nnx_loss), "in_training")
    plain = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    assert not hasattr(rmtdamp.flax.curvature_loss(plain, nnx_loss), "in_training")


def test_swapped_arguments_are_named():
    model, loss = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), lambda m, b: jnp.mean(m(b))
    for make in (rmtdamp.flax.curvature_loss, rmtdamp.flax.nnx_factors):
        with pytest.raises(TypeError, match=r"got a function for its model: hand over"):
            make(loss, model)


def test_check_state_looks_into_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    total = lambda model, batch: jnp.sum(model(batch) ** 2)
    learner = rmtdamp.DampingLearner(rmtdamp.flax.curvature_loss(model, total))
    tx = rmtdamp.auto_adam(1e-2, learner, refresh_every=None)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rmtdamp.check_state(optimizer.opt_state)
    message = "is not the mean of its microbatches' losses"
    with pytest.warns(UserWarning, match=message):
        rmtdamp.flax.refresh(optimizer, learner, model, jnp.ones((8, 2)))
    with pytest.warns(UserWarning, match=message):
        rmtdamp.check_state(optimizer.opt_state)
