r"""DECIDE: numbers in, numbers out. No autodiff, no optax.

    Hessian moments  ->  damping

The idea, in three lines. Adding a damping delta to curvature s is linear shrinkage of
s towards a target tau, with intensity beta, at a lower learning rate (eq. 13):

    alpha / (s + delta) = alpha beta / (beta s + (1 - beta) tau),
    beta = 1 / (1 + delta/tau).

The curvature is measured on a batch, so it is the true one plus noise of variance m;
the beta of least expected error || beta H + (1 - beta) tau - H_true ||^2 is

    delta = tau m / (P^-1 ||H_true - tau I||_F^2),

which the paper takes at tau = 1 for a Hessian of low rank (eq. 15: delta = m), and
Ledoit and Wolf at the tau that fits best, the mean eigenvalue nu.

That says how noisy the curvature is, and not how fast a step moves. A direction that
the preconditioner believes flat moves at alpha / delta; it does not run away as long as
that is less than plain gradient descent could do in the sharpest direction of H,

    delta >= alpha lambda_max(H) / (2 f),    f of the momentum

(`StabilityFloor`). A rule is a function of what is known to a `Shrinkage`; everything
below is rules, and the averaging along a training run of what they are told.
"""

from rmtdamp._parts import by_layer

from ._evidence import (
    MEASURED,
    DampingRule,
    Evidence,
    decides_in_the_step,
    is_relative,
    needs,
    needs_of,
)
from ._learned import SETTLED, decide_damping, learn_damping, settle_probe
from ._rules import (
    GradientNorm,
    LargestFraction,
    LevenbergMarquardt,
    Maximum,
    MeanFraction,
    StabilityFloor,
    Sum,
    identity_target,
    relative_target,
    scaled_identity_target,
)
from ._shrinkage import (
    Shrinkage,
    damping_from_shrinkage,
    damping_weight,
    shrinkage_from_damping,
)
from ._state import LearnedDamping, Probe, initial_damping

__all__ = [
    "MEASURED",
    "SETTLED",
    "DampingRule",
    "Evidence",
    "GradientNorm",
    "LargestFraction",
    "LearnedDamping",
    "LevenbergMarquardt",
    "Maximum",
    "MeanFraction",
    "Probe",
    "Shrinkage",
    "StabilityFloor",
    "Sum",
    "by_layer",
    "damping_from_shrinkage",
    "damping_weight",
    "decide_damping",
    "decides_in_the_step",
    "identity_target",
    "initial_damping",
    "is_relative",
    "learn_damping",
    "needs",
    "needs_of",
    "relative_target",
    "scaled_identity_target",
    "settle_probe",
    "shrinkage_from_damping",
]
