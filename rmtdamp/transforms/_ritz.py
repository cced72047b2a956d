"""A RitzMeasurer: the sharp directions of a batch's Hessian. No optax state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rmtdamp._basis import zeros
from rmtdamp._checks import check_choice, most_rejected
from rmtdamp._jax import is_traced
from rmtdamp._sharding import placement
from rmtdamp._tree import accumulation_dtype, norm, num_examples, random_like, size
from rmtdamp._types import Key, LossFn, Matvec, Params
from rmtdamp.hessian import hessian_matvec, lanczos, moments
from rmtdamp.rmt import rotationally_invariant_shrinkage

from ._measurer import Context, training_loss, with_numbers

Start = Literal["random", "gradient"] | Callable[[Key, Params], Params]
Cleaning = Literal["rotationally_invariant"]


class RitzSubspace(NamedTuple):
    """What a `RitzMeasurer` knows; m = min(num_steps, P).

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> measurer = rmtdamp.RitzMeasurer(loss_fn, num_steps=2)
        >>> measurer.init(jnp.ones(4)).ritz_values.shape
        (2,)
    """

    ritz_values: jax.Array  # (m,), ascending, as measured
    cleaned_ritz_values: jax.Array  # (m,), those in use; the same without cleaning
    ritz_vectors: Params  # leading axis m, orthonormal rows, 0 beyond a breakdown
    subspace_refreshes: jax.Array  # (), int32, measurements that were tried
    subspace_rejections: jax.Array  # (), int32, those that were not finite

    @property
    def waits(self) -> jax.Array:
        """Whether nothing has been measured."""
        return self.subspace_refreshes == 0

    @property
    def max_eigenvalue(self) -> jax.Array:
        """The largest |Ritz value|, which is none above the batch Hessian's; or NaN."""
        return jnp.where(self.waits, jnp.nan, jnp.max(jnp.abs(self.ritz_values)))

    def problems(self) -> list[str]:
        """What a user should know of a run, in words; eager."""
        if most_rejected(self.subspace_refreshes, self.subspace_rejections):
            return [
                "most measurements of the Ritz subspace were not finite "
                '(optax.tree.get(opt_state, "subspace_rejections")), so the subspace '
                "is the last that was, or none, and the step the gradient over the "
                "damping: look at the loss, the data and the learning rate"
            ]
        return []


