"""MEASURE: losses made so that their curvature is cheap.

    hidden states, unembedding, labels  ->  cross-entropy, a chunk of logits at a time

With a large vocabulary the logits, (tokens x vocabulary), are the largest array of a
language model by far, and a Hessian-vector product holds several of them.
"""

import functools
import math

import jax
import jax.numpy as jnp

from rmtdamp._tree import accumulation_dtype


def chunked_softmax_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    chunk_size: int = 1024,
    gauss_newton: bool = False,
) -> jax.Array:
    r"""Softmax cross-entropy of a last linear layer, without all logits at once.

    For a token with the hidden state h, the label y and the logits z = h W + b, W =
    `kernel`:

        loss = log(sum_j exp(z_j)) - z_y,

    what `optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel + bias,
    labels)` gives. Chunks of `chunk_size` tokens run one after another, and their
    logits are computed again where a derivative needs them (`jax.checkpoint`). So the
    loss, its gradient and its Hessian- and Gauss-Newton-vector products hold a few
    arrays of (chunk_size x vocabulary), whatever the number of tokens. A gradient and
    its value cost one more product h W; a product of `hessian_matvec`, which holds
    nothing that it could reuse, costs what one of `hvp` does.

    Gauss-Newton products. `ggn_matvec` splits a loss into a model and a criterion of
    its outputs. Let the model return (hidden, kernel) in place of logits, and the
    criterion be this function with `gauss_newton=True`: the logits then count as linear
    in (hidden, kernel) at the point, so that the criterion's Hessian in its inputs is
    the Gauss-Newton matrix in the logits, and the whole product what it is with logits
    as outputs. Value and gradient stay the same.

    Chunks are strided (`x[i::n]`), so tokens split over devices stay spread.

    Args:
        hidden: h, floating, shape (..., width).
        kernel: W, floating, shape (width, vocabulary); `embedding.T` where it is tied.
        labels: y, integers from 0 to vocabulary - 1, shape (...).
        bias: b, shape (vocabulary,).
        chunk_size: tokens in a chunk, at least 1.
        gauss_newton: leave the curvature of h W in (h, W) out of second derivatives.

    Returns:
        The losses, shape (...), in float32 or the dtype of the arguments if wider.

    Raises:
        ValueError: shapes that do not fit together, or `chunk_size` below 1.
        TypeError: labels that are no integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmtdamp.hessian import ggn_matvec
        >>> from rmtdamp.losses import chunked_softmax_cross_entropy
        >>> def model_fn(params, inputs):
        ...     return jnp.tanh(inputs @ params["trunk"]), params["head"]
        >>> def criterion(outputs, labels):
        ...     losses = chunked_softmax_cross_entropy(
        ...         *outputs, labels, chunk_size=2, gauss_newton=True
        ...     )
        ...     return losses.mean()
        >>> params = {"trunk": jnp.eye(3), "head": jnp.ones((3, 5))}
        >>> batch = jnp.eye(3), jnp.array([0, 1, 4])
        >>> print(f"{criterion(model_fn(params, batch[0]), batch[1]):.3f}")
        1.609
        >>> product = ggn_matvec(model_fn, criterion, params, batch)(params)
    """
    count = math.prod(labels.shape)
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1:] != kernel.shape[:1]:
        raise ValueError(
            f"hidden has shape {hidden.shape}, kernel {kernel.shape} and labels "
            f"{labels.shape}: they must be (..., width), (width, vocabulary) and (...)"
        )
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"bias has shape {bias.shape} and kernel {kernel.shape}: a bias has an "
            "entry for each column of the kernel"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are {labels.dtype}, and must be integers: classes")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, and must be at least 1")
    num = max(-(-count // chunk_size), 1)
    size = -(-count // num)
    dtype = accumulation_dtype((hidden, kernel))
    # Widened outside of the loop and narrowed within, for the loop sums its gradient up
    # in the dtype that it comes in with.
    wide, offset = kernel.astype(dtype), 0 if bias is None else bias.astype(dtype)[None]
    multiply = functools.partial(jnp.dot, preferred_element_type=dtype)
    fixed = jax.lax.stop_gradient

    def chunks(x):
        x = jnp.reshape(x, (count, *x.shape[labels.ndim :]))
        x = jnp.pad(x, [(0, num * size - count)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(jnp.reshape(x, (size, num, *x.shape[1:])), 0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop prevents it
    def losses(chunk):
        h, y = chunk
        w = wide.astype(kernel.dtype)
        logits = multiply(h, w)
        if gauss_newton:  # compiled to one product, for the three are the same
            logits = multiply(fixed(h), w) + (multiply(h, fixed(w)) - fixed(logits))
        logits = logits + offset
        chosen = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    found = jax.lax.map(losses, (chunks(hidden), chunks(labels)))
    return jnp.reshape(jnp.swapaxes(found, 0, 1), (-1,))[:count].reshape(labels.shape)
