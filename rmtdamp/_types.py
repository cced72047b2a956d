"""The nouns of the package; aliases only.

`Params` and `Batch` are pytrees of arrays. Every leaf of a batch shares its leading
axis, the examples: that axis is what gets split. A vector in parameter space (a
gradient, a probe, an eigenvector) is a pytree like `Params` and is never flattened.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

Params = Any
Batch = Any
Key = jax.Array
LossFn = Callable[..., jax.Array]  # loss_fn(params, batch, *loss_args) -> mean loss, ()
ModelFn = Callable[..., Any]  # model_fn(params, inputs, *loss_args) -> outputs
Criterion = Callable[[Any, Any], jax.Array]  # criterion(outputs, targets) -> mean loss
SampleFn = Callable[[Key, Any], Any]  # sample_fn(key, outputs) -> targets
Matvec = Callable[[Params], Params]
Execution = Literal["scan", "unroll", "vmap", "eager"]
Mode = Literal["forward-over-reverse", "reverse-over-reverse", "finite-difference"]
