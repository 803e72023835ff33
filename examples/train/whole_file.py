"""Replaces files such that a reader always sees a complete one."""

import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes):
    """Replaces a file in one step. A kill leaves either the old file or the new one.

    The content is first written beside the file under a random name. No other file is overwritten.

    Raises:
        OSError: the file cannot be written. No part of it is left.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with partial.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
