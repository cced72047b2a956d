r"""DECIDE: what random-matrix theory says of a noisy spectrum. Numbers in, numbers out.

    variance s^2, eigenvalues  ->  densities, edges, cleaned eigenvalues

A batch Hessian is the true one plus noise, H = H_true + X (eq. 6). Where X is a Wigner
matrix of P rows with P^-1 Tr X^2 = s^2 (in number eq. 15's damping), its eigenvalues
fill the semicircle [-2s, 2s]; a true eigenvalue |nu| > s leaves this bulk, is seen at
nu + s^2/nu, and its eigenvector keeps 1 - s^2/nu^2 of its squared length (Theorem 1).
**The noise of a real Hessian is not Wigner**: on a small network its largest eigenvalue
was 4 to 18 times 2s. These laws are an overlay, not a verdict.

`variance` is s^2 = P sigma^2 / B, with sigma^2 the paper's variance per element and
example, and B the batch size. Results have the dtype of the first argument (of
`variance` after `size`), in the unit of an eigenvalue unless said otherwise; NaN gives
NaN. Python numbers are validated; arrays, which may be traced, are not.

References: Granziol and Baskerville, by equation, section 4 for all the rest; for it
Benaych-Georges and Nadakuditi (2011), section 3.1; Tracy and Widom (1996); Marchenko
and Pastur (1967); for the shrinkage Bun, Allez, Bouchaud and Potters (2016).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_TRACY_WIDOM_QUANTILES = {0.9: 0.4501, 0.95: 0.9793, 0.99: 2.0234, 0.999: 3.2724}


class Edges(NamedTuple):
    """Where the continuous part of a spectrum begins and ends.

    Example:
        >>> from rmtdamp.rmt import marchenko_pastur_edges
        >>> edges = marchenko_pastur_edges(0.25, 1.0)
        >>> print(f"{edges.lower:.2f} {edges.upper:.2f}")
        0.25 2.25
    """

    lower: jax.Array
    upper: jax.Array


def _check(name, value, lowest, open_end, way_out):
    """A Python number at an open end, below `lowest` or not finite raises."""
    if not isinstance(value, int | float):
        return
    if not lowest <= value < float("inf") or (open_end and value == lowest):
        bound = f"{'above' if open_end else 'at least'} {lowest}"
        raise ValueError(f"{name} is {value} and must be finite, {bound}: {way_out}")


def _floats(x, *others):
    """All as arrays of x's dtype, or of the default float where x has none."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.result_type(float))
    return x, *(jnp.asarray(other, x.dtype) for other in others)


def _with_scale(x, variance, *, open_end=False):
    """X and s = sqrt(variance) in one dtype."""
    way_out = "pass s^2 = P^-1 Tr X^2, such as the variance that `moments` measured"
    _check("variance", variance, 0, open_end, way_out)
    x, variance = _floats(x, variance)
    return x, jnp.sqrt(variance)


def semicircle_density(x: Any, variance: Any) -> jax.Array:
    r"""Wigner's semicircle, sqrt(4 s^2 - x^2) / (2 pi s^2) on [-2s, 2s] (eq. 7).

    Zero outside. Eq. 7 omits the norm and prints P where the spectrum's scale belongs.

    Args:
        x: where; a number or an array.
        variance: s^2 > 0.

    Returns:
        The density, in the shape of `x` and the inverse unit of an eigenvalue.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import semicircle_density
        >>> print(f"{semicircle_density(0.0, 1.0):.4f}")
        0.3183
    """
    x, s = _with_scale(x, variance, open_end=True)
    u = x / (2 * s)
    outside = jnp.abs(u) >= 1
    density = jnp.sqrt(1 - jnp.where(outside, 0, u) ** 2) / (jnp.pi * s)
    return jnp.where(outside, 0, density)


