"""The options of a run as JSON: config.json in its folder, and the file that --config names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from examples.train.config import BALANCING, Config
from examples.train.errors import TrainError


def to_json(config: Config) -> str:
    """The options as a JSON object, in which the options of model and optimiser are objects."""
    return json.dumps(dataclasses.asdict(config), default=str, indent=2) + "\n"


def read_fields(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        TrainError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainError(f"The options in {path} cannot be read ({error}): give a JSON file with --config.") from error
    if not isinstance(fields, dict):
        raise TrainError(f"{path} holds a {type(fields).__name__} and must hold a JSON object of options.")
    return fields


def from_fields(fields: dict[str, Any], base: Config, origin: str) -> Config:
    """The options of a JSON object.

    Args:
        fields: the object. It may leave options out.
        base: gives the options that are left out.
        origin: names the object in messages.

    Raises:
        TrainError: an option does not exist or has a wrong value.
    """
    fields = dict(fields)
    if fields.get("mlp", base.mlp) == "dense":  # a run keeps all options, and their defaults may have changed since
        fields = {name: value for name, value in fields.items() if name not in BALANCING}
    try:
        for name in ("model", "optimizer"):
            fields[name] = dataclasses.replace(getattr(base, name), **fields.get(name, {}))
        for name in ("run", "config", "base"):
            fields[name] = None if fields.get(name) is None else Path(fields[name])
        fields["validation"] = tuple(fields.get("validation", base.validation))
        return dataclasses.replace(base, **fields)
    except TypeError as error:  # dataclasses and Path raise it
        raise TrainError(
            f"{origin} has an option that does not exist or has the wrong type ({error}): compare it with the "
            "config.json of a new run."
        ) from error
