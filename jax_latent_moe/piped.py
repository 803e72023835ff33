"""Ends a command without a traceback if what reads its output, such as `head`, has ended."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator

STATUS = 128 + 13
"""The exit status then: 128 plus the number of SIGPIPE, as of a program that the signal ends."""


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Around a whole command: if its reader has ended, the command ends with `STATUS`, and nothing is printed.

    Raises:
        BrokenPipeError: another pipe or socket is broken.
        SystemExit: the reader has ended.
    """
    try:
        try:
            yield
        except SystemExit:  # after --help, for example
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        unread = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _is_unread(stream.fileno())]
        if not unread:
            raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in unread:  # Python writes what is left when it ends
            os.dup2(nothing, descriptor)
        sys.exit(STATUS)


def _is_unread(descriptor: int) -> bool:
    """Whether a descriptor is a pipe that has no reader any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
