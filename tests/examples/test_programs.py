"""A run on a GPU keeps its compiled programs in its folder."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from examples.train import programs

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def cache_of_the_tests():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_something(factor):
    return jax.jit(lambda x: jnp.sin(x) * factor)(jnp.ones(3))


def test_programs_that_follow_are_kept(tmp_path, monkeypatch):
    compile_something(2)  # JAX settles with the first program whether there is a cache
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    programs.keep_programs(tmp_path)
    compile_something(3)
    assert any("lambda" in path.name for path in (tmp_path / programs.FOLDER).iterdir())


def test_each_run_of_a_process_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for factor, run in ((5, "a"), (6, "b"), (7, "a")):
        programs.keep_programs(tmp_path / run)
        compile_something(factor)
    kept = {run: list((tmp_path / run / programs.FOLDER).glob("*lambda*-cache")) for run in ("a", "b")}
    assert {run: len(paths) for run, paths in kept.items()} == {"a": 2, "b": 1}


def test_a_cpu_keeps_none(tmp_path):
    programs.keep_programs(tmp_path)
    compile_something(4)
    assert not any(tmp_path.iterdir())


def test_the_user_s_cache_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    programs.keep_programs(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
