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
import functools
from collections import Counter
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._checks import check_choice, check_outputs, check_range, check_scalar, pair
from rmtdamp._jax import depends, is_traced, matmul_precision
from rmtdamp._tree import accumulation_dtype, check_params, num_examples
from rmtdamp._types import Batch, Criterion, Key, ModelFn, Params, SampleFn

from ._blocks import Block
from ._factors import (
    Factors,
    LayerRecord,
    Sharing,
    kronecker_factors,
    layer_record,
)
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
            it. A sum of cross-entropies of integer labels, or of squared errors, with
            any weights (classes, masks, a mean over tokens, a constant) is recognised,
            and each target's gradient is divided by the root of its weight. Of another
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

        taps = _zeros_like_outputs(seen, self.blocks, params, inputs, loss_args)
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
            return _hessian_roots(self.criterion, outputs, targets, count)
        if self.fisher == "sampled":
            if self.sample_fn is None:
                _check_logits(outputs)
            sampled = (self.sample_fn or jax.random.categorical)(key, outputs)
            _check_sampled(sampled, targets)
            if self.sample_fn is None:
                none = (targets < 0) | (targets >= outputs.shape[-1])
                sampled = jnp.where(none, targets, sampled.astype(targets.dtype))
            targets = sampled
        gradient = jax.grad(self.criterion)(outputs, targets)
        if self.num_terms is not None:
            root = count * jnp.sqrt(self.num_terms)
        else:
            root = count * _unweighted(self.criterion, outputs, targets, gradient)
        return jax.tree.map(lambda u: (root.astype(u.dtype) * u)[None], gradient)

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


def _zeros_like_outputs(seen, blocks, params, inputs, loss_args):
    """Zeros for each call of a layer, whose place in the model is looked at first.

    Args:
        seen: (names or None, params, inputs, loss_args) -> outputs and kernels by name,
            and what the model returns.
        blocks: of the params.
        params: pytree of arrays.
        inputs: of the model.
        loss_args: further arguments of the model.

    Returns:
        Per layer a list of arrays.

    Raises:
        ValueError: a layer's outputs belong to the inside of a scan, vmap, ..., or do
            not depend on the inputs, or its kernel is not its parameter.
    """

    def trace(names):
        look = jax.make_jaxpr(functools.partial(seen, names), return_shape=True)
        try:
            traced, found = look(params, inputs, loss_args)
        except jax.errors.UnexpectedTracerError:
            return None
        # What came from neither arguments nor constants.
        return None if is_traced(traced.consts) else (traced.jaxpr, *found)

    whole = trace(None)
    if whole is None:
        named = [block.name for block in blocks if block.groups]
        inside = [name for name in named if trace({name}) is None]
        raise ValueError(
            f"layers {', '.join(inside or named)} sit inside a transformed part of the "
            "model (scan, vmap, jit, checkpoint), from which their inputs cannot be "
            "handed out: leave them to diagonal blocks (layers=)"
        )
    jaxpr, outputs, kernels, _ = whole
    first = len(jax.tree.leaves(params))
    last = first + len(jax.tree.leaves(inputs))
    follows = depends(jaxpr, jaxpr.invars[first:last])
    for name, calls in outputs.items():
        # A state of zeros is none of the inputs, at a layer's first call of several.
        of_calls = [next(follows) for _ in calls]
        shape = calls[0].shape
        # Rows for each example may be there without depending on it (positions
        # spread over the batch); the axis of a tap came first.
        spread = len(shape) > 3 and shape[1] == num_examples(inputs)
        if not any(of_calls) and not spread:
            raise ValueError(
                f"layer {name!r} has outputs of shape {shape[1:]} that do not "
                "depend on the inputs, such as an embedding of positions: the "
                "examples share them, so their gradients cannot be told apart; leave "
                "it to a diagonal block (layers=, embeddings=)"
            )
    _check_kernels(jaxpr, blocks, outputs, kernels)
    return jax.tree.map(lambda y: jnp.zeros(y.shape[1:], y.dtype), outputs)


