"""A decoder-only transformer over tokens: rotary attention, RMSNorm, and the feed-forward under study."""

from collections.abc import Callable
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from examples.train.attention import Attention, attend, choose_attention, rotary_table, rotate
from examples.train.config import Config, ModelConfig
from examples.train.cross_entropy import cross_entropy
from examples.train.embedding import embed
from examples.train.mlp import dense_width, moe_config, residual_scale
from examples.train.norm import Dropout, RMSNorm
from examples.train.placing import LAYERS
from jax_latent_moe import LatentMoEConfig
from jax_latent_moe.linen import LatentMoE

BYTES = 256
"""The vocabulary without a tokenizer."""
KEPT = ("attention", "latent_moe_latent", "latent_moe_residual")
"""What --remat cheap keeps beside the results of matmuls: making it again takes attention or grouped matmuls."""


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys (Henry et al., arXiv 2010.04245)."""

    heads: int
    dtype: str
    output_init: Callable
    how: Attention

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"], table, documents) -> Float[Array, "batch time d"]:
        """Each position reads those before it."""
        features = (3, self.heads, x.shape[-1] // self.heads)
        qkv = nn.DenseGeneral(features, use_bias=False, dtype=self.dtype, name="qkv")(x)
        q = rotate(RMSNorm(name="q_norm")(qkv[:, :, 0]), table)
        k = rotate(RMSNorm(name="k_norm")(qkv[:, :, 1]), table)
        y = checkpoint_name(attend(q, k, qkv[:, :, 2], self.how, documents), "attention")
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
    attention: Attention
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"], table, documents) -> tuple[Float[Array, "batch time d"], None]:
        """One block, and nothing to stack; dropout needs a "dropout" key unless deterministic."""
        heads, dtype = self.model.heads, self.model.dtype
        output_init = nn.initializers.variance_scaling(residual_scale(self.model) ** 2, "fan_in", "truncated_normal")
        drop = Dropout(self.model.dropout, self.deterministic)
        if self.moe is None:
            mlp = DenseMLP(dense_width(self.model), dtype, output_init, name="mlp")
        else:
            mlp = LatentMoE(self.moe, name="mlp")
        attention = SelfAttention(heads, dtype, output_init, self.attention, name="attention")
        x += drop(attention(RMSNorm(name="attention_norm")(x), table, documents))
        return x + drop(mlp(RMSNorm(name="mlp_norm")(x))), None


class Embedding(nn.Module):
    """A row of a table for each token."""

    rows: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time d"]:
        """Looks the rows up."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        return embed(self.param("embedding", init, (self.rows, self.width)), tokens, self.dtype)


class Head(nn.Module):
    """Scores of all tokens; or, of known tokens, their loss."""

    vocabulary: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"], targets=None, weights=None) -> Array:
        """Logits in float32, or the weighted sum of cross-entropies."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.vocabulary))
        if targets is None:
            return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return cross_entropy(x, kernel, targets, weights)


class LanguageModel(nn.Module):
    """Scores of the next token at each position.

    Attributes:
        model: its shape.
        moe: the feed-forward of every block but the first; None is dense.
        vocabulary: how many tokens there are.
        attention: the implementation.
        scan_layers: whether the blocks but the first are one, compiled once and scanned over stacked parameters.
        remat: what the backward pass computes again: nothing; "cheap", norms, rotations and activations; "layer",
            all of a block.
    """

    model: ModelConfig
    moe: LatentMoEConfig | None
    vocabulary: int = BYTES
    attention: Attention = "blocks"
    scan_layers: bool = False
    remat: Literal["none", "cheap", "layer"] = "none"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        deterministic: bool = True,
        *,
        targets: Int[Array, "batch time"] | None = None,
        weights: Float[Array, "batch time"] | None = None,
        documents: Int[Array, "batch time"] | None = None,
    ) -> Array:
        """Logits [batch, time, vocabulary] in float32; with targets, the sum of weight times cross-entropy in nats.

        The layers sow their auxiliary losses and loads as `LatentMoE` does.

        Args:
            tokens: what is read.
            deterministic: no dropout; else a key "dropout" is needed.
            targets: what comes after each token.
            weights: of each position in the sum, float32.
            documents: number of each token's document, which attention does not leave; None where all are of one.
        """
        config, dtype = self.model, self.model.dtype
        x = Embedding(self.vocabulary, config.hidden_size, dtype, name="embed")(tokens)
        table = rotary_table(tokens.shape[1], config.hidden_size // config.heads, dtype)
        block = self._block()
        for i in range(1 if self.scan_layers else config.layers):
            moe = self.moe if i else None
            x, _ = block(config, moe, self.attention, deterministic, name=f"block_{i:02d}")(x, table, documents)
        if self.scan_layers and config.layers > 1:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "correction_bias": 0, "losses": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=cast(Any, nn.broadcast),  # Flax's annotation leaves it out
                length=config.layers - 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = scanned(config, self.moe, self.attention, deterministic, name=LAYERS)(x, table, documents)
        x = RMSNorm(name="norm")(x)
        return Head(self.vocabulary, name="head")(x, targets, weights)

    def _block(self):
        """The class of a block, which its backward pass computes again as `remat` says."""
        if self.remat == "none":
            return Block
        policies = jax.checkpoint_policies
        cheap = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*KEPT)
        )
        return nn.remat(Block, policy=cheap if self.remat == "cheap" else None, prevent_cse=not self.scan_layers)


def language_model(config: Config, vocabulary: int = BYTES) -> LanguageModel:
    """The model that the options ask for.

    Raises:
        TrainError: the attention that they name cannot run here, or the sizes make no layer.
    """
    attention = choose_attention(config.attention, config.model)
    return LanguageModel(config.model, moe_config(config), vocabulary, attention, config.scan_layers, config.remat)