def semicircle_cdf(x: Any, variance: Any) -> jax.Array:
    r"""1/2 + (u sqrt(1 - u^2) + arcsin u) / pi, u = x/(2s): the integral of eq. 7.

    Args:
        x: where; a number or an array.
        variance: s^2 > 0.

    Returns:
        The share of the eigenvalues that are at most x, in the shape of `x`.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import semicircle_cdf
        >>> print(f"{semicircle_cdf(1.0, 1.0):.4f}")
        0.8045
    """
    x, s = _with_scale(x, variance, open_end=True)
    u = jnp.clip(x / (2 * s), -1, 1)
    return 0.5 + (u * jnp.sqrt(1 - u**2) + jnp.arcsin(u)) / jnp.pi


def semicircle_edge(variance: Any) -> jax.Array:
    """2s, where the bulk of a Wigner spectrum ends; it begins at -2s.

    The paper's proof of Theorem 1 has it at s, where true eigenvalues leave the bulk.

    Args:
        variance: s^2 >= 0.

    Returns:
        The edge.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import semicircle_edge
        >>> print(semicircle_edge(0.25))
        1.0
    """
    return 2 * _with_scale(variance, variance)[1]


def marchenko_pastur_density(x: Any, ratio: Any, variance: Any = 1.0) -> jax.Array:
    r"""sqrt((b - x)(x - a)) / (2 pi q v x) on (a, b), `marchenko_pastur_edges`.

    The spectrum of a sample covariance n^-1 Z Z^T: Z has P rows, n = P/q columns and
    independent entries of variance v. Zero outside. For q > 1 it is the continuous part
    only, of mass 1/q: the law also has an atom of weight 1 - 1/q at 0.

    Args:
        x: where; a number or an array.
        ratio: q = P/n > 0.
        variance: v > 0, of one entry of Z, in the unit of an eigenvalue: not s^2.

    Returns:
        The density, in the shape of `x` and the inverse unit of an eigenvalue.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import marchenko_pastur_density
        >>> print(f"{marchenko_pastur_density(1.0, 0.25):.4f}")
        0.6164
    """
    x, a, b, q, v = _floats(
        x, *marchenko_pastur_edges(ratio, variance), ratio, variance
    )
    outside = (x <= a) | (x >= b)
    inner = jnp.where(outside, (a + b) / 2, x)
    density = jnp.sqrt((b - inner) * (inner - a)) / (2 * jnp.pi * q * v * inner)
    return jnp.where(outside, 0, density)


def marchenko_pastur_edges(ratio: Any, variance: Any = 1.0) -> Edges:
    """The edges v (1 -+ sqrt q)^2 of a sample covariance's bulk.

    Args:
        ratio: q = P/n > 0, variables over samples.
        variance: v > 0, of one entry, in the unit of an eigenvalue: not s^2.

    Returns:
        `Edges(lower, upper)`, in the dtype of `ratio`.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import marchenko_pastur_edges
        >>> print(marchenko_pastur_edges(0.25).upper)
        2.25
    """
    _check("ratio", ratio, 0, True, "pass P/n, variables over samples")
    _check("variance", variance, 0, True, "pass that of one entry of the data matrix")
    ratio, variance = _floats(ratio, variance)
    root = jnp.sqrt(ratio)
    return Edges(variance * (1 - root) ** 2, variance * (1 + root) ** 2)


def tracy_widom_width(size: Any, variance: Any) -> jax.Array:
    r"""S P^(-2/3), the scale on which the edge of a Wigner spectrum is blurred.

    The largest eigenvalue (GOE) is near 2s + s P^(-2/3) TW_1, where TW_1 has mean
    -1.20653 and standard deviation 1.26798.

    Args:
        size: P >= 1.
        variance: s^2 >= 0.

    Returns:
        The scale; times 1.26798 it is a standard deviation.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import tracy_widom_width
        >>> print(f"{tracy_widom_width(1000, 1.0):.4f}")
        0.0100
    """
    _check("size", size, 1, False, "pass P, the number of parameters")
    _, s = _with_scale(variance, variance)
    return s * jnp.asarray(size, s.dtype) ** (-2 / 3)


