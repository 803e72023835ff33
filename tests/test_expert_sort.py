"""Which sort of the experts' choices is taken, as far as it goes without a GPU; its result: test_permute.py."""

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe import CutlassBackend, PallasBackend, XlaBackend, native
from jax_latent_moe.native import library
from jax_latent_moe.routing.expert_sort import MOST_EXPERTS, count_experts, sort_by_expert

needs_library = pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")
KERNEL = "@latent_moe_sort("
HOPPER = "NVIDIA H200"


def lowered(function, num_experts, backend):
    ids = jax.ShapeDtypeStruct((64, 22), jnp.int32)
    traced = jax.jit(lambda ids: function(ids, num_experts, backend)).trace(ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_library
@pytest.mark.parametrize("function", [sort_by_expert, count_experts])
@pytest.mark.parametrize(
    ("kind", "backend", "num_experts", "takes_it"),
    [
        (HOPPER, "auto", 512, True),
        ("NVIDIA H100 80GB HBM3", CutlassBackend(), MOST_EXPERTS, True),
        (HOPPER, "cutlass", 512, True),
        (HOPPER, PallasBackend(), 512, False),
        (HOPPER, XlaBackend(), 512, False),
        (HOPPER, "auto", MOST_EXPERTS + 1, False),
        ("NVIDIA A100-SXM4-80GB", "auto", 512, False),
    ],
)
def test_the_kernel_is_taken_where_it_runs(monkeypatch, function, kind, backend, num_experts, takes_it):
    monkeypatch.setattr(native, "default_device", lambda: ("gpu", kind))
    assert (KERNEL in lowered(function, num_experts, backend)) == takes_it


def test_without_the_library_xla_sorts(monkeypatch, library_at, tmp_path):
    monkeypatch.setattr(native, "default_device", lambda: ("gpu", HOPPER))
    library_at(tmp_path / "nothing.so")
    assert KERNEL not in lowered(sort_by_expert, 512, "auto")
