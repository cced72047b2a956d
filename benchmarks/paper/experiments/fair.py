"""The claims of `vgg` once more, without what confounds them at a small scale.

Sharpness is compared at an equal training loss, KFAC's averages begin at the identity,
as the authors' do, and eq. 15's P is that of the full network. No network has dropout,
in flat and learned runs alike.
"""

import functools

from benchmarks.shared import claims
from benchmarks.shared.claims import below, less
from benchmarks.shared.runs import Run
from benchmarks.shared.training import train

from . import vgg
from .vgg import ADAM, ALONG, DEFAULT, HIGH, LOW, RAMP, SGD, SGD_RATE, TABLE

SEEDS = (0, 1, 2, 3, 4)
REACHED, MOST = 0.3, 100  # the training loss that ends a run; epochs at most
EPOCHS = 40
# A fade of 100 of 800 steps; the authors' is of 1,000 to 2,000 of 117,000.
KFAC = {**vgg.KFAC, "debias": False, "factor_decay": 0.6}
LEARNED = {**vgg.LEARNED, "rule": "full width"}
AUTO = [
    (SGD, SGD_RATE, 0.0),
    (ADAM, LOW, DEFAULT),
    (ADAM, HIGH, HIGH),
    ({**ADAM, **RAMP}, HIGH, HIGH),
    ({**ADAM, **LEARNED}, HIGH, HIGH),
    ({**ADAM, **LEARNED, **RAMP}, HIGH, HIGH),
]


def _runs(settings, **options):
    """All seeds of (method, rate, damping)."""
    return [vgg.run(*of, seed, **options) for seed in SEEDS for of in settings]


def _until(run):
    """Evaluated after each epoch, to the first one that reaches the training loss."""
    return Run(train, run.config | {"eval_every": 1, "until": REACHED})


def _adam_runs():
    settings = [(SGD, SGD_RATE, 0.0), (ADAM, LOW, DEFAULT)]
    settings += [(ADAM, HIGH, damping) for damping in ALONG[HIGH]]
    return [_until(run) for run in _runs(settings, epochs=MOST)]


def _adam(found):
    """Table 1, Figure 8 and Table 2, of runs that have fitted equally well."""
    return [*vgg.table1_adam(found, (HIGH,)), *vgg.gap_to_sgd(found)]


def _kfac_runs():
    return _runs([(KFAC, *pair) for pair in TABLE], epochs=EPOCHS)


def _kfac(found):
    """Table 1 and Figure 7."""
    worst = max(x for losses in vgg.along(found, vgg.train_loss) for x in losses)
    text = f"Every run trains: the largest training loss, below {vgg.GUESS:.2f}"
    trains = claims.Check(text, worst, None, worst < vgg.GUESS)
    return [trains, *vgg.fig7(found), vgg.sharper(found)]


def _adam_auto(found):
    """Figures 14 and 15."""
    *beats, sgd = vgg.fig14(found)
    of = lambda metric, name: metric(found, f"Adam{name}, ramp schedule", HIGH, HIGH)
    text = "With the ramp learned beats flat, points"
    ramped = less(text, *(of(vgg.test_error, name) for name in (", learned", "")))
    text = "Learned with the ramp trains: its loss ends below a guess"
    trains = below(text, of(vgg.train_loss, ", learned"), vgg.GUESS)
    return [*beats, ramped, sgd, trains]


CURVES = ("train_error", "test_error")
DAMPING = (*CURVES, "damping_curve")
EXPERIMENTS = [
    vgg.experiment("fair_adam", _adam_runs, _adam, vgg.NORMS),
    vgg.experiment("fair_kfac", _kfac_runs, _kfac, CURVES),
    vgg.experiment(
        "fair_adam_auto",
        functools.partial(_runs, AUTO, epochs=EPOCHS),
        _adam_auto,
        DAMPING,
    ),
]
