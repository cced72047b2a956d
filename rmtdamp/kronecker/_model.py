"""model, loss, batch -> the Kronecker and diagonal factors of the curvature.

    params, inputs  ->  outputs, and each layer's inputs on a tape
                        |  the loss: a gradient u per label, or C that make its Hessian
                        v
                    output gradients of each layer  ->  LayerRecord  ->  Factors

The gradient of a layer's outputs is that of a zero array which the tape adds to them (a
tap). So a model takes part by showing the tape its layers' inputs and outputs; for Flax
`rmtdamp.flax` does this from outside.

Gradients are those of an example's own loss, N times the mean loss's.
"""

import dataclasses
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp

from rmtdamp._checks import check_choice, check_outputs, check_range, check_scalar, pair
from rmtdamp._jax import matmul_precision
from rmtdamp._tree import accumulation_dtype, check_params, num_examples
from rmtdamp._types import Batch, Criterion, Key, ModelFn, Params, SampleFn

from ._blocks import Block
from ._criterion import check_logits, check_sampled, hessian_roots, unweighted
from ._factors import (
    Factors,
    LayerRecord,
    Sharing,
    kronecker_factors,
    layer_record,
)
from ._shown import zeros_like_outputs
from ._tape import Tape

Fisher = Literal["sampled", "empirical", "ggn"]
Diagonal = Literal["examples", "signs"]


