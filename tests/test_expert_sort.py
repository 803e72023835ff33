"""Which sort of the experts' choices is taken, without a GPU. test_permute.py tests its result."""

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe import CutlassBackend, PallasBackend, XlaBackend
from jax_latent_moe.routing import compiled
from jax_latent_moe.routing.expert_sort import MOST_EXPERTS, count_experts, sort_by_expert
from tests.kernels import A100, H100, H200

KERNEL = "@latent_moe_sort_by_expert("


def lowered(function, num_experts, backend):
    ids = jax.ShapeDtypeStruct((64, 22), jnp.int32)
    traced = jax.jit(lambda ids: function(ids, num_experts, backend)).trace(ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("function", [sort_by_expert, count_experts])
@pytest.mark.parametrize(
    ("device", "backend", "num_experts", "takes_it"),
    [
        (H200, "auto", 512, True),
        (H100, CutlassBackend(), MOST_EXPERTS, True),
        (H200, "cutlass", 512, True),
        (H200, PallasBackend(), 512, False),
        (H200, XlaBackend(), 512, False),
        (H200, "auto", MOST_EXPERTS + 1, False),
        (A100, "auto", 512, False),
    ],
)
def test_the_kernel_is_taken_where_it_runs(monkeypatch, function, device, backend, num_experts, takes_it):
    monkeypatch.setattr(compiled, "current_device", lambda: device)
    assert (KERNEL in lowered(function, num_experts, backend)) == takes_it


def test_without_the_library_xla_sorts(monkeypatch, library_at, tmp_path):
    monkeypatch.setattr(compiled, "current_device", lambda: H200)
    library_at(tmp_path / "nothing.so")
    assert KERNEL not in lowered(sort_by_expert, 512, "auto")
