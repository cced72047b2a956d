"""Eigenvectors of two matrices -> how far they agree, and how far they should."""

from typing import Any

import jax
import numpy as np

from rmtdamp import rmt
from rmtdamp.hessian import EigenPairs
from rmtdamp.outliers import Outliers, spiked_law

from ._axis import BULK, LAW, SPIKE, Axes, FuncFormatter, own_axes


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
        >>> from rmtdamp.hessian import eigsh
        >>> from rmtdamp.plot import squared_overlaps
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


def _measured_law(batch: Outliers, magnitudes: np.ndarray) -> np.ndarray:
    """overlap^2 with the truth of what a batch shows, by its measured noise."""
    edge = float(batch.edge)
    dtype = batch.noise.nodes.dtype
    outside = np.where(magnitudes > edge, magnitudes, 2 * edge + 1)
    law = np.asarray(spiked_law(outside.astype(dtype), batch.noise)[1])
    return np.where(magnitudes > edge, law, 0)


def _theorem_1(batch: Outliers, magnitudes: np.ndarray) -> np.ndarray:
    """The same by Theorem 1: noise of a semicircle of the same variance."""
    variance = float(batch.variance)
    true = np.asarray(rmt.true_eigenvalue(magnitudes, variance))
    true = np.where(np.isnan(true), 0, true)
    return np.asarray(rmt.overlap_squared(true, variance))


def eigenvector_overlap(
    first: Outliers, second: Outliers | EigenPairs, *, ax: Axes | None = None
) -> Axes:
    r"""Measured squared overlaps of eigenvectors against what theory predicts.

    A batch shows a true eigenvector t as u = c t + (1 - c^2)^1/2 r, with c^2 its
    squared overlap (Theorem 1) and r a unit vector of noise, without preferred
    direction orthogonal to t. Hence, up to terms of order 1/P,

    - between a batch and the truth, for which the data set stands, <u, t>^2 = c^2;
    - between two independent batches <u_1, u_2>^2 = c_1^2 c_2^2, the product, since r_1
      and r_2 are independent: c^4 for batches of one size.

    Filled points: the eigenvector's best partner among those of `second`. Open points:
    its squared projection on all of them, which is what the laws are about where
    eigenvalues lie close to each other and their vectors mix. Lines: the prediction
    from the measured noise (`rmtdamp.outliers.spiked_law`), and Theorem 1, for a
    semicircle of the same variance. Shaded: inside the measured noise of `first`, where
    there is no verdict.

    A data set of N examples that holds the batch of B is the truth up to B/N.

    Args:
        first: outliers of a batch.
        second: outliers of another batch, independent of the first, or eigenpairs that
            stand for the truth, such as those of the data set (`dataset_matvec`).
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: `first` is not `Outliers`: it is its noise that predicts.
        ValueError: eigenvectors of different shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp import plot
        >>> from rmtdamp.hessian import hessian_matvec
        >>> from rmtdamp.outliers import halves, outliers
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2) / 2
        >>> data = jax.random.normal(jax.random.key(0), (2, 800, 50)).at[..., 0].mul(3)
        >>> params, found = jnp.zeros(50), []
        >>> for batch, key in zip(data, jax.random.split(jax.random.key(1))):
        ...     a, b = (hessian_matvec(loss_fn, params, h) for h in halves(batch))
        ...     found.append(outliers(a, b, params, key, k=3))
        >>> ax = plot.eigenvector_overlap(*found)
        >>> ax.get_ylabel()
        'squared overlap'

    References:
        Granziol and Baskerville, Theorem 1 (eq. 8).
    """
    if not isinstance(first, Outliers):
        raise TypeError(
            f"first is of type {type(first).__name__}, and must be the Outliers of a "
            "batch, whose noise makes the prediction: swap the two, or see "
            "rmtdamp.outliers.outliers"
        )
    overlaps = squared_overlaps(first, second)
    batches = [x for x in (first, second) if isinstance(x, Outliers)]
    seen = np.abs(np.asarray(first.eigenvalues, np.float64))
    edge, s = float(first.edge), float(first.variance) ** 0.5
    lower = 0.9 * min(float(seen.min()), edge, 2 * s or edge)
    grid = np.geomspace(lower, 1.15 * max(float(seen.max()), edge), 400)
    predict = lambda law: np.prod([law(batch, grid) for batch in batches], axis=0)

    ax = own_axes(ax, (7.0, 4.5))
    ax.axvspan(grid[0], edge, color="0.92", lw=0, label="inside the measured noise")
    beyond = grid > max(float(batch.edge) for batch in batches)
    measured = np.where(beyond, predict(_measured_law), np.nan)
    ax.plot(grid, measured, color=BULK, lw=1.5, label="law of the measured noise")
    label = "Theorem 1 (semicircle)"
    ax.plot(grid, predict(_theorem_1), color=LAW, lw=1.5, ls="--", label=label)
    every = overlaps.sum(1)
    label = f"projection on all {overlaps.shape[1]}"
    ax.plot(seen, every, "o", mfc="none", color=SPIKE, ms=7, label=label)
    ax.plot(seen, overlaps.max(1), ".", color=SPIKE, ms=7, label="best partner")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlim(grid[0], grid[-1])
    ax.set_ylim(-0.03, 1.05)
    ax.set_xlabel("|λ| seen on the batch  (loss / parameter²)")
    ax.set_ylabel("squared overlap")
    ax.legend(fontsize=8, loc="best")
    return ax
