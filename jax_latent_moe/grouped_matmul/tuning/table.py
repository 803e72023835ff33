"""Tables of measured tiles, one JSON file per device. The user's own, written by `tune`, take precedence over ours.

An entry holds the backend, every field of the problem but its rows, the fields of the fastest tile, and the rows and
milliseconds of the measurement. It serves the same problem with half to twice as many rows.
"""

import functools
import importlib.resources
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from jax_latent_moe.device import Device
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.grouped_matmul.problem import Problem

VARIABLE = "JAX_LATENT_MOE_TUNING"
VERSION = 1
KEY = ("backend", "contraction", "num_experts", "k", "n", "lhs", "rhs", "out", "epilogue")
FIELDS = (*KEY, "num_rows", "tile", "ms")
Entry = dict[str, Any]


def entry_of(problem: Problem, backend: str, tile: dict[str, Any], ms: float) -> Entry:
    """An entry of a table, from the fields of a tile that took `ms` milliseconds."""
    return _key(problem, backend) | {"num_rows": problem.num_rows, "tile": tile, "ms": ms}


def measured_tile(tile_type: type, backend: str, problem: Problem) -> tuple[Any, str] | None:
    """The measured tile for a problem, and where it comes from; None if no table has one.

    The user's table of the device is searched first, then the committed table of the device, then those of other
    devices of its architecture. In each table, a problem with gathered rows or columns of wider rows falls back to the
    tile of dense rows.

    Raises:
        ConfigError: the user's table cannot be read, or the tile of an entry is not valid.
    """
    for place, entries in _tables(problem.device):
        for asked in dict.fromkeys((problem, problem.dense())):
            key = _key(asked, backend)
            near = [
                entry
                for entry in entries
                if all(entry[name] == key[name] for name in KEY)
                and entry["num_rows"] <= 2 * problem.planned_rows <= 4 * entry["num_rows"]
            ]
            if near:
                entry = min(near, key=lambda entry: abs(entry["num_rows"] - problem.planned_rows))
                return _tile(tile_type, entry, f"{place}, measured at {entry['num_rows']} rows")
    return None


def user_folder() -> pathlib.Path:
    """The folder of the user's tables, which need not exist.

    It is $JAX_LATENT_MOE_TUNING, or else jax_latent_moe/tuning/ in the user's configuration folder.
    """
    if path := os.environ.get(VARIABLE):
        return pathlib.Path(path)
    base = os.environ.get("XDG_CONFIG_HOME") or pathlib.Path.home() / ".config"
    return pathlib.Path(base) / "jax_latent_moe" / "tuning"


def file_of(folder: pathlib.Path, device: Device) -> pathlib.Path:
    """The path of a device's table in a folder; the file need not exist."""
    return folder / f"{_slug(device.kind)}.json"


def add_to_table(path: pathlib.Path, device: Device, entries: Sequence[Entry]) -> None:
    """Writes entries into a device's table. Each replaces an entry of the same backend, problem and rows.

    Raises:
        ConfigError: the file is not a table of this version, or belongs to another device.
    """
    new = [_identity(entry) for entry in entries]
    table = [entry for entry in _read(path, device.kind) if _identity(entry) not in new] + list(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n    ".join(json.dumps(entry) for entry in table)
    text = (
        f'{{\n  "version": {VERSION},\n  "device": {json.dumps(device.kind)},\n  "entries": [\n    {lines}\n  ]\n}}\n'
    )
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _key(problem, backend) -> Entry:
    return {
        "backend": backend,
        "contraction": problem.contraction,
        "num_experts": problem.num_experts,
        "k": problem.k,
        "n": problem.n,
        "lhs": str(problem.lhs),
        "rhs": str(problem.rhs),
        "out": str(problem.out),
        "epilogue": None if problem.epilogue is None else str(problem.epilogue),
    }


def _identity(entry) -> str:
    return json.dumps([entry[name] for name in (*KEY, "num_rows")])


def _tile(tile_type, entry, source):
    try:
        return tile_type(**entry["tile"]), source
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{entry['tile']} of {source} is not a valid tile: {error} Run `tune` again.") from error


def _tables(device):
    """Yields (name, entries) of each table that may serve a device, in the order of the search."""
    folder = user_folder()
    _refuse_old(folder)
    path = file_of(folder, device)
    yield f"your table {path}", _read(path, device.kind)
    committed = _committed()
    for kind in sorted(committed, key=lambda kind: kind != device.kind):
        if kind == device.kind or Device("gpu", kind).architecture == device.architecture:
            yield f"the committed table of {kind}", committed[kind]


def _refuse_old(folder):
    """Refuses a table of version 0.1, which was one file for all devices and did not name the measured dtype."""
    old = folder if os.environ.get(VARIABLE) else folder.with_suffix(".json")
    if old.is_file():
        raise ConfigError(
            f"{old} is a table of tiles of version 0.1, which does not name the measured dtype: remove it, "
            "and run `python -m jax_latent_moe.grouped_matmul.tuning` again, which writes one file per device."
        )


def _read(path: pathlib.Path, kind: str) -> list[Entry]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    table = _parse(path, status.st_mtime_ns)
    if table["device"] != kind:
        raise ConfigError(f"{path} holds tiles of {table['device']!r}, not of {kind!r}: remove or move the file.")
    return table["entries"]


@functools.lru_cache(maxsize=8)
def _parse(path, modified) -> dict[str, Any]:
    """The table in a file, read again when the file changes."""
    del modified
    try:
        table = json.loads(path.read_text())
        version, complete = table["version"], all(set(FIELDS) <= entry.keys() for entry in table["entries"])
        complete = complete and isinstance(table["device"], str)
        complete = complete and all(isinstance(entry["num_rows"], int) for entry in table["entries"])
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a table of tiles ({type(error).__name__}: {error}): remove it, or write one with `tune`."
        ) from error
    if version != VERSION or not complete:
        raise ConfigError(
            f"{path} must have version {VERSION}, a device, and entries with {', '.join(FIELDS)}: remove it, "
            "or write one with `tune`."
        )
    return table


@functools.cache
def _committed() -> dict[str, list[Entry]]:
    folder = importlib.resources.files(__package__).joinpath("tables")
    tables = [json.loads(file.read_text()) for file in folder.iterdir() if file.name.endswith(".json")]
    return {table["device"]: table["entries"] for table in tables}


def _slug(kind) -> str:
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
