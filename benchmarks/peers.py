"""PyTorch's Hessian libraries behind a pipe, to be timed in turn with ours.

    python -m venv PEERS
    PEERS/bin/pip install torch curvlinops-for-pytorch hessian-eigenthings

They need an environment of their own, so this file is run by its Python: it reads one
network (`write`), answers a line that names a call when the call is done, and imports
nothing of JAX. `start` is our side of the pipe.

Each library is called as its documentation does, operators built beforehand. One favour
to curvlinops: the ends of the spectrum, which it would find by ARPACK, are given.
"""
# pyright: reportMissingImports=false

import json
import pathlib
import subprocess
import sys

import numpy as np


def write(path, kind, params, batch):
    """Params and batch in PyTorch's layouts, from ours by layer."""
    inputs, labels = (np.asarray(x) for x in batch)
    arrays = {"inputs": np.moveaxis(inputs, -1, 1) if kind == "cnn" else inputs}
    arrays["labels"] = labels.astype(np.int64)
    layers = [*params["layers"].values(), params["out"]]
    for i, layer in enumerate(layers):
        kernel = np.asarray(layer["kernel"])
        arrays[f"kernel{i}"] = kernel.T if kernel.ndim == 2 else kernel.T.swapaxes(2, 3)
        arrays[f"bias{i}"] = np.asarray(layer["bias"])
    np.savez(path, **arrays)


def start(python, path, threads):
    """The other side: call(name, *numbers) waits until it is done, and its answer."""
    server = subprocess.Popen(
        [python, pathlib.Path(__file__), str(path), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    asks, answers = server.stdin, server.stdout
    assert asks is not None
    assert answers is not None

    def call(name, *numbers):
        asks.write(json.dumps([name, *numbers]) + "\n")
        asks.flush()
        line = answers.readline()
        if not line:
            raise RuntimeError(f"the peers' process ended during {name!r}")
        return json.loads(line)

    def stop():
        asks.close()
        server.wait()

    return call, stop


def serve(path, threads):
    import curvlinops
    import torch
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
    from hessian_eigenthings.algorithms.spectral_density import spectral_density
    from hessian_eigenthings.loss_fns.standard import supervised_loss
    from hessian_eigenthings.operators import HessianOperator
    from torch import nn

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = {k: torch.from_numpy(x.copy()) for k, x in np.load(path).items()}
    stack = []
    for i in range(sum(name.startswith("kernel") for name in arrays)):
        kernel, bias = arrays[f"kernel{i}"], arrays[f"bias{i}"]
        n, m = kernel.shape[:2]
        convolution = kernel.ndim == 4
        if stack and isinstance(stack[-2], nn.Conv2d) and not convolution:
            stack += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layer = nn.Conv2d(m, n, 3, padding=1) if convolution else nn.Linear(m, n)
        with torch.no_grad():
            layer.weight.copy_(kernel)
            layer.bias.copy_(bias)
        stack += [layer, nn.ReLU()]
    model = nn.Sequential(*stack[:-1]).to(device)
    batch = arrays["inputs"].to(device), arrays["labels"].to(device)
    params = list(model.parameters())
    criterion = nn.CrossEntropyLoss()
    things = HessianOperator(model, [batch], supervised_loss(criterion))
    linop = curvlinops.HessianLinearOperator(model, criterion, params, [batch])
    vector = torch.randn(things.size, device=device)
    vector /= vector.norm()

    def gradient():
        torch.autograd.grad(criterion(model(batch[0]), batch[1]), params)

    def product(operator):
        return lambda: float(vector @ operator(vector))

    def things_density(steps, probes):
        found = spectral_density(things, num_runs=probes, lanczos_steps=steps)
        return float(found.raw_eigenvalues.nan_to_num().max())

    def linop_density(steps, probes, low, high):
        lanczos_approximate_spectrum(
            linop, steps, num_repeats=probes, boundaries=(low, high)
        )

    calls = {
        "versions": lambda: {"torch": torch.__version__},
        "gradient": gradient,
        "hessian-eigenthings": product(things.matvec),
        "curvlinops": product(linop.__matmul__),
        "hessian-eigenthings density": things_density,
        "curvlinops density": linop_density,
    }
    # Warnings and progress bars must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *numbers = json.loads(line)
        found = calls[name](*numbers)
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
