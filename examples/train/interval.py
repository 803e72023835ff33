"""Gathers the metrics of the steps between two records, and measures their speed without compilation."""

import contextlib
import math
import time
from typing import Any

import jax
import numpy as np

from examples.train.config import Config
from examples.train.flops import flops_per_token, peak_flops
from examples.train.model import LanguageModel
from examples.train.step import Metrics

IN_FLIGHT = 4
"""Number of steps that wait on the device behind the current one. It never idles, and a signal waits for few steps."""


class Interval:
    """The steps since the last record. The device does not wait for the host between two records.

    No time includes compilation: the first step of a process compiles, and so does the first pause of each kind.

    Args:
        config: the options of the run.
        model: the network.
        devices: the number of devices of the mesh.
        bytes_per_token: the mean length of a token.
        seconds: the training time before this process.
    """

    def __init__(
        self, config: Config, model: LanguageModel, devices: int, bytes_per_token: float, seconds: float = 0.0
    ):
        self._tokens, self._total = config.batch_size * config.model.context, config.steps
        self._bytes_per_token = bytes_per_token
        peak = peak_flops(jax.local_devices()[0])
        self._mfu_of_one = flops_per_token(model) / (peak * devices) if peak else None  # at one token a second
        self._steps: list[Metrics] = []
        self._seconds_before = seconds
        self._begun: float | None = None  # when the first step ended, later by the time of pauses that compile
        self._started = 0.0  # when this interval began
        self._timed = self._timed_before = 0  # steps of this interval and of earlier ones, without the first step
        self._paused: set[str] = set()

    @contextlib.contextmanager
    def paused(self, kind: str):
        """Stops the clock behind tokens per second. No step runs meanwhile."""
        jax.block_until_ready(self._steps)
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self._started += spent
        if kind not in self._paused and self._begun is not None:
            self._begun += spent
        self._paused.add(kind)

    def add(self, metrics: Metrics):
        """Adds a step. Its numbers are copied to the host in the background."""
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        self._steps.append(metrics)
        if self._begun is None:
            jax.block_until_ready(metrics)
            self._begun = self._started = time.monotonic()
            return
        self._timed += 1
        jax.block_until_ready([metrics.loss for metrics in self._steps[-IN_FLIGHT - 1 : -IN_FLIGHT]])

    @property
    def seconds(self) -> float:
        """The training time of the run, with validations and checkpoints."""
        return self._seconds_before + (0.0 if self._begun is None else time.monotonic() - self._begun)

    def record(self, step: int, rate: float) -> dict[str, Any]:
        """The means over the steps, without bad ones if any step was good. The next interval then begins."""
        steps: list[Any] = jax.device_get(self._steps)
        good = [metrics for metrics in steps if not metrics.bad] or steps
        record = {
            "step": step,
            "seconds": self.seconds,
            "loss": float(np.mean([metrics.loss for metrics in good])),
            "auxiliary_loss": float(np.mean([metrics.auxiliary_loss for metrics in good])),
            "grad_norm": float(np.mean([metrics.grad_norm for metrics in good])),
            "bad_steps": int(sum(metrics.bad for metrics in steps)),
            "learning_rate": rate,
        }
        record["bits_per_byte"] = record["loss"] / math.log(2) / self._bytes_per_token
        record |= self._speed(step) | self._memory()
        if steps[0].loads is not None:
            loads = np.sum([metrics.loads for metrics in steps], axis=0)
            record["loads"] = np.round(loads / loads.sum(axis=1, keepdims=True), 5).tolist()
        self._steps = []
        return record

    def _speed(self, step: int) -> dict[str, float]:
        """Speed, MFU and time left. Empty if the interval holds only the step that compiled."""
        if not self._timed or self._begun is None:
            return {}
        now = time.monotonic()
        speed = self._tokens * self._timed / (now - self._started)
        self._timed_before += self._timed
        left = (now - self._begun) / self._timed_before * (self._total - step)
        self._timed, self._started = 0, now
        found = {"tokens_per_second": speed, "seconds_left": left}
        return found if self._mfu_of_one is None else found | {"mfu": speed * self._mfu_of_one}

    def _memory(self) -> dict[str, int]:
        """The peak memory in use, if the device reports it."""
        used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return {} if used is None else {"memory_bytes": used}
