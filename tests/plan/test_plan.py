"""Plans against published and measured values, and against the sharded parameters of a real mesh."""

import dataclasses
import math
import re

import jax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding

from benchmarks.problems import LAYERS
from jax_latent_moe import (
    ConfigError,
    CutlassBackend,
    LatentMoEConfig,
    PallasBackend,
    ParallelConfig,
    Precision,
    RouterConfig,
    UnsupportedError,
    cost,
    decode,
    expert_plan,
    experts,
    latent_moe,
    native,
    param_shapes,
    presets,
    projections,
    quantize,
)
from jax_latent_moe.decode import Decode
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.formats import FORMATS
from jax_latent_moe.grouped_matmul.sm90 import kernel_activation
from jax_latent_moe.parallel import choice, mesh_sizes, param_specs
from jax_latent_moe.plan import GPUS, make_cost_plan, render
from jax_latent_moe.plan.__main__ import main
from jax_latent_moe.plan.kernels import KERNELS as KERNELS_OF_THE_BUILD
from jax_latent_moe.plan.memory import gathered_parameters, parameters_per_device
from jax_latent_moe.routing import compiled
from tests import kernels
from tests.cases import TOY
from tests.conformance.test_new_rows import COLUMNS
from tests.drawn import drawn
from tests.engineering.sandbox import ROOT
from tests.parallel import ragged
from tests.parallel.meshes import BASE, make_mesh
from tests.test_activations import VARIANTS

H200 = GPUS["h200"]


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (presets.NEMOTRON_3_SUPER, 2.82),
        (presets.NEMOTRON_3_ULTRA, 10.74),
        (presets.KIMI_K3, 29.60),
        (presets.DEEPSEEK_V3, 11.27),
        (presets.QWEN3_30B_A3B, 0.60),
        (presets.NEMOTRON_3_NANO, 1.28),
    ],
)
def test_expert_parameters_of_published_models(config, billions):
    experts = sum(math.prod(leaf.shape) for leaf in param_shapes(config)["experts"].values())
    assert experts / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    ("config", "layers", "total", "active"),
    [
        (presets.NEMOTRON_3_SUPER, 40, 120e9, 12e9),
        (presets.NEMOTRON_3_ULTRA, 48, 550e9, 55e9),
        (presets.KIMI_K3, 92, 2.8e12, 104e9),  # docs.nvidia.com/nemo/automodel, page of Kimi K3
    ],
)
def test_moe_layers_are_most_of_the_published_totals(config, layers, total, active):
    """The other parameters are in attention, Mamba and dense layers and embeddings, which no config here describes."""
    assert 0.93 * total < layers * cost.parameters(config) < total
    assert 0.4 * active < layers * cost.active_parameters(config) < active


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (1, 2, 2, 2), (1, 4, 1, 2)])
def test_parameters_of_a_device_are_those_that_a_mesh_gives_it(sizes):
    mesh = make_mesh(*sizes)
    shapes = jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, spec).shard_shape(leaf.shape),
        param_shapes(BASE),
        param_specs(BASE, mesh),
    )
    held = sum(map(math.prod, jax.tree.leaves(shapes, is_leaf=lambda shape: isinstance(shape, tuple))))
    abstract = AbstractMesh(sizes, mesh.axis_names)
    assert parameters_per_device(BASE, abstract) == held
    without_fsdp = AbstractMesh((sizes[0], 1, *sizes[2:]), mesh.axis_names)
    assert gathered_parameters(BASE, abstract) == parameters_per_device(BASE, without_fsdp)


def rows_of_the_page() -> dict[str, list[str]]:
    """The memory table of docs/quantised.md, by preset."""
    text = (ROOT / "docs/quantised.md").read_text().split("## Memory")[1].split("## Accuracy")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("preset", rows_of_the_page())
def test_memory_of_each_preset_by_format(preset):
    """The page has the plan's numbers, which are the bytes of the quantised tree."""
    config = dataclasses.replace(getattr(presets, preset), param_dtype="bfloat16")
    formats = (None, "fp8_block", "int8", "nvfp4", "mxfp4", "int4_128")
    for name, cell in zip(formats, rows_of_the_page()[preset], strict=True):
        if not cell:
            with pytest.raises(ConfigError, match="is not a multiple of 128"):
                make_cost_plan(config, {}, 1, H200, training=False, format=name)
            continue
        memory = make_cost_plan(config, {}, 1, H200, training=False, format=name).memory
        stored = memory["parameters"] + memory.get("codes and scales", 0)
        assert f"{stored / 1e9:.2f}" == cell, name
        shapes = param_shapes(config)
        tree = (
            shapes if name is None else jax.eval_shape(lambda params, name=name: quantize(params, config, name), shapes)
        )
        bias = sum(leaf.size * 2 for part in tree.values() for path, leaf in part.items() if path == "bias")
        leaves = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        assert stored == leaves - bias  # the plan counts the float32 bias as two bytes


