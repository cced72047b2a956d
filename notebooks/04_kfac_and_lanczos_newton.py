# %% [markdown]
# # KFAC and Lanczos-Newton
#
# Two ways to precondition with the Hessian of a network. KFAC models the block of each
# layer by a Kronecker product. Lanczos-Newton (eq. 9 of the paper) finds the sharpest
# directions of the batch Hessian and divides by their eigenvalues. Both need a damping,
# and both diverge with the wrong one. The data are scikit-learn's digits.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import rmtdamp
from rmtdamp import hessian
from rmtdamp.kronecker import (
    ModelFactors,
    Tape,
    block_table,
    dataset_factors,
    eigenbasis,
    make_blocks,
    restrict_to_block,
    top_eigenpairs,
)

images, labels = load_digits(return_X_y=True)
images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
order = jax.random.permutation(jax.random.key(0), len(labels))
images, labels = images[order], jnp.asarray(labels)[order]
train, test = (images[:1280], labels[:1280]), (images[1280:], labels[1280:])

# %% [markdown]
# ## A model that shows its layers
#
# KFAC must see the inputs and output gradients of each layer. A model of one's own
# shows them to a `Tape`, one line a layer; Flax models need not be touched
# (`rmtdamp.flax.nnx_factors`).


# %%
def model_fn(params, x, tape):
    for i, (name, layer) in enumerate(params.items()):
        x = jnp.tanh(x) if i else x
        x = tape.linear(name, x, x @ layer["kernel"] + layer["bias"])
    return x


def criterion(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_fn(params, batch):
    return criterion(model_fn(params, batch[0], Tape(keep=False)), batch[1])


sizes, params = (64, 24, 10), {}
for i, key in enumerate(jax.random.split(jax.random.key(1), 2)):
    kernel = jax.random.normal(key, sizes[i : i + 2]) / sizes[i] ** 0.5
    params[f"layer{i}"] = {"kernel": kernel, "bias": jnp.zeros(sizes[i + 1])}

layers = {n: {"kernel": f"{n}/kernel", "bias": f"{n}/bias"} for n in params}
factors_fn = ModelFactors(
    model_fn=model_fn,
    criterion=criterion,
    blocks=make_blocks(params, layers),
    fisher="ggn",
)
print(block_table(factors_fn.blocks))

# %% [markdown]
# ## How good is the Kronecker model?
#
# The factors $A = \mathbb{E}[aa^\top]$ of a layer's inputs and $G =
# \mathbb{E}[gg^\top]$ of its output gradients, over the data set; the spectrum of $A
# \otimes G$ beside the one of the layer's true Hessian.

# %%
batches = [(train[0][i : i + 256], train[1][i : i + 256]) for i in range(0, 1280, 256)]
whole = hessian.dataset_matvec(loss_fn, params, batches)
factors = dataset_factors(factors_fn, params, batches, jax.random.key(2))

fig, axes = plt.subplots(1, 2, figsize=(9, 3.3))
for ax, block, measured in zip(axes, factors_fn.blocks, factors):
    matvec, part = restrict_to_block(whole, params, block)
    true = hessian.eigsh(matvec, part, jax.random.key(3), k=20)
    model = top_eigenpairs(block, eigenbasis(measured), params, k=20)
    share = hessian.subspace_overlap(true.leading(9), model.leading(9))
    ax.plot(range(1, 21), true.eigenvalues, "o-", label="Hessian of the layer")
    ax.plot(range(1, 21), model.eigenvalues, "x--", label="Kronecker product")
    ax.set_title(f"{block.name}: {share:.0%} of the top nine in common")
    ax.set_xlabel("eigenvalue, from the largest")
axes[0].legend()
fig.tight_layout()

# %% [markdown]
# ## Which damping?
#
# Both optimisers at four flat dampings and under the stability floor. The momentum of
# Lanczos-Newton is off, as in eq. 9; the rule must be told. The floor's safety factor
# of 12 was chosen for KFAC; Lanczos-Newton takes 1 (`StabilityFloor.for_lanczos`), and
# is shown with 8, too.

# %%
NUM_STEPS = 150
momentum = {"kfac": 0.9, "newton": 0.0}


def inner(kind, rate):
    if kind == "kfac":
        return rmtdamp.kfac(rate, factors_fn)
    measurer = rmtdamp.RitzMeasurer(loss_fn, num_steps=12)
    return rmtdamp.lanczos_newton(rate, measurer, refresh_every=5, momentum=None)


def flat(kind, rate, damping):
    return rmtdamp.set_damping(inner(kind, rate), damping)


def floor(kind, rate, safety):
    rule = rmtdamp.StabilityFloor(safety=safety, momentum=momentum[kind])
    learner = rmtdamp.DampingLearner(loss_fn, rule=rule, floor=1e-8)
    return rmtdamp.auto_damping(
        inner(kind, rate), learner, refresh_every=5, learning_rate=rate
    )


def run(make, kind, rate, number):
    tx = make(kind, rate, number)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (128,), 0, len(train[1]))
        batch = train[0][rows], train[1][rows]
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        return (params, state), (
            loss_fn(params, test),
            optax.tree.get(state, "damping"),
        )

    keys = jax.random.split(jax.random.key(4), NUM_STEPS)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[1]


run_flat = jax.jit(
    functools.partial(run, flat), static_argnums=0
)  # one for all dampings


fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
safeties = {"kfac": (12.0,), "newton": (1.0, 8.0)}
names = {"kfac": "KFAC, rate 0.03", "newton": "Lanczos-Newton, rate 0.3"}
for ax, (kind, rate) in zip(axes, {"kfac": 0.03, "newton": 0.3}.items()):
    for damping in (1e-3, 1e-2, 1e-1, 1.0):
        losses = np.nan_to_num(run_flat(kind, rate, damping)[0], nan=1e3)
        ax.semilogy(losses, lw=1, ls="--", label=f"{damping:g}")
        print(f"{kind}, flat {damping:g}: {losses[-1]:.3g}")
    for safety in safeties[kind]:
        losses, dampings = run(floor, kind, rate, safety)
        ax.semilogy(losses, "k", lw=safety**0.5, label=f"StabilityFloor({safety:g})")
        course = f"{losses[-1]:.3g}, from {dampings[0]:.2g} to {dampings[-1]:.2g}"
        print(f"{kind}, StabilityFloor({safety:g}): {course}")
    ax.set_title(names[kind])
    ax.set_xlabel("step")
    ax.legend(title="damping", fontsize=8)
axes[0].set_ylim(0.05, 30)
axes[0].set_ylabel("test loss")
fig.tight_layout()

# %% [markdown]
# A small flat damping diverges or stalls, a large one crawls, and which is which
# depends on the optimiser and its rate. KFAC's floor is level with the best flat
# damping. For Lanczos-Newton a safety of 8 is far too cautious: the sharp directions
# are among its Ritz vectors and divided by their own eigenvalues; with 1 it is below
# all four.
#
# Next: [the same at scale](05_sharding_and_big_models.ipynb).
