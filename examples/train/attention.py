"""Causal attention in three implementations: cuDNN's fused kernel, JAX's own formula, blocks of queries for a CPU.

The queries, keys and values that attention reads are made here too, in as few passes over memory as XLA allows.
"""

from typing import Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from examples.train.config import ModelConfig
from examples.train.errors import TrainError
from examples.train.hardware import why_no_nvidia_gpu
from examples.train.norm import inverse_root

Attention = Literal["cudnn", "xla", "blocks"]
Table = tuple[Float[Array, "time 1 1 half"], Float[Array, "time 1 2 half"]]
"""Cosines and sines of the angle of each position and pair of features. A pair's first sine is negated."""
ROTARY_BASE = 10_000.0
BLOCKS = 4
CUDNN_CAPABILITY = 8.0
"""The lowest compute capability for which cuDNN has the fused kernel."""
CUDNN_WIDTH = 128
"""The largest width of a head for which cuDNN has both passes on all of these devices."""


def choose_attention(name: str, model: ModelConfig) -> Attention:
    """The implementation that `--attention` selects on this machine.

    Args:
        name: cudnn, xla, blocks or auto. auto selects cudnn if cuDNN can run this model here, else blocks.
        model: gives the heads and the dtype.

    Raises:
        TrainError: `name` is cudnn, and cuDNN cannot run this model here.
    """
    reason = _why_not_cudnn(model)
    if name == "auto":
        return "blocks" if reason else "cudnn"
    if name == "cudnn" and reason:
        raise TrainError(f"--attention cudnn cannot run: {reason}. Use --attention auto.")
    return cast(Attention, name)


def _why_not_cudnn(model: ModelConfig) -> str | None:
    width = model.hidden_size // model.heads
    if reason := why_no_nvidia_gpu(CUDNN_CAPABILITY):
        return reason
    if model.dtype != "bfloat16":
        return f"it needs --model.dtype bfloat16, not {model.dtype}"
    if width > CUDNN_WIDTH or width % 8:
        return f"the width of a head is {width} and must be a multiple of 8 that is at most {CUDNN_WIDTH}"
    return None


def rotary_table(positions: Int[Array, " time"], width: int, dtype: str) -> Table:
    """The cosines and sines of rotary position embedding (Su et al., arXiv 2104.09864) for heads of the given width."""
    half = width // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half) / half)
    angle = (positions[:, None] * frequency)[:, None, None, :]
    sign = jnp.asarray([-1.0, 1.0])[:, None]
    return jnp.cos(angle).astype(dtype), (sign * jnp.sin(angle)).astype(dtype)


def rotate(x: Float[Array, "batch time heads width"], table: Table) -> Float[Array, "batch time heads width"]:
    """Rotary position embedding. Each feature of a head's first half is paired with one of the second half."""
    cos, sin = table
    halves = _halves(x)
    # XLA fuses a reversal with the operations around it. It does not fuse a split and a concatenation.
    return (halves * cos + jnp.flip(halves, axis=-2) * sin).reshape(x.shape)


def _rotate_back(x, table):
    """The transpose of `rotate`, which is its inverse."""
    cos, sin = table
    halves = _halves(x)
    return (halves * cos + jnp.flip(halves * sin, axis=-2)).reshape(x.shape)


def _halves(x):
    return x.reshape(*x.shape[:-1], 2, -1)


@jax.custom_vjp
def normalise_and_rotate(
    x: Float[Array, "batch time heads width"], scale: Float[Array, " width"], table: Table
) -> Float[Array, "batch time heads width"]:
    """`rotate` after `rms_norm`, in float32 and then x's dtype.

    The backward pass needs the inner product of a head's norm with the norm's gradient. It computes it from the rotated
    values, because a rotation keeps inner products. Then XLA does not store the gradient before the rotation.
    """
    wide = x.astype(jnp.float32)
    return rotate(wide * inverse_root(wide) * scale, table).astype(x.dtype)


def _normalise_and_rotate_fwd(x, scale, table):
    y = normalise_and_rotate(x, scale, table)
    return y, (x, scale, table, y)


def _normalise_and_rotate_bwd(residuals, gradient):
    x, scale, table, y = residuals
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    root = inverse_root(wide)
    normed = wide * root
    along = jnp.mean(gradient * y.astype(jnp.float32), axis=-1, keepdims=True)
    back = _rotate_back(gradient, table)
    dx = root * (back * scale - normed * along)
    dscale = jnp.sum(back * normed, axis=range(x.ndim - 1))
    return dx.astype(x.dtype), dscale, None


normalise_and_rotate.defvjp(_normalise_and_rotate_fwd, _normalise_and_rotate_bwd)


@jax.custom_vjp
def queries_keys_values(
    x: Float[Array, "batch time d"], kernel: Float[Array, "d 3 heads width"]
) -> tuple[Float[Array, "batch time heads width"], ...]:
    """The products of x with the three kernels, as three arrays: the attention needs each of them apart.

    A single product would need two more passes over memory: one to split its result, one to concatenate its gradients.
    """
    return tuple(jnp.einsum("btd,dhw->bthw", x, kernel[:, i]) for i in range(3))


def _queries_keys_values_fwd(x, kernel):
    return queries_keys_values(x, kernel), (x, kernel)


def _queries_keys_values_bwd(residuals, gradients):
    x, kernel = residuals
    first, second, third = (jnp.einsum("bthw,dhw->btd", g, kernel[:, i]) for i, g in enumerate(gradients))
    # In this order XLA adds inside of the products.
    dx = first + (second + third)
    return dx, jnp.stack([jnp.einsum("btd,bthw->dhw", x, g) for g in gradients], axis=1)


queries_keys_values.defvjp(_queries_keys_values_fwd, _queries_keys_values_bwd)


def attend(
    q: Float[Array, "batch time heads width"],
    k: Float[Array, "batch time heads width"],
    v: Float[Array, "batch time heads width"],
    how: Attention,
    documents: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch time heads width"]:
    """Softmax attention. Each position sees itself and the earlier positions of its document.

    Args:
        q: queries.
        k: keys.
        v: values.
        how: the implementation.
        documents: number of each position's document. None puts all positions into one document.
    """
    if how == "blocks":
        return _in_blocks(q, k, v, documents)
    mask = None if documents is None else (documents[:, None, :, None] == documents[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=how)


def attend_to_cache(
    q: Float[Array, "batch 1 heads width"],
    k: Float[Array, "batch time heads width"],
    v: Float[Array, "batch time heads width"],
    position: Int[Array, ""],
) -> Float[Array, "batch 1 heads width"]:
    """Softmax attention of one position to itself and the earlier ones. Keys and values after it are not read."""
    scores = jnp.einsum("bqhw,bkhw->bhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.arange(k.shape[1]) <= position, scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def _in_blocks(q, k, v, documents):
    """Attention in blocks of queries. Each block reads only the keys up to its end.

    On a CPU this takes half the time of the full masked square of scores.
    """
    outputs = []
    block = -(-q.shape[1] // BLOCKS)
    for start in range(0, q.shape[1], block):
        queries = q[:, start : start + block]
        end = start + queries.shape[1]
        scores = jnp.einsum("bqhw,bkhw->bhqk", queries, k[:, :end], preferred_element_type=jnp.float32)
        visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        if documents is not None:
            visible &= (documents[:, start:end, None] == documents[:, None, :end])[:, None]
        scores = jnp.where(visible, scores / q.shape[-1] ** 0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        outputs.append(jnp.einsum("bhqk,bkhw->bqhw", weights, v[:, :end]))
    return jnp.concatenate(outputs, axis=1)
