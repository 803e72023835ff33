"""The Makefile's targets and the CI script run the right commands."""

import os
import shutil
import subprocess

import pytest

from tests.engineering.sandbox import ROOT


def make(*arguments: str) -> str:
    program = shutil.which("make")
    assert program
    # Under `make test`, an inner make would inherit the outer one's flags and print the folder that it enters.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        [program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("train", "-m examples.train"),
        ("test", "JAX_PLATFORMS=cpu .venv/bin/python -m pytest -n auto"),
        ("test-gpu", "tests/gpu tests/conformance tests/test_layer.py"),
        ("plan", "-m jax_latent_moe.plan"),
        ("bench", "-m benchmarks"),
        ("lint", "-m pyright"),
        ("docs", "-m sphinx -W"),
    ],
)
def test_a_target_sets_up_and_then_runs(target, command):
    lines = make("-n", target).splitlines()
    assert lines[0] == "scripts/setup.sh"
    assert any(command in line for line in lines[1:])


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = [line for line in makefile.splitlines() if line.startswith(".PHONY:")]
    listed = make("help")
    assert {line.split()[1] for line in listed.splitlines()} == set(phony.split()[1:])


def test_ci_runs_the_suite_by_make():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "make lint" in lines
    assert any(line.startswith("make test") for line in lines)


def test_the_forges_workflows_run_the_same_scripts():
    workflows = ROOT / ".github/workflows"
    assert "run: .ci/run" in (workflows / "ci.yml").read_text()
    assert "scripts/wheels.sh\n" in (workflows / "release.yml").read_text()
    assert os.access(ROOT / "scripts/wheels.sh", os.X_OK)
