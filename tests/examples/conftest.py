"""The trainer's programs are compiled without XLA's costly optimisations: most of a short run is compilation."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """In this process what `runs.cpu_alone` says to others: they are compared to the bit."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
