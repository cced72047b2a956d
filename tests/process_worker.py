"""One of several processes that share an array: what `test_processes` starts.

    python process_worker.py PORT NUM_PROCESSES PROCESS_ID FOLDER

Process 0 writes what was measured to FOLDER. In the fourth training step, after a
checkpoint, the last process is lost.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from problems import mlp, mlp_batch, mlp_loss

import rmtdamp
from rmtdamp.hessian import (
    eigsh,
    hessian_matvec,
    lanczos,
    moments,
    spectral_density,
)

SIZES = (8, 8, 4)
STEPS, SAVED = 6, 3  # training steps, and after how many of them a checkpoint is made
LOST = 17  # exit status of the process that is lost

learner = rmtdamp.DampingLearner(mlp_loss, floor=1e-3)
tx = rmtdamp.auto_adam(1e-2, learner, refresh_every=2)


@jax.jit
def step(params, state, batch):
    grads = jax.grad(mlp_loss)(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def problem():
    """Params and a batch, the same in each process."""
    params = mlp(jax.random.key(0), SIZES, jnp.float32)
    return params, mlp_batch(jax.random.key(1), 32, SIZES, jnp.float32)


def measured(params, batch):
    """What is driven from Python, of arrays of which a process may hold a part."""
    keys = jax.random.split(jax.random.key(2), 3)
    matvec = hessian_matvec(mlp_loss, params, batch)
    decomposed = lanczos(matvec, params, 6)
    pairs = eigsh(matvec, params, keys[0], k=2)
    density = spectral_density(matvec, params, keys[1], num_steps=5, num_probes=2)
    noise = moments(mlp_loss, params, batch, keys[2], num_probes=2)
    return {
        "lanczos": (decomposed.diagonal, decomposed.off_diagonal),
        "eigsh": (pairs.eigenvalues, abs(pairs.eigenvectors[0]["kernel"])),
        "spectral_density": (density.nodes, density.weights),
        "moments": noise._replace(microbatch_stderr=noise.mean),  # of differences
    }


def trained(params, state, batch, num):
    """Params and state after so many steps."""
    for _ in range(num):
        params, state = step(params, state, batch)
    return params, state


def main(port, num_processes, process, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}",
        num_processes,
        process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
    )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    params, batch = jax.device_put(problem(), split)
    assert not jax.tree.leaves(params)[0].is_fully_addressable
    found = measured(params, batch)
    carry = trained(params, tx.init(params), batch, SAVED)
    found["training"] = carry[0], optax.tree.get(carry[1], "damping")
    # Each process holds the whole of what is replicated, so it can be read.
    found = jax.jit(lambda x: x, out_shardings=whole)(found)
    if process == 0:
        np.savez(folder / "found.npz", *map(np.asarray, jax.tree.leaves(found)))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", carry)
    if process == num_processes - 1:
        os._exit(LOST)
    jax.block_until_ready(trained(*carry, batch, STEPS - SAVED))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), pathlib.Path(sys.argv[4]))
