"""matvec -> the spectral density, by stochastic Lanczos quadrature.

A random unit vector sees every eigenvalue with the same expected weight 1/P. The
tridiagonal matrix that Lanczos' iteration builds from it is a Gauss quadrature of what
it sees: nodes theta_j (eigenvalues of T) and weights (squared first components of its
eigenvectors), exact for polynomials up to degree 2 num_steps - 1. The average over
probes is the spectrum, as a set of weighted points; smoothing them is for pictures.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import draw
from rmtdamp._jax import is_traced
from rmtdamp._tree import check_params, size
from rmtdamp._types import Key, Matvec, Params

from ._apply import sum_matvec
from ._lanczos import Reorthogonalization, check_options, iterate
from ._tridiagonal import ritz


class SpectralDensity(NamedTuple):
    """Weighted points that stand for the spectrum, a row per probe.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import SpectralDensity
        >>> spectrum = SpectralDensity.from_eigenvalues(jnp.array([1.0, 3.0]))
        >>> print(*spectrum.moment(1), *spectrum.moment(2))
        2.0 0.0 5.0 0.0
    """

    nodes: jax.Array  # (num_probes, num_steps), in the unit of an eigenvalue
    weights: jax.Array  # (num_probes, num_steps), each row sums to 1
    num_parameters: int  # P
    exact: bool = False  # the nodes are the eigenvalues

    @classmethod
    def from_eigenvalues(cls, eigenvalues: jax.Array) -> "SpectralDensity":
        """The spectrum of P known eigenvalues, one row of them; P^-1 is each weight."""
        nodes = np.asarray(eigenvalues)[None]
        p = nodes.shape[1]
        weights = np.full_like(nodes, 1 / p)
        return cls(jnp.asarray(nodes), jnp.asarray(weights), p, exact=True)

    def moment(self, order: int) -> tuple[jax.Array, jax.Array]:
        """P^-1 Tr A^order and its standard error over probes.

        Returns:
            Two numbers. The error is NaN with one probe, 0 where the nodes are the
            eigenvalues.
        """
        return _moment(self.nodes, self.weights, order, self.exact)

    def density(self, grid: jax.Array, width: jax.Array | float) -> jax.Array:
        """The spectrum smoothed by Gaussians of standard deviation `width`, on `grid`.

        Args:
            grid: points (n,), in the unit of an eigenvalue.
            width: a number, or one width per grid point.

        Returns:
            The density (n,), averaged over probes; it integrates to 1.
        """
        width = jnp.broadcast_to(jnp.asarray(width, grid.dtype), grid.shape)
        nodes, weights = self.nodes.ravel(), self.weights.ravel()
        z = (grid[:, None] - nodes[None]) / width[:, None]
        peaks = jnp.exp(-0.5 * z**2) / (width[:, None] * (2 * jnp.pi) ** 0.5)
        return peaks @ weights / self.nodes.shape[0]


@functools.partial(jax.jit, static_argnames="order")
def _moment(nodes, weights, order, exact):
    per_probe = jnp.sum(weights * nodes**order, axis=1)
    count = per_probe.shape[0]
    spread = jnp.full((), jnp.nan, per_probe.dtype)
    if count > 1:
        spread = jnp.std(per_probe, ddof=1) / count**0.5
    return jnp.mean(per_probe), jnp.where(exact, 0, spread)


def spectral_density(
    matvec: Matvec,
    like: Params,
    key: Key,
    *,
    num_steps: int = 80,
    num_probes: int = 4,
    reorthogonalization: Reorthogonalization = "none",
) -> SpectralDensity:
    r"""The spectrum of a symmetric matrix as weighted points.

    For any function f, P^-1 Tr f(A) ~ mean over probes of sum_j w_j f(theta_j); for a
    polynomial f of degree below 2 `num_steps` the only error is that of the probes,
    whose standard error `SpectralDensity.moment` gives for powers.

    Without reorthogonalization no basis is stored and copies of converged eigenvalues
    appear; they share the weight of the original, and the density is none the worse.
    After breakdown the remaining points have weight 0.

    Cost: num_probes * num_steps products. Memory: four vectors like `like` ("none"), or
    `num_steps` more.

    Args:
        matvec: v -> A v with A symmetric.
        like: pytree of real floating arrays, for structure, shapes and dtypes.
        key: a key of `jax.random`.
        num_steps: points per probe, at most P.
        num_probes: independent Gaussian probes.
        reorthogonalization: as in `lanczos`.

    Returns:
        `SpectralDensity(nodes, weights, num_parameters)`.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: `num_steps` outside 1 to P, or fewer than one probe.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import spectral_density
        >>> diagonal = jnp.arange(100.0)
        >>> spectrum = spectral_density(
        ...     lambda v: diagonal * v, diagonal, jax.random.key(0), num_probes=8
        ... )
        >>> mean, stderr = spectrum.moment(1)
        >>> bool(abs(mean - 49.5) < 4 * stderr)
        True

    References:
        Golub and Meurant, Matrices, moments and quadrature, 1994. Ghorbani, Krishnan
        and Xiao, An investigation into neural net optimization via Hessian eigenvalue
        density, 2019, appendix A.
    """
    check_params(like)
    passes = check_options(num_steps, size(like), reorthogonalization)
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}, and at least 1 is needed")

    def probe(probe_key):
        start = draw(probe_key, like, jax.random.normal)
        found = iterate(matvec, like, start, num_steps, passes, passes > 0)[-1]
        return ritz(found.alphas, found.betas[:-1], found.num_steps)

    keys = jax.random.split(key, num_probes)
    if is_traced(matvec, like, keys):
        nodes, weights = jax.lax.map(probe, keys)
    else:
        rows = [probe(k) for k in keys]
        nodes, weights = (jnp.stack(x) for x in zip(*rows, strict=True))
    return SpectralDensity(nodes, weights, size(like))


def noise_matvec(first: Matvec, second: Matvec, *, factor: float = 0.5) -> Matvec:
    """A multiple of the difference of two products: the noise of a batch's Hessian.

    v -> factor (A v - B v).

    - Two halves of a batch, factor 1/2: with H_a and H_b their Hessians the batch's is
      H = (H_a + H_b) / 2, and (H_a - H_b) / 2 has the variance of its noise H - E H
      when examples are independent: the measured stand-in for eq. 6's X.
    - A batch and its data set (`dataset_matvec`), factor 1: eq. 6's X itself.

    Args:
        first: product with the Hessian of one half, or of the batch.
        second: product with the Hessian of the other half, or of the data set.
        factor: what the difference is multiplied by.

    Returns:
        A matvec, see `sum_matvec`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import noise_matvec
        >>> noise = noise_matvec(lambda v: 3 * v, lambda v: 2 * v)
        >>> print(noise(jnp.ones(2)))
        [0.5 0.5]

    References:
        Granziol and Baskerville, eq. 6.
    """
    return sum_matvec((first, second), (factor, -factor))