def tracy_widom_edge(size: Any, variance: Any, level: float = 0.95) -> jax.Array:
    """2s + s P^(-2/3) q, which noise alone exceeds with probability 1 - level.

    Args:
        size: P >= 1.
        variance: s^2 >= 0.
        level: that of q, the quantile of TW_1: 0.9, 0.95, 0.99 or 0.999.

    Returns:
        The edge of a bulk of P eigenvalues; its negative is the lower one.

    Raises:
        ValueError: a Python number out of its range, or another `level`.

    Example:
        >>> from rmtdamp.rmt import tracy_widom_edge
        >>> print(f"{tracy_widom_edge(1000, 1.0, 0.99):.3f}")
        2.020
    """
    if level not in _TRACY_WIDOM_QUANTILES:
        choices = list(_TRACY_WIDOM_QUANTILES)
        raise ValueError(f"level is {level}, not in the table: choose from {choices}")
    width = tracy_widom_width(size, variance)
    return semicircle_edge(variance) + width * _TRACY_WIDOM_QUANTILES[level]


def spiked_eigenvalue(true: Any, variance: Any) -> jax.Array:
    r"""Nu + s^2/nu where |nu| > s: where a true eigenvalue is seen, as P grows.

    For a true Hessian of low rank in Wigner noise. For |nu| <= s the spike drowns, and
    the extreme eigenvalue on its side is the edge: 2s, or -2s for nu < 0.

    Args:
        true: nu, a number or an array.
        variance: s^2 >= 0.

    Returns:
        lambda, in the shape of `true`.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import spiked_eigenvalue
        >>> print(spiked_eigenvalue(-2.0, 1.0), spiked_eigenvalue(0.5, 1.0))
        -2.5 2.0
    """
    nu, s = _with_scale(true, variance)
    drowned = jnp.abs(nu) <= s
    seen = nu + s * (s / jnp.where(drowned, 1, nu))
    return jnp.where(drowned, jnp.where(nu < 0, -2 * s, 2 * s), seen)


def true_eigenvalue(seen: Any, variance: Any) -> jax.Array:
    r"""(lambda + sign(lambda) sqrt(lambda^2 - 4 s^2)) / 2: back from what is seen.

    The inverse of `spiked_eigenvalue` for |lambda| > 2s; NaN in the bulk and at its
    edge, from which there is no way back.

    Args:
        seen: lambda, a number or an array.
        variance: s^2 >= 0.

    Returns:
        nu, in the shape of `seen`.

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import true_eigenvalue
        >>> print(true_eigenvalue(-2.5, 1.0), true_eigenvalue(0.5, 1.0))
        -2.0 nan
    """
    seen, s = _with_scale(seen, variance)
    size = jnp.abs(seen)
    outlier = size > 2 * s
    # The factors keep the digits that a difference of squares loses near the edge.
    product = jnp.where(outlier, (size - 2 * s) * (size + 2 * s), 1)
    return jnp.where(outlier, jnp.sign(seen) * (size + jnp.sqrt(product)) / 2, jnp.nan)


def overlap_squared(true: Any, variance: Any) -> jax.Array:
    r"""1 - s^2/nu^2 where |nu| > s, else 0: what an eigenvector keeps (eq. 8).

    Theorem 1: the squared inner product of a true and a seen unit eigenvector, as P
    grows. At finite P the step at |nu| = s is smooth, on the scale s P^(-1/3).

    Args:
        true: nu, a number or an array, such as `true_eigenvalue` of a seen one.
        variance: s^2 >= 0.

    Returns:
        The squared overlap, in the shape of `true`, in [0, 1].

    Raises:
        ValueError: a Python number out of its range.

    Example:
        >>> from rmtdamp.rmt import overlap_squared
        >>> print(overlap_squared(2.0, 1.0), overlap_squared(0.5, 1.0))
        0.75 0.0
    """
    nu, s = _with_scale(true, variance)
    drowned = jnp.abs(nu) <= s
    ratio = s / jnp.where(drowned, 1, nu)
    return jnp.where(drowned, 0, (1 - ratio) * (1 + ratio))


