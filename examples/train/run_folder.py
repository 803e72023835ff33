"""The folder of a run. It keeps the options, so that a resumed run has the same ones."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from examples.train import programs
from examples.train.config import Config
from examples.train.config_file import from_fields, read_fields, to_json
from examples.train.errors import TrainError
from examples.train.processes import is_first_process
from examples.train.whole_file import write_whole

FILE = "config.json"
WRITTEN = (
    *(FILE, "checkpoints", "metrics.jsonl", "tensorboard", "profile", programs.FOLDER),
    *("sample.txt", "loss.png", "throughput.png", "expert_load.png", "routing.png", "report.html"),
)
"""The names that a run writes into its folder. It may replace them there."""
FREE = {
    *("config", "preset", "run", "validation", "steps", "log_every", "eval_every", "checkpoint_every", "sample_bytes"),
    *("restore", "bad_step", "spike_factor", "mesh", "coordinator", "processes", "process"),
    *("accumulate", "reduce_dtype", "attention", "norms", "precision", "remat", "profile", "wandb", "trackio"),
    *("model.backend", "optimizer.learning_rate", "optimizer.final_fraction", "optimizer.warmup_steps"),
}
"""Options that may change when a run is resumed, because state and data carry over."""


def check_folder(config: Config):
    """Checks that the options fit the run in the folder, if there is one.

    Raises:
        TrainError: the folder holds a run with other options.
    """
    if (config.folder / FILE).exists():
        _check_same(config.folder, read_config(config.folder), config)


def open_folder(config: Config) -> Path:
    """Makes the folder of the run if it does not exist, and writes the options into it.

    Raises:
        TrainError: the folder holds a run with other options, or cannot be written.
    """
    folder = config.folder
    try:
        check_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if is_first_process():
            _check_empty_of_others(folder)
            write_whole(folder / FILE, to_json(config).encode())
    except OSError as error:
        raise TrainError(f"The run folder {folder} cannot be used ({error}): choose another with --run.") from error
    return folder


def _check_empty_of_others(folder):
    """Refuses a folder without a run if it holds a name that a run would overwrite. Other names may be there."""
    found = sorted(name for name in WRITTEN if os.path.lexists(folder / name))
    if found and not (folder / FILE).exists():
        raise TrainError(
            f"{folder} is not the folder of a run, because it has no readable {FILE}. It holds {', '.join(found)}, "
            "which a run would overwrite: give another folder with --run."
        )


def read_config(folder: Path) -> Config:
    """The options of the run in a folder.

    Raises:
        TrainError: the folder holds no run, or its options cannot be read.
    """
    try:
        return from_fields(read_fields(folder / FILE), Config(), str(folder / FILE))
    except TrainError as error:
        raise TrainError(f"{folder} holds no readable run. {error} {runs_here()}") from error


def runs_here() -> str:
    """A sentence that lists the runs in the folder runs/."""
    found = sorted(str(path.parent) for path in Path("runs").glob(f"*/{FILE}"))
    if not found:
        return "There is no run in runs/ yet: python -m examples.train starts one."
    return f"Runs here: {', '.join(found)}."


def _check_same(folder, before, now):
    old, new = flat(dataclasses.asdict(before)), flat(dataclasses.asdict(now))
    changed = [f"{name}={old[name]}, now {new[name]}" for name in new if name not in FREE and old[name] != new[name]]
    if changed:
        raise TrainError(
            f"The run in {folder} was started with {'; '.join(changed)}: give the same options to resume it, or start "
            "a new run in another folder with --run."
        )


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested options by their names, such as model.layers."""
    leaves = {}
    for name, value in fields.items():
        leaves.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return leaves
