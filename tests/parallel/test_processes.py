"""The layer over several real processes, by gloo."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_gets_what_one_alone_would(rng, processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.parallel.worker", address, processes]
    seed, environment = rng.integers(2**30), {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([*map(str, [*command, i, seed])], cwd=ROOT, env=environment, **pipes) for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for i, output in enumerate(outputs):
        assert f"process {i} of {processes} agrees" in output, output
