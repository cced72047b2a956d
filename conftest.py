"""JAX at its strictest in the tests, and at a user's settings in the examples.

What is sloppy fails here rather than at a user's. Four CPU devices stand in for a mesh.
"""

import importlib.metadata
import os

import hypothesis
import jax
import pytest

# Virtual devices wait for one another in threads of a pool. One of as many threads as
# devices, as on two cores, has none left for the device that is waited for.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))
# The tests compile for longer than they compute; XLA's older emitters take half as long
# to compile. XLA aborts at a flag that it does not know, so only where it was tried.
jaxlib = importlib.metadata.version("jaxlib")
if (0, 6) <= tuple(map(int, jaxlib.split(".")[:2])) <= (0, 10):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {flags}"
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_debug_key_reuse", True)

# Compilation makes a first example slow; the examples are the same at every run.
hypothesis.settings.register_profile("rmtdamp", deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=8000)
hypothesis.settings.load_profile("rmtdamp")


def pytest_configure(config):
    """Compile a program once, for all tests and workers: most are the same, and small.

    The folder stays, so that a second run of the tests hardly compiles. The fast tests
    compile for longer than they compute, so theirs is not optimised; the slow ones' is.
    """
    fast = config.getoption("markexpr") == "not slow"
    jax.config.update("jax_disable_most_optimizations", fast)
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def standard_promotion():
    """Optax itself relies on implicit promotion; our own code does not."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def _settings_of_a_user(request):
    """Docstring examples run as they would in a user's session."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield
