"""MEASURE: what the Hessian of a JAX loss looks like, and how noisy it is.

    loss_fn, params, batch  ->  Hessian-vector products  ->  Hessian moments

| | |
|---|---|
| `hvp`, `hessian_matvec` | H v once, or many times at one point |
| `quadratic_form` | v^T H v |
| `ggn_matvec`, `fisher_matvec` | Gauss-Newton matrix; sampled and empirical Fisher |
| `dataset_matvec`, `restrict`, `sum_matvec` | over a data set; a layer's block; sums |
| `noise_matvec` | a batch Hessian's noise: of its halves, or against the data set |
| `moments` | nu, P^-1 Tr H^2 and the variance m of eq. 15, with its standard error |
| `trace`, `diagonal` | Hutchinson, Hutch++, XTrace, with standard errors |
| `frobenius_norm` | (Tr H^2)^1/2, with its standard error |
| `lanczos`, `eigsh`, `largest_eigenvalue` | Krylov basis, extreme eigenpairs |
| `halves`, `split_half_eigsh`, `compare_halves` | do two halves agree on a pair? |
| `squared_overlaps`, `subspace_overlap` | of eigenvectors, of the spaces they span |
| `spectral_density` | the whole spectrum as weighted points |
| `to_dense`, `eigh`, `dense_moments`, `dense_matvec` | exact, where P is small |
| `check_loss` | is the loss a mean over independent examples, as `moments` needs? |
| `check_symmetric` | is a matvec symmetric, as Lanczos' iteration assumes? |

Vectors are pytrees like `params`; nothing is flattened. Needs JAX only.
"""

from ._apply import (
    dataset_matvec as dataset_matvec,
    restrict as restrict,
    sum_matvec as sum_matvec,
)
from ._check import check_loss as check_loss
from ._dense import (
    dense_matvec as dense_matvec,
    dense_moments as dense_moments,
    eigh as eigh,
    to_dense as to_dense,
)
from ._eigsh import eigsh as eigsh
from ._frobenius import frobenius_norm as frobenius_norm
from ._gauss_newton import fisher_matvec as fisher_matvec, ggn_matvec as ggn_matvec
from ._lanczos import (
    check_symmetric as check_symmetric,
    lanczos as lanczos,
)
from ._moments import HessianMoments as HessianMoments, moments as moments
from ._overlap import (
    squared_overlaps as squared_overlaps,
    subspace_overlap as subspace_overlap,
)
from ._power import Eigenvalue as Eigenvalue, largest_eigenvalue as largest_eigenvalue
from ._products import (
    hessian_matvec as hessian_matvec,
    hvp as hvp,
    quadratic_form as quadratic_form,
)
from ._spectrum import (
    SpectralDensity as SpectralDensity,
    noise_matvec as noise_matvec,
    spectral_density as spectral_density,
)
from ._split_half import (
    SplitHalfPairs as SplitHalfPairs,
    compare_halves as compare_halves,
    halves as halves,
    split_half_eigsh as split_half_eigsh,
)
from ._trace import Estimate as Estimate, diagonal as diagonal, trace as trace
from ._tridiagonal import EigenPairs as EigenPairs, Tridiagonal as Tridiagonal
