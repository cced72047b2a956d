"""matvec -> the largest eigenvalue, by power iteration.

The first half of the steps finds the eigenvalue of largest magnitude. If that one is
negative, the second half starts anew on the matrix shifted by it, so that what comes
out is the algebraically largest eigenvalue, the one that bounds the learning rate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtdamp._basis import draw, magnitude, normalised, pack, unpack
from rmtdamp._jax import is_traced
from rmtdamp._tree import aligned, check_params, norm, scattered, vdot
from rmtdamp._types import Key, Matvec, Params

from ._apply import multiply


class Eigenvalue(NamedTuple):
    """An eigenvalue estimate, its residual, and its unit vector.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import largest_eigenvalue
        >>> diagonal = jnp.array([1.0, 2.0, 8.0])
        >>> key = jax.random.key(0)
        >>> found = largest_eigenvalue(lambda v: diagonal * v, diagonal, key)
        >>> print(f"{found.value:.2f} {jnp.abs(found.vector[2]):.2f}")
        8.00 1.00
    """

    value: jax.Array  # (), Rayleigh quotient theta
    residual: jax.Array  # (), ||M x - theta x||: an eigenvalue lies this near to theta
    vector: Params  # like params, x of unit norm


class _Carry(NamedTuple):
    vector: list  # what the next step starts from, of any length
    found: Any  # the last step's `Eigenvalue`, its vector packed


@jax.jit
def _unit(root, vector):
    """The vector at unit norm, and what the matvec is to see of it."""
    # A product of zero (the matrix is zero, or the shift has made it so) stays zero.
    x, _ = normalised(vector)
    return x, (x if root is None else jax.tree.map(jnp.multiply, root, x))


@jax.jit
def _step(root, shift, x, found):
    """M x + shift x and what it says of the eigenvalue, from `found` = H (root x)."""
    if root is not None:
        found = jax.tree.map(jnp.multiply, root, found)
    theta = vdot(x, found)
    unit = magnitude(found)
    left = jax.tree.map(lambda y, a: (y - theta * a) / unit, found, x)
    residual = unit * norm(left)
    shifted = jax.tree.map(lambda y, a: y + shift * a, found, x)
    return _Carry(shifted, Eigenvalue(theta, residual, x))


@jax.jit
def _root(preconditioner, like):
    return [1 / jnp.sqrt(d) for d in pack(aligned(preconditioner, like), like)]


@jax.jit
def _again(key, like, carry: _Carry):
    """The shift and the vector that the second half starts with."""
    # Twice the negative eigenvalue: with it alone, -c I would become the zero matrix.
    shift = jnp.maximum(-2 * carry.found.value, 0)
    silent = jnp.all(jnp.stack([jnp.all(x == 0) for x in carry.vector]))  # H x = 0
    restart = draw(key, like, scattered)
    choose = lambda a, b: jnp.where((shift > 0) | silent, a, b)
    return shift, jax.tree.map(choose, restart, carry.vector)


@jax.jit
def _finish(found: Eigenvalue, like) -> Eigenvalue:
    return found._replace(vector=unpack(found.vector, like))


def _iterate(matvec, like, root, shift, vector, num_steps) -> _Carry:
    """`num_steps` products: from Python if nothing is traced, else in the graph."""

    # XLA:CPU runs convolutions inside a loop some thirty times slower, and an eager
    # loop of compiled steps never waits for the device.
    def take(_, carry):
        x, seen = _unit(root, carry.vector)
        return _step(root, shift, x, multiply(matvec, like, seen))

    carry = take(0, _Carry(vector, None))
    if is_traced(matvec, vector):
        return jax.lax.fori_loop(1, num_steps, take, carry)
    for i in range(1, num_steps):
        carry = take(i, carry)
    return carry


def largest_eigenvalue(
    matvec: Matvec,
    like: Params,
    key: Key,
    *,
    num_steps: int = 100,
    preconditioner: Params | None = None,
) -> Eigenvalue:
    """The algebraically largest eigenvalue of H, or of D^-1/2 H D^-1/2.

    With D = B + delta, the damped preconditioner of an adaptive method, the latter is
    the curvature that the method sees: `stable_learning_rate` turns it into the
    largest stable learning rate (eq. 17).

    Power iteration converges like (|lambda_2| / lambda_1)^num_steps; `residual` says
    how far it got. A tie of largest magnitudes +lambda and -lambda, or nearly one, does
    not converge, and shows as a large residual: `eigsh` tells such pairs apart.

    Args:
        matvec: v -> H v for a symmetric H, from `hessian_matvec` or any function of
            pytrees. A plain function is compiled once per function object.
        like: pytree of real floating arrays, for structure, shapes and dtypes.
        key: a key of `jax.random` for the starting vectors.
        num_steps: number of products, at least 2.
        preconditioner: the diagonal of D, positive, a pytree like `like`; for Adam the
            tree of sqrt(v) + damping. None for H itself.

    Returns:
        `Eigenvalue(value, residual, vector)`.

    Raises:
        TypeError: `like` holds anything but real floating arrays.
        ValueError: fewer than 2 steps, or a preconditioner of other shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import largest_eigenvalue
        >>> diagonal = jnp.array([-4.0, 1.0, 3.0])
        >>> matvec = lambda v: diagonal * v
        >>> found = largest_eigenvalue(matvec, diagonal, jax.random.key(0))
        >>> print(f"{found.value:.3f}")
        3.000

    References:
        Granziol and Baskerville, eq. 17 and the text before eq. 19.
    """
    check_params(like)
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}, and at least 2 are needed")
    root = None if preconditioner is None else _root(preconditioner, like)
    first, second = jax.random.split(key)
    vector = draw(first, like, scattered)
    zero = np.zeros((), vector[0].dtype)
    carry = _iterate(matvec, like, root, zero, vector, num_steps // 2)
    shift, vector = _again(second, like, carry)
    carry = _iterate(matvec, like, root, shift, vector, num_steps - num_steps // 2)
    return _finish(carry.found, like)