def _distances(eigenvalues, nodes, weights, variance, size):
    """Lambda, s, u = (lambda - theta)/s and weights, the nodes on the last axis."""
    _check("size", size, 1, False, "pass P, the number of parameters")
    eigenvalues, s = _with_scale(eigenvalues, variance)
    nodes, weights = (jnp.asarray(a, eigenvalues.dtype) for a in (nodes, weights))
    if nodes.size == 0 or nodes.ndim == 0 or nodes.shape != weights.shape:
        found = f"nodes of shape {nodes.shape} with weights of {weights.shape}"
        raise ValueError(f"{found}: both are (num_nodes,) or (num_probes, num_nodes)")
    num_probes = nodes.size // nodes.shape[-1]
    last = (1,) * eigenvalues.ndim + (-1,)
    u = (eigenvalues[..., None] - nodes.reshape(last)) / jnp.where(s > 0, s, 1)
    return eigenvalues, s, u, weights.reshape(last) / num_probes


def rotationally_invariant_shrinkage(
    eigenvalues: Any, nodes: Any, weights: Any, variance: Any, size: Any
) -> jax.Array:
    r"""Xi = lambda - 2 s^2 Re g(lambda), the best eigenvalues on the seen eigenvectors.

    Wigner noise, any true Hessian: sum_i xi_i phi_i phi_i^T has the least Frobenius
    error of all matrices on the seen eigenvectors phi_i, as P grows. g is the Stieltjes
    transform of the seen spectrum, P^-1 Tr (lambda - H)^-1, by quadrature: Re g ~
    sum_j w_j (lambda - theta_j) / ((lambda - theta_j)^2 + eta^2), eta = s/sqrt(P), over
    all P eigenvalues with weights 1/P. Of k Lanczos nodes pass k for P: eta must span
    their gaps (P = 1000, k = 60: 1 % above the oracle's error; with P's eta 29 %).

    Args:
        eigenvalues: lambda, those to clean; a number or an array.
        nodes: theta, of shape (num_nodes,) or (num_probes, num_nodes).
        weights: w >= 0, like `nodes`, of sum 1 per probe; probes are averaged.
        variance: s^2 >= 0 of the noise.
        size: P >= 1, or the number of Lanczos steps; it sets eta only.

    Returns:
        xi, in the shape of `eigenvalues`.

    Raises:
        ValueError: a Python number out of its range, or shapes that do not match.

    Example:
        >>> from rmtdamp.rmt import rotationally_invariant_shrinkage as shrink
        >>> print(f"{shrink(2.0, [-1.0, 1.0], [0.5, 0.5], 0.3, 1e9):.3f}")
        1.600
    """
    lambdas, s, u, weights = _distances(eigenvalues, nodes, weights, variance, size)
    eta_squared = 1 / jnp.asarray(size, s.dtype)  # in units of s^2
    return lambdas - 2 * s * jnp.sum(weights * u / (u**2 + eta_squared), -1)


def outlier_true_eigenvalue(
    eigenvalues: Any, nodes: Any, weights: Any, variance: Any, size: Any
) -> jax.Array:
    r"""Nu = lambda - s^2 g(lambda), own atom excluded: back from an outlier.

    `true_eigenvalue` where the rest of the true Hessian is not 0. The own atom is every
    node within s/sqrt(P) of lambda, the order of its fluctuation, so that the copies
    from several probes count as one. For converged Ritz values only.

    Args:
        eigenvalues: lambda outside the bulk; a number or an array.
        nodes: theta, as in `rotationally_invariant_shrinkage`.
        weights: w >= 0, likewise.
        variance: s^2 >= 0 of the noise.
        size: P >= 1.

    Returns:
        nu, in the shape of `eigenvalues`.

    Raises:
        ValueError: as `rotationally_invariant_shrinkage`.

    Example:
        >>> from rmtdamp.rmt import outlier_true_eigenvalue
        >>> print(outlier_true_eigenvalue(5.0, [0.0, 5.0], [0.99, 0.01], 1.0, 100))
        4.802
    """
    lambdas, s, u, weights = _distances(eigenvalues, nodes, weights, variance, size)
    own = jnp.abs(u) <= jnp.asarray(size, s.dtype) ** -0.5
    return lambdas - s * jnp.sum(jnp.where(own, 0, weights / jnp.where(own, 1, u)), -1)
