"""All experiments, by name."""

from . import (
    beyond,
    cost,
    decoupling,
    fair,
    flatness,
    imbalanced_data,
    imbalanced_theory,
    lanczos_opt,
    rules,
    spectra,
    stable_rate,
    threshold,
    vgg,
)

MODULES = (
    *(lanczos_opt, spectra, vgg, fair, stable_rate, threshold, cost),
    *(beyond, rules, flatness, decoupling, imbalanced_theory, imbalanced_data),
)
EXPERIMENTS = {x.name: x for module in MODULES for x in module.EXPERIMENTS}
