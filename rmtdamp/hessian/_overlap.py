"""Eigenvectors of two matrices -> how far they, and the spaces they span, agree."""

from typing import Any

import jax
import numpy as np


def squared_overlaps(first: Any, second: Any) -> np.ndarray:
    r"""<u_i, v_j>^2 between the unit eigenvectors of two matrices.

    Args:
        first: `EigenPairs` or `Outliers` with k_1 vectors u_i.
        second: the same with k_2 vectors v_j, like those of `first`.

    Returns:
        An array (k_1, k_2).

    Raises:
        ValueError: vectors of different shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import eigsh, squared_overlaps
        >>> a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 3.0, 2.0])
        >>> first, second = (
        ...     eigsh(lambda v, d=d: d * v, d, jax.random.key(0), k=2) for d in (a, b)
        ... )
        >>> print(squared_overlaps(first, second).round(3) + 0.0)
        [[0. 1.]
         [1. 0.]]
    """
    u, v = jax.tree.leaves(first.eigenvectors), jax.tree.leaves(second.eigenvectors)
    shapes = [[x.shape[1:] for x in side] for side in (u, v)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"eigenvectors of shapes {shapes[0]} and {shapes[1]} cannot be compared: "
            "both sides must be of one model"
        )
    total = np.zeros((u[0].shape[0], v[0].shape[0]))
    for x, y in zip(u, v, strict=True):
        x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, y))
        total += x @ y.T
    return total**2


def subspace_overlap(first: Any, second: Any) -> float:
    r"""k^-1 ||U^T V||_F^2: which share of one eigenspace lies in another.

    The mean squared length that the k unit vectors of `first` keep when they are
    projected on the span of `second`: 1 where the one space lies in the other, 0 where
    they are orthogonal. Between a space of k and a random one of k_2 of P dimensions it
    is k_2 / P on average.

    Args:
        first: `EigenPairs` or `Outliers` with k orthonormal vectors U.
        second: the same with k_2 vectors V, like those of `first`.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: vectors of different shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import eigsh, subspace_overlap
        >>> a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 1.0, 3.0])
        >>> first, second = (
        ...     eigsh(lambda v, d=d: d * v, d, jax.random.key(0), k=2) for d in (a, b)
        ... )
        >>> print(f"{subspace_overlap(first, second):.3f}")
        0.500
    """
    return float(squared_overlaps(first, second).sum(1).mean())
