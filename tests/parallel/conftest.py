"""Programs over eight devices are large and each is for one test alone: compiled in a hurry, and dropped after it.

Without XLA's costly optimisations compilation takes half as long, and collectives are what they are.
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
