"""Plans against published and measured values, and against the sharded parameters of a real mesh."""

import dataclasses
import math
import re
from collections.abc import Iterable

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from benchmarks.parallel import SHAPES
from benchmarks.problems import DECODE_KERNELS, DECODE_LAYERS, KERNELS, LAYERS
from benchmarks.tables import load, problems
from jax_latent_moe import (
    ConfigError,
    CutlassBackend,
    LatentMoEConfig,
    ParallelConfig,
    Precision,
    cost,
    param_shapes,
    presets,
    quantize,
)
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.parallel import mesh_sizes, param_specs
from jax_latent_moe.plan import GPUS, make_cost_plan, render
from jax_latent_moe.plan.__main__ import main
from jax_latent_moe.plan.memory import fuses_activation, gathered_parameters, kept_residual, parameters_per_device
from jax_latent_moe.plan.timing import grouped_matmuls
from tests import kernels
from tests.cases import TOY
from tests.engineering.sandbox import ROOT
from tests.parallel.meshes import BASE, make_mesh
from tests.test_activations import VARIANTS

H200 = GPUS["h200"]
# By the GPU's name in the results.
MEASURED = {"h200": H200, "h100-80gb-hbm3": GPUS["h100"]}


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


def measured(
    suites: dict, devices: Iterable[str] = MEASURED, impls: tuple[str, ...] = ("pallas", "pallas_fused", "cutlass")
) -> list:
    """Every record of these implementations in the newest run that measured the problem, on each device."""
    kept = [
        pytest.param(row, id="-".join((row["run"], suite, shape, pass_, impl)))
        for device in devices
        for suite, shapes in suites.items()
        for (shape, pass_), rows in problems(load(), suite, device).items()
        for impl, row in rows.items()
        if shape in shapes and impl in impls
    ]
    assert kept, "there is nothing to compare with"
    return kept


@pytest.mark.parametrize("record", measured({"layer": LAYERS, "decode": DECODE_LAYERS}))
def test_a_layer_as_measured_on_one_gpu(record):
    """Time within 30 %, memory within 15 %: not at one token, where XLA takes 8 MiB that nothing here explains.

    The plan has gated activations inside of the products, where pallas leaves them to XLA.
    """
    tokens, layer = (LAYERS | DECODE_LAYERS)[record["shape"]]
    plan = make_cost_plan(layer, {}, tokens, MEASURED[record["device"]], training=record["pass"] == "forward_backward")
    assert plan.communication_ms == 0
    assert plan.compute_ms == pytest.approx(record["ms"], rel=0.3)
    temporary = plan.memory["working memory of a layer"] + plan.memory.get("kept for the backward pass", 0)
    if tokens > 1 and not (layer.gated and record["impl"] == "pallas"):
        assert temporary == pytest.approx(record["temp_bytes"], rel=0.15)


@pytest.mark.parametrize(
    "record", measured({"parallel": ("super_t8192_x2",)}, ["h200-x2"], ("all_gather", "all_to_all"))
)
def test_a_layer_as_measured_on_two_gpus(record):
    """Time within 30 %, temporary memory within 15 %, by either dispatch that `auto` may take."""
    tokens, layer = SHAPES[record["shape"].removesuffix("_x2")]
    layer = dataclasses.replace(layer, parallel=ParallelConfig(dispatch=record["impl"], capacity_factor=1.25))
    plan = make_cost_plan(layer, {"expert": 2}, tokens, H200)
    assert plan.compute_ms + plan.communication_ms == pytest.approx(record["ms"], rel=0.3)
    temporary = plan.memory["working memory of a layer"] + plan.memory["kept for the backward pass"]
    assert temporary == pytest.approx(record["temp_bytes"], rel=0.15)


@pytest.mark.parametrize("record", measured({"kernel": KERNELS, "decode": DECODE_KERNELS}))
def test_kernels_as_measured_on_one_gpu(record):
    """Time within 30 %."""
    shape = (KERNELS | DECODE_KERNELS)[record["shape"]]
    config = LatentMoEConfig(
        hidden_size=shape.in_features,
        latent_size=None,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert_intermediate_size=shape.out_features,
        activation="relu2",
    )
    part = grouped_matmuls(config, MEASURED[record["device"]], shape.rows, shape.num_experts, 1)[f"up {record['pass']}"]
    assert part.ms == pytest.approx(record["ms"], rel=0.3)


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


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"expert_bias": True}, {"backend": CutlassBackend(fuse="never")}]
    + [{"precision": Precision(*formats)} for formats in (("fp8_block",), (None, "fp8_block"), ("fp8_block",) * 2)],
    ids=str,
)
def test_the_residual_is_the_one_that_the_layer_keeps(variant, fields):
    """The plan of a GPU that is not here and the layer on that GPU decide alike."""
    config = dataclasses.replace(TOY, dtype="bfloat16", **VARIANTS[variant], **fields)
    shapes = (64, 256, 512 * (2 if config.gated else 1)), (64, 512, 256)
    layer = plan_experts(config, 4096, *shapes, "bfloat16", device=kernels.H200)
    assert kept_residual(config) == layer.residual
    if config.precision is not None:
        return  # in FP8 the Pallas kernel fuses relu2, and its time is not known here
    for name, contraction in (("up", "fwd"), ("down_dgrad", "dgrad")):
        fused = getattr(layer, name).problem.epilogue is not None
        assert fuses_activation(config, contraction, layer.residual) == fused
