"""`python -m jax_latent_moe.grouped_matmul.tuning`."""

import sys

from jax_latent_moe.grouped_matmul.tuning.tune import main
from jax_latent_moe.piped import piped

if __name__ == "__main__":
    with piped():
        sys.exit(main())
