"""Byte pairs: every text comes back, documents stay, the run's folder keeps them, bits count per byte."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from examples.train import tokenizer as tokenizing
from examples.train.data import validation_windows
from examples.train.errors import TrainError
from examples.train.generate import load
from examples.train.metrics import read_records
from examples.train.sampling import make_generate
from examples.train.text import Text
from examples.train.tokenizer import Bytes, learn, load_tokenizer, pieces
from examples.train.train import main, train
from tests.examples.runs import assert_same_bits, state_of, stopped_after, toy_config, write_text

VOCABULARY = 300


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return Text(np.frombuffer(write_text(tmp_path_factory.mktemp("words")).read_bytes(), np.uint8))


@pytest.fixture(scope="module")
def pairs(words):
    return learn(words, VOCABULARY)


def test_every_text_comes_back(pairs, rng):
    noise = bytes(rng.integers(0, 256, 5000, np.uint8))
    for content in (b"the cat sat", bytes(range(256)), noise, "zwölf".encode(), b""):
        assert pairs.decode(pairs.encode(content)) == content
        assert Bytes().decode(Bytes().encode(content)) == content
    assert len(pairs.encode(b"the cat sat")) < 6
    assert pairs.encode(bytes(range(256))).max() < VOCABULARY - 1, "the last token stands for a separator alone"


def test_the_same_text_gives_the_same_tokens(words, pairs):
    np.testing.assert_array_equal(learn(words, VOCABULARY).encode(b"a mat and rats"), pairs.encode(b"a mat and rats"))


@pytest.mark.parametrize("piece", [2**20, 50])
def test_documents_are_encoded_one_by_one(pairs, monkeypatch, piece):
    monkeypatch.setattr(tokenizing, "PIECE", piece)
    documents = [b"the cat\nsat on a mat " * 9, b"", b"rats\n\nate", b"oats"]
    content = b"\n".join(documents)
    starts = np.cumsum([len(document) for document in documents])[:-1] + np.arange(3)
    text = Text(np.frombuffer(content, np.uint8), starts)
    encoded = pairs.encode_text(text)
    assert encoded.tokens[encoded.starts].tolist() == [pairs.separator] * 3
    assert int(np.sum(encoded.tokens == pairs.separator)) == 3
    assert pairs.decode(encoded.tokens) == content
    assert pairs.token_bytes[encoded.tokens].sum() == len(content) - 3
    assert all(len(part) <= piece for part, _ in pieces(text))


def test_windows_count_bytes_not_tokens(pairs, words):
    encoded = pairs.encode_text(words[:2000])
    windows = validation_windows(encoded, 16, start=pairs.separator, token_bytes=pairs.token_bytes)
    assert windows.scored.sum() == len(encoded.tokens) < 1000
    assert windows.num_bytes == 2000
    half = windows.subset(5)
    assert half.num_bytes == pairs.token_bytes[half.targets[half.scored]].sum()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    write_text(folder)
    config = toy_config(folder, tokenizer=f"bpe:{VOCABULARY}", documents=True, steps=30, checkpoint_every=15)
    return config, train(config)


def test_a_run_on_byte_pairs_learns_and_is_judged_by_bytes(finished):
    config, bits = finished
    assert bits < 0.6 * math.log2(256)
    records = [record for record in read_records(config.folder) if "loss" in record]
    pairs = load_tokenizer(config.folder, VOCABULARY)
    for record in records:
        of_token = record["loss"] / math.log(2) / record["bits_per_byte"]
        assert 1.5 < of_token < pairs.token_bytes.max(), "bytes of a token"
    model, state, kept = load(config.folder)
    assert model.vocabulary == VOCABULARY == state.params["head"]["kernel"].shape[1]
    text = make_generate(model, kept, 40)(state, b"the cat", jax.random.key(0)).text
    assert text.startswith(b"the cat")
    assert len(text) == 7 + 40


def test_a_run_on_byte_pairs_goes_on_to_the_bit(finished, tmp_path):
    config, bits = finished
    resumed = dataclasses.replace(config, run=tmp_path / "resumed")
    with stopped_after(7):
        assert train(resumed) is None
    assert train(resumed) == bits
    assert_same_bits(state_of(resumed.folder), state_of(config.folder))


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_tokenizer_that_does_not_fit_leaves_the_folder_alone(finished):
    config, _ = finished
    before, path = contents(config.folder), config.folder / tokenizing.FILE
    for changes, sentence in (
        ({"tokenizer": "bpe:280"}, r"started with tokenizer=bpe:300, now bpe:280"),
        ({"tokenizer": "bytes"}, r"started with tokenizer=bpe:300, now bytes"),
    ):
        with pytest.raises(TrainError, match=sentence):
            train(dataclasses.replace(config, **changes))
        assert contents(config.folder) == before
    kept = path.read_text()
    larger = json.loads(kept)
    larger["model"]["vocab"] |= {f"~{i}": i for i in range(len(larger["model"]["vocab"]), 400)}
    for written, sentence in (
        ("{", r"holds no tokenizer"),
        (json.dumps(larger), r"has 400 tokens and --tokenizer bpe:300"),
    ):
        path.write_text(written)
        with pytest.raises(TrainError, match=sentence):
            train(config)
    path.unlink()
    with pytest.raises(TrainError, match=r"tokenizer\.json holds no tokenizer \(FileNotFoundError"):
        train(config)
    path.write_text(kept)
    assert contents(config.folder) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tokenizer", "bpe:12"], "error: --tokenizer bpe:12 must be bytes, or bpe:N with N at least 258."),
        (["--tokenizer", "words"], "error: --tokenizer words must be bytes, or bpe:N"),
        (["--attention", "cudnn"], "error: --attention cudnn cannot run: it needs an NVIDIA GPU"),
        (["--accumulate", "3"], "error: --batch-size 8 must be a multiple of 3: --accumulate 3 makes 3 parts"),
        (["--accumulate", "0"], "error: accumulate=0 must be at least 1"),
        (["--profile", "5"], "error: --profile 5 must be FIRST:LAST, two steps from 1 on"),
        (["--profile", "9:3"], "error: --profile 9:3 must be FIRST:LAST"),
        (["--wandb"], "error: --wandb needs the package wandb: install it, or leave the option out."),
        (["--trackio"], "error: --trackio needs the package trackio"),
    ],
)
def test_wrong_options_leave_no_folder(tmp_path, arguments, sentence):
    text = str(write_text(tmp_path))
    with pytest.raises(SystemExit) as leaving:
        main(["--preset", "toy", "--data", text, "--run", str(tmp_path / "run"), *arguments])
    assert leaving.value.code.startswith(sentence)
    assert "\n" not in leaving.value.code
    assert not (tmp_path / "run").exists()
