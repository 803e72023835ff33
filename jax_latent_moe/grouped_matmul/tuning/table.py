"""Measured tiles: a table committed for Hopper GPUs, and the user's own, which `tune` writes and which comes first.

An entry has a device, backend, contraction, num_rows, w_shape [E, K, N], tile (the fields of the backend's dataclass)
and ms: the fastest tile that was measured there. It serves the same weights at up to twice or half as many rows.
"""

import functools
import importlib.resources
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_latent_moe.errors import ConfigError

VARIABLE = "JAX_LATENT_MOE_TUNING"
KEY = ("device", "backend", "contraction", "num_rows", "w_shape")
Entry = dict[str, Any]


class Choice(NamedTuple):
    """The tile that runs a problem.

    Attributes:
        tile: the backend's dataclass.
        source: where it comes from: the config, a table or a heuristic.
    """

    tile: Any
    source: str


def measured(backend: str, contraction: str, num_rows: int, w_shape: Sequence[int], device: str) -> Entry | None:
    """The entry for these weights and the nearest number of rows, with "source" added; None where no table has one.

    The user's table is asked first, and serves the device that it was measured on; the committed one serves all devices
    of its architecture, the same device first.

    Raises:
        ConfigError: the user's table cannot be read.
    """
    path = user_table()
    for source, entries in (
        (f"your table {path}", [entry for entry in _read(path) if entry["device"] == device]),
        ("the committed table", _committed()),
    ):
        near = [
            entry
            for entry in entries
            if (entry["backend"], entry["contraction"], *entry["w_shape"]) == (backend, contraction, *w_shape)
            and entry["num_rows"] <= 2 * num_rows <= 4 * entry["num_rows"]
        ]
        if near:
            entry = min(near, key=lambda entry: (entry["device"] != device, abs(entry["num_rows"] - num_rows)))
            return entry | {"source": f"{source}, measured at {entry['num_rows']} rows on {entry['device']}"}
    return None


def measured_tile(
    tile_type: type, backend: str, contraction: str, num_rows: int, w_shape: Sequence[int], device: str
) -> Choice | None:
    """The tile of the entry that `measured` finds, as the backend's dataclass; None where it finds none.

    Raises:
        ConfigError: the user's table cannot be read, or the entry holds what is no such tile.
    """
    entry = measured(backend, contraction, num_rows, w_shape, device)
    if entry is None:
        return None
    try:
        return Choice(tile_type(**entry["tile"]), entry["source"])
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{entry['tile']} of {entry['source']} is no tile: {error} Run `tune` again.") from error


def user_table() -> pathlib.Path:
    """Path of the user's table, there or not: $JAX_LATENT_MOE_TUNING, or tuning.json in their configuration folder."""
    if path := os.environ.get(VARIABLE):
        return pathlib.Path(path)
    base = os.environ.get("XDG_CONFIG_HOME") or pathlib.Path.home() / ".config"
    return pathlib.Path(base) / "jax_latent_moe" / "tuning.json"


def add_to_table(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    """Writes entries into a table, over those of the same key; the file is replaced whole, so nobody reads half of it.

    Raises:
        ConfigError: there is a file that is no table.
    """
    new = [_key(entry) for entry in entries]
    table = [entry for entry in _read(path) if _key(entry) not in new] + list(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write("[\n  " + ",\n  ".join(json.dumps(entry) for entry in table) + "\n]\n")
    os.replace(file.name, path)


def _key(entry) -> tuple:
    return tuple(str(entry[name]) for name in KEY)


def _read(path: pathlib.Path) -> list[Entry]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return _parse(path, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _parse(path, modified) -> list[Entry]:
    """The entries of a file, read again when it changes."""
    del modified
    try:
        entries = json.loads(path.read_text())
        complete = isinstance(entries, list) and all({*KEY, "tile", "ms"} <= entry.keys() for entry in entries)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no table of tiles: {error}. Remove it, or write one with `tune`.") from error
    if not complete:
        fields = ", ".join((*KEY, "tile", "ms"))
        raise ConfigError(f"{path} must be a list of entries with {fields}. Remove it, or write one with `tune`.")
    return entries


@functools.cache
def _committed() -> list[Entry]:
    return json.loads(
        importlib.resources.files("jax_latent_moe.grouped_matmul").joinpath("tuning_hopper.json").read_text()
    )
