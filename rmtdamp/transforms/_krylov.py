"""A Krylov: how the Ritz subspace of a batch's Hessian is measured. No optax state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._tree import accumulation_dtype, norm, num_examples, random_like, size
from rmtdamp._types import Key, LossFn, Matvec, Params
from rmtdamp.hessian import lanczos, moments
from rmtdamp.rmt import rotationally_invariant_shrinkage

from ._by_hand import warn_of_slow_convolutions

Start = Literal["random", "gradient"] | Callable[[Key, Params], Params]
Cleaning = Literal["rotationally_invariant"]


class RitzSubspace(NamedTuple):
    """What the last refresh found; m = min(num_steps, P)."""

    ritz_values: jax.Array  # (m,), ascending, as measured
    cleaned_ritz_values: jax.Array  # (m,), those in use; the same without cleaning
    ritz_vectors: Params  # leading axis m, orthonormal rows, 0 beyond a breakdown
    subspace_refreshes: jax.Array  # (), int32, refreshes that were tried
    subspace_rejections: jax.Array  # (), int32, those that were not finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Krylov:
    """How the subspace is measured. Numbers are leaves, the rest is static."""

    loss_fn: LossFn
    num_steps: int
    start: Start
    matvec_fn: Callable[..., Matvec]
    cleaning: Cleaning | None
    variance: Any
    seed: Any
    precision: str | None

    def init(self, params: Params) -> RitzSubspace:
        dtype = accumulation_dtype(params)
        m = min(self.num_steps, size(params))
        zeros = lambda: jnp.zeros(m, dtype)
        vectors = jax.tree.map(lambda x: jnp.zeros((m, *x.shape), dtype), params)
        zero = lambda: jnp.zeros((), jnp.int32)
        return RitzSubspace(zeros(), zeros(), vectors, zero(), zero())

    def _matvec(self, params, batch, loss_args):
        return self.matvec_fn(
            self.loss_fn, params, batch, loss_args=loss_args, precision=self.precision
        )

    def _start(self, key, params, gradient):
        draw = random_like(key, params, jax.random.normal)
        if self.start == "random":
            return draw
        if self.start != "gradient":
            gradient = self.start(jax.random.fold_in(key, 1), gradient)
        # Leaves, not trees: flax.nnx has other tree types for params and gradients.
        drawn, treedef = jax.tree.flatten(draw)
        pairs = list(zip(jax.tree.leaves(gradient), drawn, strict=True))
        length = norm([g for g, _ in pairs])
        # A gradient that is zero, or not finite, spans nothing.
        usable = (length > 0) & jnp.isfinite(length)
        return treedef.unflatten(
            [jnp.where(usable, g.astype(x.dtype), x) for g, x in pairs]
        )

    def _noise(self, key, params, batch, loss_args):
        if self.variance is not None:
            return jnp.asarray(self.variance)
        count = num_examples(batch)
        num = min(8, count)
        if num < 2:
            return jnp.zeros(())
        measured = moments(
            self.loss_fn,
            params,
            jax.tree.map(lambda x: x[: count - count % num], batch),
            key,
            loss_args=loss_args,
            num_microbatches=num,
            batch_size=count,
            precision=self.precision,
            stderr=False,
        )
        return measured.variance

    def refresh(self, old, params, batch, loss_args, gradient) -> RitzSubspace:
        """The subspace at these params; driven from Python when called eagerly."""
        key = jax.random.fold_in(jax.random.key(self.seed), old.subspace_refreshes)
        start_key, noise_key = jax.random.split(key)
        start = self._start(start_key, params, gradient)
        matvec = self._matvec(params, batch, loss_args)
        m = old.ritz_values.shape[0]
        found = lanczos(matvec, start, m, reorthogonalization="twice")
        noise = None
        if self.cleaning is not None:
            noise = self._noise(noise_key, params, batch, loss_args)
        return _accepted(old, found, noise)

    def warn_of_slow_convolutions(self, params, batch, loss_args) -> None:
        warn_of_slow_convolutions(
            lambda p, b, *args: self._matvec(p, b, args)(p),
            params,
            batch,
            loss_args,
            subject="loss",
            place="Lanczos' loop in a training step",
            way_out="every=None to scale_by_lanczos and call refresh_lanczos by hand",
            stacklevel=2,
        )


jax.tree_util.register_dataclass(
    Krylov,
    data_fields=["variance", "seed"],
    meta_fields=[
        "loss_fn", "num_steps", "start", "matvec_fn", "cleaning", "precision",
    ],
)  # fmt: skip


@jax.jit
def _accepted(old, found, noise):
    """The Ritz pairs found, cleaned, or the old ones where they are not finite."""
    values, shares = found.ritz()
    vectors = found.eigenpairs(values.shape[0], "SA").eigenvectors
    cleaned = values
    if noise is not None:
        noise = jnp.where((noise > 0) & jnp.isfinite(noise), noise, 0)
        cleaned = rotationally_invariant_shrinkage(
            values, values, shares, noise, found.num_steps
        )
    new = jax.tree.leaves((values, cleaned, vectors))
    finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in new])
    former, treedef = jax.tree.flatten(old[:3])
    kept = [jnp.where(finite, n, o) for n, o in zip(new, former, strict=True)]
    values, cleaned, vectors = treedef.unflatten(kept)
    return RitzSubspace(
        values,
        cleaned,
        vectors,
        old.subspace_refreshes + 1,
        old.subspace_rejections + (~finite).astype(jnp.int32),
    )


@jax.jit
def refresh_if(due, krylov, old, params, batch, loss_args, gradient):
    krylov.warn_of_slow_convolutions(params, batch, loss_args)
    refresh = lambda: krylov.refresh(old, params, batch, loss_args, gradient)
    return refresh() if due is None else jax.lax.cond(due, refresh, lambda: old)
