"""Counts which expert reads which kind of text: letters, digits, spaces and so on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float, Int

from examples.train.data import ValidationWindows
from examples.train.model import LanguageModel
from examples.train.step import TrainState, compiled_once, variables_of
from examples.train.tokenizer import Tokenizer

KINDS = ("lower-case letters", "capitals", "digits", "spaces", "ends of lines", "punctuation", "bytes from 128 on")
WINDOWS = 16
"""Number of windows whose routing is counted."""


class Routing(NamedTuple):
    """Which expert reads which kind of text.

    Attributes:
        shares: the share of a kind's tokens that an expert reads. The shares of a kind sum to top_k in each layer.
        tokens: the number of tokens of each kind.
    """

    shares: Float[np.ndarray, "layers kinds experts"]
    tokens: Int[np.ndarray, " kinds"]


def kind_of(token: bytes) -> int:
    """The kind of a token, as an index into `KINDS`. The first byte after leading spaces decides.

    In bytes from 128 on, UTF-8 writes all characters outside of ASCII. Control characters count as punctuation.
    """
    first = (token.lstrip(b" ") or b" ")[:1]
    tests = (bytes.islower, bytes.isupper, bytes.isdigit, b" \t".__contains__, b"\r\n".__contains__, bytes.isascii)
    return next((kind for kind, holds in enumerate(tests) if holds(first)), len(tests))


@compiled_once
def make_choices(model: LanguageModel):
    """A function of (state, tokens [batch, time]) that gives the chosen experts [layers, batch, time, top_k]."""

    @jax.jit
    def choices(state: TrainState, tokens):
        _, sown = model.apply(variables_of(state), tokens, mutable=["losses", "intermediates"])
        chosen = flatten_dict(sown["intermediates"])
        layers: list[Any] = [ids for path, (ids,) in sorted(chosen.items()) if path[-1] == "expert_ids"]
        return jnp.concatenate([ids.reshape(-1, *tokens.shape, ids.shape[-1]) for ids in layers])

    return choices


def count_routing(model: LanguageModel, state: TrainState, windows: ValidationWindows, tokenizer: Tokenizer) -> Routing:
    """The routing of some windows of the validation text.

    Args:
        model: a network with MoE layers.
        state: its state on one device.
        windows: the validation windows.
        tokenizer: gives the text of each token.
    """
    assert model.moe is not None, "a dense model has no router"
    tokens, experts = windows.subset(WINDOWS).inputs.astype(np.int32), model.moe.num_experts
    vocabulary = np.arange(tokenizer.vocabulary)[:, None]
    kinds = np.asarray([kind_of(tokenizer.decode(token)) for token in vocabulary], dtype=np.int64)[tokens]
    ids = np.asarray(make_choices(model)(state, tokens))
    cells = kinds[..., None] * experts + ids  # [layers, batch, time, top_k]
    counts = [np.bincount(layer.reshape(-1), minlength=len(KINDS) * experts) for layer in cells]
    of_kind = np.bincount(kinds.reshape(-1), minlength=len(KINDS))
    counts = np.stack(counts).reshape(-1, len(KINDS), experts)
    return Routing(counts / np.maximum(of_kind, 1)[:, None], of_kind)
