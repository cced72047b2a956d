"""How every algorithm here applies a matvec, and how matvecs are put together.

A matvec is a function v -> A v on pytrees like params. Algorithms hold their vectors
in float32 or wider; a product is made in the dtypes of params and widened again. A
`jax.tree_util.Partial` (what our own matvecs are) is an argument of the compiled
product, so new data does not compile anew; a plain function is compiled once per
object. A `HostMatvec` drives compiled calls of its own, one per batch of a data set,
and is left to do so.
"""

import functools
import re
from collections.abc import Callable, Iterable

import jax
import jax.core
import jax.numpy as jnp

from rmtdamp._tree import accumulation_dtype, aligned, check_params, num_examples
from rmtdamp._types import Batch, LossFn, Matvec, Params

from ._products import hvp


def is_traced(*trees) -> bool:
    """Whether any leaf is being traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


def widened(tree: Params) -> Params:
    """`tree` in its accumulation dtype."""
    dtype = accumulation_dtype(tree)
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _narrow_and_widen(matvec, like, vector):
    found = aligned(matvec(aligned(vector, like)), like)
    return jax.tree.map(lambda y, x: y.astype(x.dtype), found, vector)


_compiled = jax.jit(_narrow_and_widen)


def product(matvec: Matvec, like: Params, vector: Params) -> Params:
    """A v, made in the dtypes of `like`, returned in those of `vector`."""
    if isinstance(matvec, HostMatvec):
        return _narrow_and_widen(matvec, like, vector)
    return _compiled(_as_partial(matvec), like, vector)


class HostMatvec:
    """A matvec that runs in Python and drives compiled calls of its own."""

    def __init__(self, function: Matvec):
        self._function = function

    def __call__(self, vector: Params) -> Params:
        """A v."""
        if is_traced(vector):
            raise ValueError(
                "a data set's matvec reads batches as it goes, so it cannot be traced: "
                "call it outside jit"
            )
        return self._function(vector)


def composed(function: Callable[..., Params], matvecs: tuple, *arrays) -> Matvec:
    """A matvec out of others: v -> function(*matvecs, *arrays, v)."""
    # Compiled by who uses it, or run in Python where a part of it must be.
    if any(isinstance(matvec, HostMatvec) for matvec in matvecs):
        return HostMatvec(functools.partial(function, *matvecs, *arrays))
    return jax.tree_util.Partial(function, *map(_as_partial, matvecs), *arrays)


def _as_partial(matvec: Matvec) -> jax.tree_util.Partial:
    """A matvec that may be an argument of a compiled function."""
    if isinstance(matvec, jax.tree_util.Partial):
        return matvec
    return jax.tree_util.Partial(matvec)


def _pass_over(batches, product, wrap, vector):
    """sum_i (n_i / N) product(batch_i, v), one pass over the data."""
    dtype = accumulation_dtype(vector)
    total = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), dtype), vector)
    seen = 0
    for batch in wrap(batches):
        count = num_examples(batch)
        total = _add(total, product(batch, vector), count)
        seen += count
    if seen == 0:
        raise ValueError(
            "batches gave no batch on this pass: hand over something that can be "
            "read again and again, such as a list or a loader, not a generator"
        )
    return jax.tree.map(lambda t, x: (t / seen).astype(x.dtype), total, vector)


@jax.jit
def _add(total, product, count):
    weight = lambda t: jnp.asarray(count).astype(t.dtype)
    return jax.tree.map(lambda t, y: t + weight(t) * y.astype(t.dtype), total, product)


def dataset_matvec(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    loss_args: tuple = (),
    matvec_fn: Callable[..., Matvec] | None = None,
    wrap: Callable[[Iterable], Iterable] = iter,
    precision: str | None = "highest",
) -> HostMatvec:
    """The Hessian of the mean loss over a data set, as a function v -> H v. Eager.

    H = sum_i (n_i / N) H_i over batches of n_i examples, N in all: batches are weighted
    by their sizes, so that a short last batch counts for what it holds. One compiled
    call per batch and one per product; nothing waits for the device in between. Each
    shape of batch is compiled once.

    Cost: a product is a pass over the data at about three gradients' FLOPs. Memory: one
    batch's, and one vector like `params`.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss over the
            batch; static, so define it once.
        params: pytree of real floating arrays, the point.
        batches: the batches, something that can be iterated again at each product: a
            list, a loader, not a generator.
        loss_args: further arguments of the loss.
        matvec_fn: another matrix in place of the Hessian, `matvec_fn(loss_fn, params,
            batch, loss_args=, precision=)`, averaged over batches likewise:
            `functools.partial(ggn_matvec, model_fn)`, the same of `fisher_matvec`, or
            `functools.partial(hessian_matvec, mode="reverse-over-reverse")`.
        wrap: put around `batches` at each pass, for a progress bar
            (`wrap=rich.progress.track` or `wrap=tqdm.tqdm`).
        precision: matmul precision; None leaves the global setting.

    Returns:
        A function from a pytree like `params` to one. `lanczos`, `eigsh`, `trace`,
        `spectral_density`, ... take it as it is; it cannot be traced.

    Raises:
        TypeError: params that are not real floats, or a loss that is not a scalar.
        ValueError: (when called) no batch on a pass, an empty or unequal batch, a
            vector of other shapes, or a call inside traced code.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import dataset_matvec
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2) / 2
        >>> batches = [jnp.ones((3, 2)), jnp.zeros((1, 2))]
        >>> matvec = dataset_matvec(loss_fn, jnp.zeros(2), batches)
        >>> print(matvec(jnp.array([1.0, 0.0])))
        [0.75 0.75]
    """
    check_params(params)
    options = {"loss_args": loss_args, "precision": precision}

    def product(batch, vector):
        if matvec_fn is None:
            return hvp(loss_fn, params, batch, vector, **options)
        return matvec_fn(loss_fn, params, batch, **options)(vector)

    return HostMatvec(functools.partial(_pass_over, batches, product, wrap))


def restrict(
    matvec: Matvec, params: Params, select: str | Callable[[str], bool]
) -> tuple[Matvec, Params]:
    """A diagonal block of a matrix: the rows and columns of some of the params.

    Args:
        matvec: v -> A v for vectors like `params`.
        params: the whole params, a pytree.
        select: which leaves: a regular expression that is searched for in a leaf's
            path (`jax.tree_util.keystr`, such as "['dense']['kernel']"), or a function
            of it.

    Returns:
        The block's matvec and the part of `params` that it acts on: the same tree with
        None for the leaves left out, which counts as no leaf. Hand both on.

    Raises:
        ValueError: no leaf is selected.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import eigsh, restrict
        >>> scale = {"a": jnp.array([5.0, 7.0]), "b": jnp.array([9.0])}
        >>> matvec = lambda v: jax.tree.map(jnp.multiply, scale, v)
        >>> block, part = restrict(matvec, scale, "a")
        >>> found = eigsh(block, part, jax.random.key(0), k=1)
        >>> print(f"{found.eigenvalues[0]:.2f}")
        7.00
    """
    chosen = select if callable(select) else lambda path: bool(re.search(select, path))
    keystr = jax.tree_util.keystr
    part = jax.tree_util.tree_map_with_path(
        lambda path, x: x if chosen(keystr(path)) else None, params
    )
    if not jax.tree.leaves(part):
        paths = [keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            f"no path of params matches {select!r}: choose from {', '.join(paths[:8])}"
        )
    return composed(_block_product, (matvec,), params), part


def _block_product(matvec, params, vector):
    # A leaf left out is None, an empty subtree: tree.map hands it over as it is.
    fill = lambda p, v: jnp.zeros_like(p) if v is None else v
    whole = matvec(jax.tree.map(fill, params, vector))
    return jax.tree.map(lambda y, v: None if v is None else y, whole, vector)
