"""The command line: presets as defaults, one flag for each field of the configuration."""

import argparse
import dataclasses
from collections.abc import Sequence

import tyro

from examples.train.config import Config
from examples.train.errors import TrainError
from examples.train.presets import PRESETS, preset
from examples.train.processes import join


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that the arguments (by default the process's) ask for.

    Raises:
        TrainError: an unknown preset, or values that do not fit together.
        SystemExit: --help, or an option that does not exist.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="auto")
    early.add_argument("--coordinator", default="")
    early.add_argument("--processes", type=int, default=1)
    early.add_argument("--process", type=int, default=0)
    options = early.parse_known_args(arguments)[0]
    join(options.coordinator, options.processes, options.process)  # before anything asks JAX for its devices
    name = options.preset
    if name not in ("auto", *PRESETS):
        raise TrainError(f"--preset {name} is unknown: use one of auto, {', '.join(PRESETS)}.")
    default = preset(name)
    config = tyro.cli(Config, default=default, args=arguments, prog="python -m examples.train")
    # "auto" on the command line names the preset that was taken.
    return dataclasses.replace(config, preset=default.preset)
