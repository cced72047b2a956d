"""MEASURE: what the Hessian of a JAX loss looks like, and how noisy it is.

    loss_fn, params, batch  ->  Hessian-vector products  ->  Hessian moments

| | |
|---|---|
| `hvp`, `hessian_matvec` | H v once, or many times at one point |
| `moments` | nu, P^-1 Tr H^2 and the variance m of eq. 15, with its standard error |
| `largest_eigenvalue` | the curvature that bounds the learning rate |
| `check_loss` | is the loss a mean over independent examples, as `moments` assumes? |

Vectors are pytrees like `params`; nothing is flattened. Needs JAX only.
"""

from ._check import check_loss as check_loss
from ._moments import HessianMoments as HessianMoments, moments as moments
from ._power import Eigenvalue as Eigenvalue, largest_eigenvalue as largest_eigenvalue
from ._products import hessian_matvec as hessian_matvec, hvp as hvp
