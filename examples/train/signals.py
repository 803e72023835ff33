"""SIGINT and SIGTERM as a request to stop after the step in hand."""

import signal
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, notes the first SIGINT or SIGTERM in `name`; a second one acts at once, as if not entered."""

    def __init__(self):
        self.name: str | None = None
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None):
        self._restore()

    def _note(self, number, frame):
        del frame
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
