"""The documentation is true: its code prints what is shown, its links work, and no public name is missing."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
from sphinx.util.inventory import InventoryFile

from tests.engineering.conftest import cpu_alone
from tests.engineering.sandbox import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
"""Pages whose code blocks run; the build executes the tutorials."""
LINKED = [
    *PAGES,
    *sorted(ROOT.glob("docs/tutorials/*.md")),
    *sorted(ROOT.glob("C*.md")),
    *sorted(ROOT.glob("benchmarks/results/**/*.md")),
]
PUBLIC = (
    "jax_latent_moe",
    "jax_latent_moe.cost",
    "jax_latent_moe.grouped_matmul",
    "jax_latent_moe.hf",
    "jax_latent_moe.linen",
    "jax_latent_moe.nnx",
    "jax_latent_moe.parallel",
    "jax_latent_moe.plan",
    "jax_latent_moe.presets",
)
END_OF_BLOCK = "=== end of block ==="


def public_names() -> list[tuple[str, str]]:
    """Every public (module, name): those in `__all__`, or else those defined in the module without an underscore."""
    found = []
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        own = (name for name, value in vars(module).items() if defined_in(module_name, name, value))
        names = getattr(module, "__all__", own)
        found += [(module_name, name) for name in names if not inspect.ismodule(getattr(module, name))]
    return found


def defined_in(module_name: str, name: str, value) -> bool:
    if name.startswith("_") or inspect.ismodule(value):
        return False
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__module__ == module_name
    return name.isupper()  # a constant


@pytest.fixture(scope="module")
def inventory(built_docs) -> set[str]:
    """The Python names in the built documentation."""
    loaded = InventoryFile.loads((built_docs / "objects.inv").read_bytes(), uri="")
    return {name for kind, names in loaded.data.items() if kind.startswith("py:") for name in names}


def test_every_public_name_is_in_the_reference(inventory):
    assert not {f"{module}.{name}" for module, name in public_names()} - inventory


@pytest.mark.parametrize(("module", "name"), public_names())
def test_a_public_name_has_a_docstring(module, name):
    value = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # a constant: without a docstring it would not be in the reference
    assert value.__doc__, "no docstring"
    assert not value.__doc__.startswith(f"{name}("), "the docstring is the one that dataclasses make"
    methods = vars(value).items() if inspect.isclass(value) else ()
    for method, function in methods:
        if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            assert function.__doc__, f"{method} has no docstring"


def python_blocks(page: str) -> list[tuple[str, str | None]]:
    """The code of each Python block, with the output in the text block right after it."""
    fenced = [*re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S), ("", "")]
    following = [text if kind == "text" else None for kind, text in fenced[1:]]
    return [(code, shown) for (kind, code), shown in zip(fenced[:-1], following, strict=True) if kind == "python"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page):
    blocks = python_blocks(page.read_text())
    if not blocks:
        pytest.skip("no Python on this page")
    script = f"\nprint({END_OF_BLOCK!r})\n".join(code for code, _ in blocks)
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=cpu_alone(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    outputs = run.stdout.split(f"{END_OF_BLOCK}\n")
    for output, (code, expected) in zip(outputs, blocks, strict=True):
        assert expected in (None, output), code


@pytest.mark.parametrize("block", [code for code, _ in python_blocks((ROOT / "README.md").read_text())])
def test_a_block_of_the_readme_runs_alone_from_any_folder(block, tmp_path):
    run = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=cpu_alone(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_the_tables_of_fields_are_those_of_the_dataclasses():
    spec = importlib.util.spec_from_file_location("config_tables", ROOT / "docs/config_tables.py")
    assert spec
    assert spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.PAGE.read_text() == tables.render(tables.PAGE.read_text()), "run docs/config_tables.py"


@pytest.mark.parametrize(
    ("page", "expected"), [("README.md", {"train", "test"}), ("CONTRIBUTING.md", {"test", "lint", "docs"})]
)
def test_a_page_names_targets_that_exist(page, expected):
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.M))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert expected <= named <= targets