@with_numbers("variance", "seed")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RitzMeasurer:
    r"""Measures the Ritz pairs of a batch's Hessian, for `scale_by_lanczos`.

    Lanczos' iteration of `num_steps` = m steps gives m Ritz values and orthonormal Ritz
    vectors, those of the sharpest directions first.

    Cleaning. "rotationally_invariant" replaces each Ritz value by the best guess of the
    true curvature along its vector, `rmtdamp.rmt.rotationally_invariant_shrinkage` with
    the Ritz values and the start's shares as quadrature. Its noise s^2 is `variance`,
    or what `rmtdamp.hessian.moments` measures on the same data (8 microbatches, one
    probe). For m well below P: as m nears P, one start's shares become too noisy a
    quadrature. And real Hessian noise is not Wigner; see `rmtdamp.rmt`.

    Cost: a gradient and m products of about two gradients' FLOPs, and 8 m^2 P more.
    Memory: m vectors in the state, three times that while measuring.

    A measurer holds no state, and all its settings: hand the same one to
    `lanczos_newton` and to `rmtdamp.refresh`. It is a pytree; its numbers are leaves,
    the rest is static.

    Args:
        loss_fn: `loss_fn(params, batch, *loss_args) -> scalar`, the mean loss; static,
            so define it once. With BatchNorm the loss whose gradient is taken, or one
            that knows it (`rmtdamp.flax.curvature_loss`).
        num_steps: m, Lanczos steps, at least 1; more than P are cut to P.
        start: of Lanczos' iteration: "random" (Gaussian), "gradient" (the updates that
            come in), or a function (key, updates) -> a pytree like params. What is zero
            or not finite is replaced by a random one.
        matvec_fn: another matrix in place of the Hessian, `matvec_fn(loss_fn, params,
            batch, loss_args=, precision=)`: `functools.partial(ggn_matvec, model_fn)`
            with `criterion(outputs, targets)` in the place of `loss_fn` for the
            Gauss-Newton matrix.
        cleaning: None or "rotationally_invariant", which needs a random start.
        variance: s^2 for the cleaning, in squared eigenvalues, for the noise of the
            data's Hessian; default: measured.
        seed: of the random start, which is a function of the seed and the measurement's
            number: the same on every device and after a restart.
        precision: matmul precision of the products; None leaves the global setting.

    Raises:
        ValueError: a number out of its range, an unknown option, a cleaning without
            what it needs.
        TypeError: `loss_fn` is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> measurer = rmtdamp.RitzMeasurer(loss_fn, num_steps=2)
        >>> tx = rmtdamp.lanczos_newton(0.1, measurer, damping=0.1)
        >>> params, batch = jnp.ones(4), jnp.eye(4)
        >>> state = rmtdamp.refresh(tx.init(params), measurer, params, batch)

    References:
        Granziol and Baskerville, section 5. Bun, Allez, Bouchaud and Potters, 2016
        (cleaning).
    """

    state_type: ClassVar[type] = RitzSubspace

    loss_fn: LossFn = dataclasses.field(kw_only=False)
    num_steps: int = 20
    start: Start = "random"
    matvec_fn: Callable[..., Matvec] = hessian_matvec
    cleaning: Cleaning | None = None
    variance: Any = None
    seed: Any = 0
    precision: str | None = "highest"

    def __post_init__(self) -> None:
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn is of type {type(self.loss_fn).__name__}: hand over a "
                "function loss_fn(params, batch, *loss_args) that returns the mean loss"
            )
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(
                f"num_steps is {self.num_steps!r}: take a whole number of at least 1"
            )
        if not callable(self.start) and self.start not in ("random", "gradient"):
            raise ValueError(
                f"start is {self.start!r}: choose 'random', 'gradient' or a function "
                "of a key and the updates"
            )
        check_choice("cleaning", self.cleaning, (None, "rotationally_invariant"))
        if self.cleaning is not None and self.start != "random":
            raise ValueError(
                "cleaning needs the spectrum as a random start sees it, and start is "
                f"{self.start!r}: choose start='random'"
            )
        other = self.matvec_fn is not hessian_matvec
        if self.cleaning is not None and self.variance is None and other:
            raise ValueError(
                "cleaning measures the noise of the Hessian, and matvec_fn is another "
                "matrix: pass the variance of its noise"
            )

    def init(self, params: Params) -> RitzSubspace:
        """Before any measurement: no direction is known to be sharp."""
        dtype = accumulation_dtype(params)
        m = min(self.num_steps, size(params))
        values = lambda: jnp.zeros(m, dtype)
        vectors = zeros(jax.tree.map(lambda x: x.astype(dtype), params), m)
        zero = lambda: jnp.zeros((), jnp.int32)
        return RitzSubspace(values(), values(), vectors, zero(), zero())

    def refresh(self, measured: RitzSubspace, context: Context) -> RitzSubspace:
        """Measure on the batch; driven from Python when called eagerly.

        Returns:
            The new subspace, or the old one where the new one is not finite.
        """
        if self.start != "random" and context.grads is None:
            raise ValueError(
                "this start of Lanczos' iteration is made from the gradient: pass grads"
            )
        traced = is_traced(measured, context)
        start_of = _start if traced else _compiled_start
        key = jax.random.key(self.seed)
        key, noise_key = jax.random.split(
            jax.random.fold_in(key, measured.subspace_refreshes)
        )
        where = placement(context.params)
        start = start_of(self, key, context.params, context.grads, where)
        # The noise is that of a mean over examples, and cleans a Hessian of the same.
        in_step = training_loss if self.cleaning is None else lambda loss_fn: loss_fn
        matvec = self.matvec_fn(
            in_step(self.loss_fn),
            context.params,
            context.batch,
            loss_args=context.loss_args,
            precision=self.precision,
        )
        m = measured.ritz_values.shape[0]
        found = lanczos(matvec, start, m, reorthogonalization="twice")
        noise = None
        if self.cleaning is not None:
            noise = self._noise(noise_key, context)
        return _accepted(measured, found, noise)

    def _noise(self, key, context):
        """s^2 of the batch's Hessian, given or measured."""
        if self.variance is not None:
            return jnp.asarray(self.variance)
        count = num_examples(context.batch)
        num = min(8, count)
        if num < 2:
            return jnp.zeros(())
        measured = moments(
            self.loss_fn,
            context.params,
            jax.tree.map(lambda x: x[: count - count % num], context.batch),
            key,
            loss_args=context.loss_args,
            num_microbatches=num,
            batch_size=count,
            precision=self.precision,
            stderr=False,
        )
        return measured.variance


def _start(measurer: RitzMeasurer, key, params, gradient, where):
    draw = random_like(key, params, jax.random.normal, where)
    if measurer.start == "random":
        return draw
    if measurer.start != "gradient":
        gradient = measurer.start(jax.random.fold_in(key, 1), gradient)
    # Leaves, not trees: flax.nnx has other tree types for params and gradients.
    drawn, treedef = jax.tree.flatten(draw)
    pairs = list(zip(jax.tree.leaves(gradient), drawn, strict=True))
    length = norm([g for g, _ in pairs])
    # A gradient that is zero, or not finite, spans nothing.
    usable = (length > 0) & jnp.isfinite(length)
    return treedef.unflatten(
        [jnp.where(usable, g.astype(x.dtype), x) for g, x in pairs]
    )


_compiled_start = jax.jit(_start, static_argnames="where")


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
