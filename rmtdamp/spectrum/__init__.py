"""For a model and no time: `python -m rmtdamp spectrum module:function`.

    loss_fn, params, batches  ->  Report  ->  a page, a picture, a JSON file

`_measure` asks the questions, `_page` shows the answers, `_command` is the command
line. `measure` and `layer_spectra` are for scripts and notebooks and need JAX only; the
rest needs the extra `rmtdamp[plot]`.
"""

from ._measure import (
    LayerOverlap as LayerOverlap,
    Report as Report,
    layer_spectra as layer_spectra,
    measure as measure,
)
