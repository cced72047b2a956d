# %% [markdown]
# # The walk: what damping is, the noise behind it, and how to learn it
#
# A second-order step divides the gradient by curvature $s$ and a small constant, the
# damping $\delta$; in Adam it is called eps. This notebook shows on scikit-learn's
# digits what that constant does, which noise it answers, how to measure that noise, and
# what a learned damping changes in training.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

import rmtdamp
from rmtdamp import hessian

images, labels = load_digits(return_X_y=True)
images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
order = jax.random.permutation(jax.random.key(0), len(labels))
images, labels = images[order], jnp.asarray(labels)[order]
train, test = (images[:1280], labels[:1280]), (images[1280:], labels[1280:])

# %% [markdown]
# The model: a small network, so small that its whole Hessian fits into memory and every
# estimate can be held against the truth. The loss is a mean over examples; that is all
# that the library asks of it.


# %%
def initial_params(key, sizes=(64, 16, 16, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n))
        for k, m, n in zip(keys, sizes, sizes[1:])
    ]


def predict(params, inputs):
    *hidden, (weights, bias) = params
    for w, b in hidden:
        inputs = jax.nn.relu(inputs @ w + b)
    return inputs @ weights + bias


def loss_fn(params, batch):
    logits = predict(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


params = initial_params(jax.random.key(1))
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")


# %% [markdown]
# ## Training, once
#
# One jitted loop for every optimiser of this notebook. `batch=batch` is what a learned
# damping needs; optimisers that do not learn ignore it.


# %%
def train_with(tx, params, *, num_steps=600, batch_size=128, every=20):
    tx = optax.with_extra_args_support(tx)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch_size,), 0, len(train[1]))
        batch = train[0][rows], train[1][rows]
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, loss_fn(carry[0], test)

    carry, losses, dampings = (params, tx.init(params)), [], []
    keys = jax.random.split(jax.random.key(2), num_steps)
    for i in range(0, num_steps, every):
        carry, loss = run(carry, keys[i : i + every])
        losses.append(float(loss))
        damping = optax.tree.get(carry[1], "damping")
        dampings.append(jnp.nan if damping is None else float(damping))
    return carry[0], losses, dampings


trained, losses, _ = train_with(optax.adam(1e-3), params)
print(f"Adam's test loss after 600 steps: {losses[-1]:.3f}")

# %% [markdown]
# ## See the noise
#
# An optimiser sees the Hessian $H_B$ of a batch, and wants to know the one of all data,
# $H$. Below, for each eigenvector $u$ of the Hessian of one batch of 128: the curvature
# that the batch claims, $u^\top H_B u$, and the one that the whole training set has
# there, $u^\top H u$.

# %%
batch = train[0][:128], train[1][:128]
seen = hessian.to_dense(hessian.hessian_matvec(loss_fn, trained, batch), trained)
true = hessian.to_dense(hessian.hessian_matvec(loss_fn, trained, train), trained)
claimed, vectors = jnp.linalg.eigh(seen)
actual = jnp.sum(vectors * (true @ vectors), axis=0)

fig, ax = plt.subplots(figsize=(5, 4))
ax.plot(claimed, actual, ".", ms=4)
ax.axline((0, 0), slope=1, color="0.6", lw=1, label="if there were no noise")
ax.set_xlabel("curvature that the batch claims")
ax.set_ylabel("curvature of all data")
ax.set_xscale("symlog", linthresh=1e-2)
ax.set_yscale("symlog", linthresh=1e-2)
ax.legend()
fig.tight_layout()

