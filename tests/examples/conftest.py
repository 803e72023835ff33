"""The trainer's programs are compiled without XLA's costly optimisations: most of a short run is compilation."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
    """In this process what `runs.cpu_alone` says to others: they are compared to the bit."""
