# %% [markdown]
# # Three other papers in one sitting
#
# Beside the paper on damping, three others meet the same Hessian: on flatness and what
# it brings, on the Kronecker structure of layers, and on spectral descent. Each in two
# pictures: one from the committed records of `benchmarks/paper`, one made here and now.

# %%
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import rmtdamp
from rmtdamp import hessian
from rmtdamp.demo.spectrum_example import digits
from rmtdamp.flatness import least_linear_network_trace, linear_network_trace
from rmtdamp.kronecker import (
    dataset_factors,
    eigenbasis,
    restrict_to_block,
    top_eigenpairs,
)

HERE = pathlib.Path.cwd()
ROOT = next(p for p in (HERE, *HERE.parents) if (p / "benchmarks/paper").is_dir())


def experiment(name):
    found = json.loads((ROOT / f"benchmarks/paper/results/{name}.json").read_text())
    print(f"{found['claim']}\n-> {found['verdict']}, {found['seeds']} seeds")
    return found["measured"]["table"]


def number(text):
    """The mean and standard error of "0.16 ± 0.05"."""
    mean, _, error = str(text).partition(" ± ")
    return float(mean), float(error or 0)


# %% [markdown]
# ## Flatness finds low rank
#
# Gatmiry et al., [arXiv 2306.13239](https://arxiv.org/abs/2306.13239): among deep
# linear networks that fit random measurements of a matrix, the one with the least trace
# of the Hessian has, up to a constant, the least nuclear norm. So a small trace should
# find a matrix of low rank from fewer measurements than it has entries. It does:

# %%
rows = experiment("flatness_recovery")
fig, ax = plt.subplots(figsize=(6, 3.4))
own = [row for row in rows if row["depth"] == 2]
for method in dict.fromkeys(row["method"] for row in own):
    some = [row for row in own if row["method"] == method]
    mean, error = np.transpose([number(row["error"]) for row in some])
    counts = [row["measurements"] for row in some]
    ax.errorbar(counts, mean, error, marker="o", capsize=3, label=method)
ax.set_yscale("log")
ax.set_xlabel("measurements")
ax.set_ylabel("relative error of the matrix, depth 2")
ax.legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# Live: two layers with one product $M$, $W_2 = cQ$ and $W_1 = Q^{-1}M/c$. Their loss is
# the same; the trace of the Hessian depends on how the product is split, and its least
# value over all splits is a function of the nuclear norm of $M$ alone.

# %%
keys = jax.random.split(jax.random.key(0), 2)
matrix = jax.random.normal(keys[0], (6, 6))
measurements = jax.random.normal(keys[1], (4000, 6, 6))
left, values, right = jnp.linalg.svd(matrix)
balanced = [(jnp.sqrt(values) * left).T, jnp.sqrt(values)[:, None] * right]
scales = jnp.geomspace(0.3, 3, 21)
splits = {
    "halves of the singular values": (balanced[0].T, balanced[1]),
    "all in the first layer": (jnp.eye(6), matrix),
}
fig, ax = plt.subplots(figsize=(6, 3.4))
for name, (last, first) in splits.items():
    traces = [linear_network_trace([first / c, c * last], measurements) for c in scales]
    ax.loglog(scales, traces, label=name)
least = least_linear_network_trace(matrix, 2)
ax.axhline(least, color="k", ls=":", label="least, from the nuclear norm")
ax.set_xlabel("c, the scale moved from one layer to the other")
ax.set_ylabel("Tr H")
ax.legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# On a real network a penalty on the trace helps little:

# %%
for row in experiment("flatness_network"):
    loss, penalty = row["test loss"], row["penalty"]
    print(f"   {row['task']:>18}, penalty {penalty:g}: test loss {loss}")

# %% [markdown]
# ## The Hessian of a layer is nearly a Kronecker product
#
# Wu et al., [arXiv 2010.04261](https://arxiv.org/abs/2010.04261). How much of a layer's
# ten sharpest directions does $\mathbb{E}[gg^\top] \otimes \mathbb{E}[aa^\top]$ show?

# %%
rows = experiment("decoupling")
fig, ax = plt.subplots(figsize=(8, 3.6))
mean, error = np.transpose([number(row["k = 10"]) for row in rows])
colours = ["C0" if row["network"] == "MLP" else "C1" for row in rows]
ax.bar(range(len(rows)), mean, yerr=error, color=colours, capsize=2)
names = [f"{row['data']}\n{row['network']} {row['layer']}" for row in rows]
ax.set_xticks(range(len(rows)), names, rotation=90, fontsize=6)
ax.set_ylabel("overlap of the top ten")
fig.tight_layout()

# %% [markdown]
# Live, on the digits, after 150 steps of Adam: the first eigenvector of the first
# layer's Hessian, and the one that the factors give, each as a picture of weights of
# the most involved hidden unit.

