"""The public names, and what importing them costs."""

import inspect
import json
import statistics
import subprocess
import sys

import jax_latent_moe

TIMED_IMPORT = """
import json, sys, time
import jax
start = time.perf_counter()
import jax_latent_moe
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_every_public_name_exists_and_is_documented():
    assert jax_latent_moe.__all__ == sorted(jax_latent_moe.__all__)
    for name in jax_latent_moe.__all__:
        value = getattr(jax_latent_moe, name)
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_import_is_quick_and_light():
    """Under a second over jax itself, with no library that only an extra brings."""
    runs = [subprocess.run([sys.executable, "-c", TIMED_IMPORT], capture_output=True, check=True) for _ in range(3)]
    results = [json.loads(run.stdout) for run in runs]
    assert statistics.median(seconds for seconds, _ in results) < 1.0
    heavy = {"flax", "optax", "orbax", "tokenizers", "tyro", "rich", "matplotlib", "safetensors", "beartype", "qwix"}
    assert not heavy & set(results[0][1])


def test_errors_are_value_errors():
    for name in ("ConfigError", "InputError", "UnsupportedError"):
        assert issubclass(getattr(jax_latent_moe, name), jax_latent_moe.LatentMoEError)
    assert issubclass(jax_latent_moe.LatentMoEError, ValueError)
