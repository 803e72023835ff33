"""Several processes that train together over `jax.distributed`: joining them, leaving them, and agreeing on a stop."""

import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.train.errors import TrainError
from examples.train.ranges import check_processes

LOST_AFTER_SECONDS = 30
"""A process without a heartbeat for this long is lost, and its run ends."""


def join(coordinator: str, processes: int, process: int):
    """Joins the other processes. Without a coordinator it does nothing. Call it before JAX looks for devices.

    Args:
        coordinator: HOST:PORT of process 0, or "auto" to read it from SLURM, Kubernetes or Open MPI.
        processes: the number of processes. With "auto" the environment gives it.
        process: the index of this process. With "auto" the environment gives it.

    Raises:
        TrainError: the numbers do not fit, or the other processes cannot be reached.
    """
    check_processes(coordinator, processes, process)
    if not coordinator:
        return
    if jax.distributed.is_initialized():
        return
    named = {} if coordinator == "auto" else {
        "coordinator_address": coordinator, "num_processes": processes, "process_id": process
    }  # fmt: skip
    try:
        jax.distributed.initialize(
            **named, heartbeat_timeout_seconds=LOST_AFTER_SECONDS, shutdown_timeout_seconds=LOST_AFTER_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise TrainError(
            f"--coordinator {coordinator}: the other processes cannot be reached ({first_line(error)}): check the "
            "address, and start all processes at the same time."
        ) from error


def several_processes() -> bool:
    """Whether this process has joined other processes."""
    return jax.distributed.is_initialized()


def leave(message: str) -> NoReturn:
    """Ends this process with a message. If there are several processes, it does not wait for the others."""
    if not several_processes():
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters of it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def is_first_process() -> bool:
    """Whether this process prints, and writes the metrics and plots."""
    return jax.process_index() == 0


def any_process(here: bool) -> bool:
    """Whether the flag is set in any process. Every process must call it."""
    if jax.process_count() == 1:
        return here
    return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))
