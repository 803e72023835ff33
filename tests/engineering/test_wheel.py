"""Finding nvcc, and the conditions for a wheel with kernels (scripts/test-wheel.sh builds such wheels)."""

import importlib
import platform
import re
import sys
import types

import pytest

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
def backend(machine, monkeypatch):
    """The build backend over fake builders, which return their name and settings."""
    for name in ("hatchling", "scikit_build_core"):
        build = types.ModuleType(f"{name}.build")
        for hook in ("build_sdist", "build_editable"):
            setattr(build, hook, lambda *_: None)
        for kind in ("editable", "sdist"):
            setattr(build, f"get_requires_for_build_{kind}", None)
        build.get_requires_for_build_wheel = lambda settings: []
        build.build_wheel = lambda folder, settings, metadata, name=name: (name, settings)
        package = types.ModuleType(name)
        package.build = build
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, f"{name}.build", build)
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
    assert backend.get_requires_for_build_wheel() == []
    assert backend.build_wheel("folder")[0] == "hatchling"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Without CUDA kernels: there is no nvcc (version 12.4 or newer)")


@LINUX
def test_with_a_compiler_the_wheel_has_kernels(backend, machine, capsys):
    path = machine("bin", "13.0")
    requires = {re.split("[=>]", line)[0] for line in backend.get_requires_for_build_wheel()}
    assert requires == {"scikit-build-core", "cmake", "ninja", "nvidia-cutlass", "jaxlib"}
    builder, settings = backend.build_wheel("folder", {"cmake.define.LATENT_MOE_FEW_KERNELS": "ON"})
    assert builder == "scikit_build_core"
    assert settings == {
        "cmake.define.CMAKE_CUDA_COMPILER": str(path),
        "cmake.define.LATENT_MOE_CUTLASS_INCLUDE": "cutlass_library/source/include",
        "cmake.define.LATENT_MOE_XLA_INCLUDE": "jaxlib/include",
        "cmake.define.LATENT_MOE_FEW_KERNELS": "ON",
    }
    assert f"Compiling CUDA kernels with {path}" in capsys.readouterr().out


def test_the_user_decides(backend, machine):
    with pytest.raises(SystemExit, match=r"wheel\.cmake=true asks for CUDA kernels, but "):
        backend.get_requires_for_build_wheel({"wheel.cmake": "true"})
    machine("bin", "13.0")
    assert backend.build_wheel("folder", {"wheel.cmake": "false"})[0] == "hatchling"
    with pytest.raises(SystemExit, match=r"wheel\.cmake='perhaps' must be true or false"):
        backend.build_wheel("folder", {"wheel.cmake": "perhaps"})


def test_another_platform_gets_no_kernels(backend, machine, monkeypatch):
    machine("bin", "13.0")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert backend.build_wheel("folder")[0] == "hatchling"


def test_an_editable_install_compiles_nothing(backend):
    assert backend.build_editable is sys.modules["hatchling.build"].build_editable
