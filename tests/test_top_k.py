"""The choice of the best experts, as far as it is testable without a GPU."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import CutlassBackend, PallasBackend, XlaBackend
from jax_latent_moe.routing import compiled
from jax_latent_moe.routing.top_k import MOST_SCORES, MOST_WEIGHTS, top_k_ids
from tests import emulated
from tests.kernels import A100, H100, H200

KERNEL = "@latent_moe_top_k("


def test_it_is_a_stable_sort_from_the_best(rng):
    scores = rng.integers(0, 9, size=(7, 40)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :11]
    np.testing.assert_array_equal(top_k_ids(jnp.asarray(scores), 11), expected)


def lowered(scores, backend):
    function = jax.jit(lambda scores: top_k_ids(scores, 22, backend))
    return function.trace(scores).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize(
    ("device", "backend", "dtype", "experts", "takes_it"),
    [
        (H200, "auto", "float32", 512, True),
        (H100, CutlassBackend(), "float32", MOST_SCORES, True),
        (H200, PallasBackend(), "float32", 512, False),
        (H200, XlaBackend(), "float32", 512, False),
        (H200, "auto", "bfloat16", 512, False),
        (H200, "auto", "float32", MOST_SCORES + 1, False),
        (A100, "auto", "float32", 512, False),
    ],
)
def test_the_kernel_is_taken_where_it_runs(monkeypatch, device, backend, dtype, experts, takes_it):
    monkeypatch.setattr(compiled, "current_device", lambda: device)
    scores = jax.ShapeDtypeStruct((64, experts), dtype)
    assert (KERNEL in lowered(scores, backend)) == takes_it


def test_limits_are_those_of_the_kernels():
    header = (pathlib.Path(__file__).parents[1] / "custom_calls/src/routing/top_k.h").read_text()
    limits = dict(re.findall(r"constexpr int (k\w+) = (\d+);", header))
    expected = {"kMostScores": MOST_SCORES, "kMostWeights": MOST_WEIGHTS, "kFewRows": emulated.FEW_ROWS}
    assert {name: int(limits[name]) for name in expected} == expected


def test_without_the_library_xla_sorts(monkeypatch, library_at, tmp_path):
    monkeypatch.setattr(compiled, "current_device", lambda: H200)
    library_at(tmp_path / "nothing.so")
    assert KERNEL not in lowered(jax.ShapeDtypeStruct((64, 512), "float32"), "auto")
