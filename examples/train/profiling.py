"""Traces some steps for TensorBoard, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from examples.train.processes import is_first_process


class Profile:
    """Traces the steps from first to last into a folder. The device is idle when the trace begins and ends."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._first, self._last = steps or (0, 0)
        self._folder, self._running = folder, False

    def begin(self, step: int, before: Any):
        """Call it before a step. `before` is the result of the step before it."""
        if step == self._first and is_first_process():
            jax.block_until_ready(before)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def end(self, step: int, result: Any):
        """Call it after a step was started. `result` is its result."""
        if self._running and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self):
        """Writes the trace, even if the run ended before the last step to trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
