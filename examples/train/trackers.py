"""Sends metrics to the experiment trackers Weights & Biases and trackio, which have the same interface."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from examples.train.config import Config
from examples.train.errors import TrainError
from examples.train.processes import is_first_process

PROJECT = "jax-latent-moe"


def import_trackers(config: Config) -> list[Any]:
    """The modules of the trackers that the options name.

    Raises:
        TrainError: a package is not installed.
    """
    return [_imported(name) for name in ("wandb", "trackio") if getattr(config, name)]


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainError(f"--{name} needs the package {name}: install it, or leave the option out.") from error


class Trackers:
    """One run in each tracker. Only the first process sends metrics."""

    def __init__(self, packages: Sequence[Any], config: Config):
        self._packages = packages if is_first_process() else []
        for package in self._packages:
            options = {key: str(value) for key, value in dataclasses.asdict(config).items()}
            package.init(project=PROJECT, name=config.folder.name, config=options)

    def write(self, record: dict[str, Any]):
        """Sends the numbers of a record."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        for package in self._packages:
            package.log(numbers, step=record["step"])

    def close(self):
        """Ends the runs."""
        for package in self._packages:
            package.finish()