def _check_kernels(jaxpr, blocks, outputs, kernels) -> None:
    """Refuse a layer whose product is not that with its own parameter, and that alone.

    Args:
        jaxpr: params first; returns `outputs`, `kernels` and what the model returns.
        blocks: of the params.
        outputs: per layer a list, one for each call.
        kernels: the same, of the layers that show theirs.

    Raises:
        ValueError: there is one.
    """
    arguments, sources, uses, factors = _sources(jaxpr)
    shown, made = iter(sources[len(jax.tree.leaves(outputs)) :]), iter(factors)
    multiplied = {name: [next(made) for _ in calls] for name, calls in outputs.items()}
    own = {block.name: [arguments[i] for i in block.leaves] for block in blocks}
    for name, calls in kernels.items():
        of_calls = [next(shown) for _ in calls]
        if name not in own:  # a layer without a block of its own
            continue
        if any(x not in own[name] for x in of_calls):
            raise ValueError(
                f"layer {name!r} does not multiply by its parameter, but by what is "
                "computed from it (WeightNorm, SpectralNorm, weight standardisation), "
                "whose factors are not the parameter's: leave it to a diagonal block "
                "(layers=)"
            )
        if not all(map(set.__contains__, multiplied[name], map(id, of_calls))):
            raise ValueError(
                f"layer {name!r} does more than multiply by its kernel (a dot_general "
                "or conv_general_dilated of one's own that scales or rounds), and its "
                "factors are those of the product alone: leave it to a diagonal block "
                "(layers=)"
            )
        if uses[id(of_calls[0])] > len(calls):
            raise ValueError(
                f"layer {name!r} shares its kernel with another part of the model "
                "(tied weights), whose curvature its Kronecker block would miss: leave "
                "it to a diagonal block (layers=)"
            )


# What leaves an array's numbers as they are; what calls another jaxpr, one input each.
_SAME = {"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"}
_SAME |= {"copy", "sharding_constraint", "reshard", "pvary"}
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}
_CALLS |= {"checkpoint", "remat", "remat2"}


def _operations(jaxpr, given: list) -> tuple[list, list]:
    """(name, inputs, outputs) of each operation, calls opened, and what it returns.

    Returns:
        Operations on objects that stand for arrays; the objects returned.
    """
    known = dict(zip(jaxpr.invars, given, strict=True))
    read = lambda x: x if hasattr(x, "val") else known.setdefault(x, object())
    found = []
    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        bodies = [getattr(p, "jaxpr", p) for p in equation.params.values()]
        bodies = [body for body in bodies if hasattr(body, "eqns")]
        if equation.primitive.name in _CALLS and len(bodies) == 1:
            more, outputs = _operations(bodies[0], inputs)
            found += more
        else:
            outputs = [object() for _ in equation.outvars]
            found.append((equation.primitive.name, inputs, outputs))
        known.update(zip(equation.outvars, outputs, strict=True))
    return found, [read(x) for x in jaxpr.outvars]


def _sources(jaxpr) -> tuple[list, list, Counter, list[set[int]]]:
    """Where the numbers of each output come from, unchanged.

    Returns:
        Objects that stand for the arguments; for each output one of these, or that of
        an array that was computed; how many operations use the numbers of each, by its
        id, of those on which an output depends; and for each output the ids of what was
        multiplied to make it, perhaps with a bias added.
    """
    arguments = [object() for _ in jaxpr.invars]
    operations, outputs = _operations(jaxpr, arguments)
    source, alive = {}, {id(x) for x in outputs}
    origin = lambda x: source.get(id(x), x)
    for name, inputs, made in operations:
        if name in _SAME:
            source[id(made[0])] = origin(inputs[0])
    uses = Counter()
    for name, inputs, made in reversed(operations):
        if alive.isdisjoint(map(id, made)):
            continue
        alive.update(map(id, inputs))
        # What has no gradient adds nothing to the parameter's curvature.
        if name not in _SAME | {"stop_gradient"}:
            uses.update({id(origin(x)) for x in inputs})
    maker = {id(x): operation for operation in operations for x in operation[2]}

    def factors(x) -> set[int]:
        name, inputs, _ = maker.get(id(origin(x)), ("", [], []))
        if name in ("add", "add_any"):
            return set().union(*map(factors, inputs))
        products = "dot_general", "conv_general_dilated"
        return {id(origin(y)) for y in inputs} if name in products else set()

    return arguments, [origin(x) for x in outputs], uses, list(map(factors, outputs))


