"""All experiments, by name."""

from . import beyond, cost, decoupling, lanczos_opt, rules, spectra, stable_rate, vgg

MODULES = (lanczos_opt, spectra, vgg, stable_rate, cost, beyond, rules, decoupling)
EXPERIMENTS = {x.name: x for module in MODULES for x in module.EXPERIMENTS}
