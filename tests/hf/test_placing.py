"""Experts moved to a device in parts, as to an accelerator, with CPU devices in its place."""

import tracemalloc
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jax_latent_moe import hf
from jax_latent_moe.hf import placing
from tests.hf.test_quantised import every_kind, large_kimi, make
from tests.hf.test_round_trip import same_bits


@pytest.fixture
def in_parts(monkeypatch):
    """Every device counts as one with its own memory. A part has one expert, or a few scales."""
    monkeypatch.setattr(placing, "_has_own_memory", lambda sharding: True)
    monkeypatch.setattr(placing, "PART", 700)


@every_kind
@pytest.mark.parametrize("kept", [True, False])
def test_parts_make_the_same_layer(kind, kept, rng, tmp_path, request):
    make(tmp_path, rng, kind)
    checkpoint = hf.open_checkpoint(tmp_path)
    layer = checkpoint.layers[0]
    whole = hf.import_layer(checkpoint, layer, keep_quantized=kept)
    request.getfixturevalue("in_parts")
    parts = hf.import_layer(checkpoint, layer, keep_quantized=kept)
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert one.sharding == other.sharding
        same_bits(one, other)


@pytest.mark.parametrize("experts", [0, 1, 3, 7, 64])
@pytest.mark.parametrize("part", [1, 100, 10**6])
def test_every_expert_is_in_one_part(experts, part, monkeypatch):
    monkeypatch.setattr(placing, "PART", part)
    parts = list(placing._parts(range(5, 5 + experts), 50 * experts))
    assert [e for each in parts for e in each] == list(range(5, 5 + experts))
    assert all(50 * len(each) <= max(part, 50) for each in parts)


def test_a_part_is_written_in_place():
    shard, part = jax.ShapeDtypeStruct((64, 2, 300), np.uint8), jax.ShapeDtypeStruct((3, 2, 300), np.uint8)
    plan = placing._write.lower(None, shard, part, 5).compile().memory_analysis()
    assert plan.alias_size_in_bytes == 64 * 2 * 300
    assert plan.temp_size_in_bytes == 0


def test_the_host_holds_few_experts(rng, tmp_path, in_parts, monkeypatch):
    """Buffers of XLA are not Python's, as those of an accelerator are not."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    large_kimi(tmp_path, rng)
    checkpoint = hf.open_checkpoint(tmp_path)
    hf.import_layer(checkpoint, 1, keep_quantized=True)  # JAX traces and compiles, which takes Python's memory as well
    tracemalloc.start()
    hf.import_layer(checkpoint, 1, keep_quantized=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 0.25 * hf.plan_layer(checkpoint, 1).nbytes


def test_an_accelerators_memory_is_told_from_the_hosts():
    assert not placing._has_own_memory(jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    gpu: Any = SimpleNamespace(platform="gpu", default_memory=lambda: SimpleNamespace(kind="device"))
    for kind, own in ((None, True), ("device", True), ("pinned_host", False)):
        sharding: Any = SimpleNamespace(device_set=[gpu], memory_kind=kind)
        assert placing._has_own_memory(sharding) == own
