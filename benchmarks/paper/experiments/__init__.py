"""All experiments, by name."""

from . import beyond, cost, lanczos_opt, main_job, spectra, stable_rate, vgg

MODULES = (lanczos_opt, spectra, vgg, stable_rate, cost, beyond, main_job)
EXPERIMENTS = {x.name: x for module in MODULES for x in module.EXPERIMENTS}
