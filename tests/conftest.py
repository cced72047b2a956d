"""JAX at its strictest: what is sloppy fails here rather than at a user's."""

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_debug_key_reuse", True)

# Compilation makes a first example slow; the examples are the same at every run.
hypothesis.settings.register_profile("rmtdamp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rmtdamp")


@pytest.fixture
def standard_promotion():
    """Optax itself relies on implicit promotion; our own code does not."""
    with jax.numpy_dtype_promotion("standard"):
        yield
