"""Damping that learns itself, and the Hessian tools that measure it.

Adam's eps and a second-order method's damping are the same small constant, and it is
linear shrinkage of a noisy Hessian: beta = 1 / (1 + delta). Its best value is the noise
itself, delta = P^-1 Tr Var(H), which Hessian-vector products measure while training
runs. One walk explains the package:

| | | |
|---|---|---|
| MEASURE | `rmtdamp.hessian`, `rmtdamp.kronecker` | a loss and a batch -> curvature |
| DECIDE | `rmtdamp.damping` | its moments -> a damping |
| ACT | `rmtdamp.transforms` | damping -> preconditioned update, in optax |

The random-matrix laws behind it are in `rmtdamp.rmt`; `rmtdamp.outliers` tells a
Hessian's directions from its noise, `rmtdamp.stability` how large a learning rate may
be, `rmtdamp.pac_bayes` what error a flat solution guarantees; `rmtdamp.flatness` makes
a penalty of the trace, `rmtdamp.losses` has one for large vocabularies. For users:
`rmtdamp.schedules`, `rmtdamp.flax`, `rmtdamp.plot`, `rmtdamp.spectrum`, and
`python -m rmtdamp`.
"""

from . import (
    damping as damping,
    flatness as flatness,
    hessian as hessian,
    kronecker as kronecker,
    losses as losses,
    outliers as outliers,
    pac_bayes as pac_bayes,
    rmt as rmt,
    schedules as schedules,
    stability as stability,
    transforms as transforms,
)
from .damping import (
    Shrinkage as Shrinkage,
    StabilityFloor as StabilityFloor,
    damping_from_shrinkage as damping_from_shrinkage,
    identity_target as identity_target,
    scaled_identity_target as scaled_identity_target,
    shrinkage_from_damping as shrinkage_from_damping,
)
from .hessian import check_loss as check_loss
from .transforms import (
    DampingLearner as DampingLearner,
    KroneckerMeasurer as KroneckerMeasurer,
    RitzMeasurer as RitzMeasurer,
    adam_shrinkage as adam_shrinkage,
    adamw_shrinkage as adamw_shrinkage,
    auto_adam as auto_adam,
    auto_damping as auto_damping,
    check_state as check_state,
    kfac as kfac,
    lanczos_newton as lanczos_newton,
    refresh as refresh,
    scale_by_adam_shrinkage as scale_by_adam_shrinkage,
    scale_by_kfac as scale_by_kfac,
    scale_by_lanczos as scale_by_lanczos,
    scale_by_shampoo as scale_by_shampoo,
    scale_by_spectral_descent as scale_by_spectral_descent,
    set_damping as set_damping,
    shampoo as shampoo,
    spectral_descent as spectral_descent,
    trust_region as trust_region,
    with_damping as with_damping,
)

__version__ = "0.1.0"
