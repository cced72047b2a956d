"""All experiments, by name."""

from . import beyond, cost, fig2, lanczos_opt, spectra, stable_rate, vgg_adam, vgg_auto

MODULES = (
    lanczos_opt,
    fig2,
    spectra,
    vgg_adam,
    vgg_auto,
    stable_rate,
    cost,
    beyond,
)

EXPERIMENTS = {
    experiment.name: experiment
    for module in MODULES
    for experiment in module.EXPERIMENTS
}
