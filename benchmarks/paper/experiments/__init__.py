"""All experiments, by name."""

from . import (
    beyond,
    cost,
    fair,
    flatness,
    lanczos_opt,
    rules,
    spectra,
    stable_rate,
    threshold,
    vgg,
)

MODULES = (
    *(lanczos_opt, spectra, vgg, fair, stable_rate, threshold, cost),
    *(beyond, rules, flatness),
)
EXPERIMENTS = {x.name: x for module in MODULES for x in module.EXPERIMENTS}
