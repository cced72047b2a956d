# %% [markdown]
# # Sharding and big models
#
# Data and parameters spread over devices as JAX spreads them, by shardings under `jit`;
# nothing of the library needs to be told. This notebook makes eight devices of one CPU,
# so that it runs anywhere; on eight accelerators leave the first two lines out.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "32"  # threads for devices that wait for one another

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sklearn.datasets import load_digits

import rmtdamp
from rmtdamp import hessian

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
print(f"{jax.device_count()} devices")

images, labels = load_digits(return_X_y=True)
images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
order = jax.random.permutation(jax.random.key(0), len(labels))
images, labels = images[order], jnp.asarray(labels)[order]
train, test = (images[:1280], labels[:1280]), (images[1280:], labels[1280:])

# %% [markdown]
# A network with its kernels split along their last axis over all devices (fully
# sharded, as large models are trained), and a batch split over the same devices by
# examples.


# %%
def loss_fn(params, batch):
    x, labels = batch
    x = jax.nn.relu(x @ params["hidden"])
    logits = x @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


keys = jax.random.split(jax.random.key(1))
params = {
    "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
    "out": jax.random.normal(keys[1], (128, 10)) / 128**0.5,
}
shardings = {
    "hidden": NamedSharding(mesh, P(None, "data")),
    "out": NamedSharding(mesh, P("data", None)),
}
by_example = NamedSharding(mesh, P("data"))
split = jax.device_put(params, shardings)
split_train = jax.device_put(train, by_example)
jax.debug.visualize_array_sharding(split["hidden"])

# %% [markdown]
# ## The same run, on one device and on eight
#
# `tx.init` gives the state the shardings of the parameters; outside of `jit`, for only
# there it sees them. The learner cuts the batch into strided microbatches, `x[i::8]`,
# so that each stays spread over all devices. Where results lie is XLA's choice unless
# it is told: the second step says that new parameters lie as the old ones.

# %%
tx = rmtdamp.auto_adam(1e-2, loss_fn, refresh_every=10)


@jax.jit
def step(params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state, loss


@jax.jit
def split_step(params, state, batch):
    params, state, loss = step(params, state, batch)
    return jax.lax.with_sharding_constraint(params, shardings), state, loss


def train_on(step, params, data, num_steps=60):
    state, losses, dampings = tx.init(params), [], []
    for i in range(num_steps):
        first = 128 * (i % 10)
        batch = jax.tree.map(lambda x: x[first : first + 128], data)  # noqa: B023
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
        dampings.append(float(optax.tree.get(state, "damping")))
    return params, np.array(losses), np.array(dampings)


alone, losses, dampings = train_on(step, params, train)
spread, split_losses, split_dampings = train_on(split_step, split, split_train)

fig, axes = plt.subplots(1, 2, figsize=(9, 3.3))
for ax, here, there, name in (
    (axes[0], losses, split_losses, "loss of the batch"),
    (axes[1], dampings, split_dampings, "learned damping"),
):
    ax.semilogy(here, lw=4, alpha=0.4, label="one device")
    ax.semilogy(there, "k--", lw=1, label="eight devices")
    ax.set_title(name)
    ax.set_xlabel("step")
axes[0].legend()
fig.tight_layout()

differences = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), alone, spread)
print("largest difference of the parameters after 60 steps:", differences)
print("sharding of the trained parameters:", spread["hidden"].sharding.spec)

# %% [markdown]
# ## A Hessian that lies on many devices
#
# The spectral density keeps no basis: four vectors of memory, whatever the number of
# steps. `dataset_matvec` goes over the data batch by batch, so neither the data nor the
# activations need to fit at once. Where a product lies is again XLA's choice; one that
# must not lie whole on each device is told so, as the step above.

# %%
batches = [
    jax.tree.map(lambda x: jax.device_put(x[i : i + 256], by_example), train)  # noqa: B023
    for i in range(0, 1280, 256)
]
matvec = hessian.dataset_matvec(loss_fn, spread, batches)


@jax.jit
def sharded_product(params, batch, vector):
    found = hessian.hvp(loss_fn, params, batch, vector)
    return jax.lax.with_sharding_constraint(found, shardings)


product = sharded_product(spread, batches[0], spread)
print("sharding of a product:", product["hidden"].sharding.spec)

there = hessian.spectral_density(matvec, spread, jax.random.key(2), num_steps=30)
here = hessian.spectral_density(
    hessian.hessian_matvec(loss_fn, alone, train),
    alone,
    jax.random.key(2),
    num_steps=30,
)
fig, ax = plt.subplots(figsize=(7, 3.3))
for spectrum, style in (
    (here, {"lw": 4, "alpha": 0.4}),
    (there, {"c": "k", "ls": "--"}),
):
    grid = jnp.linspace(-0.2, float(spectrum.nodes.max()) * 1.05, 800)
    ax.semilogy(grid, spectrum.density(grid, width=0.02) + 1e-6, **style)
ax.set_xlabel("eigenvalue")
ax.set_ylabel("density (wide: one device, dashed: eight)")
fig.tight_layout()

# %% [markdown]
# ## What it costs in memory
#
# What the compiler says one step needs beside its arguments and results, for a wider
# network, with and without the learner.

# %%
wide = {"hidden": jnp.zeros((64, 4096)), "out": jnp.zeros((4096, 10))}
batch = jax.tree.map(lambda x: x[:128], train)


def memory(tx):
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    shapes = jax.eval_shape(tx.init, wide)
    analysed = jax.jit(step).lower(wide, shapes, batch).compile().memory_analysis()
    return analysed.temp_size_in_bytes / 1e6, analysed.argument_size_in_bytes / 1e6


learner = rmtdamp.DampingLearner(loss_fn, rule=rmtdamp.identity_target)
for name, tx in {
    "Adam": optax.with_extra_args_support(optax.adam(1e-3)),
    "auto_adam": rmtdamp.auto_adam(1e-3, loss_fn),
    "the paper's learner": rmtdamp.auto_adam(1e-3, learner),
}.items():
    temporary, arguments = memory(tx)
    print(
        f"{name:>20}: {temporary:5.1f} MB on the way, {arguments:5.1f} MB of arguments"
    )

# %% [markdown]
# Under `shard_map` or `pmap` each device sees its shard alone; there the learner's loss
# needs a `jax.lax.pmean` ([limits](../docs/design.md#limits)).
