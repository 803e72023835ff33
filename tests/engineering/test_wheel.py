"""Which nvcc is found, and when a wheel is built with kernels (scripts/test-wheel.sh builds such wheels)."""

import importlib
import platform
import sys
import tomllib
import types

import pytest

from tests.engineering.sandbox import ROOT

LINUX = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="kernels are built on Linux on x86_64 alone"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that has no nvcc until `machine(folder, version)` puts one there."""

    def install(folder, version):
        path = tmp_path / folder / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDACXX", "CUDA_HOME", "SKBUILD_WHEEL_CMAKE"):
        monkeypatch.delenv(name, raising=False)
    return install


@pytest.fixture
def nvcc(monkeypatch):
    return module("nvcc", monkeypatch)


@pytest.fixture
def backend(machine, monkeypatch):
    """The build backend over a scikit-build-core that answers with the settings it was given."""
    stub = types.ModuleType("scikit_build_core.build")
    for name in ("build_sdist", "build_editable", "prepare_metadata_for_build_editable"):
        setattr(stub, name, lambda *_: None)
    for kind in ("editable", "sdist"):
        setattr(stub, f"get_requires_for_build_{kind}", lambda *_: [])
    stub.get_requires_for_build_wheel = lambda settings: [f"cmake={settings['wheel.cmake']}"]
    stub.build_wheel = lambda folder, settings, metadata: settings
    stub.prepare_metadata_for_build_wheel = lambda folder, settings: settings
    package = types.ModuleType("scikit_build_core")
    package.build = stub
    monkeypatch.setitem(sys.modules, "scikit_build_core", package)
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", stub)
    monkeypatch.setitem(sys.modules, "nvcc", module("nvcc", monkeypatch))
    backend = module("build_backend", monkeypatch)
    monkeypatch.setattr(backend, "_folder", lambda name, path: f"{name}/{path}")
    return backend


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "custom_calls"))
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


@LINUX
def test_without_a_compiler_the_wheel_is_pure_and_says_so(backend, capsys):
    assert backend.get_requires_for_build_wheel() == ["cmake=false"]
    assert backend.build_wheel("folder") == {"wheel.cmake": "false"}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Without CUDA kernels: there is no nvcc (version 12.4 or newer)")


@LINUX
def test_with_a_compiler_the_wheel_has_kernels(backend, machine, capsys):
    path = machine("bin", "13.0")
    cmake, *headers = backend.get_requires_for_build_wheel()
    assert cmake == "cmake=true"
    assert [line.split("==")[0] for line in headers] == ["nvidia-cutlass", "jaxlib"]
    settings = backend.build_wheel("folder", {"cmake.define.LATENT_MOE_FEW_KERNELS": "ON"})
    assert settings == {
        "wheel.cmake": "true",
        "cmake.define.CMAKE_CUDA_COMPILER": str(path),
        "cmake.define.LATENT_MOE_CUTLASS_INCLUDE": "cutlass_library/source/include",
        "cmake.define.LATENT_MOE_XLA_INCLUDE": "jaxlib/include",
        "cmake.define.LATENT_MOE_FEW_KERNELS": "ON",
    }
    assert f"Compiling CUDA kernels with {path}" in capsys.readouterr().out
    assert backend.prepare_metadata_for_build_wheel("folder")["wheel.cmake"] == "true"


def test_the_user_decides(backend, machine, monkeypatch):
    with pytest.raises(SystemExit, match=r"wheel\.cmake=true asks for CUDA kernels, but "):
        backend.get_requires_for_build_wheel({"wheel.cmake": "true"})
    machine("bin", "13.0")
    assert backend.build_wheel("folder", {"wheel.cmake": "false"}) == {"wheel.cmake": "false"}
    monkeypatch.setenv("SKBUILD_WHEEL_CMAKE", "false")
    assert backend.build_wheel("folder") == {"wheel.cmake": "false"}
    monkeypatch.setenv("SKBUILD_WHEEL_CMAKE", "perhaps")
    with pytest.raises(SystemExit, match=r"wheel\.cmake='perhaps' must be true or false"):
        backend.build_wheel("folder")


def test_another_platform_gets_no_kernels(backend, machine, monkeypatch):
    machine("bin", "13.0")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert backend.build_wheel("folder") == {"wheel.cmake": "false"}


def test_an_editable_install_compiles_nothing():
    """The backend hands editable installs to scikit-build-core as they are, which reads this setting."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["cmake"] is False
