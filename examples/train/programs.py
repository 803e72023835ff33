"""Compiled programs of a run on GPUs, in its folder.

XLA times kernels while it compiles for a GPU, and takes the fastest. A program that is compiled again may use other
kernels and give other bits. A resumed run reads the programs of its first process, so it goes on with the same bits and
starts sooner.
"""

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "programs"
_chosen_here: set[str] = set()
"""The caches that this process has set. A process may train several runs, each with its own programs."""


def keep_programs(run: Path):
    """Keeps all programs that are compiled from now on, and reads those that are there.

    It does nothing on a CPU, whose programs do not depend on timings, or if the user has chosen a cache, such as with
    `JAX_COMPILATION_CACHE_DIR`.
    """
    before, cache = jax.config.jax_compilation_cache_dir, str(run / FOLDER)
    if jax.default_backend() != "gpu" or (before is not None and before not in _chosen_here):
        return
    _chosen_here.add(cache)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A program that was compiled before, such as for the sizes of the parameters, has settled that there is no cache.
    compilation_cache.reset_cache()
