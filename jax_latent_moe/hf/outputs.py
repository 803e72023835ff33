"""Folders to write: each appears whole under its name, and nothing that was there before is removed or overwritten."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.hf.tensor_file import as_path


def check_new(path: str | os.PathLike[str], source: pathlib.Path | None = None) -> pathlib.Path:
    """The absolute path of a folder that may be made.

    Args:
        path: a name that nothing has yet.
        source: a folder that is being read, outside of which `path` must lie.

    Raises:
        CheckpointError: something has the name, or it lies in the source.
    """
    path = as_path(path)
    with writing(path):
        # Links before the last name are followed, "new/.." has no name of its own, and a link of that name counts.
        path = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
        if _is_taken(path):
            what = "it exists already" if path.exists() else "it is a link that leads nowhere"
            raise CheckpointError(path, [f"{what}, and nothing is overwritten: name a new folder."])
        if source is not None and path.is_relative_to(source.resolve()):
            raise CheckpointError(path, [f"it lies in {source}, which is read: name a folder outside of that."])
    return path


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], source: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """An empty folder to write to, which becomes `path` if all goes well and is removed if not.

    It stands beside `path` under a random name (".1f2e3d4c5b6a7988.partial"), which only this call uses. A process that
    is killed leaves it there.

    Args:
        path: a name that nothing has yet.
        source: a folder that is being read, outside of which `path` must lie.

    Raises:
        CheckpointError: something has the name, it lies in the source, or it cannot be written.
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
    """Copies what a folder holds into an empty one; links are followed, so that the copy shares no file with it.

    Raises:
        CheckpointError: a link leads to a folder that holds the source or the target: the copy would have no end.
    """
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            real = entry.resolve()
            if source.resolve().is_relative_to(real) or target.resolve().is_relative_to(real):
                raise CheckpointError(entry, [f"it leads to {real}, which holds the folder that is copied: remove it."])
            (target / entry.name).mkdir()
            copy_folder(entry, target / entry.name)
        elif entry.is_file():
            shutil.copyfile(entry, target / entry.name)
        else:
            raise CheckpointError(entry, ["neither a file nor a folder, so that it cannot be copied: remove it."])


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system says into a CheckpointError about `path`."""
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
    """Renames a folder; fails where something has the new name by now."""
    path.mkdir()  # claims the name: renaming alone would replace an empty folder that is there
    try:
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise
