"""What measures every few steps, and by hand: shared by the learner, KFAC and Lanczos.

A measurement sits behind a conditional in the training step, or is called between
steps, where its state is found in any chain and put back.
"""

import warnings
from collections.abc import Callable

import jax
import numpy as np
import optax

from rmtdamp._types import Batch, Params
from rmtdamp.hessian._moments import has_convolution


def check_every(name: str, every, *, or_never: bool) -> None:
    """Refuse a period that is no whole number of steps; traced ones pass.

    Raises:
        ValueError: a Python number below 1, or not whole.
    """
    if isinstance(every, int | float | np.number) and (
        every < 1 or every != int(every)
    ):
        never = ", or None for never" if or_never else ""
        raise ValueError(f"{name} is {every}: take a whole number of at least 1{never}")


def only_state(opt_state: optax.OptState, kind: type, described: str, way_out: str):
    """The one state of `kind` in any chain or wrapper.

    Returns:
        The state.

    Raises:
        ValueError: there is none, or there are several.
    """
    is_kind = lambda node: isinstance(node, kind)
    found = list(filter(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind)))
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} {described} states, and {way_out}"
        )
    return found[0]


def replaced(opt_state: optax.OptState, old, new) -> optax.OptState:
    """`opt_state` with `new` in the place of `old`; all else is untouched."""
    is_old = lambda node: node is old
    return jax.tree.map(lambda x: new if x is old else x, opt_state, is_leaf=is_old)


def warn_of_slow_convolutions(
    function: Callable,
    params: Params,
    batch: Batch,
    loss_args: tuple,
    *,
    subject: str,
    place: str,
    way_out: str,
    stacklevel: int,
) -> None:
    """Warn where XLA:CPU would run `function` some thirty times slower in a step."""
    if jax.default_backend() == "cpu" and has_convolution(
        function, params, batch, loss_args
    ):
        warnings.warn(
            f"the {subject} contains convolutions, which XLA on a CPU runs some thirty "
            f"times slower inside {place}: pass {way_out} (on a GPU or TPU this does "
            "not matter)",
            stacklevel=stacklevel + 1,
        )
