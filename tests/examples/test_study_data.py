"""The text of the study, from a hand-made package: which files are kept, how they are split, and refusals."""

import hashlib
import io
import tarfile

import pytest

from examples.study import data
from examples.train.errors import TrainError

SOURCES = {
    "net/Makefile": b"all:\n",
    "kernel/exit.c": b"int fork;\n",
    "drivers/gpu/drm/amd/include/table.h": b"#define GENERATED\n",
    "drivers/net/firmware.bin": b"abc",
    "lib/zero.c": b"a\0b",
    "Documentation/contents.rst": b"Title\n=====\n",
}


def packed(files: dict[str, bytes]) -> bytes:
    """A tar.xz of these files, with a folder and a link."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:xz") as archive:
        for kind, name in ((tarfile.DIRTYPE, "linux/lib"), (tarfile.SYMTYPE, "linux/link.c")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "kernel/fork.c"
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def package(files: dict[str, bytes]) -> bytes:
    """An ar archive as Debian's: the version, a control member of an odd size, and the data."""
    made = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", packed(files))):
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        made += b"\n" * (len(content) % 2)
    return made


def name_like(wanted) -> str:
    """The name of a file for which `wanted` holds."""
    return next(name for i in range(10_000) if wanted(name := f"fs/file{i}.c"))


def is_left_out(path: str) -> bool:
    return not data.is_held_out(path) and not data.is_trained_on(path)


@pytest.fixture
def archive(tmp_path):
    sources = SOURCES | {name_like(data.is_held_out): b"held out", name_like(is_left_out): b"left out"}
    sources = {f"linux-source-6.1/{name}": content for name, content in sources.items()}
    path = tmp_path / "package.deb"
    path.write_bytes(package({"./usr/share/doc/x": b"no", f"./{data.SOURCES}": packed(sources)}))
    return path


def test_text_is_kept_in_order_and_split_by_paths(archive, tmp_path):
    files = data.split_sources(archive, tmp_path)
    assert files == data.open_text(tmp_path)
    assert files.train.read_bytes() == b"all:\n\nint fork;\n\nTitle\n=====\n\n"
    assert files.validation.read_bytes() == b"held out\n"
    names = [f"drivers/{i}.c" for i in range(20_000)]
    for chosen, share in ((data.is_held_out, 1 / data.HELD_OUT_SHARE), (data.is_trained_on, 1 / data.TRAIN_SHARE)):
        assert sum(map(chosen, names)) / len(names) == pytest.approx(share, rel=0.3)
    assert not any(data.is_held_out(name) and data.is_trained_on(name) for name in names)


def test_the_package_is_fetched_and_checked(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "URLS", ("file:///nonexistent/package.deb", archive.as_uri()))
    with pytest.raises(TrainError, match=r"has the SHA-256 \w+ and must be 9305"):
        data.make_text(tmp_path / "text")
    assert not (tmp_path / "text" / "train.txt").exists()
    monkeypatch.setattr(data, "PACKAGE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    data.make_text(tmp_path / "text")
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == ["train.txt", "validation.txt"]
    assert "train.txt: 30 bytes" in capsys.readouterr().out
    data.make_text(tmp_path / "again", archive)
    assert archive.exists(), "a package that was given stays"


def test_what_is_missing_or_no_package_is_named(archive, tmp_path, monkeypatch):
    with pytest.raises(TrainError, match=r"python -m examples\.study\.data --folder .* fetches it"):
        data.open_text(tmp_path)
    monkeypatch.setattr(data, "URLS", ("file:///nonexistent/package.deb",))
    with pytest.raises(TrainError, match=r"cannot be fetched \(file:///nonexistent.*--archive"):
        data.make_text(tmp_path / "text")
    for content, message in ((b"zip", "is not a Debian package"), (package({"x": b""}), "holds no usr/src/linux")):
        archive.write_bytes(content)
        with pytest.raises(TrainError, match=message):
            data.split_sources(archive, tmp_path)
