"""A trace of some steps, for TensorBoard, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from examples.train.processes import is_first_process


class Profile:
    """Traces the steps from first to last into a folder; the device has nothing to do as the trace begins and ends."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._first, self._last = steps or (0, 0)
        self._folder, self._running = folder, False

    def begin(self, step: int, before: Any):
        """Before a step is started; `before` is what the last one gives."""
        if step == self._first and is_first_process():
            jax.block_until_ready(before)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def end(self, step: int, result: Any):
        """After a step was started."""
        if self._running and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self):
        """Writes the trace, also of fewer steps."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
