"""The launch recipes: their options parse, their meshes fit the requested devices, and SLURM's settings are used."""

import math
import os
import re
import shlex
import subprocess
import sys

import pytest

from examples.train import cli
from examples.train.mlp import moe_config
from jax_latent_moe.parallel import mesh_sizes
from tests.examples.runs import ROOT, cpu_alone

LAUNCH = ROOT / "examples" / "launch"
DEVICES = 16
"""Two hosts of eight GPUs, in every recipe."""


def command_line(path) -> list[str]:
    """The options that a recipe gives the trainer, with a number for each variable of the shell."""
    text = re.sub(r"\\\n|\n +(?=--)", " ", path.read_text())
    line = re.search(r"-m examples\.train (.*)", text)[1]
    return shlex.split(re.sub(r'"\$@"|"\$\{?\w+(:-[^}]*)?\}?"', lambda found: "" if "@" in found[0] else "1", line))


@pytest.mark.parametrize("recipe", ["README.md", "slurm.sh", "jobset.yaml"])
def test_a_recipe_is_a_run_that_fits(monkeypatch, recipe):
    joined = []
    monkeypatch.setattr(cli, "join", lambda *named: joined.append(named))
    config = cli.parse(command_line(LAUNCH / recipe))
    assert joined[0][0] == config.coordinator != ""
    sizes = mesh_sizes(config.mesh)
    assert math.prod(sizes.values()) == DEVICES
    assert config.batch_size % DEVICES == 0
    layer = moe_config(config)
    assert layer.num_experts % sizes["expert"] == 0
    assert layer.hidden_size % sizes["fsdp"] == layer.latent_size % sizes["fsdp"] == 0


def test_slurm_says_who_is_who():
    """Two processes with the variables that srun sets find each other."""
    program = (
        "import jax; from examples.train.processes import join; join('auto', 1, 0); "
        "print('process', jax.process_index(), 'of', jax.process_count())"
    )
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=cpu_alone() | slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            **pipes,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for i, output in enumerate(outputs):
        assert f"process {i} of 2" in output, output
