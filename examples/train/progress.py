"""What a run prints: lines that stay, a progress bar on a terminal, and a spinner while something takes time."""

import contextlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from examples.train.processes import is_first_process


def console(*, stderr: bool = False) -> Console:
    """The console for standard output or standard error. Only the first process prints."""
    return Console(highlight=False, quiet=not is_first_process(), stderr=stderr)


@contextlib.contextmanager
def busy(words: str, *, stderr: bool = False):
    """Shows that something takes time: a spinner and the seconds on a terminal, else one plain line."""
    shown = console(stderr=stderr)
    if not shown.is_terminal or shown.quiet:
        shown.print(f"{words} ...", markup=False, soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=shown, transient=True) as spinner:
        spinner.add_task(words, total=None)
        yield


class ProgressReport:
    """Prints the lines of a run. On a terminal a bar below them shows the step, the speed and the time left."""

    def __init__(self, steps: int):
        self._console, self._steps, self._bar = console(), steps, None

    def update(self, record: dict[str, Any]):
        """Prints a training record as one line."""
        parts = [f"loss {record['loss']:.3f}", *_speed(record)]
        if "memory_bytes" in record:
            parts.append(f"{record['memory_bytes'] / 1e9:.1f} GB")
        if "loads" in record:
            parts.append(f"busiest expert {busiest(record['loads']):.2f}x")
        if "seconds_left" in record:
            parts.append(f"{duration(record['seconds_left'])} left")
        self.say(f"step {record['step']}/{self._steps}  {'  '.join(parts)}")
        self._move_bar(record)

    def say(self, text: str):
        """Prints one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self):
        """Removes the bar. The lines stay."""
        if self._bar is not None:
            self._bar.stop()

    def _move_bar(self, record):
        if not self._console.is_terminal or self._console.quiet:
            return
        if self._bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=self._steps)
            self._bar.start()
        left = f"{duration(record['seconds_left'])} left" if "seconds_left" in record else ""
        self._bar.update(self._task, completed=record["step"], description="  ".join([*_speed(record), left]))


def _speed(record) -> list[str]:
    """The speed, and the MFU if the device's peak is known. The first step of a run has none."""
    if "tokens_per_second" not in record:
        return []
    mfu = [f"MFU {100 * record['mfu']:.1f} %"] if "mfu" in record else []
    return [f"{record['tokens_per_second']:,.0f} tokens/s", *mfu]


def duration(seconds: float) -> str:
    """A time in words: "45 s", "3 min 20 s", "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def busiest(loads: list[list[float]]) -> float:
    """The load of the busiest expert in any layer over an even share. The loads of a layer are shares that sum to 1."""
    shares = np.asarray(loads)
    return float(shares.max() * shares.shape[1])
