"""Which dispatch "auto" takes, and whether the predicted bytes are those that a program's collectives move."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe import ConfigError, InputError, ParallelConfig, latent_moe, param_shapes, presets
from jax_latent_moe.cost import exchange_bytes, exchange_capacity
from jax_latent_moe.parallel import (
    choose_dispatch,
    dispatch_costs,
    explain,
    logical_axis_rules,
    param_specs,
    token_spec,
)
from tests.parallel.meshes import BASE, make_mesh

SUPER = dataclasses.replace(presets.NEMOTRON_3_SUPER, parallel=ParallelConfig())


def with_parallel(config, **fields):
    return dataclasses.replace(config, parallel=ParallelConfig(**fields))


def test_auto_gathers_while_nearly_every_token_visits_every_device():
    assert choose_dispatch(with_parallel(SUPER, capacity_factor=1.25), devices=8, tokens=8192) == "all_gather"


def test_auto_sends_rows_once_devices_outnumber_choices():
    assert choose_dispatch(with_parallel(SUPER, capacity_factor=1.25), devices=128, tokens=8192) == "all_to_all"


def test_auto_without_capacity_takes_no_memory_for_the_worst_case():
    assert choose_dispatch(SUPER, devices=128, tokens=8192) == "all_gather"


def test_auto_never_takes_the_ragged_exchange():
    costs = dispatch_costs(SUPER, devices=64, tokens=8192)
    assert sum(costs["ragged_all_to_all"][:2]) < sum(costs["all_gather"][:2])
    assert choose_dispatch(SUPER, devices=64, tokens=8192) == "all_gather"


def test_expected_times_are_near_those_measured_on_two_gpus():
    """8192 tokens a GPU, latents of 1024 in bfloat16: 0.13 and 0.11 ms there and back; all_to_all 0.69 ms one way."""
    costs = dispatch_costs(with_parallel(SUPER, capacity_factor=1.0), devices=2, tokens=8192)
    assert costs["all_gather"].ms == pytest.approx(0.13 + 0.11, rel=0.2)
    assert costs["all_to_all"].ms == pytest.approx(2 * 0.69, rel=0.2)
    assert costs["ragged_all_to_all"].ms == pytest.approx(2 * 70.4, rel=0.2)


def test_explain_names_what_runs():
    text = explain(SUPER, devices=8, tokens=8192)
    assert re.search(r"all_gather .*<- runs", text)
    assert re.search(r"ragged_all_to_all .*never by auto", text)
    assert explain(SUPER, devices=1, tokens=8192) == "One device holds all experts: nothing travels."
    with pytest.raises(ConfigError, match="parallel=None has no dispatch"):
        explain(presets.NEMOTRON_3_SUPER, devices=8, tokens=8192)


@pytest.mark.parametrize(
    ("tokens", "factor", "expected"), [(64, None, 128), (64, 1.0, 48), (64, 0.9, 48), (64, 9, 128)]
)
def test_capacity(tokens, factor, expected):
    assert exchange_capacity(BASE, 4, tokens, factor) == expected  # top_k 3, 2 experts a device


def collective_bytes(program: str, name: str) -> int:
    """Bytes of the operands of a collective in StableHLO, one device's."""
    operands = re.findall(rf'"stablehlo\.{name}".*?: \(tensor<([\dx]+)x[a-z]+(8|32)>', program, re.S)
    return sum(int(bits) // 8 * math.prod(map(int, shape.split("x"))) for shape, bits in operands)


@pytest.mark.parametrize(
    ("capacity_factor", "tile", "format"),
    [(None, None, None), (1.0, None, None), (None, 4, None), (1.0, 4, None), (1.0, None, "fp8_block")],
)
def test_bytes_are_those_of_the_program(capacity_factor, tile, format):
    devices, tokens = 4, 64
    base = dataclasses.replace(BASE, router=dataclasses.replace(BASE.router, round_to_tile=tile))
    x = jax.ShapeDtypeStruct((devices * tokens, BASE.hidden_size), jnp.float32)
    expected = exchange_bytes(with_parallel(base, dispatch_format=format), devices, tokens, capacity_factor)
    for dispatch, collectives in (("all_gather", ("all_gather", "reduce_scatter")), ("all_to_all", ("all_to_all",))):
        config = with_parallel(base, dispatch=dispatch, capacity_factor=capacity_factor, dispatch_format=format)
        with jax.set_mesh(make_mesh(1, 1, devices, 1)):
            program = jax.jit(latent_moe, static_argnums=2).lower(param_shapes(BASE), x, config).as_text()
        operands = sum(collective_bytes(program, name) for name in collectives)
        router = 4 * (BASE.hidden_size + 1) * BASE.num_experts // devices  # gathered by every layer, whatever travels
        router += 8 * tokens * 2 * BASE.top_k if tile else 0  # ids and weights, which rounding compares
        if dispatch == "all_gather":
            # A device gives its tokens to each other one, and gets its own part back from each.
            returned = 4 * devices * tokens * BASE.latent_width
            wire = (operands - router - returned) * (devices - 1) + returned * (devices - 1) // devices
        else:
            wire = operands * (devices - 1) // devices
        assert wire == sum(expected[dispatch])


@pytest.mark.parametrize(
    ("devices", "tokens", "message"),
    [
        (0, 8, "devices=0 must be an integer of at least 1"),
        (8, -8, "tokens=-8 must be an integer of at least 0"),
        (8, 8.5, r"tokens=8\.5 must be an integer"),
        (3, 8, "devices=3 must divide the 512 experts"),
    ],
)
def test_what_no_mesh_has_is_not_explained(devices, tokens, message):
    with pytest.raises(ConfigError, match=message):
        explain(SUPER, devices=devices, tokens=tokens)


def test_arguments_of_other_types_are_refused():
    mesh = jax.sharding.AbstractMesh((2,), ("expert",))
    for call, message in (
        (lambda: explain(None, devices=2, tokens=8), "config of type NoneType must be a LatentMoEConfig"),
        (lambda: param_specs(None, mesh), "config of type NoneType must be a LatentMoEConfig"),
        (lambda: param_specs(SUPER, None), "mesh of type NoneType must be a mesh"),
        (lambda: token_spec(SUPER, mesh), "parallel of type LatentMoEConfig must be a ParallelConfig"),
        (lambda: logical_axis_rules(None, mesh), "parallel of type NoneType must be a ParallelConfig"),
    ):
        with pytest.raises(InputError, match=message):
            call()
