r"""gradients -> averaged Kronecker factors -> their eigenbases -> damped Shampoo step.

A matrix gradient G has the factors L, averaged G G^T, and R, averaged G^T G. Their
eigenvectors are cached. Along them every gradient is averaged into the eigenvalues, and
the damping is added to their roots when the step is made. Every leaf is handled in
the form (stack, rows, columns); one that is no matrix keeps the average of g^2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rmtdamp._checks import check_decays, check_every, check_mesh
from rmtdamp._jax import matmul_precision
from rmtdamp._sharding import automatic, spread, typed_like
from rmtdamp._tree import accumulation_dtype

from ._measurer import is_due
from ._optimiser import check_damping, damping_in_force, optimiser
from ._spectral_descent import dimension_numbers, folded, ratio


class Factor(NamedTuple):
    """One side of a stack of matrices, k its length; or trees of these, as params."""

    average: Any  # (stack, k, k), decaying average of G G^T or G^T G, biased
    eigenvalues: Any  # (stack, k), v^T average v along the eigenvectors v, biased
    eigenvectors: Any  # (stack, k, k), in columns
    unseen: Any  # (stack, k), 1 for eigenvectors that had no eigenvalue, else 0


class ShampooBlock(NamedTuple):
    """What is known of one leaf: a matrix has factors, anything else has squares."""

    left: Factor | None  # of the rows; None where that side has none
    right: Factor | None  # of the columns
    squares: jax.Array | None  # like the leaf, decaying average of g^2, biased


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`; its trees are like params, with arrays for leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> state = rmtdamp.scale_by_shampoo().init({"w": jnp.zeros((4, 3))})
        >>> print(state.count, state.factor_rejections)
        0 0
    """

    count: Any  # (), int32, steps taken
    factor_rejections: jax.Array  # (), int32, gradients that were not finite
    left: Factor  # of trees; a scalar where a side has no factor
    right: Factor
    squares: Any  # of leaves that are no matrices, else scalars


def _blocks(state: ScaleByShampooState, leaves: list) -> list[ShampooBlock]:
    """What is known of each of the leaves."""

    def factors(side):
        each = zip(*map(jax.tree.leaves, side), strict=True)
        return [Factor(*arrays) if arrays[0].ndim else None for arrays in each]

    def block(left, right, squares, leaf):
        held = left is right is None and squares.shape == leaf.shape
        return ShampooBlock(left, right, squares if held else None)

    sides = factors(state.left), factors(state.right)
    each = zip(*sides, jax.tree.leaves(state.squares), leaves, strict=True)
    return [block(*of_leaf) for of_leaf in each]


def _trees(blocks: list[ShampooBlock], treedef, dtype) -> tuple[Factor, Factor, Any]:
    """The inverse of `_blocks`."""
    tree = lambda leaves: jax.tree.unflatten(treedef, leaves)
    # Scalars, for orbax keeps no empty arrays; not shared, so that a step may donate.
    nothing = lambda: jnp.zeros((), dtype)

    def side(factors):
        full = [f or [nothing() for _ in Factor._fields] for f in factors]
        return Factor(*(tree([f[i] for f in full]) for i in range(len(Factor._fields))))

    squares = [nothing() if b.squares is None else b.squares for b in blocks]
    left, right = (side([b[i] for b in blocks]) for i in range(2))
    return left, right, tree(squares)


def _is_factor(x) -> bool:
    return isinstance(x, Factor)


def _rounding(values):
    """What eigenvalues (stack, k) are known up to, shape (stack, 1)."""
    top = jnp.max(values, axis=1, keepdims=True)
    return values.shape[-1] * jnp.finfo(values.dtype).eps * top


def _eigh(factor):
    values, vectors = jnp.linalg.eigh(factor.average)
    unseen = values <= _rounding(values)
    values = jnp.where(unseen, 0, values)
    return factor._replace(
        eigenvalues=values,
        eigenvectors=vectors,
        unseen=unseen.astype(values.dtype),
    )


def _energies(factor, energies):
    """|v^T G|^2 (stack, k) of the eigenvectors v; the unseen ones share theirs."""
    # Which vectors span what was unseen is a matter of rounding. No direction among
    # them has more than all of them have.
    shared = jnp.sum(factor.unseen * energies, axis=1, keepdims=True)
    return jnp.where(factor.unseen > 0, shared, energies)


def _eigenbases(mesh, blocks):
    factors, treedef = jax.tree.flatten(blocks, is_leaf=_is_factor)
    costs = [f.average.size * f.average.shape[-1] for f in factors]
    return treedef.unflatten(spread(_eigh, factors, costs, mesh))


# A function of the module, so that an eager update compiles the conditional once.
@functools.partial(jax.jit, static_argnums=0)
def _eigenbases_if(mesh, due, blocks):
    return jax.lax.cond(due, functools.partial(_eigenbases, mesh), lambda b: b, blocks)


def _weights(values, delta, power, in_root):
    """(lambda^1/2 + delta)^(-2 power), shape (stack, k)."""
    # None counts for less than rounding, nor below zero.
    values = jnp.maximum(values, _rounding(values))
    base = values + delta if in_root else jnp.sqrt(values) + delta
    exponent = -power if in_root else -2 * power
    return jnp.where(base > 0, jnp.where(base > 0, base, 1) ** exponent, 0)


def _transposed(x):
    return jnp.swapaxes(x, 1, 2)


def scale_by_shampoo(
    *,
    damping: optax.ScalarOrSchedule = 1e-8,
    exponents: Any = 0.25,
    decay: jax.typing.ArrayLike = 0.95,
    eigen_every: jax.typing.ArrayLike = 10,
    damping_in_root: bool = False,
    max_side: int = 8192,
    weight_dimension_numbers: Any = None,
    precision: str | None = "highest",
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo with the damping of `scale_by_spectral_descent`.

    With L and R the debiased averages of G G^T and G^T G and delta the damping,

        u = (L^1/2 + delta I)^(-2p) G (R^1/2 + delta I)^(-2q),   p, q = `exponents`.

    At p = q = 1/4 and with one gradient this is the damped polar factor of
    `scale_by_spectral_descent`, for every delta. At p = q = 1/2 it is the inverse of a
    Kronecker product, in the place of a Fisher matrix; (0.5, 0) is one-sided. A leaf
    that is no matrix gets, as a diagonal one, g / (sqrt(v) + delta)^(2p + 2q), with v
    the debiased average of g^2: at 1/4 it is RMSProp. There is no momentum here: put
    `optax.ema` before or after it.

    With `damping_in_root` the damping is inside, u = (L + delta I)^-p G (R + delta
    I)^-q, as published.

    Units: delta is added to a root of a factor's eigenvalue, a singular value of the
    gradient; inside the root to an eigenvalue, its square.

    Between eigendecompositions the eigenvectors v stay, and each gradient is averaged
    into the eigenvalues as |v^T G|^2, what v^T L v is: a direction that is new since
    does not go by an eigenvalue of zero. Eigenvectors without an eigenvalue, below
    rounding, are arbitrary; each has the energy of all of them, so that a step there is
    no longer than L's own and does not depend on which they are.

    A gradient that is not finite leaves the factors as they were and is counted
    (`optax.tree.get(state, "factor_rejections")`). An eigenvalue below rounding, k eps
    times the largest, counts as that, so a damping of 0 is allowed.

    Cost: products with the sides' squares each step, an eigendecomposition of each side
    every `eigen_every` steps. Memory: twice the squares of both sides.

    Args:
        damping: delta, a number or a schedule of the step, for use without
            `auto_damping` and `set_damping`.
        exponents: p and q, a pair, or one number for both. A side with the Python
            number 0 gets no factor.
        decay: of the averages, in [0, 1); 0 takes the last gradient alone.
        eigen_every: steps between eigendecompositions, the first step included, and
            steps 1, 2, 4, ... below half of it.
        damping_in_root: whether delta is added to L and R themselves.
        max_side: a longer side gets no factor and leaves its exponent to the other
            one; a matrix with two such sides is treated entry by entry.
        weight_dimension_numbers: which axes make a matrix, as in
            `scale_by_spectral_descent`.
        precision: matmul precision; None leaves the global setting.
        mesh: devices over which the eigendecompositions are spread, each factor's on
            one; None: each device makes all of them.

    Returns:
        A transformation whose `update` takes `damping`, a scalar. Updates have the
        gradients' dtype; the work is done in float32 or wider.

    Raises:
        ValueError: a number out of its range, or (from `init`) axes that do not make a
            matrix.
        TypeError: `mesh` is something else.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> tx = rmtdamp.scale_by_shampoo(damping=1.0)
        >>> grads = jnp.diag(jnp.array([1.0, 3.0]))
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> [round(float(u), 3) for u in jnp.diag(updates)]
        [0.5, 0.75]

    References:
        Gupta, Koren and Singer, Shampoo, 2018, Algorithm 1. We average where they sum,
        and damp the root. Morwani et al., A new perspective on Shampoo's
        preconditioner, 2024 (the exponent 1/2).
    """
    check_damping(damping)
    pair = tuple(exponents) if isinstance(exponents, tuple | list) else (exponents,) * 2
    if len(pair) != 2 or any(isinstance(p, int | float) and p < 0 for p in pair):
        raise ValueError(
            f"exponents is {exponents}: take one number or a pair, at least 0"
        )
    check_decays(decay=decay)
    check_every("eigen_every", eigen_every)
    check_mesh(mesh)
    if not isinstance(max_side, int) or max_side < 1:
        raise ValueError(
            f"max_side is {max_side}: take a whole number of at least 1 (and name it "
            "in static_args of optax.inject_hyperparams: shapes depend on it)"
        )
    own = damping

    def powers(shape):
        """The exponents of the two sides of a matrix; None: entry by entry."""
        p, q = pair
        long_left, long_right = (k > max_side for k in shape)
        if long_left and long_right:
            return None
        return (0, p + q) if long_left else (p + q, 0) if long_right else (p, q)

    def factor(power, stack, k, dtype):
        if isinstance(power, int | float) and power == 0:
            return None
        eye = jnp.broadcast_to(jnp.eye(k, dtype=dtype), (stack, k, k))
        zeros = jnp.zeros((stack, k), dtype)
        return Factor(
            jnp.zeros((stack, k, k), dtype), zeros, eye, jnp.ones((stack, k), dtype)
        )

    def block(leaf, numbers, dtype):
        if numbers is not None:
            stack, rows, columns = folded(leaf, numbers)[0].shape
            both = powers((rows, columns))
            if both is not None:
                left = factor(both[0], stack, rows, dtype)
                return ShampooBlock(left, factor(both[1], stack, columns, dtype), None)
        return ShampooBlock(None, None, jnp.zeros(leaf.shape, dtype))

    def mean(old, new, counts):
        rate = jnp.asarray(decay).astype(old.dtype)
        return jnp.where(counts, rate * old + (1 - rate) * new, old)

    def averaged(block, g, finite):
        left, right, squares = block
        if squares is not None:
            return block._replace(squares=mean(squares, g * g, finite))
        if left is not None:
            new = mean(left.average, g @ _transposed(g), finite)
            left = left._replace(average=new)
        if right is not None:
            new = mean(right.average, _transposed(g) @ g, finite)
            right = right._replace(average=new)
        return ShampooBlock(left, right, None)

    def applied(block, g, delta, correction, counts):
        """The step, and the block whose eigenvalues know of g too if it `counts`."""
        power = lambda p: jnp.asarray(p).astype(g.dtype)
        left, right, squares = block
        if squares is not None:
            v = squares / correction
            base = v + delta if damping_in_root else jnp.sqrt(v) + delta
            exponent = power(sum(pair)) * (1 if damping_in_root else 2)
            return ratio(g, base**exponent), block
        p, q = powers(g.shape[1:]) or pair
        # Bases are orthogonal, so one side's does not change what the other sees.
        g = g if left is None else _transposed(left.eigenvectors) @ g
        g = g if right is None else g @ right.eigenvectors
        energy = g * g
        if left is not None:
            seen = _energies(left, jnp.sum(energy, axis=2))
            values = mean(left.eigenvalues, seen, counts)
            left = left._replace(eigenvalues=values)
            weights = _weights(values / correction, delta, power(p), damping_in_root)
            g = left.eigenvectors @ (weights[:, :, None] * g)
        if right is not None:
            seen = _energies(right, jnp.sum(energy, axis=1))
            values = mean(right.eigenvalues, seen, counts)
            right = right._replace(eigenvalues=values)
            weights = _weights(values / correction, delta, power(q), damping_in_root)
            g = (g * weights[:, None, :]) @ _transposed(right.eigenvectors)
        return g, ShampooBlock(left, right, None)

    def init(params):
        dtype = accumulation_dtype(params)
        leaves, treedef = jax.tree.flatten(params)
        numbers = dimension_numbers(weight_dimension_numbers, params)
        blocks = [block(x, n, dtype) for x, n in zip(leaves, numbers, strict=True)]
        zero = lambda: jnp.zeros((), jnp.int32)
        return ScaleByShampooState(zero(), zero(), *_trees(blocks, treedef, dtype))

    def update(updates, state, params=None, *, damping=None, **extra_args):
        del params, extra_args
        out = lambda: typed_like((updates, state))
        return automatic(step, out, updates, state, damping)

    def step(updates, state, damping):
        leaves, treedef = jax.tree.flatten(updates)
        numbers = dimension_numbers(weight_dimension_numbers, updates)
        blocks = _blocks(state, leaves)
        dtype = accumulation_dtype(updates)
        delta = damping_in_force("scale_by_shampoo", damping, own, state.count, dtype)
        finite = jnp.array(True)
        for leaf in leaves:
            finite &= jnp.all(jnp.isfinite(leaf))

        rejections = state.factor_rejections + (~finite).astype(jnp.int32)
        count = optax.safe_increment(state.count)
        seen = jnp.maximum(count - rejections, 1).astype(dtype)
        correction = 1 - jnp.asarray(decay).astype(dtype) ** seen

        gradients, ways_back = [], []
        for leaf, n, known in zip(leaves, numbers, blocks, strict=True):
            g, back = leaf.astype(dtype), lambda x: x
            if known.squares is None and n is not None:
                g, back = folded(g, n)
            gradients.append(g)
            ways_back.append(back)
        with matmul_precision(precision):
            blocks = [
                averaged(b, g, finite) for b, g in zip(blocks, gradients, strict=True)
            ]
            squares = [b.squares for b in blocks]
            factors = [b._replace(squares=None) for b in blocks]
            if isinstance(eigen_every, int) and eigen_every == 1:
                due, factors = True, _eigenbases(mesh, factors)
            else:
                due = is_due(state.count, eigen_every)
                factors = _eigenbases_if(mesh, due, factors)
            blocks = [
                b._replace(squares=s) for b, s in zip(factors, squares, strict=True)
            ]
            counts = finite & ~jnp.asarray(due)  # else it is in the average
            each = zip(blocks, gradients, strict=True)
            steps = [applied(b, g, delta, correction, counts) for b, g in each]
        blocks = [b for _, b in steps]
        new = [
            back(u).astype(leaf.dtype)
            for (u, _), back, leaf in zip(steps, ways_back, leaves, strict=True)
        ]
        trees = _trees(blocks, treedef, dtype)
        state = ScaleByShampooState(count, rejections, *trees)
        return jax.tree.unflatten(treedef, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: optax.ScalarOrSchedule = 1e-8,
    exponents: Any = 0.25,
    decay: jax.typing.ArrayLike = 0.95,
    eigen_every: jax.typing.ArrayLike = 10,
    damping_in_root: bool = False,
    max_side: int = 8192,
    weight_dimension_numbers: Any = None,
    precision: str | None = "highest",
    mesh: Mesh | None = None,
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_shampoo`, momentum, decoupled weight decay and the learning rate.

    Args:
        learning_rate: alpha, a number or a schedule.
        damping: delta, a number or a schedule, in the unit of a singular value.
        exponents: p and q, a pair, or one number for both.
        decay: of the factors' averages.
        eigen_every: steps between eigendecompositions.
        damping_in_root: whether delta is added to the factors themselves.
        max_side: a longer side gets no factor.
        weight_dimension_numbers: which axes make a matrix.
        precision: matmul precision.
        mesh: devices over which the eigendecompositions are spread.
        momentum: decay of the sum of past steps; None for none.
        nesterov: Nesterov momentum.
        weight_decay: decoupled, multiplied by the learning rate, as in `optax.adamw`.
        mask: which params decay: a tree of bools or a function that makes one.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: as `scale_by_shampoo`.
        TypeError: as `scale_by_shampoo`.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmtdamp
        >>> tx = rmtdamp.set_damping(rmtdamp.shampoo(1e-2), 1e-3)
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
        >>> updates, state = tx.update(params, tx.init(params), params)

    References:
        Gupta, Koren and Singer, Shampoo, 2018.
    """
    return optimiser(
        scale_by_shampoo(
            damping=damping,
            exponents=exponents,
            decay=decay,
            eigen_every=eigen_every,
            damping_in_root=damping_in_root,
            max_side=max_side,
            weight_dimension_numbers=weight_dimension_numbers,
            precision=precision,
            mesh=mesh,
        ),
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        mask=mask,
    )
