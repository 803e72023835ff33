"""The layer over several real processes, by gloo."""

import itertools
import math
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.parallel.meshes import SIZES, WHOLE_MATRIX

ROOT = pathlib.Path(__file__).parents[2]
DRAWN = 2


def cells(rng, processes: int) -> list:
    """Every mesh over the processes with each strategy and norm, or some that are drawn."""
    sizes = [sizes for sizes in SIZES if math.prod(sizes) == processes]
    whole = list(itertools.product(sizes, ("all_gather", "all_to_all"), ("none", "pre", "post")))
    return whole if WHOLE_MATRIX else [whole[i] for i in sorted(rng.choice(len(whole), DRAWN, replace=False))]


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_gets_what_one_alone_would(rng, processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared, seed = [sys.executable, "-m", "tests.parallel.worker", address, processes], rng.integers(2**30)
    own = [str(seed), str(cells(rng, processes))]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([*map(str, [*shared, i]), *own], cwd=ROOT, env=environment, **pipes) for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=3600 if WHOLE_MATRIX else 400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for i, output in enumerate(outputs):
        assert f"process {i} of {processes} agrees" in output, output
