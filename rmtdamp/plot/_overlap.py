"""Eigenvectors of two matrices -> how far they agree, and how far they should."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp import rmt
from rmtdamp.hessian import EigenPairs, squared_overlaps
from rmtdamp.outliers import Outliers

from ._axis import BULK, LAW, SPIKE, Axes, FuncFormatter, own_axes


@jax.jit
def _theorem_1(magnitudes, variance):
    """overlap^2 with the truth of what a batch shows in noise of a semicircle."""
    return rmt.overlap_squared(
        jnp.nan_to_num(rmt.true_eigenvalue(magnitudes, variance)), variance
    )


def eigenvector_overlap(
    first: Outliers,
    second: Outliers | EigenPairs,
    *,
    variance: Any = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Measured squared overlaps of eigenvectors beside what one batch tells of them.

    A batch shows a true eigenvector t as u = c t + (1 - c^2)^1/2 r, with c^2 its
    squared overlap and r a unit vector of noise orthogonal to t. Hence, up to terms of
    order 1/P,

    - between a batch and the truth, for which the data set stands, <u, t>^2 = c^2;
    - between two independent batches <u_1, u_2>^2 = c_1^2 c_2^2, the product, since r_1
      and r_2 are independent: c^4 for batches of one size.

    Filled points: the eigenvector's best partner among those of `second`. Open points:
    its squared projection on all of them, which is what c^2 is about where eigenvalues
    lie close to each other and their vectors mix. Crosses, for the outliers: the same
    as estimated from the halves of the batch, c^2 or c_1^2 c_2^2. Line: Theorem 1, for
    noise of a semicircle.

    A data set of N examples that holds the batch of B is the truth up to B/N.

    Args:
        first: outliers of a batch.
        second: outliers of another batch, independent of the first, or eigenpairs that
            stand for the truth, such as those of the data set (`dataset_matvec`).
        variance: s^2 of the semicircle, in the squared unit of an eigenvalue; default:
            no line.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: `first` is not `Outliers`, whose overlaps are estimated.
        ValueError: eigenvectors of different shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp import plot
        >>> from rmtdamp.hessian import halves, hessian_matvec, split_half_eigsh
        >>> from rmtdamp.outliers import outliers
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2) / 2
        >>> data = jax.random.normal(jax.random.key(0), (2, 800, 50)).at[..., 0].mul(3)
        >>> params, found = jnp.zeros(50), []
        >>> for batch, key in zip(data, jax.random.split(jax.random.key(1))):
        ...     a, b = (hessian_matvec(loss_fn, params, h) for h in halves(batch))
        ...     found.append(outliers(split_half_eigsh(a, b, params, key, k=3)))
        >>> ax = plot.eigenvector_overlap(*found)
        >>> ax.get_ylabel()
        'squared overlap'

    References:
        Granziol and Baskerville, Theorem 1 (eq. 8).
    """
    if not isinstance(first, Outliers):
        raise TypeError(
            f"first is of type {type(first).__name__}, and must be the Outliers of a "
            "batch, whose overlaps are estimated: swap the two, or see "
            "rmtdamp.outliers.outliers"
        )
    overlaps = squared_overlaps(first, second)
    estimate = np.asarray(first.overlaps_squared, np.float64)
    batches = 1
    if isinstance(second, Outliers):
        estimate = estimate * np.asarray(second.overlaps_squared)[overlaps.argmax(1)]
        batches = 2
    out = np.asarray(first.is_outlier)
    seen = np.abs(np.asarray(first.eigenvalues, np.float64))

    ax = own_axes(ax, (7.0, 4.5))
    every = overlaps.sum(1)
    label = f"projection on all {overlaps.shape[1]}"
    ax.plot(seen, every, "o", mfc="none", color=SPIKE, ms=7, label=label)
    ax.plot(seen, overlaps.max(1), ".", color=SPIKE, ms=7, label="best partner")
    label = "estimated from the halves"
    ax.plot(seen[out], estimate[out], "x", color=BULK, ms=7, label=label)
    lower, upper = 0.9 * float(seen.min()), 1.15 * float(seen.max())
    if variance is not None:
        lower = min(lower, 0.9 * (2 * float(variance) ** 0.5 or lower))
        grid = np.geomspace(lower, upper, 400)
        law = np.asarray(_theorem_1(grid, float(variance))) ** batches
        label = "Theorem 1 (semicircle)"
        ax.plot(grid, law, color=LAW, lw=1.5, ls="--", label=label)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlim(lower, upper)
    ax.set_ylim(-0.03, 1.05)
    ax.set_xlabel("|λ| seen on the batch  (loss / parameter²)")
    ax.set_ylabel("squared overlap")
    ax.legend(fontsize=8, loc="best")
    return ax
