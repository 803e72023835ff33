"""`make bench`: the benchmarks of this machine's platform."""

import jax

from benchmarks import cpu
from jax_latent_moe.piped import piped

if __name__ == "__main__":
    with piped():
        if jax.default_backend() != "cpu":
            raise SystemExit("make bench measures the CPU; for a GPU, run a module, such as python -m benchmarks.gpu")
        cpu.main()
