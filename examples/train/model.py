"""A decoder-only transformer over tokens: rotary attention, RMSNorm, and the feed-forward under study."""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from examples.train.attention import (
    Attention,
    attend,
    attend_to_cache,
    choose_attention,
    normalise_and_rotate,
    queries_keys_values,
    rotary_table,
)
from examples.train.config import Config, ModelConfig
from examples.train.cross_entropy import cross_entropy
from examples.train.embedding import embed
from examples.train.fused_norm import Norms, add_norm, choose_norms, norm_rotate
from examples.train.mlp import dense_width, moe_config, residual_scale
from examples.train.norm import Dropout, rms_norm
from examples.train.placing import LAYERS
from jax_latent_moe import LatentMoEConfig
from jax_latent_moe.linen import ADAPTERS, CODES, EXPERT_CODES, LatentMoE

BYTES = 256
"""Size of the vocabulary without a tokenizer."""
KEPT = ("attention", "latent_moe_latent", "latent_moe_residual")
"""Names of values that --remat cheap keeps beside the results of matmuls. Recomputing them would take attention or
grouped matmuls."""
CACHE = "cache"
"""The collection of each layer's keys and values [batch, time, heads, width]."""
STACKED = ("params", "correction_bias", CODES, EXPERT_CODES, ADAPTERS, "losses", "intermediates", CACHE)
"""The collections that a scan over layers stacks."""
Stream = tuple[Float[Array, "batch time d"], Float[Array, "batch time d"] | None]
"""The residual stream, and what is still to be added to it. None: nothing."""


class QueriesKeysValues(nn.Module):
    """The three projections that attention reads."""

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> tuple[Float[Array, "batch time heads width"], ...]:
        """Queries, keys and values."""
        d = x.shape[-1]

        def init(key, shape):
            return nn.initializers.lecun_normal()(key, (d, math.prod(shape[1:]))).reshape(shape)

        kernel = self.param("kernel", init, (d, 3, self.heads, d // self.heads))
        return queries_keys_values(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """The sum of the residual stream and what a block adds to it, and the RMSNorm of the sum with a trained scale.

    Attributes:
        norms: the implementation.
        last: whether the caller reads only the norm. The sum is then not returned.
    """

    norms: Norms
    last: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], delta: Float[Array, "batch time d"] | None = None
    ) -> tuple[Float[Array, "batch time d"], Float[Array, "batch time d"]]:
        """Returns the sum, and its norm along the last axis. Without delta, the sum is x."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if self.norms == "pallas":
            total, normed = add_norm(x, delta, scale, not self.last)
            return x if total is None else total, normed
        x = x if delta is None else x + delta
        return x, rms_norm(x, scale)


class RotatedRMSNorm(nn.Module):
    """RMSNorm of heads with a trained scale, and their rotation."""

    norms: Norms

    @nn.compact
    def __call__(self, x: Float[Array, "batch time heads width"], table) -> Float[Array, "batch time heads width"]:
        """Normalises and rotates each head."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if self.norms == "pallas":
            cos, sin = table
            return norm_rotate(x, scale, cos[:, 0, 0], sin[:, 0, 1])
        return normalise_and_rotate(x, scale, table)


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys (Henry et al., arXiv 2010.04245)."""

    heads: int
    dtype: str
    output_init: Callable
    how: Attention
    norms: Norms

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"], table, documents, position) -> Float[Array, "batch time d"]:
        """Each position reads itself and the positions before it. Without `position`, all of them are in x."""
        q, k, v = QueriesKeysValues(self.heads, self.dtype, name="qkv")(x)
        q, k = (RotatedRMSNorm(self.norms, name=name)(part, table) for name, part in (("q_norm", q), ("k_norm", k)))
        if position is None:
            self._store(k, v)
            y = checkpoint_name(attend(q, k, v, self.how, documents), "attention")
        else:
            y = attend_to_cache(q, *self._appended(k, v, position), position)
        output = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=self.output_init, name="out"
        )
        return output(y)

    def _store(self, k, v):
        """Puts keys and values into the cache, if the caller wants one."""
        if self.is_mutable_collection(CACHE) and not self.is_initializing():
            self.put_variable(CACHE, "keys", k)
            self.put_variable(CACHE, "values", v)

    def _appended(self, k, v, position):
        """The keys and values of the cache, after one position's have been put into it."""
        before = self.get_variable(CACHE, "keys"), self.get_variable(CACHE, "values")
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(all_of_them, one, position, axis=1)
            for all_of_them, one in zip(before, (k, v), strict=True)
        )
        self._store(k, v)
        return k, v


class DenseMLP(nn.Module):
    """Two matrices around a squared ReLU, which is also the activation of the experts."""

    width: int
    dtype: str
    output_init: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        """Applies the matrices to each position."""
        h = jnp.square(nn.relu(nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="w_in")(x)))
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=self.output_init, name="w_out")(h)


