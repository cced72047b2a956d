"""Two processes on one machine, each with a part of params, state and batch."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import process_worker as worker
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

TESTS = pathlib.Path(__file__).parent
NUM = 2


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The exit status and last words of each process, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    # With the settings of the tests, so that random numbers and programs are the same.
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, "PYTHONPATH": paths, **settings}
    command = [sys.executable, str(TESTS / "process_worker.py"), str(port), str(NUM)]
    running = [
        subprocess.Popen(
            [*command, str(i), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(NUM)
    ]
    try:
        words = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], words, folder


def test_two_processes_find_what_one_finds(processes):
    _, words, folder = processes
    assert (folder / "found.npz").exists(), words[0]
    params, batch = worker.problem()
    expected = worker.measured(params, batch)
    params, state = worker.trained(params, worker.tx.init(params), batch, worker.SAVED)
    expected["training"] = params, optax.tree.get(state, "damping")
    with np.load(folder / "found.npz") as found:
        # Sums in another order: some roundings of float32, grown by ten products.
        for x, y in zip(found.values(), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_lost_process_is_an_error_to_the_other_and_no_hang(processes):
    codes, words, _ = processes
    assert codes[-1] == worker.LOST, words[-1]
    assert codes[0] not in (0, worker.LOST)


def test_the_run_resumes_from_its_checkpoint_on_one_device(processes):
    folder = processes[-1]
    params, batch = worker.problem()
    first = jax.device_put((params, worker.tx.init(params)), jax.devices()[0])
    template = jax.tree.map(jnp.zeros_like, first)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        carry = checkpointer.restore(folder / "checkpoint", template)
    rest = worker.trained(*carry, batch, worker.STEPS - worker.SAVED)
    expected = worker.trained(*first, batch, worker.STEPS)
    for x, y in zip(
        jax.tree.leaves(rest[0]), jax.tree.leaves(expected[0]), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    counts = [
        optax.tree.get(state, "refresh_attempts") for _, state in (rest, expected)
    ]
    assert counts[0] == counts[1] > 1
