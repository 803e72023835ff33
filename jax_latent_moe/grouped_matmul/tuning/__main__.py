"""`python -m jax_latent_moe.grouped_matmul.tuning`."""

import sys

from jax_latent_moe.grouped_matmul.tuning.tune import main

if __name__ == "__main__":
    sys.exit(main())
