"""Questions to JAX: is this being traced?"""

import jax
import jax.core


def is_traced(*trees) -> bool:
    """Whether any leaf is being traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))
