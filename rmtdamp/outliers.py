r"""DECIDE: which eigenvectors of a batch Hessian are more than noise, and by how much.

    eigenpairs of a batch, agreement of its halves on each  ->  Outliers

The Hessian of a batch is the expected one plus noise, H = E H + X (eq. 6). The paper
takes X for a Wigner matrix and judges an eigenvalue by the edge of its spectrum. **The
noise of a real Hessian has the sharp directions in it**: what reaches far beyond the
edge of the rest is the scatter of curvature along true eigenvectors, so that no edge
tells truth from noise. Hence a vector is judged and not a value: is it there again in
examples it was not found on?

A direction whose squared overlap with the truth is c^2 in a batch and c_h^2 in half of
it is shown by the two halves with squared cosine c_h^4 to each other, since their noise
is independent. In the setting of Theorem 1, as P grows, the batch's vector has squared
cosine 2 c_h^2 / (1 + c_h^2) to that of a half, so that the agreement which
`rmtdamp.hessian.split_half_eigsh` measures is 2 c_h^4 / (1 + c_h^2), and
c^2 = (1 + c_h^2) / 2: one number measured, both overlaps known. For any noise that
turns vectors by little the same holds to first order, because the squared angle halves
as the batch doubles.

`spiked_law` answers another question: what noise without preferred directions would do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._types import Params
from rmtdamp.hessian import SpectralDensity, SplitHalfPairs


class Outliers(NamedTuple):
    """Eigenvectors of a batch Hessian and what is behind them, largest first.

    [H] is the unit of a Hessian eigenvalue.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import SplitHalfPairs
        >>> from rmtdamp.outliers import outliers
        >>> values = jnp.array([9.0, 1.0])
        >>> agreements = jnp.array([0.9, 0.0])
        >>> found = outliers(
        ...     SplitHalfPairs(values, jnp.eye(2, 500), jnp.zeros(2), agreements, 40)
        ... )
        >>> print(found.is_outlier)
        [ True False]
    """

    eigenvalues: jax.Array  # (k,), lambda as seen on the batch, in [H]
    residuals: jax.Array  # (k,), an eigenvalue of H lies this near to lambda, in [H]
    is_outlier: jax.Array  # (k,), bool: more than noise
    true_eigenvalues: jax.Array  # (k,), nu of the expected Hessian, else NaN, in [H]
    overlaps_squared: jax.Array  # (k,), c^2, its squared projection on the truth
    eigenvectors: Params  # leading axis k, as seen, of unit norm


def outliers(measured: SplitHalfPairs) -> Outliers:
    r"""Which eigenvectors of a batch Hessian are more than noise. Pure.

    From the agreement a of the halves (see above), c_h^2 = (a + (a^2 + 8 a)^1/2) / 4,

        c^2 = (1 + c_h^2) / 2,    nu = lambda / (2 - c^2),    outlier: c_h^4 > 0.6.

    A vector is an outlier if the halves show each other more than 0.6 of it, which is
    from c^2 = 0.89 on. c^2 estimates the squared projection of the batch's eigenvector
    on the span of the leading true ones, as many as were compared, so that turning
    among close eigenvalues costs nothing. Near 1/2 it is no estimate: a half that shows
    nothing of a direction does not tell how much less than half of it the whole shows.

    nu takes away what noise adds to an eigenvalue by turning its vector (Theorem 1).
    The scatter of the curvature along the vector itself remains in it.

    Assumed: examples are independent, and the noise turns vectors into many more than k
    directions. Nothing is assumed of its law, nor of how large it is in which
    direction. Multiplying the loss by a number changes lambda and nu alone.

    The 0.6 was chosen on tanh networks of 610 parameters with batches of 64 to 256,
    held against the k + 2 leading eigenvectors of the whole data set. On ReLU networks
    it then missed 4.6 % of 2,279 vectors with a squared overlap of 0.9 or more, and
    called true 8 of 158 with less than 0.5, most of them true directions that are not
    among the k + 2; above 0.9 c^2 was off by -0.01 ± 0.03. Where the truth is known
    (spiked matrices, curvature that scatters, heavy tails), it missed at most 1 % and
    called none. What is missed: directions whose curvature scatters so much that a half
    has little of it or the wrong sign, and the last ones, where the order of close
    eigenvalues decides which are among the k. Ask for a few more than you need.

    Args:
        measured: from `rmtdamp.hessian.split_half_eigsh`.

    Returns:
        `Outliers`.

    Raises:
        TypeError: `measured` comes from elsewhere.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import halves, hessian_matvec, split_half_eigsh
        >>> from rmtdamp.outliers import outliers
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2) / 2
        >>> batch = jax.random.normal(jax.random.key(0), (800, 50)).at[:, 0].mul(3)
        >>> params = jnp.zeros(50)
        >>> first, second = (hessian_matvec(loss_fn, params, h) for h in halves(batch))
        >>> found = outliers(
        ...     split_half_eigsh(first, second, params, jax.random.key(1), k=3)
        ... )
        >>> print(found.is_outlier, f"{found.overlaps_squared[0]:.2f}")
        [ True False False] 0.99

    References:
        Granziol and Baskerville, section 4. We depart from it in judging by the halves
        of the batch in place of the semicircle.
    """
    if not isinstance(measured, SplitHalfPairs):
        raise TypeError(
            f"measured is {type(measured).__name__}, and a verdict needs what two "
            "halves of the batch agree on: hand over what split_half_eigsh returns"
        )
    is_outlier, true, overlaps = _judged(measured.eigenvalues, measured.agreements)
    return Outliers(
        eigenvalues=measured.eigenvalues,
        residuals=measured.residuals,
        is_outlier=is_outlier,
        true_eigenvalues=true,
        overlaps_squared=overlaps,
        eigenvectors=measured.eigenvectors,
    )


@jax.jit
def _judged(eigenvalues, agreements):
    # Below 0 is chance, above 1 rounding. NaN stays.
    agreements = jnp.clip(agreements, 0, 1)
    half = (agreements + jnp.sqrt(agreements * (agreements + 8))) / 4
    overlaps = (1 + half) / 2
    is_outlier = half**2 > 0.6
    return (
        is_outlier,
        jnp.where(is_outlier, eigenvalues / (2 - overlaps), jnp.nan),
        overlaps,
    )


def spiked_law(
    eigenvalues: jax.Array, noise: SpectralDensity
) -> tuple[jax.Array, jax.Array]:
    r"""(nu, overlap^2) of eigenvalues seen outside a noise of any symmetric law.

    Holds as P grows for noise without preferred directions around a true Hessian of low
    rank. **The noise of a network is not like that**: with its measured spectrum this
    law predicted overlaps of 0.999 where they were 0.98, and none at all where they
    were 0.97. Take `outliers` for a verdict, this for what Theorem 1 would say.

    1/nu = G(lambda) and overlap^2 = -G^2 / G', with G(x) = P^-1 Tr (x - X)^-1. X and
    -X have the same law, since the halves of a batch may change places, so that
    G(x) = sum_j w_j x / (x^2 - theta_j^2). For Wigner's semicircle these are
    nu = (lambda + (lambda^2 - 4 s^2)^1/2) / 2 and 1 - s^2 / nu^2: Theorem 1. Only
    traces of the noise enter, so a quadrature from a few probes will do:
    `spectral_density` of `noise_matvec` of two halves.

    Args:
        eigenvalues: lambda, (k,), each of larger magnitude than every node.
        noise: quadrature of the noise's spectrum.

    Returns:
        Two arrays (k,): nu in the unit of an eigenvalue, and the overlap in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import SpectralDensity
        >>> from rmtdamp.outliers import spiked_law
        >>> two_points = SpectralDensity(
        ...     jnp.array([[-1.0, 1.0]]), jnp.array([[0.5, 0.5]]), 9
        ... )
        >>> nu, overlap = spiked_law(jnp.array([2.0]), two_points)
        >>> print(nu, overlap)
        [1.5] [0.8]

    References:
        Benaych-Georges and Nadakuditi, The eigenvalues and eigenvectors of finite, low
        rank perturbations of large random matrices, 2011, theorems 2.1 and 2.2.
    """
    x = jnp.asarray(eigenvalues)[:, None]
    nodes = noise.nodes.ravel()[None].astype(x.dtype)
    weights = noise.weights.ravel()[None].astype(x.dtype) / noise.nodes.shape[0]
    # (x - theta)(x + theta) keeps the digits that a difference of squares loses.
    gap = (x - nodes) * (x + nodes)
    g = jnp.sum(weights * x / gap, axis=1)
    slope = -jnp.sum(weights * (x**2 + nodes**2) / gap**2, axis=1)
    return 1 / g, -(g**2) / slope
