"""Several processes that train together over `jax.distributed`: how one joins, who speaks, what they agree on."""

import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.train.errors import TrainError
from examples.train.ranges import check_processes

LOST_AFTER_SECONDS = 30
"""A process that was silent for so long is given up, and with it the run."""


def join(coordinator: str, processes: int, process: int):
    """Joins the others; does nothing without a coordinator. Must come before anything asks JAX for its devices.

    Args:
        coordinator: HOST:PORT of process 0, or "auto" for what SLURM, Kubernetes or Open MPI say.
        processes: how many there are; "auto" finds out.
        process: which one this is.

    Raises:
        TrainError: the numbers do not fit, or the others cannot be reached.
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
        raise TrainError(f"--coordinator {coordinator}: the other processes cannot be reached ({error}).") from error


def several_processes() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def leave(message: str) -> NoReturn:
    """Ends this process with a message; among several, without waiting for the others at the door."""
    if not several_processes():
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def is_first_process() -> bool:
    """Whether this process writes metrics, plots and what a user reads."""
    return jax.process_index() == 0


def any_process(here: bool) -> bool:
    """Whether it holds in any process; every process must ask."""
    if jax.process_count() == 1:
        return here
    return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))
