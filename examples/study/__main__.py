"""Entry point of `python -m examples.study`."""

import os

# By default JAX reserves three quarters of a GPU's memory. A large model needs more.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

from jax_latent_moe.errors import needs_extra
from jax_latent_moe.piped import piped

with needs_extra("train"):
    from examples.study.cli import main

with piped():
    main()
