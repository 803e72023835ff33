"""Writes folders. Each appears under its name when it is complete, and nothing existing is removed or overwritten."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.hf.tensor_file import as_path


def check_new(path: str | os.PathLike[str], source: pathlib.Path | None = None) -> pathlib.Path:
    """The absolute path of a folder that may be created.

    Args:
        path: a path at which nothing exists yet.
        source: the folder that is being read; `path` must lie outside of it.

    Raises:
        CheckpointError: something exists at path, or path lies in the source.
    """
    path = as_path(path)
    with writing(path):
        # All links but the last name are followed: a link at the last name counts as existing. "new/.." has no last
        # name, so it is followed whole.
        path = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
        if _is_taken(path):
            what = "it exists already" if path.exists() else "it is a dangling link"
            raise CheckpointError(path, [f"{what}, and nothing is overwritten: name a new folder."])
        if source is not None and path.is_relative_to(source.resolve()):
            raise CheckpointError(path, [f"it lies in {source}, which is being read: name a folder outside of it."])
    return path


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], source: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Yields an empty folder to write to. It is renamed to `path` on success and removed on failure.

    The folder lies beside `path` under a random name (".1f2e3d4c5b6a7988.partial") that only this call uses. A process
    that is killed leaves it behind.

    Args:
        path: a path at which nothing exists yet.
        source: the folder that is being read; `path` must lie outside of it.

    Raises:
        CheckpointError: something exists at path, path lies in the source, or it cannot be written.
    """
    path = check_new(path, source)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f".{secrets.token_hex(8)}.partial"
        partial.mkdir()
    try:
        with writing(path):
            yield partial
            _rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the content of a folder into an empty one. Links are followed, so that the two share no file.

    Raises:
        CheckpointError: a link leads to a folder that holds the source or the target, so the copy would never end.
    """
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            real = entry.resolve()
            if source.resolve().is_relative_to(real) or target.resolve().is_relative_to(real):
                raise CheckpointError(
                    entry, [f"it is a link to {real}, which holds the folder being copied: remove it."]
                )
            (target / entry.name).mkdir()
            copy_folder(entry, target / entry.name)
        elif entry.is_file():
            shutil.copyfile(entry, target / entry.name)
        else:
            raise CheckpointError(entry, ["it is neither a file nor a folder and cannot be copied: remove it."])


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError into a CheckpointError about `path`."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        raise CheckpointError(path, [f"cannot be written: {error.strerror or error}{where}."]) from error


def _is_taken(path: pathlib.Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _rename(partial: pathlib.Path, path: pathlib.Path):
    """Renames a folder; fails if something has the new name by now."""
    path.mkdir()  # claims the name: renaming alone would replace an empty folder
    try:
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise
