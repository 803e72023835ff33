"""Settings of every test: fresh seeds, printed; hypothesis from the same seed; eight virtual CPU devices."""

import gc
import os
import pathlib
import secrets

import hypothesis
import jax
import numpy as np
import pytest

from jax_latent_moe import native
from tests import kernels, seeds

hypothesis.settings.register_profile("tests", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    jax.config.update("jax_num_cpu_devices", 8)  # for tests/parallel; the others use the first
    os.environ.setdefault(seeds.VARIABLE, str(secrets.randbelow(2**31)))  # workers of xdist inherit it
    os.environ["JAX_LATENT_MOE_TUNING"] = os.path.join(os.sep, "nonexistent", "tuning")  # the user's own tiles
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = os.environ[seeds.VARIABLE]


def pytest_collection_finish():
    """Searches for garbage less often, and never among imported modules: a search of a whole heap takes 0.5 s."""
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Neighbours, which share fixtures and compiled functions, stay on one worker, unless --dist says otherwise."""
    if config.option.dist == "load":  # what -n alone means
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"random inputs: repeat with {seeds.VARIABLE}={seeds.base_seed()}")


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Drops compiled programs before a worker runs out of memory maps, where LLVM fails and the process ends.

    A Linux process has 65530 of them by default (vm.max_map_count). A program takes several, and an interpreted kernel
    takes hundreds.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def drops_programs():
    """Drops a module's programs after it: jit would reuse those without optimisations where tests compare bits."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation(drops_programs):
    """Compiles without XLA's costly optimisations, for tests that compile much and compute little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def library_at(monkeypatch):
    """Has the compiled kernels looked for elsewhere."""

    def look(path: pathlib.Path):
        monkeypatch.setenv(native.VARIABLE, str(path))
        native.library.cache_clear()

    yield look
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.fixture
def install_library(monkeypatch):
    """Has the package find a library written by hand, a whole one until another is given: `install_library(other)`."""

    def install(found: native.Library):
        monkeypatch.setattr(native, "library", lambda: found)

    install(kernels.WHOLE)
    return install


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers that depend on the run's seed and on the test."""
    return seeds.generator(request.node.nodeid)


@pytest.fixture
def compiled_in_a_hurry(drops_programs):
    """Programs for a single test compile in half the time without XLA's costly optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
