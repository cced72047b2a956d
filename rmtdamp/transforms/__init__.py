"""ACT: optax gradient transformations that use, hold or learn a damping.

`damping` is a traced scalar that travels inward as an extra argument of `update`. One
link of a chain owns it and keeps it in its state (`auto_damping` learns it,
`set_damping` holds it); whoever uses it stands inside and keeps none, with the value of
its constructor as the fall-back. The owner hands in a second scalar, `damping_target`,
the tau that the shrinkage form needs.

The only folder that imports optax.
"""

from ._adam import (
    adam_shrinkage as adam_shrinkage,
    adamw_shrinkage as adamw_shrinkage,
    scale_by_adam_shrinkage as scale_by_adam_shrinkage,
    with_damping as with_damping,
)
from ._auto import (
    auto_damping as auto_damping,
    refresh_damping as refresh_damping,
)
from ._auto_adam import auto_adam as auto_adam
from ._kfac import (
    refresh_factors as refresh_factors,
    scale_by_kfac as scale_by_kfac,
)
from ._kfac_optimizer import kfac as kfac
from ._kfac_state import KFACState as KFACState
from ._lanczos import (
    ScaleByLanczosState as ScaleByLanczosState,
    scale_by_lanczos as scale_by_lanczos,
)
from ._lanczos_newton import (
    lanczos_newton as lanczos_newton,
    refresh_lanczos as refresh_lanczos,
)
from ._learner import DampingLearner as DampingLearner
from ._owner import (
    AutoDampingState as AutoDampingState,
    SetDampingState as SetDampingState,
    set_damping as set_damping,
)
from ._shampoo import (
    ScaleByShampooState as ScaleByShampooState,
    scale_by_shampoo as scale_by_shampoo,
    shampoo as shampoo,
)
from ._spectral import (
    ScaleBySpectralState as ScaleBySpectralState,
    scale_by_spectral as scale_by_spectral,
    spectral as spectral,
)
