"""The set-up scripts on faked machines: which packages they install, and with which sentence they fail."""

import pytest

from tests.engineering import sandbox as sandboxes
from tests.engineering.sandbox import PYTHON_312, UV, Sandbox


@pytest.fixture
def sandbox(tmp_path) -> Sandbox:
    return sandboxes.make(tmp_path)


@pytest.fixture
def ready(sandbox) -> Sandbox:
    """A machine with uv and Python 3.12."""
    sandbox.command("uv", UV)
    sandbox.command("python3.12", PYTHON_312)
    sandbox.command("uname", "case $1 in -s) echo Linux ;; *) echo x86_64 ;; esac")
    return sandbox


def refusal(result) -> str:
    """The sentence with which a failed script ends."""
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith(".")
    return last


@pytest.mark.parametrize(
    ("smi", "device"),
    [
        ("echo '580.65.06, 9.0'", "cuda13"),
        ("echo '595.10, 12.0'; echo '595.10, 9.0'", "cuda13"),
        ("echo '580.65.06, 7.0'", "cuda12"),  # Volta: dropped by CUDA 13
        ("echo '579.99, 9.0'", "cuda12"),
        ("echo '525.60.13, 8.0'", "cuda12"),
        ("echo '524.99, 8.0'", "cpu"),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", "cpu"),
        (None, "cpu"),
    ],
)
def test_the_driver_picks_the_extra(ready, smi, device):
    if smi is not None:
        ready.command("nvidia-smi", smi)
    assert ready.run("setup.sh").returncode == 0
    (install,) = ready.installs()
    assert install.startswith("sync --locked --python ")
    assert f"--extra {device} --extra flax --extra train" in install


def test_the_environment_variable_overrules_the_driver(ready):
    ready.command("nvidia-smi", "echo '580.65.06, 9.0'")
    assert ready.run("device.sh", LATENT_MOE_DEVICE="cpu").stdout == "cpu\n"
    assert "LATENT_MOE_DEVICE='tpu' is unknown: use cpu, cuda12 or cuda13" in refusal(
        ready.run("setup.sh", LATENT_MOE_DEVICE="tpu")
    )


def test_a_mac_gets_the_cpu_and_an_unserved_machine_a_sentence(ready):
    ready.command("nvidia-smi", "echo '580.65.06, 9.0'")
    ready.command("uname", "case $1 in -s) echo Darwin ;; *) echo arm64 ;; esac")
    assert ready.run("device.sh").stdout == "cpu\n"
    ready.command("uname", "case $1 in -s) echo Darwin ;; *) echo x86_64 ;; esac")
    assert "no wheels for Darwin on x86_64" in refusal(ready.run("setup.sh"))


def test_a_second_set_up_does_nothing_and_needs_nothing(ready):
    assert ready.run("setup.sh").returncode == 0
    for name in ("uv", "python3.12"):
        (ready.bin / name).unlink()
    again = ready.run("setup.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert len(ready.installs()) == 1


@pytest.mark.parametrize("change", ["uv.lock", "pyproject.toml", "device", "python"])
def test_what_the_environment_depends_on_makes_it_anew(ready, change):
    assert ready.run("setup.sh").returncode == 0
    env = {}
    if change == "device":
        env["LATENT_MOE_DEVICE"] = "cuda12"
    elif change == "python":
        (ready.root / ".venv/bin/python").unlink()
    else:
        with (ready.root / change).open("a") as file:
            file.write("\n")
    assert ready.run("setup.sh", **env).returncode == 0
    assert len(ready.installs()) == 2


def test_a_failed_install_is_tried_again(ready):
    ready.command("uv", UV.replace("sync)", "sync) exit 1 ;;\nnever)"))
    assert "uv could not install the packages" in refusal(ready.run("setup.sh"))
    ready.command("uv", UV)
    assert ready.run("setup.sh").returncode == 0


def test_a_shim_that_fails_is_passed_over(ready, tmp_path):
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "uv").write_text("#!/bin/bash\necho 'pyenv: uv: command not found' >&2\nexit 127\n")
    (shims / "uv").chmod(0o755)
    assert ready.run("uv.sh", PATH=f"{shims}:{ready.bin}").stdout == f"{ready.bin}/uv\n"


def test_a_python_that_the_user_names_is_taken(ready):
    ready.command("uv", UV)
    assert ready.run("setup.sh", UV_PYTHON="3.14").returncode == 0
    calls = (ready.root / "calls").read_text()
    assert "python find --system --no-project 3.14\n" in calls


def test_an_old_uv_is_passed_over(sandbox):
    sandbox.command("uv", 'echo "uv 0.4.30"')
    assert "neither uv nor python3" in refusal(sandbox.run("uv.sh"))


def test_no_uv_and_no_python(sandbox):
    assert refusal(sandbox.run("uv.sh")) == (
        "error: neither uv nor python3 (3.8 or newer) works here: install one of them and run make again."
    )


def test_no_uv_and_a_python_without_venv_and_pip(sandbox):
    python = sandbox.command("python3", 'case "$*" in *version_info*) exit 0 ;; *) exit 1 ;; esac')
    message = refusal(sandbox.run("uv.sh"))
    assert f"{python} has neither venv nor pip" in message
    assert "python3-venv" in message


def test_no_uv_and_no_network(sandbox):
    sandbox.command(
        "python3", 'case "$*" in *version_info*|*ensurepip*) exit 0 ;; *) echo no route to host; exit 1 ;; esac'
    )
    assert "could not be fetched from PyPI" in refusal(sandbox.run("uv.sh"))
    assert "no route to host" in (sandbox.root / ".tools/uv.log").read_text()


def test_no_fitting_python_and_no_network(ready):
    ready.command("uv", 'case "$1" in --version) echo uv 0.13.9 ;; *) echo no route to host >&2; exit 2 ;; esac')
    assert refusal(ready.run("setup.sh")).startswith(
        "error: no Python 3.12, 3.13 or 3.14 was found and uv could not download one"
    )
    assert "no route to host" in (ready.root / ".tools/python.log").read_text()
