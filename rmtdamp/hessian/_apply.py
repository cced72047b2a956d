"""How every algorithm here applies a matvec, and how matvecs are put together.

A matvec is a function v -> A v on pytrees like params. Algorithms hold their vectors
packed (`rmtdamp._basis`), in float32 or wider; a product is made on pytrees in the
dtypes of params and packed again, all in one compiled program that every algorithm
shares. A `jax.tree_util.Partial` (what our own matvecs are) is an argument of it, so
new data does not compile anew; a plain function is compiled once per object. What is
made of other matvecs (a sum, a block) has no program of its own where it is applied
eagerly: its parts' programs are called in turn. A `HostMatvec` drives compiled calls of
its own, one per batch of a data set.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import pack, unpack
from rmtdamp._checks import refuse_one_batch
from rmtdamp._jax import is_traced
from rmtdamp._tree import aligned, check_params, num_examples
from rmtdamp._types import Batch, LossFn, Matvec, Params

from ._products import hvp


def _narrow(vector, like):
    return aligned(unpack(vector, like), like)


def _widen(found, like):
    return pack(aligned(found, like), like)


@jax.jit
def _multiply(matvec, like, vector):
    return _widen(matvec(_narrow(vector, like)), like)


_narrow_jitted, _widen_jitted = jax.jit(_narrow), jax.jit(_widen)


def multiply(matvec: Matvec, like: Params, vector: list) -> list:
    """A v for a packed v, made in the dtypes of `like`."""
    if isinstance(matvec, HostMatvec):
        return _widen_jitted(matvec(_narrow_jitted(vector, like)), like)
    if isinstance(matvec, _Sum | _Block):
        return matvec.multiply(like, vector)
    return _multiply(as_argument(matvec), like, vector)


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


def as_argument(matvec: Matvec) -> Matvec:
    """A matvec that may be an argument of a compiled function."""
    if isinstance(matvec, jax.tree_util.Partial | HostMatvec | _Sum | _Block):
        return matvec
    return jax.tree_util.Partial(matvec)


@jax.jit
def _weighted(factors, vectors):
    terms = [
        jax.tree.map(lambda x, i=i: factors[i].astype(x.dtype) * x, vector)
        for i, vector in enumerate(vectors)
    ]
    return jax.tree.map(lambda *xs: functools.reduce(jnp.add, xs), *terms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Sum:
    """The matvec of sum_i c_i A_i."""

    factors: Any  # (n,), c_i
    matvecs: tuple

    def __call__(self, vector: Params) -> Params:
        return _weighted(self.factors, [matvec(vector) for matvec in self.matvecs])

    def multiply(self, like, vector):
        found = [multiply(matvec, like, vector) for matvec in self.matvecs]
        return _weighted(self.factors, found)


def sum_matvec(matvecs: Sequence[Matvec], factors: Sequence[float]) -> Matvec:
    """A weighted sum of matrices, v -> sum_i c_i A_i v.

    Args:
        matvecs: products with the A_i, such as those of two halves of a batch.
        factors: the c_i, a number for each.

    Returns:
        A matvec: eager where one of the parts is, else a pytree that may be handed to
        compiled code. Algorithms that are called eagerly call the parts in turn, so
        that products of equal shapes share one compiled program.

    Raises:
        ValueError: no matrix, or another number of factors.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.hessian import sum_matvec
        >>> mean = sum_matvec([lambda v: 3 * v, lambda v: 5 * v], [0.5, 0.5])
        >>> print(mean(jnp.ones(2)))
        [4. 4.]
    """
    if not matvecs or len(matvecs) != len(factors):
        raise ValueError(
            f"there are {len(matvecs)} matvecs and {len(factors)} factors: hand over "
            "one factor for each, and at least one"
        )
    return _Sum(np.asarray(factors, float), tuple(map(as_argument, matvecs)))


def _pass_over(batches, product, wrap, vector):
    """sum_i (n_i / N) product(batch_i, v), one pass over the data."""
    total, seen = None, 0
    for batch in wrap(batches):
        count = num_examples(batch)
        total = _add(total, product(batch, vector), np.float64(count), vector)
        seen += count
    if seen == 0:
        raise ValueError(
            "batches gave no batch on this pass: hand over something that can be "
            "read again and again, such as a list or a loader, not a generator"
        )
    return _share(total, np.float64(seen), vector)


@jax.jit
def _add(total, product, count, vector):
    term = [count.astype(y.dtype) * y for y in pack(product, vector)]
    return term if total is None else jax.tree.map(jnp.add, total, term)


@jax.jit
def _share(total, seen, vector):
    return aligned(unpack([t / seen.astype(t.dtype) for t in total], vector), vector)


def dataset_matvec(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    loss_args: tuple[Any, ...] = (),
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
        ValueError: one batch in place of several; (when called) no batch on a pass, an
            empty or unequal batch, a vector of other shapes, or a call inside traced
            code.

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
    refuse_one_batch(batches)
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
        select: which leaves: a part of a leaf's path (`jax.tree_util.keystr`, such as
            "['dense']['kernel']"), or if no path has it, a regular expression that is
            searched for in them; or a function of the path.

    Returns:
        The block's matvec and the part of `params` that it acts on: the same tree with
        None for the leaves left out, which counts as no leaf. Hand both on.

    Raises:
        ValueError: no leaf is selected.
        TypeError: `select` is neither.

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
    keystr = jax.tree_util.keystr
    paths = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if callable(select):
        chosen = select
    elif not isinstance(select, str):
        raise TypeError(
            f"select is a {type(select).__name__}: hand over a part of a path, such as "
            f"{paths[0]!r}, or a function of a path, lambda path: path in [...]"
        )
    elif any(select in path for path in paths):
        chosen = lambda path: select in path
    else:
        try:
            pattern = re.compile(select)
        except re.error as error:
            raise ValueError(
                f"select is {select!r}, which no path of params has and which is no "
                f"regular expression ({error}): choose from {', '.join(paths[:8])}"
            ) from error
        chosen = lambda path: bool(pattern.search(path))
    part = jax.tree_util.tree_map_with_path(
        lambda path, x: x if chosen(keystr(path)) else None, params
    )
    if not jax.tree.leaves(part):
        raise ValueError(
            f"no path of params matches {select!r}: choose from {', '.join(paths[:8])}"
        )
    return _Block(as_argument(matvec), params), part


def _filled(vector, params):
    # A leaf left out is None, an empty subtree: tree.map hands it over as it is.
    fill = lambda p, v: jnp.zeros_like(p) if v is None else v
    return jax.tree.map(fill, params, vector)


def _selected(found, params, vector):
    keep = lambda p, v, y: None if v is None else y
    return jax.tree.map(keep, params, vector, found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """The matvec of a diagonal block: a vector is None where a leaf is left out."""

    matvec: Any
    params: Params

    def __call__(self, vector: Params) -> Params:
        whole = self.matvec(_filled(vector, self.params))
        return _selected(whole, self.params, vector)

    def multiply(self, like, vector):
        whole = _filled_packed(self.params, like, vector)
        found = multiply(self.matvec, self.params, whole)
        return _selected_packed(self.params, like, found)


@jax.jit
def _filled_packed(params, like, vector):
    return pack(_filled(unpack(vector, like), params), params)


@jax.jit
def _selected_packed(params, like, found):
    return _widen(_selected(unpack(found, params), params, like), like)
