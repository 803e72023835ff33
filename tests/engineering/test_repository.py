"""Rules over the whole tree: versions agree, imports go one way, and no path of one machine is in a file."""

import ast
import graphlib
import pathlib
import re
import statistics
import subprocess
import sys
import tomllib

import pytest

from tests.engineering.sandbox import ROOT

PACKAGE = ROOT / "jax_latent_moe"
# A module may import from the lines above its own, and from its own folder.
ORDER = (
    ("varying",),
    ("device", "dtypes", "errors", "native", "piped", "shards"),
    ("checks",),
    ("activations", "arrays", "derivatives", "formats"),
    ("low_rank",),
    ("grouped_matmul", "precision", "router_config"),
    ("config", "expert_biases", "lax"),
    ("decode", "row_encoders"),
    ("expert_plan", "params", "presets", "routing"),
    ("adapted_experts", "projections"),
    ("cost", "experts", "lora", "quantization"),
    ("hf", "inputs", "limits", "parallel", "shared_expert"),
    ("codes", "one_token"),
    ("layer", "plan"),
    ("training",),
    ("linen", "nnx", "qwix"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
ONLY_IN = {"flax": {"linen", "nnx"}, "qwix": {"qwix"}, "ctypes": {"native"}, "safetensors": set()}


def modules() -> dict[str, pathlib.Path]:
    """The path of each module, by its name within the package ("grouped_matmul/xla")."""
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: pathlib.Path) -> set[str]:
    """Every module that the file imports, anywhere in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_folder(module: str) -> str:
    return module.split("/")[0]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("module", [name for name in modules() if name != "__init__"])
def test_imports_go_one_way(module):
    assert top_folder(module) in RANK, f"give {top_folder(module)} a place in ORDER"
    for name in imported(modules()[module]):
        if not name.startswith("jax_latent_moe."):
            continue
        other = name.split(".")[1]
        assert other in RANK, f"{module} imports {name}: name the module it comes from"
        inside = top_folder(module) == other and other in (
            "formats",
            "grouped_matmul",
            "hf",
            "parallel",
            "plan",
            "routing",
        )
        assert inside or RANK[other] < RANK[top_folder(module)], f"{module} imports {name}, which is not below it"


def test_no_import_runs_in_a_circle():
    """Not within a folder either, whose modules may import each other; a folder's own names come from its modules."""
    names = {
        f"jax_latent_moe.{name}".replace("/", ".").removesuffix(".__init__"): path for name, path in modules().items()
    }
    graph = {}
    for name, path in names.items():
        found = (other if other in names else other.rpartition(".")[0] for other in imported(path))
        graph[name] = {other for other in found if other in names and other not in (name, "jax_latent_moe")}
    order = tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle
    assert order.index("jax_latent_moe.errors") < order.index("jax_latent_moe.layer")


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_an_optional_package_is_imported_in_its_own_modules_alone(package):
    users = {name for name, path in modules().items() for line in imported(path) if line.split(".")[0] == package}
    assert users <= ONLY_IN[package]


def test_importing_the_library_imports_no_optional_package():
    code = "import sys, jax_latent_moe; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "jax_latent_moe" in loaded
    assert not loaded & {
        "flax",
        "optax",
        "orbax",
        "tokenizers",
        "tyro",
        "rich",
        "tensorboardX",
        "matplotlib",
        "safetensors",
    }


def test_a_missing_package_names_the_extra_that_has_it():
    code = """
import importlib, sys
sys.modules["flax"] = sys.modules["qwix"] = None
for module in ("jax_latent_moe.linen", "jax_latent_moe.nnx", "examples.train.__main__", "jax_latent_moe.qwix"):
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    message = "this needs {}, which is not installed: pip install 'jax-latent-moe[{}]'."
    wanted = (("flax", "flax"), ("flax", "flax"), ("flax", "train"), ("qwix", "qwix"))
    assert run.stdout.splitlines() == [message.format(*names) for names in wanted]


def test_the_version_is_written_once():
    """In jax_latent_moe/__init__.py, which both wheels read."""
    import jax_latent_moe

    assert "version" in project()["dynamic"]
    for name, path in (("pyproject.toml", "jax_latent_moe"), ("custom_calls/pyproject.toml", "../jax_latent_moe")):
        found = tomllib.loads((ROOT / name).read_text())
        assert "version" not in found["project"]
        assert found["tool"]["hatch"]["version"]["path"] == f"{path}/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", jax_latent_moe.__version__)
    assert f"## [Unreleased] ({jax_latent_moe.__version__})" in (ROOT / "CHANGELOG.md").read_text() or (
        f"## [{jax_latent_moe.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_the_oldest_packages_are_the_lower_bounds():
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "tests/requirements-oldest.txt").read_text(), re.M))
    extras = project()["optional-dependencies"]
    for requirement in (*project()["dependencies"], *extras["flax"]):
        name, bound = requirement.split(">=")
        pinned = oldest[name]
        assert pinned == bound or pinned.startswith(f"{bound}."), f"{name}: {pinned} is tested, {bound} is promised"


def tracked() -> list[pathlib.Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive has no list of tracked files")
def test_no_path_of_one_machine():
    personal = re.compile(rb"(?<![\w.~}>])/(?:work|root|home|Users|tmp)/[\w.]+")
    found = [
        f"{path.relative_to(ROOT)}: {match.decode()}"
        for path in tracked()
        if path.is_file()
        for match in personal.findall(path.read_bytes())
    ]
    assert not found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive has no list of tracked files")
def test_files_are_short():
    """A reader takes in a file at once: the median is at most 150 lines, and only kernels have more than 450."""
    code = [path for path in tracked() if path.suffix in {".py", ".cc", ".cu", ".h", ".cuh"} and path.is_file()]
    lines = {path: path.read_text().count("\n") for path in code}
    for folder in ("jax_latent_moe", "custom_calls", "examples", "benchmarks", "tests"):
        assert statistics.median(n for path, n in lines.items() if path.is_relative_to(ROOT / folder)) <= 150, folder
    long = {path.relative_to(ROOT).as_posix() for path, n in lines.items() if n > 450}
    assert long <= {"custom_calls/src/sm90/grouped_kernel.cuh"}
