"""Runs against each other: `python -m examples.train.compare runs/a runs/b --output compare.png`."""

import sys
from pathlib import Path

import tyro

from examples.train.errors import TrainError
from examples.train.metrics import read_records
from examples.train.plots import plot_comparison


def compare(runs: tyro.conf.Positional[tuple[Path, ...]], output: Path = Path("compare.png")):
    """Plots the validation bits per byte of runs against steps and against seconds.

    Args:
        runs: folders of the runs.
        output: the picture.

    Raises:
        TrainError: a folder holds no metrics, or the picture cannot be written.
    """
    records = {run.name: read_records(run) for run in runs}
    empty = [str(run) for run in runs if not any("validation_bits_per_byte" in record for record in records[run.name])]
    if empty or not runs:
        raise TrainError(
            f"Nothing to compare in {', '.join(empty) or 'no folder'}: give folders of runs past eval_every."
        )
    try:
        plot_comparison(records, output)
    except OSError as error:
        raise TrainError(f"{output} cannot be written ({error}): choose another --output.") from error
    print(f"Wrote {output}.")


if __name__ == "__main__":
    try:
        tyro.cli(compare, prog="python -m examples.train.compare")
    except TrainError as error:
        sys.exit(f"error: {error}")
