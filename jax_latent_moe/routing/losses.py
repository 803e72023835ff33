"""Auxiliary losses of the router: over the batch, over each sequence or document, over a step, and of the logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import RouterConfig
from jax_latent_moe.grouped_matmul.registry import BackendConfig
from jax_latent_moe.routing.expert_sort import count_experts
from jax_latent_moe.routing.router import CHOICE, NO_EXPERT
from jax_latent_moe.routing.scores import probabilities
from jax_latent_moe.routing.top_k import top_k_ids
from jax_latent_moe.shards import ONE_DEVICE, Shards


class Balance(NamedTuple):
    """The inputs of the balance losses: probabilities P, and the experts of each token's k largest P.

    Attributes:
        probabilities: [B, S, E], 0 for masked tokens.
        ids: [B, S, k] int32, `NO_EXPERT` for masked tokens. Bias and group limits have no part in them.
        mask: [B, S], False for masked tokens.
    """

    probabilities: Float[Array, "b s e"]
    ids: Int[Array, "b s k"]
    mask: Bool[Array, "b s"]


def auxiliary_losses(
    logits: Float[Array, "b s e"],
    config: RouterConfig,
    top_k: int,
    token_mask: Bool[Array, "b s"] | None = None,
    *,
    segment_ids: Int[Array, "b s"] | None = None,
    global_counts: Int[Array, " e"] | None = None,
    shards: Shards = ONE_DEVICE,
    backend: str | BackendConfig = "auto",
) -> tuple[dict[str, Float[Array, ""]], Int[Array, " e"] | None]:
    """The losses "switch", "sequence" and "z", coefficients applied, and "global" if it has a coefficient.

    P are the scores as probabilities, n_e is the number of tokens whose k largest P include P_e, and T is the number of
    unmasked tokens.

    - switch (Switch Transformers, arXiv 2101.03961, as in Megatron): E / (k T^2) * sum_e n_e sum_t P[t, e]. It equals
      its coefficient at perfect balance.
    - sequence: the same for each sequence, or for each document, averaged over those with unmasked tokens.
    - global (arXiv 2501.11873, Megatron's global_aux_loss): the same with the shares n_e / sum_e n_e of all
      microbatches of the step so far.
    - z (ST-MoE, arXiv 2202.08906): mean_t logsumexp(logits_t)^2.

    Args:
        logits: [B, S, E], of this device's tokens.
        config: the router.
        top_k: k.
        token_mask: [B, S]; tokens that are False do not count.
        segment_ids: [B, S] integers; the tokens of a sequence with equal ids form a document.
        global_counts: [E] int32, counts of the step's earlier microbatches; None is 0.
        shards: which mesh axes split the tokens.
        backend: as for `route`.

    Returns:
        The losses, and the counts [E] int32 of this and the earlier microbatches, or None without a global loss.
    """
    mask = jnp.ones(logits.shape[:2], bool) if token_mask is None else token_mask
    losses: dict[str, Array] = dict.fromkeys(("switch", "sequence", "z"), jnp.zeros((), logits.dtype))
    counts = None
    if config.switch_loss_coef or config.sequence_loss_coef or config.global_loss_coef:
        balance = _balance(logits, mask, config.score_function, top_k, backend)
        of_batch, counts = _of_batch(balance, config, global_counts, shards, backend)
        losses |= of_batch
        if config.sequence_loss_coef and segment_ids is None:
            losses["sequence"] = config.sequence_loss_coef * _of_sequences(balance, shards, backend)
        elif config.sequence_loss_coef:
            losses["sequence"] = config.sequence_loss_coef * _of_documents(balance, segment_ids, shards)
    if config.z_loss_coef:
        squared = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) ** 2, 0)
        tokens = _at_least_one(shards.sum_over_tokens(jnp.sum(mask)), squared)
        losses["z"] = config.z_loss_coef * shards.sum_over_tokens(jnp.sum(squared)) / tokens
    return losses, counts


def _balance(logits, mask, score_function, top_k, backend):
    probs = jnp.where(mask[..., None], probabilities(logits, score_function), 0)
    ids = top_k_ids(lax.stop_gradient(logits).reshape(-1, logits.shape[2]), top_k, backend)
    ids = checkpoint_name(ids.reshape(*mask.shape, top_k), CHOICE)
    return Balance(probs, jnp.where(mask[..., None], ids, NO_EXPERT), mask)


def _imbalance(counts: Int[Array, "*b e"], sums: Float[Array, "*b e"], tokens, top_k) -> Float[Array, "*b"]:
    """E / (k T^2) * sum_e n_e sum_t P[t, e], from n and the sums over t."""
    return jnp.sum(counts.astype(sums.dtype) * sums, axis=-1) * counts.shape[-1] / (top_k * tokens**2)


def _of_batch(balance, config, global_counts, shards, backend):
    """The losses "switch" and "global", if they have coefficients, and the counts of the step or None."""
    if not (config.switch_loss_coef or config.global_loss_coef):
        return {}, None
    probs, ids, mask = balance
    experts, top_k = probs.shape[2], ids.shape[2]
    losses = {}
    counts = shards.sum_over_tokens(count_experts(ids, experts, backend))
    sums = shards.sum_over_tokens(jnp.sum(probs, axis=(0, 1)))
    tokens = _at_least_one(shards.sum_over_tokens(jnp.sum(mask)), probs)
    if config.switch_loss_coef:
        losses["switch"] = config.switch_loss_coef * _imbalance(counts, sums, tokens, top_k)
    if not config.global_loss_coef:
        return losses, None
    counts = counts if global_counts is None else counts + global_counts.astype(counts.dtype)
    shares = counts.astype(sums.dtype)
    shares /= _at_least_one(jnp.sum(shares), sums)
    losses["global"] = config.global_loss_coef * jnp.sum(shares * sums) * experts / tokens
    return losses, counts


def _of_sequences(balance, shards, backend):
    """The mean imbalance of the sequences with unmasked tokens."""
    probs, ids, mask = balance
    (batch, _, experts), top_k = probs.shape, ids.shape[2]
    own = jnp.where(mask[..., None], ids + experts * jnp.arange(batch, dtype=ids.dtype)[:, None, None], NO_EXPERT)
    counts = count_experts(own, batch * experts, backend).reshape(batch, experts)
    tokens = shards.sum_over_sequence(jnp.sum(mask, axis=1))
    imbalance = _imbalance(
        shards.sum_over_sequence(counts),
        shards.sum_over_sequence(jnp.sum(probs, axis=1)),
        _at_least_one(tokens, probs),
        top_k,
    )
    sequences = shards.sum_over_batch(jnp.sum(tokens > 0))
    return shards.sum_over_batch(jnp.sum(imbalance)) / _at_least_one(sequences, probs)


def _of_documents(balance, segment_ids, shards):
    """The mean imbalance of the documents with unmasked tokens.

    It is written as a sum over tokens, sum_t E / (k T_d^2) <n_d, P_t> for the document d of token t, because only
    integers are then summed by a scatter: sums of floats by a scatter have other bits on each run on a GPU.
    """
    probs, ids, mask = balance
    (batch, _, experts), top_k = probs.shape, ids.shape[2]
    numbers = document_numbers(shards.gather_sequences(segment_ids))
    documents = batch * numbers.shape[1]
    numbers += numbers.shape[1] * jnp.arange(batch, dtype=jnp.int32)[:, None]
    document = shards.own_part(numbers).reshape(-1)
    # One more column for masked tokens: checkify reports an index out of bounds, even one that is dropped.
    column = jnp.where(ids == NO_EXPERT, experts, ids).reshape(document.size, top_k)
    counts = jnp.zeros((documents, experts + 1), jnp.int32).at[document[:, None], column].add(1)[:, :experts]
    tokens = jnp.zeros(documents, jnp.int32).at[document].add(mask.reshape(-1).astype(jnp.int32))
    counts, tokens = shards.sum_over_sequence(counts), shards.sum_over_sequence(tokens)
    of_token = _take(counts, document).astype(probs.dtype) * probs.reshape(-1, experts)
    size = _at_least_one(_take(tokens, document), probs)
    total = shards.sum_over_tokens(jnp.sum(jnp.sum(of_token, axis=1) * experts / (top_k * size**2)))
    return total / _at_least_one(shards.sum_over_batch(jnp.sum(tokens > 0)), probs)


def document_numbers(segment_ids: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """A number in [0, S) for each token, int32: equal for equal ids of a sequence, and for no others."""
    places = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    ordered, places = lax.sort((segment_ids, places), dimension=1, num_keys=1)
    is_new = jnp.concatenate([jnp.zeros_like(ordered[:, :1], bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    numbers = jnp.cumsum(is_new, axis=1, dtype=jnp.int32)
    return lax.sort((places, numbers), dimension=1, num_keys=1)[1]


def _at_least_one(count, like):
    return jnp.maximum(count, 1).astype(like.dtype)


def _take(values, indices):
    return values.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
