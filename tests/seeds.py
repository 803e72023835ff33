"""The base seed of a run: fresh every time, fixed by the environment to repeat a failure."""

import os
import zlib

import numpy as np

VARIABLE = "JAX_LATENT_MOE_TEST_SEED"


def base_seed() -> int:
    """The run's seed; pytest prints it last."""
    return int(os.environ[VARIABLE])


def generator(*names) -> np.random.Generator:
    """A separate generator for each test: it depends only on the base seed and on names."""
    return np.random.default_rng([base_seed(), *(zlib.crc32(str(name).encode()) for name in names)])
