"""Pictures of spectra. Every function draws on one `Axes` and returns it.

    SpectralDensity, Outliers, EigenPairs  ->  Axes

| | |
|---|---|
| `density` | density, reach of the measured noise, outliers, semicircle |
| `eigenvector_overlap` | overlaps of eigenvectors: measured, estimated, Theorem 1 |
| `layer_densities` | densities of several blocks, one above the other |

The axis of eigenvalues is linear around zero and logarithmic beyond, so that a narrow
bulk and outliers a thousand times as far are both to be seen. Without `ax` a `Figure`
of its own is made, outside pyplot: there is no window and no global state, and
`ax.figure.savefig("name.png")` needs no display. Needs the extra `rmtdamp[plot]`.
"""

from ._density import (
    density as density,
    layer_densities as layer_densities,
)
from ._overlap import eigenvector_overlap as eigenvector_overlap
