"""Files that are whole whenever they are seen."""

import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes):
    """Replaces a file at once: a kill leaves the old one, or the new one.

    The content is written under a random name beside it, so that nothing else is overwritten.

    Raises:
        OSError: it cannot be written; nothing is left of it.
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
