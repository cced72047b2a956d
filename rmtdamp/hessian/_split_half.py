"""Two halves of a batch -> its eigenpairs, and how far the halves agree on each.

    batch -> halves -> two matvecs -> eigenpairs of both and of their mean -> agreements

The halves have no example in common, so their noise is independent: on what a vector
owes to noise they agree by chance alone, whatever the law of the noise.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._basis import project
from rmtdamp._sharding import regrouped
from rmtdamp._tree import check_params, num_examples, size
from rmtdamp._types import Batch, Key, Matvec, Params

from ._apply import sum_matvec
from ._eigsh import eigsh
from ._tridiagonal import EigenPairs


class SplitHalfPairs(NamedTuple):
    """Eigenpairs of a batch, and what its halves say of each. [H]: of an eigenvalue.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import split_half_eigsh
        >>> matvec = lambda v: jnp.linspace(0.0, 4.0, 20) * v
        >>> pairs = split_half_eigsh(
        ...     matvec, matvec, jnp.zeros(20), jax.random.key(0), k=1
        ... )
        >>> print(
        ...     f"{pairs.eigenvalues[0]:.2f} {pairs.agreements[0]:.2f}"
        ... )  # equal halves
        4.00 1.00
    """

    eigenvalues: jax.Array  # (k,), lambda of the whole batch, in [H]
    eigenvectors: Params  # leading axis k, u of unit norm
    residuals: jax.Array  # (k,), ||H u - lambda u||, in [H]
    agreements: jax.Array  # (k,), <P_a u, P_b u>, at most 1
    num_products: int  # products with the Hessian of a half that were spent


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """A batch as two halves, `x[0::2]` and `x[1::2]`.

    Strided, so that a batch sharded over devices stays spread.

    Args:
        batch: pytree of arrays with one leading axis, of even length.

    Returns:
        Two pytrees like `batch` with half the examples.

    Raises:
        ValueError: an odd number of examples, an empty batch, or unequal leading axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import halves
        >>> first, second = halves(jnp.arange(6))
        >>> print(first, second)
        [0 2 4] [1 3 5]
    """
    count = num_examples(batch)
    if count % 2:
        raise ValueError(
            f"batch holds {count} examples, and two halves of a batch need an even "
            f"number: leave one out, jax.tree.map(lambda x: x[:{count - 1}], batch)"
        )
    return _halves(batch)


@jax.jit
def _halves(batch):
    pairs = jax.tree.map(lambda x: regrouped(x, 2), batch)
    return tuple(jax.tree.map(lambda x, i=i: x[:, i], pairs) for i in (0, 1))


@functools.partial(jax.jit, static_argnames="k")
def _compared(whole: EigenPairs, first: EigenPairs, second: EigenPairs, *, k):
    """The first k of `whole`, <P_a u, P_b u> with P_a on what has lambda's sign."""
    values, vectors, residuals = jax.tree.map(lambda x: x[:k], whole[:3])
    gram = jax.vmap(project, in_axes=(None, 0))

    def coordinates(half):
        same = jnp.sign(values)[:, None] == jnp.sign(half.eigenvalues)[None]
        return jnp.where(same, gram(half.eigenvectors, vectors), 0)

    cross = gram(second.eigenvectors, first.eigenvectors)
    seen = jnp.matmul(coordinates(first), cross, precision="highest")
    agreements = jnp.sum(seen * coordinates(second), axis=1)
    return values, vectors, residuals, agreements


def compare_halves(
    whole: EigenPairs, first: EigenPairs, second: EigenPairs, *, k: int
) -> SplitHalfPairs:
    """How far the eigenpairs of two halves agree on each of a batch's.

    Args:
        whole: the leading eigenpairs of the batch's Hessian, k or more.
        first: as many or more of one half's, see `split_half_eigsh`.
        second: and of the other's.
        k: eigenpairs of the batch to give.

    Returns:
        `SplitHalfPairs` of the first k of `whole`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import compare_halves, eigh
        >>> like = jnp.zeros(2)
        >>> pairs = eigh([[2.0, 0.0], [0.0, 1.0]], like).leading(1)
        >>> turned = eigh([[1.0, 0.0], [0.0, 2.0]], like).leading(1)
        >>> print(compare_halves(pairs, pairs, turned, k=1).agreements)
        [0.]
    """
    values, vectors, residuals, agreements = _compared(whole, first, second, k=k)
    num_products = whole.num_products + first.num_products + second.num_products
    return SplitHalfPairs(values, vectors, residuals, agreements, num_products)


def split_half_eigsh(
    first: Matvec,
    second: Matvec,
    like: Params,
    key: Key,
    *,
    k: int = 10,
    spare: int = 2,
    tol: float = 1e-3,
    max_products: int | None = None,
) -> SplitHalfPairs:
    r"""Eigenpairs of a batch Hessian, and how far two halves agree on each. Eager.

    With A and B the Hessians of the halves, H = (A + B) / 2 is that of the batch. Of
    each the k + `spare` eigenpairs of largest magnitude are found. For an eigenvector u
    of H with eigenvalue lambda, P_a projects on the span of those of A whose
    eigenvalues have lambda's sign, P_b likewise, and the agreement on u is
    <P_a u, P_b u>: what both halves have of it, and have in common. It is 1 where both
    halves hold u, and near 0 where u is noise.

    Spans are compared, so that vectors which turn among themselves because their
    eigenvalues are close lose nothing. Signs are told apart because noise between two
    directions makes a pair of eigenvalues +-x in each half, whose span is the same.

    Cost: products with half a batch, four times as many as `eigsh` takes for one of the
    three matrices. The halves share one compiled product. Memory: that of `eigsh`, and
    3 (k + `spare`) vectors like `like`.

    Args:
        first: product with the Hessian of one half of the batch (`halves`).
        second: product with that of the other, of the same number of examples.
        like: pytree of P real floating numbers, such as the params.
        key: a key of `jax.random`.
        k: eigenpairs to give, at most P / 4: larger spans agree by chance, in few
            dimensions even these (of P = 20 one vector of noise in seven).
        spare: further ones to find, as far as P / 4 leaves room. A half may have a
            vector of noise, or two in another order, among its first k.
        tol: relative residual asked of `eigsh`.
        max_products: its budget for each of the three; default: its own.

    Returns:
        `SplitHalfPairs`, largest magnitude first; `rmtdamp.outliers.outliers` tells
        from it which are more than noise.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: k above P / 4, or what `eigsh` refuses.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import halves, hessian_matvec, split_half_eigsh
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2) / 2
        >>> batch = jax.random.normal(jax.random.key(0), (800, 50)).at[:, 0].mul(3)
        >>> params = jnp.zeros(50)
        >>> first, second = (hessian_matvec(loss_fn, params, h) for h in halves(batch))
        >>> found = split_half_eigsh(first, second, params, jax.random.key(1), k=3)
        >>> found.agreements > 0.9
        Array([ True, False, False], dtype=bool)
    """
    check_params(like)
    p = size(like)
    if k > p / 4:
        raise ValueError(
            f"k is {k}, and at most a quarter of the {p} parameters can be judged: "
            "spans of more dimensions agree by chance; ask for fewer, or look at the "
            "whole matrix"
        )
    # One size for all, which compiles once.
    find = functools.partial(
        eigsh,
        like=like,
        k=min(k + spare, p // 4),
        which="LM",
        tol=tol,
        max_products=max_products,
    )
    mean = sum_matvec((first, second), (0.5, 0.5))
    keys = jax.random.split(key, 3)
    whole, a, b = (
        find(matvec, key=key)
        for matvec, key in zip((mean, first, second), keys, strict=True)
    )
    return compare_halves(whole, a, b, k=k)._replace(
        num_products=2 * whole.num_products + a.num_products + b.num_products
    )