class Block(nn.Module):
    """Attention and a feed-forward. Each reads the normalised residual stream and adds to it.

    Attributes:
        model: the shape of the model.
        moe: the feed-forward. None makes it dense.
        attention: the implementation of attention.
        deterministic: whether dropout is off.
        norms: the implementation of norms and rotations.
        defers: whether the next norm adds the output of the feed-forward to the stream.
    """

    model: ModelConfig
    moe: LatentMoEConfig | None
    attention: Attention
    deterministic: bool
    norms: Norms = "xla"
    defers: bool = False

    @nn.compact
    def __call__(self, stream: Stream, table, documents, position) -> tuple[Stream, None]:
        """Returns the stream, and None because a scan stacks nothing. Dropout needs a "dropout" key."""
        heads, dtype = self.model.heads, self.model.dtype
        output_init = nn.initializers.variance_scaling(residual_scale(self.model) ** 2, "fan_in", "truncated_normal")
        drop = Dropout(self.model.dropout, self.deterministic)
        if self.moe is None:
            mlp = DenseMLP(dense_width(self.model), dtype, output_init, name="mlp")
        else:
            mlp = LatentMoE(self.moe, name="mlp")
        attention = SelfAttention(heads, dtype, output_init, self.attention, self.norms, name="attention")
        x, normed = RMSNorm(self.norms, name="attention_norm")(*stream)
        attended = drop(attention(normed, table, documents, position))
        x, normed = RMSNorm(self.norms, name="mlp_norm")(x, attended)
        packed = {} if self.moe is None else {"segment_ids": documents}
        delta = drop(mlp(normed, **packed))
        return ((x, delta) if self.defers else (x + delta, None)), None


class Embedding(nn.Module):
    """A row of a table for each token."""

    rows: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time d"]:
        """Looks up the row of each token."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        return embed(self.param("embedding", init, (self.rows, self.width)), tokens, self.dtype)


class Head(nn.Module):
    """The output head. It gives the logits of all tokens, or the loss of given targets."""

    vocabulary: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"], targets=None, weights=None) -> Array:
        """Without targets: the logits in float32. With targets: the weighted sum of cross-entropies."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.vocabulary))
        if targets is None:
            return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return cross_entropy(x, kernel, targets, weights)


class LanguageModel(nn.Module):
    """Predicts the next token at each position.

    Attributes:
        model: the shape of the model.
        moe: the feed-forward of every block but the first. None makes it dense.
        vocabulary: the number of tokens.
        attention: the implementation of attention.
        scan_layers: whether the blocks after the first are compiled once and scanned over stacked parameters.
        remat: what the backward pass recomputes. "none" recomputes nothing, "cheap" recomputes norms, rotations and
            activations, and "layer" recomputes a whole block.
        norms: the implementation of norms and rotations.
    """

    model: ModelConfig
    moe: LatentMoEConfig | None
    vocabulary: int = BYTES
    attention: Attention = "blocks"
    scan_layers: bool = False
    remat: Literal["none", "cheap", "layer"] = "none"
    norms: Norms = "xla"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        deterministic: bool = True,
        *,
        targets: Int[Array, "batch time"] | None = None,
        weights: Float[Array, "batch time"] | None = None,
        documents: Int[Array, "batch time"] | None = None,
        position: Int[Array, ""] | None = None,
    ) -> Array:
        """Returns the logits [batch, time, vocabulary] in float32.

        With targets, it returns the sum of weight times cross-entropy in nats instead. The layers sow their auxiliary
        losses and loads as `LatentMoE` does. If the collection `CACHE` is mutable, the keys and values go into it.

        Args:
            tokens: the tokens to read.
            deterministic: True switches dropout off. False needs a "dropout" key.
            targets: the token after each position.
            weights: the weight of each position in the sum, in float32.
            documents: the number of each token's document. Attention stays within a document. None puts all tokens into
                one document.
            position: the position of the only token, whose predecessors' keys and values are in `CACHE`. It must be
                below the number of positions there, and documents must be None. None: tokens begin at position 0.
        """
        assert position is None or documents is None, "the cache holds one document"
        config, dtype = self.model, self.model.dtype
        x = Embedding(self.vocabulary, config.hidden_size, dtype, name="embed")(tokens)
        positions = jnp.arange(tokens.shape[1]) if position is None else position[None]
        places = rotary_table(positions, config.hidden_size // config.heads, dtype), documents, position
        # One token is too little work for a separate kernel.
        norms = self.norms if position is None else "xla"
        # Recomputation keeps the input of a block: with the sum deferred, two arrays instead of one.
        how = self.attention, deterministic, norms, norms == "pallas" and self.remat == "none"
        block, stream = self._block(), (x, None)
        for i in range(1 if self.scan_layers else config.layers):
            moe = self.moe if i else None
            stream, _ = block(config, moe, *how, name=f"block_{i:02d}")(stream, *places)
        if self.scan_layers and config.layers > 1:
            scanned = nn.scan(
                block,
                variable_axes=dict.fromkeys(STACKED, 0),
                split_rngs={"params": True, "dropout": True},
                in_axes=cast(Any, nn.broadcast),  # Flax's annotation leaves it out
                length=config.layers - 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            stream, _ = scanned(config, self.moe, *how, name=LAYERS)(stream, *places)
        _, x = RMSNorm(norms, last=True, name="norm")(*stream)
        return Head(self.vocabulary, name="head")(x, targets, weights)

    def _block(self):
        """The class of a block, with the recomputation that `remat` names."""
        if self.remat == "none":
            return Block
        policies = jax.checkpoint_policies
        cheap = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*KEPT)
        )
        return nn.remat(Block, policy=cheap if self.remat == "cheap" else None, prevent_cse=not self.scan_layers)


def language_model(config: Config, vocabulary: int = BYTES) -> LanguageModel:
    """The model that the options describe.

    Raises:
        TrainError: the chosen attention or norms cannot run here, or the sizes do not fit together.
    """
    attention, norms = choose_attention(config.attention, config.model), choose_norms(config.norms, config.model)
    moe = moe_config(config)
    return LanguageModel(config.model, moe, vocabulary, attention, config.scan_layers, config.remat, norms)
