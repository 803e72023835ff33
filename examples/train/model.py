"""A decoder-only transformer over bytes: rotary attention, RMSNorm, and the feed-forward under study."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from examples.train.config import ModelConfig
from examples.train.mlp import dense_width, residual_scale
from jax_latent_moe import LatentMoEConfig
from jax_latent_moe.linen import LatentMoE

VOCABULARY = 256
ROTARY_BASE = 10_000.0
ATTENTION_BLOCKS = 4


def rotate(x: Float[Array, "batch time heads width"]) -> Float[Array, "batch time heads width"]:
    """Rotary position embedding (Su et al., arXiv 2104.09864), the halves of a head paired."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half) / half)
    angle = (jnp.arange(x.shape[1])[:, None] * frequency)[:, None, :]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    q: Float[Array, "batch time heads width"],
    k: Float[Array, "batch time heads width"],
    v: Float[Array, "batch time heads width"],
) -> Float[Array, "batch time heads width"]:
    """Softmax attention to the positions up to one's own.

    Queries go in blocks, each against the keys that it may see: on a CPU half the time of a masked square.
    """
    outputs = []
    block = -(-q.shape[1] // ATTENTION_BLOCKS)
    for start in range(0, q.shape[1], block):
        queries = q[:, start : start + block]
        end = start + queries.shape[1]
        scores = jnp.einsum("bqhw,bkhw->bhqk", queries, k[:, :end], preferred_element_type=jnp.float32)
        visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        scores = jnp.where(visible, scores / q.shape[-1] ** 0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        outputs.append(jnp.einsum("bhqk,bkhw->bqhw", weights, v[:, :end]))
    return jnp.concatenate(outputs, axis=1)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys (Henry et al., arXiv 2010.04245)."""

    heads: int
    dtype: str
    output_init: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        """Each position reads those before it."""
        features = (3, self.heads, x.shape[-1] // self.heads)
        qkv = nn.DenseGeneral(features, use_bias=False, dtype=self.dtype, name="qkv")(x)
        q = rotate(nn.RMSNorm(dtype=self.dtype, name="q_norm")(qkv[:, :, 0]))
        k = rotate(nn.RMSNorm(dtype=self.dtype, name="k_norm")(qkv[:, :, 1]))
        y = causal_attention(q, k, qkv[:, :, 2])
        output = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=self.output_init, name="out"
        )
        return output(y)


class DenseMLP(nn.Module):
    """Two matrices around a squared ReLU, as in the experts."""

    width: int
    dtype: str
    output_init: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        """Each position for itself."""
        h = jnp.square(nn.relu(nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="w_in")(x)))
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=self.output_init, name="w_out")(h)


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

    model: ModelConfig
    moe: LatentMoEConfig | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"], deterministic: bool) -> Float[Array, "batch time d"]:
        """One block; dropout needs a "dropout" key unless deterministic."""
        heads, dtype = self.model.heads, self.model.dtype
        output_init = nn.initializers.variance_scaling(residual_scale(self.model) ** 2, "fan_in", "truncated_normal")
        drop = nn.Dropout(self.model.dropout, deterministic=deterministic)
        if self.moe is None:
            mlp = DenseMLP(dense_width(self.model), dtype, output_init, name="mlp")
        else:
            mlp = LatentMoE(self.moe, name="mlp")
        x += drop(
            Attention(heads, dtype, output_init, name="attention")(nn.RMSNorm(dtype=dtype, name="attention_norm")(x))
        )
        return x + drop(mlp(nn.RMSNorm(dtype=dtype, name="mlp_norm")(x)))


class LanguageModel(nn.Module):
    """Scores of the next byte at each position.

    Attributes:
        model: its shape.
        moe: the feed-forward of every block but the first; None is dense.
    """

    model: ModelConfig
    moe: LatentMoEConfig | None

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch time"], deterministic: bool = True
    ) -> Float[Array, "batch time vocabulary"]:
        """Logits in float32; the layers sow their auxiliary losses and loads as `LatentMoE` does."""
        dtype = self.model.dtype
        x = nn.Embed(VOCABULARY, self.model.hidden_size, dtype=dtype, name="embed")(tokens)
        for i in range(self.model.layers):
            x = Block(self.model, self.moe if i else None, name=f"block_{i:02d}")(x, deterministic)
        x = nn.RMSNorm(dtype=dtype, name="norm")(x)
        return nn.Dense(VOCABULARY, use_bias=False, dtype="float32", name="head")(x)
