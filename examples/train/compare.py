"""Compares runs in one figure: `python -m examples.train.compare runs/a runs/b --output compare.png`."""

import sys
from pathlib import Path

import tyro

from examples.train.errors import TrainError
from examples.train.metrics import VALIDATION, read_records
from examples.train.plots import DPI, comparison, comparison_figure
from examples.train.run_folder import runs_here
from jax_latent_moe.piped import piped


def compare(runs: tyro.conf.Positional[tuple[Path, ...]] = (), output: Path = Path("compare.png")):
    """Draws the validation bits per byte of some runs over steps and over seconds, and says which run is best.

    Args:
        runs: folders of the runs, such as runs/shakespeare-cpu-latent_moe runs/shakespeare-cpu-dense.
        output: the figure to write. Its ending names the format: .png, .svg or .pdf.

    Raises:
        TrainError: no folder is given, a folder has no validation in its metrics, or the figure cannot be written.
    """
    if not runs:
        raise TrainError(
            f"Give the folders of some runs: python -m examples.train.compare runs/A runs/B. {runs_here()}"
        )
    records = {run: read_records(run) for run in runs}
    empty = [str(run) for run in runs if not any(VALIDATION in record for record in records[run])]
    if empty:
        raise TrainError(
            f"There is no validation to compare in {', '.join(empty)}: give folders of runs that have passed "
            f"--eval-every steps. {runs_here()}"
        )
    unique = len({run.name for run in records}) == len(records)
    named = {run.name if unique else str(run): found for run, found in records.items()}
    try:
        comparison_figure(named).savefig(output, dpi=DPI)
    except (OSError, ValueError) as error:
        raise TrainError(f"{output} cannot be written ({error}): choose another --output.") from error
    print(f"{comparison(named)}. Wrote {output}.")


if __name__ == "__main__":
    with piped():
        try:
            tyro.cli(compare, prog="python -m examples.train.compare")
        except TrainError as error:
            sys.exit(f"error: {error}")
