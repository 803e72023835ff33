"""The command line: runs what is missing in a study, then makes the tables and figures."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from examples.study import data
from examples.study.arms import arm_named
from examples.study.definition import study_named
from examples.study.report import write_report
from examples.study.runner import run_study
from examples.train.errors import TrainError
from examples.train.signals import INTERRUPTED, StopRequest
from jax_latent_moe.errors import LatentMoEError


@dataclasses.dataclass(frozen=True)
class Options:
    """Runs a study and writes its tables and figures.

    The same command goes on after a stop. Ctrl-C, SIGTERM and `timeout` stop it after the current step.
    """

    arms: str = "toy"
    """Name of the study, which is a set of arms: d512, d768, either with -short for a quarter of the steps, or toy,
    which takes minutes on a CPU."""
    only: tuple[str, ...] = ()
    """The arms to run after the sweep of learning rates. Empty runs all arms of the study."""
    folder: Path | None = None
    """Folder of the rows, tables and figures. The default is runs/study/ARMS."""
    scratch: Path | None = None
    """Folder of the trainer's runs and their checkpoints. The default is runs/ in the folder."""
    text: Path | None = None
    """Folder of the text that python -m examples.study.data writes. The default is in the user's cache."""
    report_only: bool = False
    """Makes the tables and figures of the rows that there are, and runs nothing."""


def main(arguments: Sequence[str] | None = None):
    """Parses the command line and runs. An error that the user can solve is printed as one sentence.

    If a signal stops the runs, it ends with the status of `StopRequest`.
    """
    options = tyro.cli(Options, args=arguments, prog="python -m examples.study")
    stop = StopRequest()
    try:
        if not run(options, stop):
            sys.exit(stop.status)
    except (TrainError, LatentMoEError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the newest checkpoint.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def check_place(option: str, folder: Path):
    """Makes the folder that an option names. It refuses one that is a file or lies in one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{option} {folder} cannot be made ({error}): name another folder.") from error


def share_compiled_steps(folder: Path):
    """Lets runs of an arm with other seeds, in any process, read the step that the first run compiled.

    A cache that the user has chosen with `JAX_COMPILATION_CACHE_DIR` stays.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def run(options: Options, stop: StopRequest | None = None) -> bool:
    """Does what the options say.

    Args:
        options: the command line.
        stop: notes a signal that stops the runs.

    Returns:
        False if a signal stopped the runs. There is then no report.

    Raises:
        TrainError: an option is wrong, the text is missing, or the rows do not fit the study.
    """
    study = study_named(options.arms)
    for name in options.only:
        if arm_named(name) not in study.arms:
            there = ", ".join(arm.name for arm in study.arms)
            raise TrainError(f"--only {name} is not in the study {study.name}: use some of {there}.")
    folder = options.folder or Path("runs") / "study" / study.name
    if not study.linux:
        jax.config.update("jax_disable_most_optimizations", True)  # most of a toy run is compilation
    if not options.report_only:
        text = data.open_text(options.text or data.default_folder()) if study.linux else None
        scratch = options.scratch or folder / "runs"
        check_place("--folder", folder)
        check_place("--scratch", scratch)
        share_compiled_steps(scratch / "compiled")
        if not run_study(study, folder, scratch, text, options.only, stop):
            print("Stopped. The same command goes on from here.")
            return False
    for path in write_report(study, folder):
        print(path)
    return True
