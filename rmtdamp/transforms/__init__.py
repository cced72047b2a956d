"""ACT: optax gradient transformations that use, hold or learn a damping.

`damping` is a traced scalar that travels inward as an extra argument of `update`. One
link of a chain keeps it in its state (`auto_damping` learns it, `set_damping` holds
it); whoever uses it stands inside and keeps none, with the value of its constructor as
the fall-back. A second scalar travels with it, `damping_target`, the tau that the
shrinkage form needs. With `curvature_power`, -1, 0 or 1, a preconditioner B answers
with (B + damping)^power of the updates and leaves its state alone: a rule that looks at
what the preconditioner leaves of the Hessian asks for that.

What is measured every few steps (the damping, Kronecker factors, Ritz pairs) is the
business of a `Measurer`, run in the step or by `refresh` between steps.

The only folder of the library that imports optax.
"""

from ._adam import (
    adam_shrinkage as adam_shrinkage,
    adamw_shrinkage as adamw_shrinkage,
    scale_by_adam_shrinkage as scale_by_adam_shrinkage,
    with_damping as with_damping,
)
from ._auto_adam import auto_adam as auto_adam
from ._damping import (
    AutoDampingState as AutoDampingState,
    SetDampingState as SetDampingState,
    auto_damping as auto_damping,
    set_damping as set_damping,
)
from ._kfac import (
    ScaleByKFACState as ScaleByKFACState,
    kfac as kfac,
    scale_by_kfac as scale_by_kfac,
)
from ._kronecker import (
    KroneckerMeasurer as KroneckerMeasurer,
    KroneckerState as KroneckerState,
)
from ._lanczos import (
    ScaleByLanczosState as ScaleByLanczosState,
    lanczos_newton as lanczos_newton,
    scale_by_lanczos as scale_by_lanczos,
)
from ._learner import DampingLearner as DampingLearner
from ._measurer import (
    Context as Context,
    Measurer as Measurer,
    check_state as check_state,
    is_due as is_due,
    refresh as refresh,
    refresh_in_step as refresh_in_step,
    with_numbers as with_numbers,
)
from ._ritz import RitzMeasurer as RitzMeasurer, RitzSubspace as RitzSubspace
from ._shampoo import (
    ScaleByShampooState as ScaleByShampooState,
    scale_by_shampoo as scale_by_shampoo,
    shampoo as shampoo,
)
from ._spectral_descent import (
    ScaleBySpectralDescentState as ScaleBySpectralDescentState,
    scale_by_spectral_descent as scale_by_spectral_descent,
    spectral_descent as spectral_descent,
)
from ._trust_region import (
    TrustRegionState as TrustRegionState,
    trust_region as trust_region,
)
