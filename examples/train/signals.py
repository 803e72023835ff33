"""SIGINT and SIGTERM as a request to stop after the current step."""

import signal
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context that stores the name of the first SIGINT or SIGTERM in `name`. A second signal has its usual effect."""

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
