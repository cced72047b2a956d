"""For Flax: nnx and linen, training and curvature.

| | |
|---|---|
| `curvature_loss`, `loss_args` | an nnx model's loss in evaluation mode, fresh state |
| `refresh` | measure by hand, on an `nnx.Optimizer` |
| `TrainState` | linen's, whose `apply_gradients` takes extra arguments |
| `nnx_factors`, `linen_factors` | Kronecker factors of an unchanged model, for KFAC |
"""

from ._linen import linen_factors as linen_factors
from ._nnx import nnx_factors as nnx_factors
from ._training import (
    TrainState as TrainState,
    curvature_loss as curvature_loss,
    loss_args as loss_args,
    refresh as refresh,
)
