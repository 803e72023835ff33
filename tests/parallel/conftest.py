"""Programs over eight devices are large and each is for one test alone: they are dropped after it."""

import jax
import pytest

from tests import layers


@pytest.fixture(autouse=True)
def no_program_stays():
    yield
    layers.compiled.cache_clear()
    jax.clear_caches()
