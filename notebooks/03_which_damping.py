# %% [markdown]
# # Which damping for my model?
#
# The honest way to find out is a sweep: a damping is good if it is good over learning
# rates, for nobody knows the best rate in advance. Here KFAC and Adam train a small
# network on scikit-learn's digits, over two decades of rates, with flat dampings and
# with one that is learned.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import rmtdamp
import rmtdamp.flax
from rmtdamp.damping import StabilityFloor

images, labels = load_digits(return_X_y=True)
images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
order = jax.random.permutation(jax.random.key(0), len(labels))
images, labels = images[order], jnp.asarray(labels)[order]
train, test = (images[:1280], labels[:1280]), (images[1280:], labels[1280:])

# %% [markdown]
# A Flax model, as it is. `curvature_loss` makes of it a function of parameters and
# batch; `nnx_factors` finds the layers for KFAC.


# %%
def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def model_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 10, rngs=rngs)
)
loss_fn = rmtdamp.flax.curvature_loss(model, model_loss)
factors_fn = rmtdamp.flax.nnx_factors(model, cross_entropy)
params = nnx.as_pure(nnx.state(model, nnx.Param))
rmtdamp.check_loss(loss_fn, params, train)  # is it a mean over examples?

# %% [markdown]
# The candidates. Each makes an optimiser of a learning rate and a damping; the learned
# ones do not look at the damping. A damping of KFAC is a Hessian eigenvalue, one of
# Adam a gradient, so they are not on one scale.

# %%
NUM_STEPS = 300
anneal = rmtdamp.schedules.linear_anneal_schedule(1.0, NUM_STEPS)


def schedule(rate):
    return lambda count: rate * anneal(count)


def kfac(rate, damping):
    inner = rmtdamp.kfac(schedule(rate), factors_fn)
    return rmtdamp.set_damping(inner, damping)


def kfac_floor(rate, _):
    learner = rmtdamp.DampingLearner(loss_fn, floor=1e-8, rule=StabilityFloor())
    return rmtdamp.auto_damping(
        rmtdamp.kfac(schedule(rate), factors_fn),
        learner,
        refresh_every=20,
        learning_rate=schedule(rate),
    )


def adam(rate, damping):
    return rmtdamp.set_damping(rmtdamp.adam_shrinkage(schedule(rate)), damping)


def auto_adam(rate, _):
    return rmtdamp.auto_adam(schedule(rate), loss_fn, refresh_every=20)


# %% [markdown]
# One run: 300 steps, the test loss and the damping on the way. Rate and damping are
# traced, so each kind of optimiser compiles once for the whole sweep.


# %%
@functools.partial(jax.jit, static_argnames="make")
def run(make, rate, damping=0.0, seed=0):
    tx = make(rate, damping)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (128,), 0, len(train[1]))
        batch = train[0][rows], train[1][rows]
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        return (params, state), optax.tree.get(state, "damping")

    def epoch(carry, keys):
        carry, dampings = jax.lax.scan(step, carry, keys)
        return carry, (loss_fn(carry[0], test), dampings[-1])

    keys = jax.random.split(jax.random.key(seed), (NUM_STEPS // 10, 10))
    return jax.lax.scan(epoch, (params, tx.init(params)), keys)[1]


rates = np.array([0.001, 0.003, 0.01, 0.03, 0.1])
loss, damping = run(kfac_floor, 0.03)
print(f"test loss {loss[-1]:.3f}, damping from {damping[0]:.2g} to {damping[-1]:.2g}")

# %% [markdown]
# ## The sweep
#
# For each damping and rate the test loss at its best epoch, as early stopping would
# choose it.


# %%
def sweep(make, damping=0.0):
    losses = [jnp.nanmin(run(make, rate, damping)[0]) for rate in rates]
    return np.minimum(np.array(losses), 3.0)


tables = {
    "KFAC": {f"{d:g}": sweep(kfac, d) for d in (1e-3, 1e-2, 1e-1, 1.0)}
    | {"StabilityFloor": sweep(kfac_floor)},
    "Adam": {f"{d:g}": sweep(adam, d) for d in (1e-8, 1e-3, 1e-2, 1e-1)}
    | {"auto_adam": sweep(auto_adam)},
}

fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
for ax, (name, table) in zip(axes, tables.items()):
    for label, losses in table.items():
        learned = label in ("StabilityFloor", "auto_adam")
        style = {"color": "k", "lw": 2.5} if learned else {"ls": "--", "lw": 1.2}
        ax.loglog(rates, losses, marker=".", label=label, **style)
    ax.set_title(name)
    ax.set_xlabel("learning rate")
    ax.legend(title="damping", fontsize=8)
axes[0].set_ylabel("test loss, best epoch")
fig.tight_layout()

# %% [markdown]
# What to read off. KFAC: every flat damping has rates that are right for it, the larger
# the rate the larger the right damping, and the learned one need not be told. Adam: eps
# 1e-8 is hard to beat on a task as easy as this, a flat damping large enough to help at
# the largest rate harms at all others, and `auto_adam` gains a little.
#
# ## Regret
#
# In one number: the mean over rates of log(loss / the best loss of any damping at that
# rate), which is what a choice of the damping costs if the rate is not tuned with it.

# %%
for name, table in tables.items():
    best = np.min(list(table.values()), axis=0)
    print(name)
    for label, losses in table.items():
        regret = np.mean(np.log(losses / best))
        print(f"  {label:>15}: regret {regret:.2f}, best loss {losses.min():.3f}")

# %% [markdown]
# ## Why it follows the rate
#
# The floor is $\delta = c\,\alpha\lambda_{\max}/(2f)$: proportional to the learning
# rate and to the sharpest curvature. It starts high, where the network is sharp and the
# rate is large, and falls with both.

# %%
fig, ax = plt.subplots(figsize=(6, 3.3))
for rate in rates[::2]:
    ax.semilogy(
        range(10, NUM_STEPS + 1, 10), run(kfac_floor, rate)[1], label=f"{rate:g}"
    )
ax.set_xlabel("step")
ax.set_ylabel("learned damping of KFAC")
ax.legend(title="learning rate")
fig.tight_layout()

# %% [markdown]
# ## So which one?
#
# | your case | take |
# |---|---|
# | KFAC: a preconditioner like a Hessian | `rule=StabilityFloor()` |
# | Lanczos-Newton | `rule=StabilityFloor.for_lanczos()` |
# | Adam, and the rate may be too large or is being swept | `auto_adam` |
# | Adam at a tuned rate, and it trains | nothing to gain; leave eps alone |
# | you know the damping | `set_damping` |
#
# This is one seed on one task. [The measured comparison](../docs/evidence.md) has up
# to ten seeds, more tasks, and rules from elsewhere beside these.
