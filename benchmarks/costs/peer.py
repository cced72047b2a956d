"""Steps of kfac-jax behind a pipe, to be timed in turn with ours.

    python -m venv PEER && PEER/bin/pip install kfac-jax==0.0.8 jax==0.9.1
    KFAC_JAX_PYTHON=PEER/bin/python python -m benchmarks.costs kfac-jax

It does not run on the JAX that Flax needs, so this file is run by the Python of an
environment of its own. It reads a network, then a line of JSON a call, and answers with
one when the call is done.

Nothing adapts: damping, learning rate and momentum are fixed, there is no burn-in, and
labels are sampled. "factored" is its default, "eigenvalues" its exact inverses, by our
names.
"""
# pyright: reportMissingImports=false

import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np


@contextlib.contextmanager
def peer(python, layers, batch, settings):
    """A function `ask(name, steps)` of the process, for (kernel, bias) of layers."""
    inputs, labels = batch
    arrays = {"inputs": inputs.reshape(len(inputs), -1), "labels": labels}
    for i, (kernel, bias) in enumerate(layers):
        arrays |= {f"kernel{i}": kernel, f"bias{i}": bias}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "network.npz"
        np.savez(path, **arrays)
        command = [python, "-P", __file__, path, json.dumps(settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdout is not None
            answers = process.stdout

            def ask(*question):
                print(json.dumps(question), file=process.stdin, flush=True)
                if not (answer := answers.readline()):
                    raise RuntimeError(f"kfac-jax's process ended at {question}")
                return json.loads(answer)

            yield ask


def mean_cross_entropy(layers, batch, register=lambda logits, labels: None):
    logits, labels = batch
    for i, (kernel, bias) in enumerate(layers):
        logits = (jax.nn.relu(logits) if i else logits) @ kernel + bias
    register(logits, labels)
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))


def steps_of(kfac_jax, layers, batch, settings, exact):
    """A function that takes so many more steps, and returns the last loss."""
    settings = dict(settings)
    register = kfac_jax.register_softmax_cross_entropy_loss
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(lambda p, b: mean_cross_entropy(p, b, register)),
        l2_reg=0.0,
        estimation_mode="fisher_gradients",
        curvature_ema=settings.pop("decay"),
        curvature_update_period=settings.pop("refresh_every"),
        inverse_update_period=(period := settings.pop("eigen_every")),
        use_exact_inverses=exact,
        num_burnin_steps=0,
    )
    fixed = {name: jnp.asarray(x) for name, x in settings.items()}
    key, *keys = jax.random.split(jax.random.key(0), 1 + period)
    layers = jax.tree.map(jnp.copy, layers)  # a step donates them
    carry, counts, found = (
        (layers, optimizer.init(layers, key, batch)),
        itertools.count(),
        {},
    )

    def run(num):
        nonlocal carry, found
        for i in itertools.islice(counts, num):
            *carry, found = optimizer.step(
                *carry, keys[i % period], batch=batch, global_step_int=i, **fixed
            )
        jax.block_until_ready(carry)
        return float(found["loss"])

    return run


def main(path, settings):
    import kfac_jax

    settings = json.loads(settings)
    with np.load(path) as found:
        arrays = {name: jnp.asarray(x) for name, x in found.items()}
    batch = arrays["inputs"], arrays["labels"]
    count = sum(name.startswith("kernel") for name in arrays)
    layers = [(arrays[f"kernel{i}"], arrays[f"bias{i}"]) for i in range(count)]
    gradient = jax.jit(jax.value_and_grad(mean_cross_entropy))

    def gradients(num):
        for _ in range(num):
            jax.block_until_ready(gradient(layers, batch))

    calls = {
        "gradient": gradients,
        "factored": steps_of(kfac_jax, layers, batch, settings, exact=False),
        "eigenvalues": steps_of(kfac_jax, layers, batch, settings, exact=True),
    }
    # Warnings must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *numbers = json.loads(line)
        print(json.dumps(calls[name](*numbers)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
