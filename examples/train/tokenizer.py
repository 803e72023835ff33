"""Converts bytes to tokens and back. A token is a byte, or a byte pair that was learnt from the training text."""

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
"""The length in bytes of a piece that is encoded as one text, and the number of pieces that are encoded at once."""
LEARNT_BYTES = 2**28
"""Byte pairs are learnt from at most this much text. A longer text gives pieces that are spread over it."""
# A word is a run of letters, digits or signs, with the space before it. Bytes from 0x80 on count as letters, because
# UTF-8 uses them for other alphabets.
WORDS = r" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+"


class Bytes:
    """Each byte is a token.

    Attributes:
        vocabulary: the number of tokens.
        separator: the token that begins a document.
        token_bytes: the bytes of each token. None because each token is one byte.
        unit: the name of the tokens in messages.
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

    def encode_text(self, text: Text) -> Text:
        """The text in tokens."""
        return text

    def bytes_per_token(self, tokens: Int[np.ndarray, " n"]) -> float:
        """The mean length of the tokens in bytes."""
        del tokens
        return 1.0

    def save(self, folder: Path):
        """Does nothing, because bytes need no file."""


class BytePairs:
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) by the package tokenizers.

    The package sees every byte as one character (latin-1), so decoding gives back every text exactly.

    Attributes:
        vocabulary: the number of tokens.
        separator: the token that begins a document. It is the last token.
        token_bytes: [vocabulary] int64, the bytes of each token. The separator has 0.
        unit: the name of the tokens in messages.
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
        """The text of tokens. A separator becomes a newline."""
        return b"".join(b"\n" if token == self.separator else self._texts[token] for token in np.asarray(tokens))

    def bytes_per_token(self, tokens: Int[np.ndarray, " n"]) -> float:
        """The mean length of the tokens in bytes."""
        return float(self.token_bytes[tokens].mean())

    def save(self, folder: Path):
        """Writes the tokenizer into the folder of a run."""
        write_whole(folder / FILE, self._pairs.to_str(pretty=True).encode())

    def encode_text(self, text: Text) -> Text:
        """The text in tokens. If the text is mapped from disk, so are its tokens."""
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


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> Corpus:
    """All texts of the corpus in tokens."""
    encode = tokenizer.encode_text
    more = {name: encode(text) for name, text in corpus.more.items()}
    return Corpus(encode(corpus.train), encode(corpus.validation), more)


def pieces(text: Text, every: int = 1) -> Iterator[tuple[bytes, bool]]:
    """The documents without their separators, in pieces. The flag of a piece says whether it begins a document.

    A long document is cut at ends of lines if it has any.

    Args:
        text: the text as bytes.
        every: N gives only every N-th piece.
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
    """Learns byte pairs from a text. The same text gives the same pairs."""
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
        TrainError: the file is missing, cannot be read, or has another vocabulary.
    """
    path, again = folder / FILE, "restore the file, or start a new run in another folder with --run"
    try:
        content = path.read_text()
        pairs, found = _package().Tokenizer.from_str(content), len(json.loads(content)["model"]["vocab"])
    except Exception as error:  # the package raises plain Exceptions
        raise TrainError(f"{path} holds no tokenizer ({type(error).__name__}: {error}): {again}.") from error
    if found > vocabulary - 1:
        raise TrainError(f"{path} has {found} tokens and --tokenizer bpe:{vocabulary} is smaller: {again}.")
    return BytePairs(pairs, vocabulary)


def open_tokenizer(config: Config, text: Text) -> Tokenizer:
    """The tokenizer that the options name. It is read from the run's folder.

    A new run takes the tokenizer of --base, or learns one from the text.

    Raises:
        TrainError: the tokenizer in the folder does not fit, or a run that has begun has none.
    """
    if config.bpe_tokens is None:
        return Bytes()
    if (config.folder / FILE).exists() or (config.folder / "checkpoints").exists():
        return load_tokenizer(config.folder, config.bpe_tokens)
    if config.base is not None:
        return load_tokenizer(config.base, config.bpe_tokens)
    return learn(text, config.bpe_tokens)


def _package() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise TrainError(
            "--tokenizer bpe:N needs the package tokenizers: pip install 'jax-latent-moe[train]'."
        ) from error
    return tokenizers
