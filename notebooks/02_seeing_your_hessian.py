# %% [markdown]
# # Seeing your Hessian
#
# How sharp is this minimum? How noisy is the curvature that a batch shows? Which sharp
# directions are real? The answers below need a loss, its parameters and batches, and
# nothing of how the model is written. The model here is a small tanh network after 150
# steps of Adam on scikit-learn's digits.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from rmtdamp import hessian, plot
from rmtdamp.demo.spectrum_example import digits
from rmtdamp.outliers import outliers
from rmtdamp.spectrum import layer_spectra
from rmtdamp.stability import stable_learning_rate

loss_fn, params, batches, _ = digits()
key = jax.random.key(0)
num_parameters = sum(x.size for x in jax.tree.leaves(params))
print(f"{num_parameters:,} parameters, {len(batches)} batches of {len(batches[0][1])}")

# %% [markdown]
# The same page comes from the command line, for any function that returns `(loss_fn,
# params, batches)`:
#
# python -m rmtdamp spectrum rmtdamp.demo.spectrum_example:digits
#
# ## Products, and what they give
#
# Everything is made of products $v \mapsto Hv$, here with the Hessian of all five
# batches. Each random estimate comes with a standard error, each eigenvalue with a
# residual $\lVert Hv - \lambda v\rVert$, so that nobody has to believe it.

# %%
matvec = hessian.dataset_matvec(loss_fn, params, batches)
keys = jax.random.split(key, 8)
total = hessian.trace(matvec, params, keys[0], num_probes=32)
top = hessian.eigsh(matvec, params, keys[1], k=20)
bottom = hessian.eigsh(matvec, params, keys[2], k=1, which="SA")

print(f"trace            {total.value:7.2f} ± {total.stderr:.2f}")
print(f"largest          {top.eigenvalues[0]:7.3f}, residual {top.residuals[0]:.0e}")
print(f"smallest         {bottom.eigenvalues[0]:7.3f}")
rate = stable_learning_rate(top.eigenvalues[0], momentum=0.9)
print(f"gradient descent with momentum 0.9 is stable up to a rate of {rate:.2f}")

# %% [markdown]
# ## The whole spectrum
#
# Most of the spectrum lies near zero, on both sides. To the right nine directions stand
# apart, one less than there are classes, as is usual in classification.

# %%
spectrum = hessian.spectral_density(matvec, params, keys[3])
fig, ax = plt.subplots(figsize=(8, 3.5))
plot.density(spectrum, ax=ax)
ax.set_title("The Hessian of the data set")
fig.tight_layout()

share = float(np.sum(top.eigenvalues[:9]) / total.value)
print(f"the nine largest of {num_parameters:,} eigenvalues: {share:.0%} of the trace")

# %% [markdown]
# ## What a batch of 64 sees
#
# The same, on a batch of 64: the spectrum is wider, and part of it is noise. The noise
# itself can be measured, as half the difference of the Hessians of two halves of the
# batch; the dashed lines are how far it reaches. Random-matrix theory would like it to
# be a semicircle. It is not: the noise of a real Hessian has the sharp directions in
# it.

# %%
small = jax.tree.map(lambda x: x[:64], batches[0])
first, second = (
    hessian.hessian_matvec(loss_fn, params, half) for half in hessian.halves(small)
)
batch_matvec = hessian.hessian_matvec(loss_fn, params, small)
batch_spectrum = hessian.spectral_density(batch_matvec, params, keys[4])
noise = hessian.spectral_density(hessian.noise_matvec(first, second), params, keys[5])
found = outliers(hessian.split_half_eigsh(first, second, params, keys[6], k=12))

fig, ax = plt.subplots(figsize=(8, 3.5))
plot.density(batch_spectrum, noise=noise, outliers=found, ax=ax)
ax.set_title("The Hessian of a batch of 64")
fig.tight_layout()

# %% [markdown]
# ## Which directions are real
#
# An eigenvector is real as far as two halves of the batch agree on it. The estimate
# needs the batch alone. Here it can be held against the truth: the overlap with the
# eigenvectors of the Hessian of all data.

# %%
true = hessian.squared_overlaps(found, top).sum(axis=1)
fig, ax = plt.subplots(figsize=(6, 3.5))
ax.bar(np.arange(12) - 0.2, found.overlaps_squared, 0.4, label="from two halves")
ax.bar(np.arange(12) + 0.2, true, 0.4, label="with all data's first 20")
ax.set_xticks(
    range(12), [f"{value:.2f}" for value in found.eigenvalues], rotation=60, fontsize=8
)
ax.set_xlabel("eigenvalue that the batch shows")
ax.set_ylabel("squared overlap")
ax.legend()
fig.tight_layout()
print(f"{int(found.is_outlier.sum())} of 12 are called more than noise")

# %% [markdown]
# ## Noise as one number
#
# $m = P^{-1}\,\mathrm{Tr\,Var}(H)$ is the noise that the paper's rule takes for a
# damping. It falls as one over the batch size: measured on one batch of 256 it can be
# asked for any size.

# %%
for batch_size in (16, 64, 256):
    measured = hessian.moments(
        loss_fn, params, batches[0], keys[7], num_probes=8, batch_size=batch_size
    )
    m, stderr = measured.variance, measured.variance_stderr
    print(f"batches of {batch_size:3d}: m = {m:.1e} ± {stderr:.0e}")

# %% [markdown]
# ## Layer by layer
#
# Which layer is sharp? A block of the Hessian is a product like any other.

# %%
fig, ax = plt.subplots(figsize=(8, 3.5))
plot.layer_densities(layer_spectra(matvec, params, keys[7], num_steps=40), ax=ax)
fig.tight_layout()

# %% [markdown]
# For a model of your own: write a function that returns `(loss_fn, params, batches)`,
# with the loss in evaluation mode (`rmtdamp.check_loss` tells whether it is a mean over
# examples). [The page on Hessians](../docs/hessian.md) lists every tool.
