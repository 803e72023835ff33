"""Which expert reads which kind of text, counted against a loop."""

import numpy as np
import pytest

from examples.train import routing_map
from examples.train.data import validation_windows
from examples.train.model import language_model
from examples.train.presets import TOY
from examples.train.routing_map import KINDS, count_routing, kind_of
from examples.train.text import Text
from examples.train.tokenizer import Bytes


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (b"a", "lower-case letters"),
        (b" the", "lower-case letters"),
        (b"The", "capitals"),
        (b"7", "digits"),
        (b" ", "spaces"),
        (b"\t", "spaces"),
        (b"\n", "ends of lines"),
        (b"\r", "ends of lines"),
        (b" !?", "punctuation"),
        (b"\x01", "punctuation"),
        ("ü".encode(), "bytes from 128 on"),
        (b"", "spaces"),
    ],
)
def test_kinds_of_tokens(token, kind):
    assert KINDS[kind_of(token)] == kind


def test_shares_are_those_of_a_loop(rng, monkeypatch):
    """Two layers, eight experts, two choices of each token."""
    text = bytes(rng.choice(np.frombuffer(b"abcXY12 .\n\xff", np.uint8), 300))
    windows = validation_windows(Text.of(text), TOY.model.context)
    tokens = windows.subset(routing_map.WINDOWS).inputs
    ids = np.argsort(rng.uniform(size=(2, *tokens.shape, 8)), axis=-1)[..., :2].astype(np.uint8)
    monkeypatch.setattr(routing_map, "make_choices", lambda model: lambda state, tokens: ids)
    routing = count_routing(language_model(TOY), None, windows, Bytes())

    counts, of_kind = np.zeros((2, len(KINDS), 8)), np.zeros(len(KINDS))
    for place in np.ndindex(tokens.shape):
        kind = kind_of(bytes([tokens[place]]))
        of_kind[kind] += 1
        for layer in range(2):
            for expert in ids[(layer, *place)]:
                counts[layer, kind, expert] += 1
    np.testing.assert_array_equal(routing.tokens, of_kind)
    seen = of_kind > 0
    np.testing.assert_allclose(routing.shares[:, seen], counts[:, seen] / of_kind[seen, None])
    assert not routing.shares[:, ~seen].any()
