r"""DECIDE: what the flatness of a solution guarantees: an explicit PAC-Bayes bound.

    a layer's eigenvalues h, n  ->  variances s  ->  KL(Q || P)  ->  bound of the error

The posterior Q = N(w, S) is centred at the trained weights w, S diagonal in an
orthonormal basis of each layer, such as that of its Kronecker factors; the prior is
P = N(w_0, lambda I) with w_0 drawn before training and a lambda for each layer, chosen
from a grid of J at the price of ln J. In the quadratic model of the loss the best S is

    s_i = 1 / (n h_i + 1 / lambda),    argmin_S  Tr(H S) / 2 + KL(Q || P) / n.

How good the model is does not matter to the bound, which holds for any Q; the error of
Q is measured, by networks drawn from it. The n of the variances may be another number
than that of the examples: it says how much the loss counts, and is as free as Q is.

References: Maurer, A note on the PAC Bayesian theorem, 2004, theorem 5. Langford and
Caruana, (Not) bounding the true error, 2001, section 4. Dziugaite and Roy, Computing
nonvacuous generalization bounds, 2017. Layer-wise: Wu et al., 2020, arXiv 2010.04261.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlog1py, xlogy

from rmtdamp._checks import check_range
from rmtdamp._types import Key, Params
from rmtdamp.kronecker import Block, Eigenbasis, from_matrix

_HALVINGS = 40  # beyond float32's resolution


def kl_inverse(rate: Any, divergence: Any) -> jax.Array:
    r"""The largest p with kl(rate || p) <= divergence, between coins.

    kl(q || p) = q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)), in nats. By bisection,
    rounded up.

    Args:
        rate: q, an observed rate in [0, 1]; numbers or arrays.
        divergence: what kl is bounded by, at least 0.

    Returns:
        p in [q, 1].

    Raises:
        ValueError: a Python number out of range.

    Example:
        >>> from rmtdamp.pac_bayes import kl_inverse
        >>> print(f"{kl_inverse(0.0, 0.1):.4f}")  # 1 - exp(-0.1)
        0.0952
    """
    check_range("rate", rate, lambda q: 0 <= q <= 1, "in [0, 1]")
    check_range("divergence", divergence, lambda c: c >= 0, "at least 0")
    q = jnp.asarray(rate, jnp.result_type(float))
    return _bisect(*jnp.broadcast_arrays(q, jnp.asarray(divergence, q.dtype)))


@jax.jit
def _bisect(q, bound):
    entropy = xlogy(q, q) + xlogy(1 - q, 1 - q)

    def halve(_, ends):
        low, high = ends
        p = (low + high) / 2
        inside = entropy - xlogy(q, p) - xlog1py(1 - q, -p) <= bound
        return jnp.where(inside, p, low), jnp.where(inside, high, p)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (q, jnp.ones_like(q)))[1]


def gaussian_kl(
    variances: Params, prior_variance: Any, distance_squared: Any
) -> jax.Array:
    """KL(N(w, S) || N(w_0, lambda I)) in nats, S diagonal in an orthonormal basis.

    (1/2) (sum_i (s_i / lambda - 1 - ln(s_i / lambda)) + ||w - w_0||^2 / lambda).

    Args:
        variances: s, pytree of positive arrays; the basis does not matter.
        prior_variance: lambda.
        distance_squared: ||w - w_0||^2.

    Returns:
        The divergence, a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.pac_bayes import gaussian_kl
        >>> print(gaussian_kl(jnp.full(3, 0.5), 0.5, 4.0))
        4.0
    """
    ratios = jax.tree.map(lambda s: s / prior_variance, variances)
    terms = jax.tree.map(lambda r: jnp.sum(r - 1 - jnp.log(r)), ratios)
    total = sum(jax.tree.leaves(terms), jnp.asarray(distance_squared / prior_variance))
    return total / 2


class Gaussian(NamedTuple):
    """A layer's posterior around its weights, and what it costs.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.pac_bayes import best_gaussian
        >>> found = best_gaussian(jnp.array([0.0, 9.0]), 0.2, 100, [0.1])
        >>> print(f"{found.prior_variance:.1f} {found.kl:.2f}")
        0.1 2.76
    """

    variances: jax.Array  # like the eigenvalues, s
    prior_variance: jax.Array  # (), lambda
    kl: jax.Array  # (), of this layer


def best_gaussian(
    eigenvalues: jax.Array,
    distance_squared: Any,
    num_examples: Any,
    grid: Sequence[float],
) -> Gaussian:
    r"""The best S and lambda of a layer in the quadratic model.

    With the best S, n (Tr(H S) / 2 + KL / n) = (1/2) (||w - w_0||^2 / lambda + sum_i
    ln(1 + n lambda h_i)), which is lowest over the grid. By Jensen's inequality no
    isotropic posterior (all h_i at their mean) does better.

    Args:
        eigenvalues: h, of the layer's Hessian in the basis; negative ones count as 0.
        distance_squared: ||w - w_0||^2 of the layer.
        num_examples: n, or another weight of the loss.
        grid: the prior variances to choose from, fixed before the data is seen.

    Returns:
        `Gaussian`. The union over the choices costs ln(len(grid)) for each layer, see
        `error_bound`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.pac_bayes import best_gaussian
        >>> found = best_gaussian(jnp.array([0.0, 9.0]), 0.2, 100, [0.01, 0.1, 1.0])
        >>> print(found.prior_variance, found.variances)
        0.1 [0.1       0.0010989]
    """
    h, scales = jnp.maximum(eigenvalues, 0), jnp.asarray(grid, eigenvalues.dtype)
    return _best_gaussian(h, distance_squared, num_examples, scales)


@jax.jit
def _best_gaussian(h, distance_squared, num_examples, scales):
    def objective(scale):
        return distance_squared / scale + jnp.sum(jnp.log1p(num_examples * scale * h))

    best = scales[jnp.argmin(jax.lax.map(objective, scales))]
    variances = 1 / (num_examples * h + 1 / best)
    return Gaussian(variances, best, gaussian_kl(variances, best, distance_squared))


def draw(
    key: Key,
    params: Params,
    blocks: Sequence[Block],
    bases: Sequence[Eigenbasis],
    variances: Sequence[jax.Array],
) -> Params:
    """A network of the posterior: W + Q_A (s^1/2 * noise) Q_G^T in each layer.

    Args:
        key: a key of `jax.random`.
        params: w, the mean.
        blocks: of the layers; other params stay as they are, and must then be the same
            as before training.
        bases: of each layer's factors.
        variances: of each layer, (groups, rows, columns).

    Returns:
        Params like `params`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.kronecker import KroneckerFactors, eigenbasis, make_blocks
        >>> from rmtdamp.pac_bayes import draw
        >>> params = {"w": jnp.ones((2, 1))}
        >>> blocks = make_blocks(params, {"dense": {"kernel": "w"}})
        >>> basis = eigenbasis(KroneckerFactors(jnp.eye(2)[None], jnp.ones((1, 1, 1))))
        >>> variances = jnp.array([[[1.0], [0.0]]])
        >>> found = draw(jax.random.key(0), params, blocks, [basis], [variances])
        >>> print(found["w"][1])
        [1.]
    """
    leaves, treedef = jax.tree.flatten(params)
    layers = zip(
        jax.random.split(key, len(blocks)), blocks, bases, variances, strict=True
    )
    for k, block, basis, s in layers:
        noise = jnp.sqrt(s) * jax.random.normal(k, s.shape, s.dtype)
        noise = jnp.einsum("gax,gxy,gby->gab", basis.inputs, noise, basis.outputs)
        for place, part in zip(block.leaves, from_matrix(block, noise), strict=True):
            leaves[place] = leaves[place] + part.astype(leaves[place].dtype)
    return jax.tree.unflatten(treedef, leaves)


def error_bound(
    observed: Any,
    kl: Any,
    num_examples: int,
    *,
    num_draws: int,
    num_priors: int = 1,
    failure_probability: float = 0.05,
) -> jax.Array:
    r"""A bound of the expected error of networks drawn from Q, on unseen examples.

    With probability at least 1 - p over n examples and m draws, p half for each,

        kl(L_m || L_n(Q)) <= ln(4 / p) / m,
        kl(L_n(Q) || L(Q)) <= (KL(Q || P) + ln(4 sqrt(n) J / p)) / n,

    L_m the mean over m independent draws of (network, examples of the training set),
    L_n(Q) its expectation, L(Q) the error on unseen examples.

    Args:
        observed: L_m in [0, 1].
        kl: KL(Q || P) of all layers, in nats.
        num_examples: n, of the training set, at least 8.
        num_draws: m.
        num_priors: J, how many priors P was chosen from: the product of the layers'.
        failure_probability: p, in (0, 1).

    Returns:
        The bound of L(Q), in [0, 1]. From the error of blind guessing on it is vacuous.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> from rmtdamp.pac_bayes import error_bound
        >>> print(f"{error_bound(0.05, 3000.0, 60_000, num_draws=4000):.3f}")
        0.166

    References:
        Maurer, 2004, theorem 5; Langford and Caruana, 2001, for the draws.
    """
    check_range("kl", kl, lambda c: c >= 0, "at least 0")
    check_range("num_examples", num_examples, lambda n: n >= 8, "at least 8")
    check_range("num_draws", num_draws, lambda m: m >= 1, "at least 1")
    check_range("num_priors", num_priors, lambda j: j >= 1, "at least 1")
    check_range(
        "failure_probability", failure_probability, lambda p: 0 < p < 1, "in (0, 1)"
    )
    measured = kl_inverse(observed, math.log(4 / failure_probability) / num_draws)
    price = math.log(4 * num_examples**0.5 / failure_probability) + math.log(num_priors)
    return kl_inverse(measured, (kl + price) / num_examples)
