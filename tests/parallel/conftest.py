"""Programs over eight devices are large, and each serves one test: they are compiled fast and then dropped.

Without XLA's costly optimisations compilation takes half as long, and the collectives stay the same.
"""

import jax
import pytest

from tests import layers


@pytest.fixture(autouse=True)
def no_program_stays():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    layers.compiled.cache_clear()
    jax.clear_caches()