def _each(pull, directions):
    """`pull` for each of C directions; one needs no batching."""
    if jax.tree.leaves(directions)[0].shape[0] > 1:
        return jax.vmap(pull)(directions)
    single = pull(jax.tree.map(lambda u: u[0], directions))
    return jax.tree.map(lambda x: x[None], single)


def _hessian_roots(criterion, outputs, targets, count):
    """u_c with sum_c u_c u_c^T the Hessian of each example's loss: (C, N, ...)."""
    if not isinstance(outputs, jax.Array):
        raise ValueError(
            f"fisher='ggn' needs a model with one array of outputs, and got a "
            f"{type(outputs).__name__}: take 'sampled' or 'empirical'"
        )
    flat = jnp.reshape(outputs, (count, -1))
    dtype = accumulation_dtype(outputs)
    flat = flat.astype(dtype)
    loss = lambda z: criterion(
        jnp.reshape(z, outputs.shape).astype(outputs.dtype), targets
    ).astype(dtype)

    def column(unit):
        tangent = jnp.broadcast_to(unit[None], flat.shape)
        return jax.jvp(jax.grad(loss), (flat,), (tangent,))[1]

    hessian = count * jax.vmap(column)(jnp.eye(flat.shape[1], dtype=dtype))
    hessian = jnp.moveaxis(hessian, 0, 2)
    values, vectors = jnp.linalg.eigh((hessian + jnp.swapaxes(hessian, 1, 2)) / 2)
    roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    roots = jnp.moveaxis(roots, 2, 0).astype(outputs.dtype)
    return jnp.reshape(roots, (-1, *outputs.shape))


def _check_logits(outputs) -> None:
    """Refuse several outputs, and those of one column: there is nothing to draw."""
    if not isinstance(outputs, jax.Array):
        raise ValueError(
            f"model_fn's outputs are a {type(outputs).__name__}, and labels are drawn "
            "from one array of logits: hand over a sample_fn(key, outputs) that draws "
            "targets like the batch's, or take fisher='empirical'"
        )
    shapes = [jnp.shape(x) for x in jax.tree.leaves(outputs)]
    if any(shape[-1] == 1 for shape in shapes):
        raise ValueError(
            f"model_fn's outputs have shapes {shapes}, and among logits of length 1 "
            "there is one label to draw: for a single logit hand over a sample_fn such "
            "as lambda key, z: jax.random.bernoulli(key, jax.nn.sigmoid(z[:, 0])), of "
            "the targets' shape and dtype, or take fisher='ggn'"
        )


def _unweighted(criterion, outputs, targets, gradient) -> jax.Array:
    """What brings the gradients' squares to the Hessian's scale, as its root.

    Where N times the loss is sum_i c_i l_i over targets i, l_i a negative logarithm of
    a likelihood, the Hessian is the sum of c_i F_i, and gradients of c_i l_i give
    c_i^2 F_i. So they are divided by the root of c_i.

    Returns:
        A scalar, or an array that multiplies the gradient, with an axis for classes.
    """
    if not all(isinstance(x, jax.Array | np.ndarray) for x in (outputs, targets)):
        return jnp.ones(())
    weights, known = _weights(criterion, outputs, targets)
    try:
        other = jnp.sqrt(_num_terms(criterion, outputs, targets, gradient))
    except (TypeError, ValueError) as error:
        # A mask of a fixed shape, say. In a compiled step nothing can be raised.
        if weights is None or (not is_traced(known) and not known):
            raise ValueError(
                f"each example has targets of shape {targets.shape[1:]}, and whether "
                "the loss is their mean or sum cannot be tried with twice as many "
                f"({error}): hand over num_terms, their number if it is the mean, else "
                "1"
            ) from error
        other = jnp.full((), jnp.nan)
    if weights is None:
        return other
    root = jax.lax.rsqrt(jnp.where(weights > 0, weights, 1))
    return jnp.where(known, root, other.astype(root.dtype))


