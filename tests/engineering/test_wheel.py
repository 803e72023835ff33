"""Finding nvcc, and the hooks of both wheels (scripts/wheels.sh builds and checks them)."""

import importlib
import platform
import re
import sys
import types

import pytest

from jax_latent_moe import native
from tests.engineering.sandbox import ROOT

LINUX = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="kernels are built only on Linux on x86_64"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without nvcc, until `machine(folder, version)` adds one."""

    def install(folder, version):
        path = tmp_path / folder / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return install


@pytest.fixture
def nvcc(monkeypatch):
    return module("nvcc", monkeypatch)


@pytest.fixture
def hatchling(monkeypatch):
    """Hatchling's two classes of hooks, which exist only in the environment of a build."""
    for name, hook in (("metadata", "MetadataHookInterface"), ("builders.hooks", "BuildHookInterface")):
        fake = types.ModuleType(f"hatchling.{name}.plugin.interface")
        setattr(fake, hook, object)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)


def module(name, monkeypatch, folder="custom_calls"):
    monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return loaded


@LINUX
def test_named_compilers_go_before_the_path_and_old_ones_are_passed_over(machine, nvcc, tmp_path, monkeypatch):
    on_path = machine("bin", "12.4")
    assert nvcc.find() == str(on_path)
    at_home = machine("cuda/bin", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert nvcc.find() == str(at_home)
    named, old = machine("named", "12.10"), machine("old", "12.3")
    monkeypatch.setenv("CUDACXX", str(named))
    assert nvcc.find() == str(named)
    monkeypatch.setenv("CUDACXX", str(old))
    assert nvcc.find() == str(at_home)
    monkeypatch.delenv("CUDA_HOME")
    on_path.unlink()
    with pytest.raises(nvcc.NotFoundError, match=r"old/nvcc is not an nvcc of version 12\.4 or newer"):
        nvcc.find()


def test_the_kernels_need_the_release_that_they_were_compiled_for(hatchling, monkeypatch):
    metadata = {"version": "1.2.3"}
    module("hatch_build", monkeypatch).Dependencies().update(metadata)
    assert metadata["dependencies"] == ["jax-latent-moe==1.2.3"]


def test_the_wheel_of_kernels_compiles_nothing(hatchling, monkeypatch):
    build, data = module("hatch_build", monkeypatch).Library(), {}
    with pytest.raises(SystemExit, match=r"made of a compiled library: run scripts/wheels\.sh"):
        build.initialize("standard", data)
    monkeypatch.setenv("LATENT_MOE_CUDA_LIBRARY", "some/library.so")
    monkeypatch.setenv("LATENT_MOE_CUTLASS_LICENSE", "some/licence")
    build.initialize("standard", data)
    assert data["force_include"]["some/library.so"] == f"{native.WHEEL}/{native.FILE}"
    assert data["tag"] == "py3-none-linux_x86_64"
    assert not data["pure_python"]


@pytest.mark.parametrize("published", [False, True])
def test_a_published_readme_leads_to_its_repository(hatchling, monkeypatch, published):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    if published:
        monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    metadata = {"version": "1.2.3"}
    module("hatch_build", monkeypatch, ".").Published().update(metadata)
    text = metadata["readme"]["text"]
    relative = re.findall(r"\]\((?!https?://)([^)]+)\)", text)
    assert bool(relative) != published, relative
    if published:
        assert "](https://github.com/owner/name/raw/v1.2.3/docs/figures/" in text
        assert "](https://github.com/owner/name/blob/v1.2.3/docs/backends.md)" in text
        assert metadata["urls"]["Changelog"] == "https://github.com/owner/name/blob/v1.2.3/CHANGELOG.md"
    else:
        assert "urls" not in metadata