def test_a_plan_with_frozen_codes():
    """Experts have no gradient and no moments; a mesh splits their codes."""
    config = dataclasses.replace(presets.KIMI_K3, param_dtype="bfloat16")
    dense, codes = (make_cost_plan(config, {"expert": 8}, 4096, H200, format=name) for name in (None, "mxfp4"))
    assert codes.memory["optimiser"] < 0.05 * dense.memory["optimiser"]
    assert codes.memory["codes and scales"] == pytest.approx(4.25 / 8 / 8 * 29.6e9, rel=0.001)
    assert "with dense experts" in render(codes)
    sharded = make_cost_plan(config, {"fsdp": 2, "expert": 8}, 4096, H200, format="mxfp4")
    assert sharded.memory["codes and scales"] == codes.memory["codes and scales"] // 2


def test_what_binds():
    super_layer = dataclasses.replace(presets.NEMOTRON_3_SUPER, param_dtype="bfloat16")
    assert make_cost_plan(super_layer, {}, 8192, H200).binds.startswith("experts, bound by arithmetic")
    assert "most of it optimiser" in make_cost_plan(super_layer, {}, 8192, H200, layers=40).binds
    assert make_cost_plan(super_layer, {}, 1, H200, training=False).binds.startswith("experts, bound by memory")
    wide = make_cost_plan(super_layer, {"expert": 64}, 8192, H200)
    assert wide.binds.startswith("exchange by all_gather, bound by network")


def test_more_devices_share_what_they_split_and_no_more():
    layer = presets.KIMI_K3
    few, many = (make_cost_plan(layer, {"expert": n}, 4096, H200, layers=92) for n in (8, 64))
    assert many.memory["optimiser"] < 0.2 * few.memory["optimiser"]
    assert [part.name for part in few.parts if part.bound == "link"] == ["exchange by all_gather"]
    recomputed = make_cost_plan(layer, {"expert": 8}, 4096, H200, layers=92, remat=True)
    assert recomputed.memory["kept for the backward pass"] < 0.1 * few.memory["kept for the backward pass"]
    assert recomputed.compute_ms > few.compute_ms


def test_text_says_every_part(capsys):
    main(["--preset", "nemotron_3_super", "--mesh", "data=2,fsdp=2,expert=4,tensor=2", "--layers", "40"])
    text = capsys.readouterr().out
    for words in ("114.92 B, active 7.03 B", "optimiser", "fsdp gather and scatter", "sum over tensor", "Binds:"):
        assert words in text
    plan = make_cost_plan(
        dataclasses.replace(BASE, parallel=ParallelConfig(dispatch="all_to_all")), {"expert": 2}, 64, H200
    )
    assert re.search(r"all_to_all .*<- runs", render(plan))


@pytest.mark.parametrize("mesh", ["expert", "rows=2", "expert=0", "expert=2,expert=2"])
def test_a_mesh_that_does_not_read_is_refused(mesh):
    with pytest.raises(ConfigError, match="must be AXIS=SIZE"):
        mesh_sizes(mesh)


def test_a_mesh_that_does_not_divide_ends_in_one_sentence():
    with pytest.raises(SystemExit, match=r"error: num_experts=512 must be a multiple of the mesh's expert=7"):
        main(["--mesh", "expert=7"])


FIELDS = (
    {},
    {"expert_bias": True},
    {"apply_probs_on_input": True, "top_k": 1, "router": RouterConfig(norm_topk_prob=False)},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"router": RouterConfig(score_function="softmax", norm_topk_prob=False)},
    *({"backend": backend} for backend in ("xla", "pallas", PallasBackend(fuse="always"))),
    *({"backend": CutlassBackend(fuse=fuse)} for fuse in ("always", "never")),
    *({"precision": Precision(*formats)} for formats in (("fp8_block",), (None, "fp8_block"), ("fp8_block",) * 2)),
)


def variant(name: str):
    return dataclasses.replace(TOY, **VARIANTS[name]).bound_activation


