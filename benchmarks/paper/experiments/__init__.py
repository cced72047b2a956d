"""All experiments, by name."""

from . import (
    beyond,
    cost,
    imbalanced_data,
    imbalanced_theory,
    lanczos_opt,
    rules,
    spectra,
    stable_rate,
    vgg,
)

MODULES = (
    lanczos_opt,
    spectra,
    vgg,
    stable_rate,
    cost,
    beyond,
    rules,
    imbalanced_theory,
    imbalanced_data,
)
EXPERIMENTS = {x.name: x for module in MODULES for x in module.EXPERIMENTS}
