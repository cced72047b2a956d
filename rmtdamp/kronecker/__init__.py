"""MEASURE, layer by layer: Kronecker-factored curvature.

    model_fn, criterion, params, batch  ->  each layer's factors A and G, a diagonal

| | |
|---|---|
| `make_blocks`, `block_table` | which leaves one block of the curvature covers |
| `Tape` | how a model shows its layers |
| `ModelFactors` | measures the factors of a model; `FactorsFn` is what KFAC asks for |
| `Factors`, `KroneckerFactors`, `LayerRecord` | what is measured |
| `eigenbasis`, `second_moments` | where the curvature is diagonal; EKFAC's diagonal |
| `dataset_factors` | the factors over a data set |
| `restrict_to_block`, `top_eigenpairs` | a layer's Hessian, the top of its estimate |

Needs JAX only; `rmtdamp.flax` tapes Flax models as they are.
"""

from rmtdamp._tree import leaf_names as leaf_names

from ._blocks import (
    Block as Block,
    block_table as block_table,
    from_matrix as from_matrix,
    make_blocks as make_blocks,
    to_matrix as to_matrix,
)
from ._decoupling import (
    dataset_factors as dataset_factors,
    restrict_to_block as restrict_to_block,
    top_eigenpairs as top_eigenpairs,
)
from ._factors import (
    Eigenbasis as Eigenbasis,
    Factors as Factors,
    KroneckerFactors as KroneckerFactors,
    LayerRecord as LayerRecord,
    Sharing as Sharing,
    eigenbasis as eigenbasis,
    second_moments as second_moments,
)
from ._model import (
    Diagonal as Diagonal,
    FactorsFn as FactorsFn,
    Fisher as Fisher,
    ModelFactors as ModelFactors,
)
from ._tape import Tape as Tape