@pytest.fixture
def made_by_the_layer(monkeypatch, install_library):
    """The plans that `routed_experts` makes while a layer is traced as if on an H200."""
    made = []

    def planned(*arguments, **options):
        made.append(plan_experts(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(experts, "plan_experts", planned)
    for module in (choice, compiled, decode, expert_plan, projections):
        monkeypatch.setattr(module, "current_device", lambda: kernels.H200)
    install_library(native.Library(dict(KERNELS_OF_THE_BUILD), None))
    return made


def traced(config, tokens, params=None):
    """Traces the layer with the gradient of x, which changes no plan. Without it, one call may run a token."""
    x = jax.ShapeDtypeStruct((tokens, config.hidden_size), config.dtype)

    def layer(params, x):
        return jax.vjp(lambda x: latent_moe(params, x, config)[0], x)[0]

    jax.eval_shape(layer, params or param_shapes(config), x)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_it_decides_as_the_layer_on_that_gpu_does(made_by_the_layer, fields, tokens):
    """The plan of the traced layer, and the one of no GPU at all."""
    sizes = dict(latent_size=256, expert_intermediate_size=512, num_experts=64, hidden_size=128)
    insists = getattr(fields.get("backend"), "fuse", None) == "always"
    in_kernels = [name for name in VARIANTS if not insists or kernel_activation(variant(name)) is not None]
    for name in drawn(in_kernels, 2):
        config = dataclasses.replace(TOY, **VARIANTS[name], **({"dtype": "bfloat16", **sizes} | fields))
        traced(config, tokens)
        on_paper = make_cost_plan(config, {}, tokens, H200).experts
        assert str(on_paper) == str(made_by_the_layer[-1])
        assert isinstance(on_paper.decode, Decode) == isinstance(made_by_the_layer[-1].decode, Decode)


WIDE = dataclasses.replace(
    TOY,
    hidden_size=128,
    latent_size=256,
    expert_intermediate_size=512,
    shared_expert_intermediate_size=0,
    num_experts=16,
    top_k=9,
    dtype="bfloat16",
)
LIMITS = {
    "plain": {},
    "padded": dict(capacity_factor=1.25, pad_to_capacity=True),
    "padded to the least": dict(capacity_factor=0.1, pad_to_capacity=True, min_capacity=24),
    "padded to all": dict(capacity_factor=99.0, pad_to_capacity=True),
    "rounded": dict(round_to_tile=16),
    "rounded to few": dict(round_to_tile=1),
}


def limited(name: str, **fields) -> LatentMoEConfig:
    router = dataclasses.replace(WIDE.router, **LIMITS[name])
    return dataclasses.replace(WIDE, router=router, **fields)


@pytest.mark.parametrize("format", [None, COLUMNS.name, "in eights"])
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_rows_are_those_of_the_layer(monkeypatch, made_by_the_layer, name, tokens, format):
    """Every product has as many rows as the traced layer's, and what follows from them is decided alike."""
    monkeypatch.setitem(FORMATS, COLUMNS.name, COLUMNS)
    monkeypatch.setitem(FORMATS, "in eights", dataclasses.replace(COLUMNS, name="in eights", row_multiple=8))
    config = limited(name)
    params = param_shapes(config)
    if format is not None:
        params = jax.eval_shape(lambda params: quantize(params, config, format), params)
    traced(config, tokens, params)
    plan = make_cost_plan(config, {}, tokens, H200, format=format)
    assert str(plan.experts) == str(made_by_the_layer[-1])
    assert plan.experts.up.problem.num_rows == made_by_the_layer[-1].up.problem.num_rows


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all", "ragged_all_to_all"])
@pytest.mark.parametrize("name", ["plain", "rounded"])
@pytest.mark.parametrize("in_rounds", [False, True])
@pytest.mark.parametrize(
    ("factor", "format", "sizes"),
    [
        (None, None, (1, 1, 4, 1)),
        (1.1, None, (1, 1, 4, 1)),
        (1.1, "in eights", (2, 1, 4, 1)),
        (0.5, None, (2, 1, 1, 2)),
    ],
)
def test_rows_are_those_of_the_layer_on_a_mesh(
    monkeypatch, made_by_the_layer, dispatch, name, in_rounds, factor, format, sizes
):
    if in_rounds:
        monkeypatch.setattr(cost, "least_round_saving", lambda config, devices: 0)
    monkeypatch.setitem(FORMATS, "in eights", dataclasses.replace(COLUMNS, name="in eights", row_multiple=8))
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged.ragged_all_to_all)
    config = limited(name, parallel=ParallelConfig(dispatch=dispatch, capacity_factor=factor))
    params = param_shapes(config)
    if format is not None:
        params = jax.eval_shape(lambda params: quantize(params, config, format), params)
    tokens, mesh = 7, make_mesh(*sizes)
    with jax.set_mesh(mesh):
        traced(config, tokens * math.prod(sizes[:3]), params)
    plan = make_cost_plan(config, dict(mesh.shape), tokens, H200, format=format)
    assert str(plan.experts) == str(made_by_the_layer[-1])
    assert plan.experts.up.problem.num_rows == made_by_the_layer[-1].up.problem.num_rows


def test_rounds_keep_fewer_rows_and_take_one_more_gradient_of_the_experts(monkeypatch):
    monkeypatch.setattr(cost, "least_round_saving", lambda config, devices: 0)
    whole, rounds = (
        make_cost_plan(
            limited("plain", parallel=ParallelConfig(dispatch="all_gather", round_factor=factor)),
            {"expert": 2},
            64,
            H200,
        ).memory
        for factor in (None, 1.25)
    )
    assert rounds["kept for the backward pass"] < whole["kept for the backward pass"]
    fewer = (2 * 64 * 8 - 720) * (256 + 2 * 512) * 2
    experts = 8 * 256 * 512 * 2 * 2
    more = rounds["working memory of a layer"] - whole["working memory of a layer"]
    assert experts - fewer < more <= experts


def test_more_rows_take_more_memory_and_time():
    plain, padded, rounded = (make_cost_plan(limited(name), {}, 4096, H200) for name in ("plain", "padded", "rounded"))
    for name in ("kept for the backward pass", "working memory of a layer"):
        assert plain.memory[name] < min(padded.memory[name], rounded.memory[name])
    (own,), (full,) = ([part for part in plan.parts if part.name == "experts"] for plan in (plain, padded))
    assert full.flops == pytest.approx(1.25 * own.flops, rel=0.01)
    with pytest.raises(ConfigError, match="pad_to_capacity=True needs parallel=None"):
        make_cost_plan(limited("padded"), {"expert": 2}, 64, H200)


def test_a_plan_for_gpus_has_their_collectives(capsys):
    """XLA has no ragged_all_to_all on the CPU that runs this test."""
    main(["--mesh", "expert=8", "--dispatch", "ragged_all_to_all"])
    assert re.search(r"ragged_all_to_all .*<- runs", capsys.readouterr().out)
    config = dataclasses.replace(BASE, parallel=ParallelConfig(dispatch="ragged_all_to_all"))
    cpu = dataclasses.replace(H200, device=kernels.CPU)
    with pytest.raises(UnsupportedError, match="dispatch 'ragged_all_to_all' cannot run this"):
        make_cost_plan(config, {"expert": 2}, 64, cpu)


@pytest.mark.parametrize(
    ("tokens", "sizes", "layers", "message"),
    [
        (-1, {}, 1, "tokens=-1 must be an integer of at least 1"),
        (0, {}, 1, "tokens=0 must be an integer of at least 1"),
        (2.0, {}, 1, r"tokens=2\.0 must be an integer"),
        (8, {}, 0, "layers=0 must be an integer of at least 1"),
        (8, {"expert": -2}, 1, r"sizes\['expert'\]=-2 must be an integer of at least 1"),
    ],
)
def test_numbers_that_no_plan_has(tokens, sizes, layers, message):
    with pytest.raises(ConfigError, match=message):
        make_cost_plan(BASE, sizes, tokens, H200, layers=layers)


@pytest.mark.parametrize("option", ["tokens", "layers"])
@pytest.mark.parametrize("number", ["-1", "0"])
def test_numbers_that_the_command_refuses(option, number):
    with pytest.raises(SystemExit, match=f"error: {option}={number} must be an integer of at least 1"):
        main([f"--{option}", number])


def test_what_the_decisions_change():
    """XLA's products take longer and keep pre-activations; a backend that is not on a GPU is refused there."""
    swiglu = dataclasses.replace(LAYERS["super_swiglu_m1792_t8192"][1])
    plans = {
        name: make_cost_plan(dataclasses.replace(swiglu, backend=backend), {}, 8192, H200)
        for name, backend in (("auto", "auto"), ("never", CutlassBackend(fuse="never")), ("xla", "xla"))
    }
    assert [plan.experts.residual for plan in plans.values()] == ["gate_hidden", "pre", "pre"]
    assert plans["auto"].compute_ms < plans["never"].compute_ms < 0.3 * plans["xla"].compute_ms
    assert plans["auto"].bytes < plans["never"].bytes == plans["xla"].bytes
    assert "the forward pass keeps 'gate_hidden'" in render(plans["auto"])
    with pytest.raises(UnsupportedError, match="not 'NVIDIA B200'"):
        make_cost_plan(dataclasses.replace(swiglu, backend="cutlass"), {}, 8192, GPUS["b200"])
    assert not isinstance(make_cost_plan(swiglu, {"expert": 2}, 1, H200, training=False).experts.decode, Decode)