# %%
loss_fn, params, batches, factors_fn = digits()
whole = hessian.dataset_matvec(loss_fn, params, batches)
block = factors_fn.blocks[0]
factors = dataset_factors(factors_fn, params, batches, jax.random.key(1))
matvec, part = restrict_to_block(whole, params, block)
true = hessian.eigsh(matvec, part, jax.random.key(2), k=10)
model = top_eigenpairs(block, eigenbasis(factors[0]), params, k=10)
print(f"overlap of the top ten: {hessian.subspace_overlap(true, model):.2f}")

fig, axes = plt.subplots(1, 2, figsize=(5.5, 2.6))
for ax, pairs, name in ((axes[0], true, "Hessian"), (axes[1], model, "Kronecker")):
    kernel = np.asarray(pairs.eigenvectors["layer0"]["kernel"][0])  # (pixels, units)
    unit = np.abs(kernel).sum(0).argmax()
    picture = kernel[:, unit] * np.sign(kernel[:, unit].sum())
    ax.imshow(picture.reshape(8, 8), cmap="coolwarm")
    ax.set_title(f"{name}, eigenvalue {pairs.eigenvalues[0]:.2f}", fontsize=9)
    ax.axis("off")
fig.tight_layout()

# %% [markdown]
# ## Spectral descent and rare classes
#
# A step of the polar factor of the gradient (Muon's direction) moves all singular
# directions alike, so that what is rare is not learned last. In theory and on
# Fashion-MNIST with a long tail of rare classes:

# %%
rows = experiment("imbalanced_data")
own = [row for row in rows if row["task"] == "Fashion-MNIST"]
fig, ax = plt.subplots(figsize=(6.5, 3.4))
for shift, name in ((-0.2, "early, %"), (0.2, "at the chosen epoch, %")):
    mean, error = np.transpose([number(row[name]) for row in own])
    ax.bar(np.arange(len(own)) + shift, mean, 0.4, yerr=error, label=name, capsize=2)
ax.set_xticks(range(len(own)), [row["optimiser"] for row in own], fontsize=8)
ax.set_ylabel("balanced accuracy, %")
ax.legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# Live: digits 5 to 9 are cut to a tenth. Accuracy on the frequent and on the rare
# classes, every class counted alike, for gradient descent and the damped polar factor,
# each at the rate (of six) with the best balanced accuracy at the end.

# %%
images, labels = load_digits(return_X_y=True)
images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
keep = (np.arange(1280) % 10 == 0) | (labels[:1280] < 5)
train = images[:1280][keep], jnp.asarray(labels[:1280][keep])
test = images[1280:], jnp.asarray(labels[1280:])


def model_loss(params, batch):
    logits = jnp.tanh(batch[0] @ params[0]) @ params[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@functools.partial(jax.jit, static_argnames="make")
def run(make, rate):
    keys = jax.random.split(jax.random.key(5))
    params = tuple(
        jax.random.normal(k, s) / 8 for k, s in zip(keys, ((64, 32), (32, 10)))
    )
    tx = make(rate)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(model_loss)(params, train)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        guess = jnp.argmax(jnp.tanh(test[0] @ params[0]) @ params[1], axis=1)
        right = [jnp.mean(guess == c, where=test[1] == c) for c in range(10)]
        return (params, state), jnp.array(right)

    return jax.lax.scan(step, (params, tx.init(params)), length=150)[1]


def spectral(rate):
    return rmtdamp.spectral_descent(rate, damping=1e-6, momentum=None)


fig, ax = plt.subplots(figsize=(6.5, 3.4))
candidates = {
    "gradient descent": (optax.sgd, np.geomspace(0.03, 3, 6)),
    "spectral descent": (spectral, np.geomspace(0.001, 0.1, 6)),
}
for colour, (name, (make, rates)) in zip(("C0", "C1"), candidates.items()):
    found = [np.array(run(make, rate)) for rate in rates]
    best = int(np.argmax([right[-1].mean() for right in found]))
    frequent, rare = found[best][:, :5].mean(1), found[best][:, 5:].mean(1)
    ax.plot(frequent, "--", color=colour, lw=1)
    ax.plot(rare, color=colour, label=f"{name}, rate {rates[best]:.3g}")
    at = [f"{rare[i]:.0%} at {i + 1}" for i in (19, 49, 149)]
    print(f"{name}, rare classes after steps: {', '.join(at)}")
ax.set_xlabel("step")
ax.set_ylabel("accuracy (dashed: frequent classes)")
ax.legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# Behind in the first steps, at the rate that is best in the end, and ahead afterwards.
#
# What was and was not reproduced, on which tasks, is on [the benchmark's
# page](../benchmarks/paper/README.md#flatness_least).
