"""Bazel uses the versions that uv locks."""

import re
import tomllib

from tests.engineering.sandbox import ROOT


def pins() -> dict[str, str]:
    lines = (ROOT / "tests/requirements-bazel.txt").read_text().splitlines()
    return dict(line.split(" ;")[0].split("==") for line in lines if not line.startswith("#"))


def test_the_pins_are_those_of_the_lock():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {(package["name"], package.get("version")) for package in packages}
    stale = {f"{name}=={version}" for name, version in pins().items()} - {f"{name}=={v}" for name, v in locked}
    assert not stale, "run the command at the top of tests/requirements-bazel.txt"


def test_the_headers_are_those_of_the_other_builds():
    module = (ROOT / "MODULE.bazel").read_text()
    for line in (ROOT / "custom_calls/headers.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert f"/{name.replace('-', '_')}-{version}-" in module, f"MODULE.bazel has another {name}"


def test_every_package_that_a_target_needs_is_pinned():
    names = {name.replace("-", "_") for name in pins()}
    for build in ROOT.glob("*/BUILD.bazel"):
        needed = set(re.findall(r'"@pypi//(\w+)"', build.read_text()))
        assert needed <= names, build
