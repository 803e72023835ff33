"""What a run reports: JSONL and TensorBoard files, a progress bar, or plain lines where there is no terminal."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from examples.train.config import Config
from examples.train.flops import flops_per_token, peak_flops
from examples.train.model import LanguageModel
from examples.train.processes import is_first_process
from examples.train.step import Metrics
from examples.train.trackers import Trackers
from examples.train.whole_file import write_whole

FILE = "metrics.jsonl"
IN_FLIGHT = 4
"""Steps that are given to the device ahead of the one that it computes: it never waits, and a signal is soon met."""


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The run's records in order; a last line cut off by a kill is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsWriter:
    """Appends records to metrics.jsonl, to TensorBoard and to the trackers.

    Records after `step` are what a run wrote between its last checkpoint and its end: they are removed, because
    they will be made again.
    """

    def __init__(self, folder: Path, step: int, trackers: Trackers):
        self._file, self._trackers = None, trackers
        if not is_first_process():
            return  # the numbers are the same in all of them
        kept = [json.dumps(record) + "\n" for record in read_records(folder) if record["step"] <= step]
        write_whole(folder / FILE, "".join(kept).encode())
        self._file = (folder / FILE).open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]):
        """One record: a "step", numbers, and lists of numbers."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, record["step"])
        self._trackers.write(record)

    def close(self):
        """Flushes both."""
        if self._file is None:
            return
        self._file.close()
        self._board.close()
        self._trackers.close()


class ProgressReport:
    """Step, loss, speed, balance of the experts and time left."""

    def __init__(self, steps: int):
        self._console = Console(highlight=False, quiet=not is_first_process())
        self._steps = steps
        self._bar = None
        if self._console.is_terminal and not self._console.quiet:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("compiling", total=steps)
            self._bar.start()

    def update(self, record: dict[str, Any]):
        """Shows a training record."""
        text = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in record:
            text += f"  MFU {100 * record['mfu']:.1f} %"
        if "memory_bytes" in record:
            text += f"  {record['memory_bytes'] / 1e9:.1f} GB"
        if "loads" in record:
            text += f"  busiest expert {busiest(record['loads']):.2f}x"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        else:
            self.say(f"step {record['step']}/{self._steps}  {text}  {record['seconds_left']:.0f} s left")

    def say(self, text: str):
        """One line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self):
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


class Interval:
    """Gathers the steps since the last record, without waiting for the device."""

    def __init__(self, config: Config, model: LanguageModel, devices: int, first: int, bytes_per_token: float):
        self._tokens, self._total = config.batch_size * config.model.context, config.steps
        self._bytes_per_token = bytes_per_token
        peak = peak_flops(jax.local_devices()[0])
        self._mfu_of_one = flops_per_token(model) / (peak * devices) if peak else None  # of one token a second
        self._steps, self._started = [], time.monotonic()
        self._begun, self._first = time.monotonic(), first

    @contextlib.contextmanager
    def paused(self):
        """While entered, the clock behind tokens per second stands still, and no step is under way."""
        jax.block_until_ready(self._steps)
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began

    def add(self, metrics: Metrics):
        """One more step; its numbers come to the host on their own."""
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        self._steps.append(metrics)
        jax.block_until_ready([metrics.loss for metrics in self._steps[-IN_FLIGHT - 1 : -IN_FLIGHT]])

    def record(self, step: int, seconds: float, rate: float) -> dict[str, Any]:
        """Means over the gathered steps, or over the good ones if there are any; the steps are then forgotten."""
        steps: list[Any] = jax.device_get(self._steps)
        good = [metrics for metrics in steps if not metrics.bad] or steps
        now = time.monotonic()
        record = {
            "step": step,
            "seconds": seconds,
            "loss": float(np.mean([metrics.loss for metrics in good])),
            "auxiliary_loss": float(np.mean([metrics.auxiliary_loss for metrics in good])),
            "grad_norm": float(np.mean([metrics.grad_norm for metrics in good])),
            "bad_steps": int(sum(metrics.bad for metrics in steps)),
            "learning_rate": rate,
            "tokens_per_second": self._tokens * len(steps) / (now - self._started),
            "seconds_left": (now - self._begun) / (step - self._first) * (self._total - step),
        }
        record["bits_per_byte"] = record["loss"] / math.log(2) / self._bytes_per_token
        record |= self._of_device(record["tokens_per_second"])
        if steps[0].loads is not None:
            loads = np.sum([metrics.loads for metrics in steps], axis=0)
            record["loads"] = np.round(loads / loads.sum(axis=1, keepdims=True), 5).tolist()
        self._steps, self._started = [], now
        return record

    def _of_device(self, tokens_per_second: float) -> dict[str, float]:
        """MFU and the most memory that was in use, of devices that say them."""
        found = {} if self._mfu_of_one is None else {"mfu": tokens_per_second * self._mfu_of_one}
        used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return found if used is None else found | {"memory_bytes": used}


def busiest(loads: list[list[float]]) -> float:
    """Load of the busiest expert of any layer, 1 where all are even; loads are shares that sum to 1 in each layer."""
    shares = np.asarray(loads)
    return float(shares.max() * shares.shape[1])
