"""Params split over devices, a batch split over them, both: what is found is the same.

On automatic meshes, where XLA decides how what is between is split, and on explicit
ones, where types say so. And what the devices have to tell each other, counted in the
compiled program.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, reshard
from problems import mlp, mlp_batch

import rmtdamp
from benchmarks.costs.scaling import collectives
from rmtdamp import hessian
from rmtdamp._tree import size
from rmtdamp.kronecker import ModelFactors, make_blocks
from rmtdamp.outliers import outliers

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZES = (8, 4, 4)


@functools.cache
def problem(sizes=SIZES, count=32, dtype=jnp.float64):
    inputs, labels = mlp_batch(jax.random.key(1), count, sizes, dtype)
    targets = jax.nn.one_hot(labels, sizes[-1], dtype=dtype)
    return mlp(jax.random.key(0), sizes, dtype), (inputs, targets)


def explicitly(x, *spec):
    """What an explicit mesh asks of a model that is split: to say what is gathered."""
    return reshard(x, jax.P(*spec)) if any(jax.typeof(x).sharding.spec) else x


def model_fn(params, x, tape=None):
    for i, layer in enumerate(params):
        kernel, bias = (explicitly(layer[name]) for name in ("kernel", "bias"))
        z = x @ kernel + bias[None]
        z = tape.linear(str(i), x, z) if tape else z
        x = jnp.tanh(z) if i < len(params) - 1 else z
    return x


def criterion(logits, targets):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=1))


def loss_fn(params, batch):
    return criterion(model_fn(params, batch[0]), batch[1])


def stepped(tx):
    """Params after two steps, and the damping."""

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    def take(params, batch):
        carry = params, tx.init(params)
        for _ in range(2):
            carry = step(*carry, batch)
        return carry[0], optax.tree.get(carry[1], "damping")

    return take


def learned(inner):
    learner = rmtdamp.DampingLearner(loss_fn, floor=0.1)
    return stepped(rmtdamp.auto_damping(inner, learner, refresh_every=1))


def of_matvec(algorithm):
    """What an algorithm finds of the Hessian; the sign of a vector is its own."""
    matvec = functools.partial(hessian.hessian_matvec, loss_fn)
    return lambda params, batch: algorithm(matvec(params, batch), params)


def traced(function):
    return lambda matvec, params: jax.jit(function)(matvec, params)


def decomposed(matvec, params):
    found = hessian.lanczos(matvec, params, 6)
    return found._replace(residual=None, num_steps=None)


def with_sign(pairs):
    return pairs.eigenvalues, jax.tree.map(jnp.abs, pairs.eigenvectors)


def halves(params, batch):
    matvecs = [
        hessian.hessian_matvec(loss_fn, params, half) for half in hessian.halves(batch)
    ]
    found = hessian.split_half_eigsh(*matvecs, params, key(), k=3)
    return found.eigenvalues, found.agreements, outliers(found).eigenvalues


def key():
    """The same key, made anew: a test may use it once."""
    return jax.random.key(3)


BLOCKS = make_blocks(
    problem()[0], {i: {"kernel": f"{i}/kernel", "bias": f"{i}/bias"} for i in "01"}
)
FACTORS_FN = ModelFactors(
    model_fn=model_fn, criterion=criterion, blocks=BLOCKS, fisher="empirical"
)
kronecker = functools.partial(rmtdamp.KroneckerMeasurer, FACTORS_FN)
ritz = rmtdamp.RitzMeasurer(loss_fn, num_steps=4, start="gradient")
adam = rmtdamp.auto_adam(0.01, loss_fn, refresh_every=1)
newton = rmtdamp.lanczos_newton(0.1, ritz)


def density(matvec, params):
    found = hessian.spectral_density(matvec, params, key(), num_steps=5, num_probes=2)
    return found[:2]


def noise(params, batch, **options):
    return hessian.moments(loss_fn, params, batch, key(), **options)


CASES = {
    "hvp": lambda params, batch: hessian.hvp(loss_fn, params, batch, params),
    "hvp, finite-difference": lambda params, batch: hessian.hvp(
        loss_fn, params, batch, params, mode="finite-difference"
    ),
    **{
        f"moments, {how}": functools.partial(noise, execution=how, num_probes=2)
        for how in ("eager", "scan", "unroll", "vmap")
    },
    "lanczos": of_matvec(decomposed),
    "lanczos, traced": of_matvec(traced(decomposed)),
    "eigsh": of_matvec(lambda m, p: with_sign(hessian.eigsh(m, p, key(), k=3))),
    "spectral_density": of_matvec(density),
    "spectral_density, traced": of_matvec(traced(density)),
    "quadratic_form": lambda params, batch: hessian.quadratic_form(
        loss_fn, params, batch, params
    ),
    "trace": of_matvec(
        lambda m, p: hessian.trace(m, p, key(), num_probes=6, method="xtrace")
    ),
    "diagonal": of_matvec(
        lambda m, p: hessian.diagonal(m, p, key(), num_probes=6, method="hutch++")
    ),
    "frobenius_norm": of_matvec(
        lambda m, p: hessian.frobenius_norm(m, p, key(), num_probes=4)
    ),
    "largest_eigenvalue": of_matvec(
        lambda m, p: hessian.largest_eigenvalue(m, p, key(), num_steps=20).value
    ),
    "to_dense": of_matvec(hessian.to_dense),
    "split_half_eigsh": halves,
    "auto_adam": stepped(adam),
    "auto_damping(adam_shrinkage)": learned(rmtdamp.adam_shrinkage(0.01)),
    "auto_damping(lanczos_newton)": learned(newton),
    "auto_damping(kfac)": learned(rmtdamp.kfac(0.1, kronecker())),
    "auto_damping(kfac, factored)": learned(
        rmtdamp.kfac(0.1, kronecker(), tikhonov="factored")
    ),
    "auto_damping(kfac, trust region)": learned(
        rmtdamp.trust_region(
            rmtdamp.kfac(0.1, kronecker(), kl_clip=None), loss_fn, radius=0.01
        )
    ),
    "auto_damping(ekfac)": learned(rmtdamp.kfac(0.1, kronecker(ekfac=True))),
    "auto_damping(spectral)": learned(rmtdamp.spectral_descent(0.1)),
    "auto_damping(shampoo)": learned(rmtdamp.shampoo(0.1)),
}
# How params and batch lie on four devices.
LAYOUTS = {
    "data-parallel": ((4,), lambda x: jax.P()),
    "split": ((4,), lambda x: jax.P("data")),
    "both": ((2, 2), lambda x: jax.P(*[None] * (x.ndim - 1), "model")),
}
FAST = {
    ("lanczos", "split", "explicit"),
    ("moments, scan", "both", "automatic"),
    ("auto_adam", "both", "automatic"),
}
# Each case in each layout, and on both kinds of mesh.
MESHES = [
    ("data-parallel", "automatic"),
    ("split", "explicit"),
    ("both", "automatic"),
    ("both", "explicit"),
]
TABLE = [(case, *mesh) for case in CASES for mesh in MESHES]


def on_mesh(layout, kind, tree):
    """A mesh, and params and batch on it."""
    shape, spec = LAYOUTS[layout]
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, ("data", "model")[: len(shape)], types)
    at = lambda spec: jax.NamedSharding(mesh, spec)
    params, batch = tree
    params = jax.tree.map(lambda x: jax.device_put(x, at(spec(x))), params)
    return mesh, params, jax.device_put(batch, at(jax.P("data")))


@functools.cache
def on_one_device(name):
    return CASES[name](*problem())


@pytest.mark.parametrize(
    ("name", "layout", "kind"),
    [pytest.param(*x, marks=[pytest.mark.slow] * (x not in FAST)) for x in TABLE],
)
def test_what_is_found_does_not_depend_on_the_mesh(name, layout, kind):
    mesh, params, batch = on_mesh(layout, kind, problem())
    # An explicit mesh has to be set; on an automatic one nothing has to be said.
    with jax.set_mesh(mesh if kind == "explicit" else jax.sharding.get_mesh()):
        found = CASES[name](params, batch)
    # Eigenvectors and ratios of what was summed in another order.
    chex.assert_trees_all_close(found, on_one_device(name), rtol=1e-6, atol=1e-9)


def is_split(leaf, mesh):
    return leaf.addressable_shards[0].data.size * mesh.size == leaf.size


@pytest.mark.parametrize(
    "kind", ["automatic", pytest.param("explicit", marks=pytest.mark.slow)]
)
def test_a_basis_and_a_state_are_split_as_params_are(kind):
    mesh, params, batch = on_mesh("split", kind, problem())
    with jax.set_mesh(mesh if kind == "explicit" else jax.sharding.get_mesh()):
        matvec = hessian.hessian_matvec(loss_fn, params, batch)
        basis = hessian.lanczos(matvec, params, 3).basis
        learner = rmtdamp.DampingLearner(
            loss_fn, rule=rmtdamp.damping.StabilityFloor.for_adam()
        )
        for vectors in (
            basis,
            hessian.eigsh(matvec, params, key(), k=1).eigenvectors,
            learner.init(params).probe.vector,
            ritz.init(params).ritz_vectors,
        ):
            assert all(is_split(x, mesh) for x in jax.tree.leaves(vectors))


# Activations of a microbatch are larger than the weights: of the two XLA moves less.
WIDE = (16, 32, 32, 8)
P = size(problem(WIDE)[0])
LARGEST = 32 * 32  # elements of a leaf


def step_of_adam(params, batch):
    grads = jax.grad(loss_fn)(params, batch)
    return adam.update(grads, adam.init(params), params, batch=batch)


# With the products, or what else is as long, that a pass of the program makes.
COUNTED = {
    "product": (of_matvec(lambda matvec, params: matvec(params)), 1),
    "lanczos": (of_matvec(lambda m, p: hessian.lanczos(m, p, 4)), 1),
    "moments": (functools.partial(noise, stderr=False), 1),
    "auto_adam": (step_of_adam, 2),  # and the gradient
}


def in_elements(function, layout):
    """The sizes of what each call of a collective brings, float32 all."""
    _, *arguments = on_mesh(layout, "automatic", problem(WIDE, 2048, jnp.float32))
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = collectives(text)
    return {kind: [[x // 4 for x in call] for call in of] for kind, of in found.items()}


each_counted = pytest.mark.parametrize(
    "name",
    [n if n == "lanczos" else pytest.param(n, marks=pytest.mark.slow) for n in COUNTED],
)


def total(calls):
    return sum(map(sum, calls))


@each_counted
def test_data_parallel_a_product_is_one_all_reduce(name):
    function, products = COUNTED[name]
    found = in_elements(function, "data-parallel")
    assert set(found) == {"all-reduce"}
    # The first measurement's look at the loss adds three numbers.
    assert len([call for call in found["all-reduce"] if sum(call) > 3]) == products
    # Of a kernel after the first the product has two terms, which XLA on a CPU reduces
    # one by one; and there are scalars.
    assert products * P <= total(found["all-reduce"]) < products * 2 * P


@pytest.mark.slow
def test_a_loss_in_shard_map_reduces_a_product_once_for_all():
    mesh, params, batch = on_mesh(
        "data-parallel", "automatic", problem(WIDE, 2048, jnp.float32)
    )
    mean = jax.shard_map(
        lambda params, batch: jax.lax.pmean(loss_fn(params, batch), "data"),
        mesh=mesh,
        in_specs=(jax.P(), jax.P("data")),
        out_specs=jax.P(),
    )
    product = lambda p, b: hessian.hessian_matvec(mean, p, b)(p)
    text = jax.jit(product).lower(params, batch).compile().as_text()
    (call,) = collectives(text).pop("all-reduce")
    assert sum(call) == 4 * P
    chex.assert_trees_all_close(
        jax.jit(product)(params, batch),
        hessian.hvp(loss_fn, params, batch, params),
        rtol=1e-4,
        atol=1e-6,
    )


@each_counted
def test_split_params_are_gathered_and_neither_basis_nor_state(name):
    function, products = COUNTED[name]
    found = in_elements(function, "split")
    assert set(found) == {"all-reduce", "all-gather"}
    # Leaf by leaf: the params, and the vector and what of them a product is made of.
    assert all(len(call) == 1 and call[0] <= LARGEST for call in found["all-gather"])
    # Once more for the first measurement's look at the loss.
    most = 4 if name == "auto_adam" else 3
    assert total(found["all-gather"]) < most * P
    assert total(found["all-reduce"]) < products * 2 * P


def test_a_scalar_among_params_on_several_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    on = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    loss = lambda p, x: jnp.mean((x @ p["w"] + p["bias"]) ** 2)
    params = {"w": jnp.ones(3), "bias": jnp.ones(())}
    batch = jax.random.normal(jax.random.key(0), (16, 3))
    found = [
        hessian.eigsh(hessian.hessian_matvec(loss, p, x), p, jax.random.key(1), k=2)
        for p, x in (
            (params, batch),
            (on(params, jax.P()), on(batch, jax.P("data"))),
        )
    ]
    chex.assert_trees_all_close(*[x.eigenvalues for x in found], rtol=1e-5)


def decompositions(text):
    """How many stand in a program, and how many of them on one branch of a choice."""
    branches = re.findall(r"branch_computations=\{%(\S+), %(\S+)\}", text)
    bodies = dict(re.findall(r"^%(\S+) \(.*\{\n((?:.*\n)*?)\}", text, re.MULTILINE))
    count = lambda body: body.count("syevd")
    return count(text), [tuple(count(bodies[x]) for x in pair) for pair in branches]


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_eigendecompositions_spread_over_devices_are_those_of_one(kind):
    mesh, params, batch = on_mesh("data-parallel", kind, problem())
    apart, together = kronecker(mesh=mesh, eigen_every=1), kronecker(eigen_every=1)
    with jax.set_mesh(mesh if kind == "explicit" else jax.sharding.get_mesh()):
        found = [
            learned(rmtdamp.kfac(0.1, measurer))(params, batch)
            for measurer in (apart, together)
        ]
        by_hand = [
            rmtdamp.refresh(
                rmtdamp.kfac(0.1, measurer, damping=0.1).init(params),
                measurer,
                params,
                batch,
            )
            for measurer in (apart, together)
        ]
        shampoo = [
            learned(rmtdamp.shampoo(0.1, eigen_every=1, mesh=where))(params, batch)
            for where in (mesh, None)
        ]
    # What the devices that do not own a layer add is zeros; XLA fuses what is around.
    chex.assert_trees_all_close(*shampoo, rtol=1e-10)
    chex.assert_trees_all_equal(*found)
    chex.assert_trees_all_equal(*by_hand)


def test_each_eigendecomposition_is_on_one_device():
    mesh, params, batch = on_mesh("data-parallel", "automatic", problem())
    measurer = kronecker(mesh=mesh)
    tx = rmtdamp.kfac(0.1, measurer, damping=0.1)
    step = jax.jit(lambda p, b: tx.update(p, tx.init(p), p, batch=b)[0])
    text = step.lower(params, batch).compile().as_text()
    count, branches = decompositions(text)
    layers = len(BLOCKS)
    assert count == 2 * layers
    assert branches.count((0, 2)) + branches.count((2, 0)) == layers


def test_devices_that_are_no_mesh():
    with pytest.raises(TypeError, match=r"mesh is of type list, .* jax.sharding.Mesh"):
        kronecker(mesh=jax.devices())
    with pytest.raises(TypeError, match=r"mesh is of type list, .* jax.sharding.Mesh"):
        rmtdamp.shampoo(0.1, mesh=jax.devices())
