"""kfac-jax behind a pipe, to be timed in turn with ours.

    python3.11 -m venv PEER
    PEER/bin/pip install kfac-jax==0.0.8 jax==0.9.1 jaxlib==0.9.1

It needs an environment of its own, as it does not run on newer versions of JAX. So this
file is run by that environment's Python: it reads one network, and answers a line of
JSON that names a call when the call is done.

Nothing adapts: damping, learning rate and momentum are fixed, there is no burn-in, and
labels are sampled. "inverses" is the library's default, factored damping and inverted
factors; "exact" adds the damping to the products of eigenvalues, as ours does.
"""
# pyright: reportMissingImports=false

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np


def loss_fn(params, batch):
    x, labels = batch
    for i, (kernel, bias) in enumerate(params):
        x = (jax.nn.relu(x) if i else x) @ kernel + bias
    kfac_jax.register_softmax_cross_entropy_loss(x, labels)
    logp = jax.nn.log_softmax(x)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def looped(params, batch, settings, exact):
    """A function that takes so many more steps, and returns the last loss."""
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_fn),
        l2_reg=0.0,
        estimation_mode="fisher_gradients",
        curvature_ema=0.95,
        curvature_update_period=settings["factor_every"],
        inverse_update_period=settings["eigen_every"],
        use_exact_inverses=exact,
        num_burnin_steps=0,
    )
    fixed = {
        name: jnp.asarray(settings[name])
        for name in ("learning_rate", "momentum", "damping")
    }
    key, *keys = jax.random.split(jax.random.key(0), 1 + settings["eigen_every"])
    # A step donates its params.
    params = jax.tree.map(jnp.copy, params)
    carry = params, optimizer.init(params, key, batch)
    steps = itertools.count()

    def run(num):
        nonlocal carry
        found = {"loss": jnp.nan}
        for i in itertools.islice(steps, num):
            *carry, found = optimizer.step(
                *carry, keys[i % len(keys)], batch=batch, global_step_int=i, **fixed
            )
        jax.block_until_ready(carry)
        return float(found["loss"])

    return run


def main(path):
    with np.load(path) as found:
        arrays = {name: jnp.asarray(x) for name, x in found.items()}
    batch = arrays["inputs"], arrays["labels"]
    params = [(arrays[f"kernel{i}"], arrays[f"bias{i}"]) for i in range(3)]
    settings = json.loads(sys.stdin.readline())
    gradient = jax.jit(jax.value_and_grad(loss_fn))

    def gradients(num):
        for _ in range(num):
            jax.block_until_ready(gradient(params, batch))

    calls = {
        "gradient": gradients,
        "inverses": looped(params, batch, settings, exact=False),
        "exact": looped(params, batch, settings, exact=True),
        "versions": lambda: {"jax": jax.__version__, "kfac-jax": kfac_jax.__version__},
    }
    # Warnings must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *numbers = json.loads(line)
        print(json.dumps(calls[name](*numbers)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