# %% [markdown]
# The largest claims are exaggerated, the small ones are too small, and the negative
# ones are mostly not there: the eigenvalues of a batch spread further than the true
# ones. The cure that statistics knows is to shrink them towards a common value $\tau$:
#
# $$ \beta H_B + (1 - \beta)\,\tau I, \qquad \beta = \frac{1}{1 + \delta/\tau} . $$
#
# Up to a factor that belongs to the learning rate this *is* a damping: $\beta (H_B +
# \delta I)$. So the best $\beta$ is a best damping.
#
# ## The best damping is the noise
#
# How far is the shrunk matrix from the truth? Here both are known, so the error can be
# drawn. The marks are what the library finds from the batch alone, by Hessian-vector
# products and without the truth: $\delta = m = P^{-1} \mathrm{Tr\,Var}(H)$ for $\tau =
# 1$ (eq. 15 of the paper), and Ledoit and Wolf's for $\tau$ the mean eigenvalue. They
# are right on average over batches; what is best for this one batch scatters around
# them.

# %%
key = jax.random.key(3)
measured = hessian.moments(loss_fn, trained, batch, key, num_probes=16)
rules = {
    "eq. 15, target 1": rmtdamp.identity_target(measured),
    "Ledoit-Wolf, target the mean": rmtdamp.scaled_identity_target(measured),
}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.5))
eye, relative = jnp.eye(len(true)), jnp.geomspace(1e-3, 1e2, 60)
for ax, (name, rule) in zip(axes, rules.items()):
    betas = 1 / (1 + relative)
    error = [
        jnp.linalg.norm(b * seen + (1 - b) * rule.target * eye - true) ** 2
        for b in betas
    ]
    ax.loglog(relative * rule.target, error)
    ax.axvline(rule.damping, color="C3", ls="--", label="measured on the batch")
    best = rule.target * relative[jnp.argmin(jnp.array(error))]
    ax.axvline(best, color="0.5", ls=":", label="best")
    ax.set_title(name)
    ax.set_xlabel("damping")
    ax.legend()
    print(f"{name}: measured {rule.damping:.2g}, best {best:.2g}")
axes[0].set_ylabel("squared distance to the true Hessian")
fig.tight_layout()

# %% [markdown]
# ## What a large step needs
#
# The noise says how far to trust the curvature. It does not say how far a step moves:
# in a direction that the preconditioner believes flat, the step is $\alpha/\delta$
# times the gradient, and if the loss bends there more than $2\delta/\alpha$ allows, the
# run diverges. `StabilityFloor` is the damping that prevents it, $\delta =
# c\,\alpha\lambda_{\max}/(2f)$, and what `auto_adam` learns by default.
#
# Adam and `auto_adam` at three learning rates, constant for half of the run and then
# falling to a hundredth:

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.5))
steps = range(20, 601, 20)
for colour, rate in zip(("C0", "C1", "C2"), (1e-3, 1e-2, 1e-1)):
    schedule = rmtdamp.schedules.linear_anneal_schedule(rate, total_steps=600)
    _, plain, _ = train_with(optax.adam(schedule), params)
    auto = rmtdamp.auto_adam(schedule, loss_fn, refresh_every=20)
    _, learned, dampings = train_with(auto, params)
    axes[0].semilogy(steps, plain, "--", color=colour, lw=1)
    axes[0].semilogy(steps, learned, color=colour, label=f"rate {rate:g}")
    axes[1].semilogy(steps, dampings, color=colour)
    print(f"rate {rate:g}: Adam {plain[-1]:.3f}, auto_adam {learned[-1]:.3f}")
axes[0].set_title("test loss (dashed: Adam)")
axes[1].set_title("learned damping")
axes[0].legend()
for ax in axes:
    ax.set_xlabel("step")
fig.tight_layout()

# %% [markdown]
# At Adam's usual rate, and at the best one, there is nothing to gain, and the damping
# stays out of the way. At a hundred times the usual rate, where steps are too long, the
# damping rises to meet them, and the test loss is about four fifths of Adam's: a bad
# choice of the rate costs less. It still costs something.
#
# This is one seed of one small network; several seeds on four tasks are in [the
# measured comparison](../docs/evidence.md). Next: [seeing your
# Hessian](02_seeing_your_hessian.ipynb); [which damping for your
# model](03_which_damping.ipynb).
