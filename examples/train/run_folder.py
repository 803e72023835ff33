"""The folder of a run: its options, kept so that a resumed run is the same run."""

import dataclasses
import json
import os
from pathlib import Path

from examples.train.config import Config, ModelConfig, OptimizerConfig
from examples.train.errors import TrainError
from examples.train.processes import is_first_process
from examples.train.whole_file import write_whole

FILE = "config.json"
WRITTEN = (
    *(FILE, "checkpoints", "metrics.jsonl", "tensorboard", "profile"),
    *("sample.txt", "loss.png", "throughput.png", "expert_load.png"),
)
"""What a run writes into its folder, and may replace there."""
FREE = {
    *("preset", "run", "steps", "log_every", "eval_every", "checkpoint_every", "sample_bytes"),
    *("restore", "bad_step", "spike_factor", "mesh", "coordinator", "processes", "process"),
    *("accumulate", "attention", "remat", "profile", "wandb", "trackio"),
    *("model.backend", "optimizer.learning_rate", "optimizer.final_fraction", "optimizer.warmup_steps"),
}
"""Options that may change when a run is resumed: state and data go on as they are."""


def check_folder(config: Config):
    """Looks whether the options fit a run that is in the folder.

    Raises:
        TrainError: the folder holds a run with other options.
    """
    if (config.folder / FILE).exists():
        _check_same(config.folder, read_config(config.folder), config)


def open_folder(config: Config) -> Path:
    """Makes the run's folder, or takes up the one that is there, and writes the options into it.

    Raises:
        TrainError: the folder holds a run with other options, or cannot be written.
    """
    folder = config.folder
    try:
        check_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if is_first_process():
            _check_empty_of_others(folder)
            options = json.dumps(dataclasses.asdict(config), default=str, indent=2) + "\n"
            write_whole(folder / FILE, options.encode())
    except OSError as error:
        raise TrainError(f"The run folder {folder} cannot be used ({error}): choose another with --run.") from error
    return folder


def _check_empty_of_others(folder):
    """A folder that is no run may hold what it likes, but nothing that a run would overwrite."""
    found = sorted(name for name in WRITTEN if os.path.lexists(folder / name))
    if found and not (folder / FILE).exists():
        raise TrainError(
            f"{folder} holds {', '.join(found)}, which a run would overwrite, but no readable {FILE} of a run: give "
            "another folder with --run."
        )


def read_config(folder: Path) -> Config:
    """The options of the run in a folder.

    Raises:
        TrainError: there is no run, or its options cannot be read.
    """
    try:
        fields = json.loads((folder / FILE).read_text())
        model, optimizer = ModelConfig(**fields.pop("model")), OptimizerConfig(**fields.pop("optimizer"))
        run = fields.pop("run")
        return Config(**fields, run=None if run is None else Path(run), model=model, optimizer=optimizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{folder} holds no readable run ({error}): give another folder with --run.") from error


def _check_same(folder, before, now):
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(now))
    changed = [f"{name}={old[name]}, now {new[name]}" for name in new if name not in FREE and old[name] != new[name]]
    if changed:
        raise TrainError(
            f"The run in {folder} was started with {'; '.join(changed)}: give the same options to resume it, or "
            "another folder with --run to start anew."
        )


def _flat(fields, prefix=""):
    leaves = {}
    for name, value in fields.items():
        leaves.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return leaves
