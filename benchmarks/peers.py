"""Other libraries behind a pipe, to be timed in turn with ours.

    python -m venv PEERS
    PEERS/bin/pip install torch curvlinops-for-pytorch hessian-eigenthings
    python3.11 -m venv PEER
    PEER/bin/pip install kfac-jax==0.0.8 jax==0.9.1 jaxlib==0.9.1

They need environments of their own (kfac-jax does not run on newer versions of JAX), so
this file is run by theirs: it reads one network, and answers a line of JSON that names
a call when the call is done. `start` is our side of the pipe.

PyTorch's libraries are called as their documentation does, operators built beforehand.
One favour to curvlinops: the ends of the spectrum, which it would find by ARPACK, are
given. In kfac-jax nothing adapts: damping, learning rate and momentum are fixed, there
is no burn-in, and labels are sampled. "inverses" is its default, factored damping and
inverted factors; "exact" adds the damping to the products of eigenvalues, as ours does.
"""
# pyright: reportMissingImports=false

import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np


@contextlib.contextmanager
def start(python, library, params, batch, settings):
    """The other side: call(name, *numbers) waits until it is done, and its answer."""
    layers = [*params["hidden"].values(), params["out"]]
    arrays = dict(zip(("inputs", "labels"), map(np.asarray, batch), strict=True))
    for i, layer in enumerate(layers):
        arrays |= {f"{name}{i}": layer[name] for name in ("kernel", "bias")}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "network.npz"
        np.savez(path, **arrays)
        with subprocess.Popen(
            [python, __file__, library, path, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:

            def call(*question):
                print(json.dumps(question), file=server.stdin, flush=True)
                line = server.stdout.readline() if server.stdout else ""
                if not line:
                    raise RuntimeError(f"the peers' process ended at {question}")
                return json.loads(line)

            yield call


def torch_calls(arrays, settings):
    import curvlinops
    import torch
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
    from hessian_eigenthings.algorithms.spectral_density import spectral_density
    from hessian_eigenthings.loss_fns.standard import supervised_loss
    from hessian_eigenthings.operators import HessianOperator
    from torch import nn

    torch.set_num_threads(settings["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = {k: torch.from_numpy(x.copy()) for k, x in arrays.items()}
    stack = []
    for i in range(sum(name.startswith("kernel") for name in arrays)):
        kernel, bias = arrays[f"kernel{i}"], arrays[f"bias{i}"]
        m, n = kernel.shape[-2:]
        convolution = kernel.ndim == 4
        if stack and isinstance(stack[-2], nn.Conv2d) and not convolution:
            stack += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layer = nn.Conv2d(m, n, 3, padding=1) if convolution else nn.Linear(m, n)
        with torch.no_grad():
            layer.weight.copy_(kernel.permute(3, 2, 0, 1) if convolution else kernel.T)
            layer.bias.copy_(bias)
        stack += [layer, nn.ReLU()]
    model = nn.Sequential(*stack[:-1]).to(device)
    inputs = arrays["inputs"]
    inputs = inputs.movedim(-1, 1).contiguous() if inputs.ndim == 4 else inputs
    batch = inputs.to(device), arrays["labels"].long().to(device)
    params, criterion = list(model.parameters()), nn.CrossEntropyLoss()
    things = HessianOperator(model, [batch], supervised_loss(criterion))
    linop = curvlinops.HessianLinearOperator(model, criterion, params, [batch])
    vector = torch.randn(things.size, device=device)
    vector /= vector.norm()

    def gradient():
        torch.autograd.grad(criterion(model(batch[0]), batch[1]), params)

    def things_density(steps, probes):
        found = spectral_density(things, num_runs=probes, lanczos_steps=steps)
        return float(found.raw_eigenvalues.nan_to_num().max())

    def linop_density(steps, probes, low, high):
        options = {"num_repeats": probes, "boundaries": (low, high)}
        lanczos_approximate_spectrum(linop, steps, **options)

    return {
        "versions": lambda: {"torch": torch.__version__},
        "gradient": gradient,
        "hessian-eigenthings": lambda: float(vector @ things.matvec(vector)),
        "curvlinops": lambda: float(vector @ (linop @ vector)),
        "hessian-eigenthings density": things_density,
        "curvlinops density": linop_density,
    }, torch.cuda.synchronize if device == "cuda" else lambda: None


def kfac_calls(arrays, settings):
    import jax
    import jax.numpy as jnp
    import kfac_jax

    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    batch = arrays["inputs"], arrays["labels"]
    layers = [(arrays[f"kernel{i}"], arrays[f"bias{i}"]) for i in range(3)]

    def loss_fn(params, batch):
        x, labels = batch
        for i, (kernel, bias) in enumerate(params):
            x = (jax.nn.relu(x) if i else x) @ kernel + bias
        kfac_jax.register_softmax_cross_entropy_loss(x, labels)
        logp = jax.nn.log_softmax(x)
        return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))

    def looped(exact):
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
        names = ("learning_rate", "momentum", "damping")
        fixed = {name: jnp.asarray(settings[name]) for name in names}
        key, *keys = jax.random.split(jax.random.key(0), 1 + settings["eigen_every"])
        params = jax.tree.map(jnp.copy, layers)  # a step donates them
        carry, steps = (params, optimizer.init(params, key, batch)), itertools.count()

        def run(num):
            nonlocal carry
            found = {"loss": jnp.nan}
            for i in itertools.islice(steps, num):
                options = {"batch": batch, "global_step_int": i, **fixed}
                *carry, found = optimizer.step(*carry, keys[i % len(keys)], **options)
            jax.block_until_ready(carry)
            return float(found["loss"])

        return run

    gradient = jax.jit(jax.value_and_grad(loss_fn))

    def gradients(num):
        for _ in range(num):
            jax.block_until_ready(gradient(layers, batch))

    return {
        "gradient": gradients,
        "inverses": looped(exact=False),
        "exact": looped(exact=True),
        "versions": lambda: {"jax": jax.__version__, "kfac-jax": kfac_jax.__version__},
    }, lambda: None


def serve(library, path, settings):
    with np.load(path) as found:
        arrays = dict(found)
    make = {"torch": torch_calls, "kfac-jax": kfac_calls}[library]
    calls, wait = make(arrays, json.loads(settings))
    # Warnings and progress bars must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *numbers = json.loads(line)
        found = calls[name](*numbers)
        wait()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
