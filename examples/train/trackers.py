"""Experiment trackers that metrics also go to: Weights & Biases and trackio, which take the same calls."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from examples.train.config import Config
from examples.train.errors import TrainError
from examples.train.processes import is_first_process

PROJECT = "jax-latent-moe"


def import_trackers(config: Config) -> list[Any]:
    """The packages that the options name, imported.

    Raises:
        TrainError: one is not installed.
    """
    return [_imported(name) for name in ("wandb", "trackio") if getattr(config, name)]


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainError(f"--{name} needs the package {name}: install it, or leave the option out.") from error


class Trackers:
    """One run at each of the packages; only the first process speaks to them."""

    def __init__(self, packages: Sequence[Any], config: Config):
        self._packages = packages if is_first_process() else []
        for package in self._packages:
            options = {key: str(value) for key, value in dataclasses.asdict(config).items()}
            package.init(project=PROJECT, name=config.folder.name, config=options)

    def write(self, record: dict[str, Any]):
        """The numbers of a record."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        for package in self._packages:
            package.log(numbers, step=record["step"])

    def close(self):
        """Ends the runs."""
        for package in self._packages:
            package.finish()