def _weights(criterion, outputs, targets) -> tuple:
    """c, where N times the loss is sum_i c_i l_i of cross-entropies or squared errors.

    At outputs of zero a softmax cross-entropy of label y among C has the gradient
    c (1/C - e_y) and the Hessian c (I - 1/C) / C, half a squared error -c y and c I.
    Whatever c may be, that both agree tells these losses from others.

    Returns:
        c, of the outputs' number of axes, and whether it is known, a scalar; None and
        False if it cannot be.
    """
    dtype, count = accumulation_dtype(outputs), len(targets)
    zeros = jnp.zeros(outputs.shape, dtype)
    slope = jax.grad(lambda z: count * criterion(z, targets).astype(dtype))
    if outputs.shape == targets.shape:
        if not jnp.issubdtype(targets.dtype, jnp.inexact):
            return None, False
        first, c = jax.jvp(slope, (zeros,), (jnp.ones_like(zeros),))
        size = lambda x: jnp.linalg.norm(jnp.ravel(x))
        expected = c * targets.astype(dtype)
        return c, (size(first + expected) <= 0.01 * size(expected)) & jnp.any(c > 0)
    integers = jnp.issubdtype(targets.dtype, jnp.integer)
    classes = outputs.shape[-1]
    if outputs.shape[:-1] != targets.shape or not integers or classes < 2:
        return None, False
    signs = 1 - 2 * (np.arange(classes) % 2)
    signs = jnp.asarray(signs - signs.mean(), dtype)
    first, second = jax.jvp(slope, (zeros,), (jnp.broadcast_to(signs, zeros.shape),))
    c = classes * (second @ signs) / (signs @ signs)
    label = jnp.clip(targets, 0, classes - 1)[..., None]
    at_label = jnp.take_along_axis(first, label, axis=-1)[..., 0]
    by_slope = (jnp.mean(first, axis=-1) - at_label) / (1 - 1 / classes)
    # Smoothed labels make the slope smaller. Places left out have neither.
    agree = (c > 0.6 * by_slope) & (c < 1.7 * by_slope) | (c == 0) & (by_slope == 0)
    return c[..., None], jnp.all(agree) & jnp.any(c > 0)


def _num_terms(criterion, outputs, targets, gradient) -> jax.Array | float:
    """Targets per example, where the loss is their mean; 1 where it is their sum.

    Returns:
        A number, of those that have a gradient.
    """
    if targets.size == len(targets):
        return 1.0
    places = targets.ndim
    if outputs.shape[:places] != targets.shape:
        return 1.0
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    doubled = jax.grad(criterion)(twice(outputs), twice(targets))
    size = lambda x: jnp.linalg.norm(jnp.ravel(x).astype(jnp.float32))
    whole = size(gradient)
    share = size(doubled[:, : targets.shape[1]]) / jnp.where(whole > 0, whole, 1)
    rows = jnp.reshape(gradient, (*targets.shape, -1))
    count = jnp.count_nonzero(jnp.any(rows != 0, axis=-1)) / len(targets)
    return jnp.where(jnp.abs(share - 0.5) < 0.01, jnp.maximum(count, 1), 1)


def _check_sampled(sampled, targets) -> None:
    describe = lambda tree: [
        (jnp.shape(x), jnp.issubdtype(jnp.result_type(x), jnp.floating))
        for x in jax.tree.leaves(tree)
    ]
    if describe(sampled) != describe(targets):
        shapes = [
            [jnp.shape(x) for x in jax.tree.leaves(t)] for t in (sampled, targets)
        ]
        raise ValueError(
            f"sampled targets have shapes {shapes[0]} and those of the batch "
            f"{shapes[1]}, or integers meet floats: hand over sample_fn(key, outputs) "
            "that draws targets of the batch's kind (the default draws integer labels "
            "from logits), or take fisher='ggn'"
        )