class FactorsFn(Protocol):
    """What KFAC needs to know of a model; `ModelFactors` is one, write others freely.

    Hashable, as it is a static argument of compiled functions; make it once.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmtdamp.kronecker import Factors, make_blocks
        >>> class OneEverywhere:
        ...     "Curvature one for each entry of a vector."
        ...
        ...     blocks = make_blocks(jnp.zeros(3), {})
        ...
        ...     def __call__(self, params, batch, key, *loss_args):
        ...         return Factors((), (jnp.ones(3),))
        >>> OneEverywhere().blocks[0].leaves
        (0,)
    """

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block of each leaf, from `make_blocks`."""
        ...

    def __call__(
        self, params: Params, batch: Batch, key: Key, *loss_args: Any
    ) -> Factors:
        """The factors at one point, in float32 or wider."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFactors:
    r"""Measures the Kronecker and diagonal factors of a model with a loss.

    For a layer with inputs a and output gradients g the block is A x G (Kronecker
    product), A = E[a a^T] and G = E[g g^T], where a layer that meets an example at T
    places sums or averages over them (`sharing`). For an embedding a is one-hot and A
    the diagonal of the tokens' frequencies. A full block is E[v v^T] for the gradient v
    of an example in all of its leaves; every other leaf has the mean over examples of
    its squared gradients. Which gradients is `fisher`:

    - "sampled": labels drawn from the model, `sample_fn(key, outputs)`. In expectation
      this is the Fisher matrix, the Gauss-Newton matrix of a likelihood. One backward
      pass.
    - "empirical": the labels of the batch. What the paper's experiments ran.
    - "ggn": all C gradients u_c with sum_c u_c u_c^T the Hessian of an example's loss
      in its outputs, exact for any convex loss that adds up over examples (softmax
      cross-entropy, squared error). C backward passes, C the number of outputs.

    Unit: A x G has that of the loss's Hessian.

    Args:
        model_fn: `model_fn(params, inputs, tape, *loss_args) -> outputs`, one row per
            example; shows each layer to the `Tape` under the name of its block.
        criterion: `criterion(outputs, targets) -> scalar`, the mean loss.
        blocks: from `make_blocks`.
        fisher: "sampled", "empirical" or "ggn".
        sample_fn: draws targets for "sampled"; the default suits logits and integer
            labels, and keeps those that are none (below 0, or 255 of 10 classes), by
            which a loss may leave places out. For half the squared distance:
            `lambda key, z: z + jax.random.normal(key, z.shape)`.
        sharing: "expand" treats the T places as independent, "reduce" as parts of a
            mean: see `layer_record`.
        diagonal: "examples" runs the model example by example, which costs a gradient
            and N copies of the diagonal leaves and full blocks; "signs" squares one
            gradient of the batch in which examples have random signs, N times cheaper
            in memory and right in expectation (large embeddings).
        num_terms: what brings the squared gradients of "sampled" and "empirical" to the
            Hessian's scale, where it is known: independent terms per example that the
            loss takes the mean over, such as tokens, over the loss's factor. None finds
            it. A sum of softmax cross-entropies (of integer labels or distributions),
            of sigmoid cross-entropies or of squared errors, of one array of outputs or
            a tree of them with targets alike, with any weights (classes, masks, a mean
            over tokens, a constant), is recognised, and each target's gradient is
            divided by the root of its weight. Of another
            loss, which must be a negative log-likelihood without a factor, it is the
            number of targets that have a gradient, where an example has several and
            twice as many would halve the gradient of each; else 1.
        precision: matmul precision; None leaves the global setting.

    Raises:
        ValueError: an unknown choice, full blocks with diagonal="signs"; when called, a
            bad batch, outputs without a row per example, sampled targets unlike those
            of the batch, a layer that the model does not show, that is called with
            different shapes or that does not see the examples.
        TypeError: when called, params that are not real floats, or a loss that is not
            a scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.kronecker import ModelFactors, make_blocks
        >>> def model_fn(params, x, tape):
        ...     return tape.linear("dense", x, x @ params["kernel"])
        >>> def criterion(outputs, targets):
        ...     return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> factors_fn = ModelFactors(
        ...     model_fn=model_fn,
        ...     criterion=criterion,
        ...     blocks=make_blocks(params, {"dense": {"kernel": "kernel"}}),
        ...     fisher="ggn",
        ... )
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 3))
        >>> (found,) = factors_fn(params, batch, jax.random.key(0)).kronecker
        >>> print(found.inputs[0])
        [[0.5 0. ]
         [0.  4.5]]
        >>> bool(jnp.allclose(found.outputs[0], jnp.eye(3), atol=1e-5))
        True

    References:
        Martens and Grosse, 2015, sections 2 and 3. Eschenhagen et al., 2023.
    """

    model_fn: ModelFn  # with the tape after the inputs
    criterion: Criterion
    blocks: tuple[Block, ...]
    fisher: Fisher = "sampled"
    sample_fn: SampleFn | None = None
    sharing: Sharing = "expand"
    diagonal: Diagonal = "examples"
    num_terms: float | None = None
    precision: str | None = "highest"

    def __post_init__(self) -> None:
        check_choice("fisher", self.fisher, get_args(Fisher))
        check_choice("sharing", self.sharing, get_args(Sharing))
        check_choice("diagonal", self.diagonal, get_args(Diagonal))
        if self.num_terms is not None:
            check_range("num_terms", self.num_terms, lambda n: n > 0, "above 0")
        full = [block.name for block in self.blocks if block.kind == "full"]
        if full and self.diagonal == "signs":
            raise ValueError(
                f"the full blocks of {', '.join(full)} need each example's gradient, "
                "and diagonal='signs' has one of the batch: take 'examples', or leave "
                "them to diagonal blocks"
            )

    def __call__(
        self, params: Params, batch: Batch, key: Key, *loss_args: Any
    ) -> Factors:
        """Measure.

        Args:
            params: pytree of real floating arrays.
            batch: a pair (inputs, targets) of pytrees with one leading axis.
            key: a key of `jax.random`, for sampled labels and random signs.
            *loss_args: further arguments of the model.

        Returns:
            `Factors`, in float32 or the params' dtype if that is wider.
        """
        check_params(params)
        inputs, targets = pair(batch)
        label_key, sign_key = jax.random.split(key)
        with matmul_precision(self.precision):
            outputs, calls, pull = self._run(params, inputs, loss_args)
            check_outputs(outputs, inputs)
            directions = self._directions(outputs, targets, label_key)
            gradients = _each(pull, directions)
            measure = self._per_example if self.diagonal == "examples" else self._signed
            diagonal, full = measure(params, inputs, loss_args, directions, sign_key)
            layers = [block for block in self.blocks if block.groups]
            records = tuple(
                full[block.name]
                if block.kind == "full"
                else self._record(block, calls, gradients, inputs, params)
                for block in layers
            )
            kronecker = tuple(
                kronecker_factors(record, block.rows)
                for record, block in zip(records, layers, strict=True)
            )
        return Factors(kronecker, diagonal, records)

    def _run(self, params, inputs, loss_args):
        """Outputs, each layer's calls, and the map to the taps' gradients."""

        def run(taps, params=params, inputs=inputs, loss_args=loss_args):
            tape = Tape(taps)
            outputs = self.model_fn(params, inputs, tape, *loss_args)
            return outputs, tape.calls

        def seen(names, params, inputs, loss_args):
            tape = Tape()
            result = self.model_fn(params, inputs, tape, *loss_args)
            # An operation, as JAX lets foreign tracers pass that nothing is done with.
            of = lambda found: {
                name: [x[None] for x in values]
                for name, values in found.items()
                if names is None or name in names
            }
            outputs = {k: [y for _, y in pairs] for k, pairs in tape.calls.items()}
            return of(outputs), of(tape.kernels), result

        taps = zeros_like_outputs(seen, self.blocks, params, inputs, loss_args)
        outputs, pull, calls = jax.vjp(run, taps, has_aux=True)
        return outputs, calls, lambda direction: pull(direction)[0]

    def _directions(self, outputs, targets, key):
        """The gradients u of each example's loss: leaves (C, N, ...)."""
        try:
            jax.eval_shape(self.criterion, outputs, targets)
        except TypeError as error:
            raise TypeError(
                f"criterion(outputs, targets) fails: {error}. It gets what the model "
                "returns and the batch's targets, not the model: hand over the mean "
                "loss of outputs, as in cross_entropy(model(inputs), targets)"
            ) from error
        check_scalar(self.criterion, outputs, targets, ())
        count = num_examples(outputs)
        if self.fisher == "ggn":
            return hessian_roots(self.criterion, outputs, targets, count)
        if self.fisher == "sampled":
            if self.sample_fn is None:
                check_logits(outputs)
            sampled = (self.sample_fn or jax.random.categorical)(key, outputs)
            check_sampled(sampled, targets)
            if self.sample_fn is None:
                none = (targets < 0) | (targets >= outputs.shape[-1])
                sampled = jnp.where(none, targets, sampled.astype(targets.dtype))
            targets = sampled
        gradient = jax.grad(self.criterion)(outputs, targets)
        if self.num_terms is None:
            roots = unweighted(self.criterion, outputs, targets, gradient)
        else:
            root = jnp.sqrt(jnp.asarray(self.num_terms))
            roots = jax.tree.map(lambda _: root, gradient)
        own = lambda u, root: ((count * root).astype(u.dtype) * u)[None]
        return jax.tree.map(own, gradient, roots)

    def _record(self, block, calls, gradients, inputs, params):
        count = num_examples(inputs)
        if block.name not in calls:
            raise ValueError(
                f"layer {block.name!r} was not called by the model: leave it to a "
                "diagonal block (layers=)"
            )
        rows = [x for x, _ in calls[block.name]]
        if rows[0].shape[0] % count:
            raise ValueError(
                f"layer {block.name!r} sees {rows[0].shape[0]} rows, which "
                f"{count} examples do not divide, so they cannot be told apart: "
                "leave it to a diagonal block (layers=)"
            )
        a = [jnp.reshape(x, (count, -1, *x.shape[1:])) for x in rows]
        g = [
            jnp.reshape(x, (x.shape[0], count, -1, block.groups, block.columns))
            for x in gradients[block.name]
        ]
        return layer_record(
            jnp.concatenate(a, axis=1),
            jnp.concatenate(g, axis=2),
            bias=len(block.leaves) > 1,
            sharing=self.sharing,
            dtype=accumulation_dtype(params),
        )

    def _untaped(self, params, loss_args):
        """The leaves that no layer has, and the model as their function and inputs'."""
        leaves, treedef = jax.tree.flatten(params)
        places = [
            place
            for block in self.blocks
            if not block.groups or block.kind == "full"
            for place in block.leaves
        ]

        def model(chosen, inputs):
            mixed = list(leaves)
            for place, leaf in zip(places, chosen, strict=True):
                mixed[place] = leaf
            rebuilt = jax.tree.unflatten(treedef, mixed)
            return self.model_fn(rebuilt, inputs, Tape(keep=False), *loss_args)

        return tuple(leaves[place] for place in places), model

    def _per_example(self, params, inputs, loss_args, directions, key):
        """Mean over examples of the squared gradients, summed over the C of each.

        Returns:
            These for the diagonal blocks, and by name the records of full ones.
        """
        chosen, model = self._untaped(params, loss_args)
        if not chosen:
            return (), {}
        dtype = accumulation_dtype(params)

        def measure(x, u):
            row = lambda leaf: leaf[None]
            _, pull = jax.vjp(lambda c: model(c, jax.tree.map(row, x)), chosen)
            (gradients,) = _each(lambda v: pull(jax.tree.map(row, v)), u)
            gradients = iter([g.astype(dtype) for g in gradients])  # (C, ...) each
            squares, full = [], {}
            for block in self.blocks:
                if block.kind == "full":
                    parts = [next(gradients) for _ in block.leaves]
                    parts = [jnp.reshape(g, (len(g), -1)) for g in parts]
                    full[block.name] = jnp.concatenate(parts, axis=1)
                elif not block.groups:
                    squares.append(jnp.sum(jnp.square(next(gradients)), axis=0))
            return squares, full

        squares, full = jax.vmap(measure, in_axes=(0, 1))(inputs, directions)
        records = {
            name: LayerRecord(
                jnp.ones((len(g), 1, 1, 1), dtype),
                jnp.swapaxes(g, 0, 1)[:, :, None, None],
            )
            for name, g in full.items()
        }
        return tuple(jnp.mean(x, axis=0) for x in squares), records

    def _signed(self, params, inputs, loss_args, directions, key):
        """The squared gradient of the batch with random signs, over N."""
        chosen, model = self._untaped(params, loss_args)
        if not chosen:
            return (), {}
        dtype = accumulation_dtype(params)
        num_gradients, count = jax.tree.leaves(directions)[0].shape[:2]
        signs = jax.random.rademacher(key, (num_gradients, count))
        signed = jax.tree.map(
            lambda u: jnp.einsum("cn,cn...->n...", signs.astype(u.dtype), u), directions
        )
        _, pull = jax.vjp(lambda c: model(c, inputs), chosen)
        squares = [
            jnp.square(gradient.astype(dtype)) / count for gradient in pull(signed)[0]
        ]
        return tuple(squares), {}


def _each(pull, directions):
    """`pull` for each of C directions; one needs no batching."""
    if jax.tree.leaves(directions)[0].shape[0] > 1:
        return jax.vmap(pull)(directions)
    single = pull(jax.tree.map(lambda u: u[0], directions))
    return jax.tree.map(lambda x: x[None], single)
