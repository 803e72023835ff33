"""SIGINT and SIGTERM as a request to stop after the current step."""

import signal
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 128 + signal.SIGINT
"""The exit status after a Ctrl-C that was not noted, or the second one."""


class StopRequest:
    """A context that stores the name of the first SIGINT or SIGTERM in `name`. A second signal has its usual effect.

    It may be entered again within itself.
    """

    def __init__(self):
        self.name: str | None = None
        self._entered = 0
        self._previous = {}

    @property
    def status(self) -> int:
        """The exit status of a command that is stopped: 128 and the signal's number, as shells have it.

        The run is not complete, so it is not 0, on which queues do not start a job again. If another process got the
        signal, it is the status of SIGTERM.
        """
        return 128 + signal.Signals[self.name or "SIGTERM"]

    def __enter__(self) -> "StopRequest":
        if not self._entered:
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._entered += 1
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None):
        self._entered -= 1
        if not self._entered:
            self._restore()

    def _note(self, number, frame):
        del frame
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
