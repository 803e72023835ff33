"""Bytes to tokens and back: each byte a token, or byte pairs learnt from the training text."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from examples.train.config import Config
from examples.train.corpus import cache_folder
from examples.train.errors import TrainError
from examples.train.text import SEPARATOR, Corpus, Parts, Text, collected, on_disk
from examples.train.whole_file import write_whole

FILE = "tokenizer.json"
PIECE, GROUP = 2**20, 16
"""Bytes that are encoded as one text, and how many of these at once."""
LEARNT_BYTES = 2**28
"""Text that byte pairs are learnt from; of a longer one, as much in pieces spread over it."""
# Letters (bytes from 0x80 on belong to other alphabets' letters), digits and signs, each with the space before it.
WORDS = r" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+"


class Bytes:
    """Each byte is a token.

    Attributes:
        vocabulary: how many tokens there are.
        separator: the token that begins a document.
        token_bytes: bytes of each token; None where each is one.
    """

    vocabulary = 256
    separator = SEPARATOR
    token_bytes = None
    unit = "bytes"

    def encode(self, content: bytes) -> Int[np.ndarray, " n"]:
        """The tokens of a text."""
        return np.frombuffer(content, np.uint8)

    def decode(self, tokens: Int[np.ndarray, " n"]) -> bytes:
        """The text of tokens."""
        return np.asarray(tokens, np.uint8).tobytes()

    def corpus(self, corpus: Corpus) -> Corpus:
        """The corpus in tokens."""
        return corpus

    def bytes_per_token(self, tokens: Int[np.ndarray, " n"]) -> float:
        """Their mean length."""
        del tokens
        return 1.0

    def save(self, folder: Path):
        """There is nothing to keep."""


class BytePairs:
    """Byte pairs (Sennrich et al., arXiv 1508.07909) of the package tokenizers; the last token is the separator.

    Every byte is one character to it (latin-1), so that any text comes back as it was.

    Attributes:
        vocabulary: as of `Bytes`.
        separator: as of `Bytes`.
        token_bytes: [vocabulary] int64; the separator has none.
    """

    unit = "tokens"

    def __init__(self, pairs: Any, vocabulary: int):
        self._pairs, self.vocabulary, self.separator = pairs, vocabulary, vocabulary - 1
        names = {number: name for name, number in pairs.get_vocab().items()}
        self._texts = [names.get(number, "").encode("latin-1") for number in range(vocabulary)]
        self.token_bytes: Int[np.ndarray, " vocabulary"] = np.asarray([len(text) for text in self._texts])
        self._dtype = np.uint16 if vocabulary <= 2**16 else np.uint32

    def encode(self, content: bytes) -> Int[np.ndarray, " n"]:
        """The tokens of a text."""
        return np.asarray(self._pairs.encode(content.decode("latin-1")).ids, self._dtype)

    def decode(self, tokens: Int[np.ndarray, " n"]) -> bytes:
        """The text of tokens; a separator is a newline."""
        return b"".join(b"\n" if token == self.separator else self._texts[token] for token in np.asarray(tokens))

    def corpus(self, corpus: Corpus) -> Corpus:
        """The corpus in tokens, in the cache where its text is on disk."""
        return Corpus(self._encoded(corpus.train), self._encoded(corpus.validation))

    def bytes_per_token(self, tokens: Int[np.ndarray, " n"]) -> float:
        """Their mean length."""
        return float(self.token_bytes[tokens].mean())

    def save(self, folder: Path):
        """Keeps the tokenizer in a run's folder."""
        write_whole(folder / FILE, self._pairs.to_str(pretty=True).encode())

    def _encoded(self, text: Text) -> Text:
        if not isinstance(text.tokens, np.memmap):
            return collected(self._parts(text), self._dtype)
        named = (self._pairs.to_str(), str(text.tokens.filename), text.tokens.size, int(text.tokens[:64].sum()))
        key = hashlib.sha256(repr(named).encode()).hexdigest()[:24]
        return on_disk(cache_folder() / "tokens" / key, self._dtype, lambda: self._parts(text))

    def _parts(self, text: Text) -> Parts:
        group = []
        for piece in pieces(text):
            group.append(piece)
            if len(group) == GROUP:
                yield from self._encoded_group(group)
                group = []
        yield from self._encoded_group(group)

    def _encoded_group(self, group):
        encoded = self._pairs.encode_batch([content.decode("latin-1") for content, _ in group])
        for (_, begins), tokens in zip(group, encoded, strict=True):
            yield np.asarray([self.separator, *tokens.ids] if begins else tokens.ids, self._dtype), begins


Tokenizer = Bytes | BytePairs


def pieces(text: Text, every: int = 1) -> Iterator[tuple[bytes, bool]]:
    """The documents without their separators, long ones in pieces that end a line, each with whether it begins one.

    Args:
        text: bytes.
        every: of a long text, only one piece in so many.
    """
    bounds = [0, *text.starts.tolist(), len(text.tokens)]
    number = 0
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        begins = document > 0
        start += begins
        while start < end or begins:
            content = text.tokens[start : min(end, start + PIECE)].tobytes()
            if start + PIECE < end and b"\n" in content:
                content = content[: content.rindex(b"\n")] or content
            start += len(content)
            if number % every == 0:
                yield content, begins
            number, begins = number + 1, False


def learn(text: Text, vocabulary: int) -> BytePairs:
    """Learns byte pairs from a text, the same ones from the same text."""
    tokenizers = _package()
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    alphabet = [chr(byte) for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    every = -(-len(text.tokens) // LEARNT_BYTES)
    pairs.train_from_iterator((content.decode("latin-1") for content, _ in pieces(text, every)), trainer)
    return BytePairs(pairs, vocabulary)


def load_tokenizer(folder: Path, vocabulary: int) -> BytePairs:
    """The tokenizer of a run.

    Raises:
        TrainError: it is not there, cannot be read, or has another vocabulary.
    """
    path, again = folder / FILE, "restore it, or start anew in another folder with --run"
    try:
        content = path.read_text()
        pairs, found = _package().Tokenizer.from_str(content), len(json.loads(content)["model"]["vocab"])
    except Exception as error:  # tokenizers raises plain Exceptions
        raise TrainError(f"{path} holds no tokenizer ({type(error).__name__}: {error}): {again}.") from error
    if found > vocabulary - 1:
        raise TrainError(f"{path} has {found} tokens and --tokenizer bpe:{vocabulary} is smaller: {again}.")
    return BytePairs(pairs, vocabulary)


def open_tokenizer(config: Config, text: Text) -> Tokenizer:
    """The tokenizer that the options name: the one in the run's folder, else one learnt from the text.

    Raises:
        TrainError: the folder's does not fit, or is missing from a run that has begun.
    """
    if config.bpe_tokens is None:
        return Bytes()
    if (config.folder / FILE).exists() or (config.folder / "checkpoints").exists():
        return load_tokenizer(config.folder, config.bpe_tokens)
    return learn(text, config.bpe_tokens)


def _package() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise TrainError("--tokenizer bpe:N needs the package tokenizers: install jax-latent-moe[train].") from error
    return tokenizers
