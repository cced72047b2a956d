"""What a program costs on several devices, read off the compiled text.

Nothing runs: collectives and bytes are those of the program that XLA made for so many
devices, virtual ones on a CPU.
"""

import collections
import functools
import math
import re

import jax
import optax
from jax.sharding import AxisType

import rmtdamp
from rmtdamp.hessian import hessian_matvec, lanczos, moments

from .timing import problem

BATCH = 8192  # microbatches whose activations are larger than the weights
STEPS = 8  # of Lanczos' iteration
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def collectives(text: str) -> dict[str, list[list[int]]]:
    """Of each kind the calls in a compiled text, each with the bytes of its arrays.

    The bytes are those of the results on one device. A call in a loop counts once.
    """
    found = collections.defaultdict(list)
    for results, kind in _CALL.findall(text):
        found[kind].append(
            [
                math.prod(map(int, filter(None, shape.split(","))))
                * (int(bits or 8) // 8)  # a bool, "pred", is a byte
                for _, bits, shape in _SHAPE.findall(results)
            ]
        )
    return dict(found)


def split_over(mesh, params):
    """Each leaf split over the mesh, along its longest axis that can be."""
    num = mesh.size

    def sharding(x):
        fits = [axis for axis in range(x.ndim) if x.shape[axis] % num == 0]
        spec = [None] * x.ndim
        if fits:
            spec[max(fits, key=lambda axis: x.shape[axis])] = "data"
        return jax.NamedSharding(mesh, jax.P(*spec))

    return jax.tree.map(sharding, params)


def product(loss_fn, tx, params, batch, state):
    return hessian_matvec(loss_fn, params, batch)(params)


def measured(loss_fn, tx, params, batch, state):
    return moments(loss_fn, params, batch, jax.random.key(0), stderr=False)


def step(loss_fn, tx, params, batch, state):
    grads = jax.grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def decomposed(loss_fn, tx, params, batch, state):
    return lanczos(hessian_matvec(loss_fn, params, batch), params, STEPS)


PROGRAMS = {
    "product": product,
    "moments": measured,
    "auto_adam": step,
    "lanczos": decomposed,
}
LAYOUTS = ("data-parallel", "split")


def scaling_row(effort, name, layout, num):
    """Collectives, what they bring in multiples of P, and memory."""
    del effort
    loss_fn, params, batch = problem("mlp", BATCH)
    mesh = jax.make_mesh(
        (num,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num]
    )
    whole, rows = (jax.NamedSharding(mesh, jax.P(*x)) for x in ((), ("data",)))
    split = whole if layout == "data-parallel" else split_over(mesh, params)
    params, batch = jax.device_put(params, split), jax.device_put(batch, rows)
    tx = rmtdamp.auto_adam(1e-3, loss_fn)
    program = functools.partial(PROGRAMS[name], loss_fn, tx)
    compiled = jax.jit(program).lower(params, batch, tx.init(params)).compile()
    calls, memory = collectives(compiled.as_text()), compiled.memory_analysis()
    assert memory is not None
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    p = sum(x.nbytes for x in jax.tree.leaves(params))
    said = dict.fromkeys(("all-reduce", "all-gather"), "none")
    for kind, of in calls.items():
        said[kind] = f"{len(of)}: {sum(map(sum, of)) / p:.2f} P"
    return said | {"MB a device": f"{peak / 1e6:.1f}"}
