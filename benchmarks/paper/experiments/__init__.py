"""All experiments, by name."""

from . import beyond, cost, lanczos_opt, spectra, stable_rate, vgg

MODULES = (lanczos_opt, spectra, vgg, stable_rate, cost, beyond)
EXPERIMENTS = {x.name: x for module in MODULES for x in module.EXPERIMENTS}
