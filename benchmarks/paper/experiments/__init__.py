"""All experiments, by name."""

from . import fig2, lanczos_opt, spectra, vgg_adam, vgg_auto

EXPERIMENTS = {
    experiment.name: experiment
    for module in (lanczos_opt, fig2, spectra, vgg_adam, vgg_auto)
    for experiment in module.EXPERIMENTS
}
