"""The command line: a preset or a file of options as defaults, and one flag for each field of the configuration."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from examples.train.config import Config
from examples.train.config_file import from_fields, read_fields
from examples.train.errors import TrainError
from examples.train.presets import PRESETS, preset
from examples.train.processes import join


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that the command line gives.

    Args:
        arguments: None reads the arguments of the process.

    Raises:
        TrainError: the preset is unknown, the file of options is unusable, or values do not fit together.
        SystemExit: the arguments hold --help or an unknown option.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--preset")
    options, rest = early.parse_known_args(arguments)
    fields = {} if options.config is None else read_fields(options.config)
    _join_processes(fields, rest)  # before JAX looks for devices
    default = _default(options, fields)
    config = tyro.cli(Config, default=default, args=arguments, prog="python -m examples.train")
    # The configuration names the preset that "auto" selected.
    return dataclasses.replace(config, preset=default.preset)


def _default(options: argparse.Namespace, fields: dict) -> Config:
    """The values of all options that are not on the command line."""
    if options.preset and "preset" in fields:
        raise TrainError(
            f"--preset {options.preset} has no effect with --config {options.config}, which has a preset: leave one of "
            "them out."
        )
    name = options.preset or fields.get("preset", "auto")
    if name not in ("auto", *PRESETS):
        raise TrainError(f"--preset {name} is unknown: use one of auto, {', '.join(PRESETS)}.")
    base = preset(name)
    if options.config is None:
        return base
    config = from_fields({**fields, "preset": base.preset}, base, str(options.config))
    return dataclasses.replace(config, config=options.config)


def _join_processes(fields: dict, arguments: Sequence[str]):
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--coordinator", default=str(fields.get("coordinator", "")))
    early.add_argument("--processes", type=int, default=str(fields.get("processes", 1)))
    early.add_argument("--process", type=int, default=str(fields.get("process", 0)))
    options = early.parse_known_args(arguments)[0]
    join(options.coordinator, options.processes, options.process)
