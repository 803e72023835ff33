"""The decisions about the experts' products before any of them runs: backends, epilogues, residual, gathering."""

import dataclasses

import pytest

from jax_latent_moe import CutlassBackend, PallasBackend, Precision, UnsupportedError, presets
from jax_latent_moe.expert_plan import choose_residual, plan_experts
from jax_latent_moe.grouped_matmul import Operand
from tests.cases import TOY
from tests.fusing import FusingBackend
from tests.kernels import CPU, FUSED, H200, MAX_EXPERTS, PLAIN, library
from tests.test_activations import VARIANTS

SUPER = presets.NEMOTRON_3_SUPER
PRODUCTS = ("up", "up_without_gradient", "down", "down_dgrad", "down_wgrad", "up_dgrad", "up_wgrad")


def plan_of(config, num_rows=64, experts=None, latent=None, inner=None, dtype="float32", device=CPU, **weights):
    experts, latent = experts or config.num_experts, latent or config.latent_size
    inner = inner or config.expert_intermediate_size
    shapes = (experts, latent, inner * (2 if config.gated else 1)), (experts, inner, latent)
    return plan_experts(config, num_rows, *shapes, dtype, device=device, **weights)


def fused(plan) -> set[str]:
    """Products with an activation in their epilogue."""
    return {name for name in PRODUCTS if (bound := getattr(plan, name)) and bound.problem.epilogue is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("value", [False, True])
def test_both_passes_work_with_the_residual(variant, value, gradient):
    """The smallest one that XLA can make or that both passes fuse, else the pre-activation."""
    config = dataclasses.replace(TOY, **VARIANTS[variant])
    smallest, *_ = config.bound_activation.definition.residuals
    for residual in config.bound_activation.definition.residuals:
        backend = FusingBackend((residual,) * value, (residual,) * gradient)
        plan = plan_of(dataclasses.replace(config, backend=backend))
        both = value and gradient and residual == "gate_hidden"
        assert plan.residual == (smallest if smallest != "gate_hidden" or both else "pre")
        wanted = {"up_without_gradient"} if value else set()
        wanted |= {"up"} if value and residual == plan.residual else set()
        wanted |= {"down_dgrad"} if gradient and residual == plan.residual else set()
        assert fused(plan) == wanted
        for name in ("up", "down_dgrad"):
            epilogue = getattr(plan, name).problem.epilogue
            assert epilogue is None or (epilogue.residual, epilogue.activation) == (plan.residual, plan.activation)


@pytest.mark.usefixtures("install_library")
def test_codes_that_no_kernel_reads_are_refused_for_both_reasons():
    """The kernels that widen codes take bfloat16 alone."""
    config, codes = dataclasses.replace(SUPER, backend=CutlassBackend(decode="always")), Operand("mxfp4")
    few = "6600 tokens are too many."
    reason = r"widens codes to bfloat16, not float16 x mxfp4.*few tokens do not run either: 6600"
    with pytest.raises(UnsupportedError, match=reason):
        plan_of(config, 145200, dtype="float16", device=H200, w_in=codes, w_out=codes, decode=few)


def test_what_no_kernel_would_read_is_not_kept():
    """If only one pass has the gate and hidden rows side by side, the pre-activation is kept and composed."""
    swiglu = dataclasses.replace(TOY, activation="swiglu")
    for value, gradient in ((("gate_hidden",), ()), ((), ("gate_hidden",)), (("gate_hidden",), ("pre",))):
        plan = plan_of(dataclasses.replace(swiglu, backend=FusingBackend(value, gradient)))
        assert plan.residual == "pre"
        assert plan.up.problem.epilogue is None
        assert ("down_dgrad" in fused(plan)) == (gradient == ("pre",))


def test_the_pre_activation_serves_any_backend():
    for fields in VARIANTS.values():
        activation = dataclasses.replace(TOY, **fields).bound_activation
        found = choose_residual(activation, lambda _: False, lambda _: False)
        assert found == ("hidden" if activation.name == "relu2" else "pre")


@pytest.mark.parametrize(
    ("experts", "residual", "in_kernels"),
    [
        (2394, "gate_hidden", {"up", "up_without_gradient", "down_dgrad"}),
        (2395, "pre", set()),
        (3416, "pre", set()),
        (3417, "pre", set()),
    ],
)
def test_experts_that_fit_beside_one_kernel_alone(install_library, experts, residual, in_kernels):
    """The shared memory of swiglu's kernels holds the bounds of fewer experts in fwd than in dgrad."""
    fwd, dgrad = (name for name in FUSED if ".swiglu:" in name)
    install_library(library(*PLAIN, max_experts=8192, **{fwd: 2394, dgrad: 3416}))
    config = dataclasses.replace(TOY, activation="swiglu", backend=CutlassBackend(fuse="always"))
    plan = plan_of(config, 8192, experts, 64, 64, "bfloat16", H200)
    assert plan.residual == residual
    assert fused(plan) == in_kernels


@pytest.mark.usefixtures("install_library")
def test_a_plan_is_told_whole():
    """Six products of Nemotron-3 Super: backend, tile, its source, the epilogue, and where rows are gathered."""
    plan = plan_of(SUPER, 180224, dtype="bfloat16", device=H200)
    sizes = ["180224 rows, 512 experts of 1024 x 2688", "180224 rows, 512 experts of 2688 x 1024"]
    b, relu2, runs = (
        "bfloat16",
        "relu2 keeping",
        "  CutlassBackend(matmul_tile=None, wgrad_tile=None, fuse='measured', decode='measured')",
    )
    lines = str(plan).splitlines()
    assert lines[0] == "experts with relu2; the forward pass keeps 'hidden'"
    assert lines[1] == f"down_dgrad reads rows without their weights: {plan.unweighted}"
    assert [line for line in lines[2:] if not line.startswith("  ")] == [
        f"up: fwd with {relu2} hidden of gathered {b} and {b} to {b}, {sizes[0]}",
        f"up_without_gradient: fwd with {relu2} nothing of gathered {b} and {b} to {b}, {sizes[0]}",
        f"down: fwd of {b} and {b} to {b}, {sizes[1]}",
        f"down_dgrad: {plan.down_dgrad.problem}",
        f"down_wgrad: wgrad of {b} and gathered {b} to {b}, {sizes[1]}",
        f"up_dgrad: dgrad of {b} and {b} to {b}, {sizes[0]}",
        f"up_wgrad: wgrad of gathered {b} and {b} to {b}, {sizes[0]}",
    ]
    assert str(plan.down_dgrad.problem).startswith(f"dgrad with {relu2} hidden of ")
    assert lines.count(f"{runs} runs it") == len(PRODUCTS)
    tiles = [line for line in lines if line.startswith("  tile: ")]
    assert len(tiles) == len(PRODUCTS)
    assert all(line.startswith("  tile: CutlassTile(rows=") for line in tiles)
    heuristics = [line.endswith("from a heuristic: no table has this problem") for line in tiles]
    tables = [line.endswith("committed table of NVIDIA H200, measured at 180224 rows") for line in tiles]
    assert heuristics == [name in fused(plan) for name in PRODUCTS]
    assert tables == [not heuristic for heuristic in heuristics]
    up = lines[lines.index(f"up: {plan.up.problem}") + 1 : lines.index(f"down: {plan.down.problem}")]
    assert up.count("  lhs: gathered in the kernel") == 2
    wgrad = lines[lines.index(f"up_wgrad: {plan.up_wgrad.problem}") + 1 :]
    assert wgrad[-1] == "  lhs: gathered in the kernel"


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {}, None),
        ({}, {"dtype": "bfloat16"}, None),
        ({}, {"by_log": False}, "the gradients of the weights themselves are asked for"),
        ({"activation": "gelu"}, {}, "down_wgrad follows it"),
        ({"precision": Precision(dgrad="fp8_block")}, {}, "it reads codes in fp8_block"),
        ({}, {"w_out": Operand("int4_32")}, "w_out is frozen"),
        ({}, {"dtype": "float16"}, "small weights would lose their rows' bits in float16"),
    ],
    ids=str,
)
def test_rows_times_their_weights_are_read_or_a_line_says_why_not(changes, options, reason):
    plan = plan_of(dataclasses.replace(TOY, **changes), **({"by_log": True} | options))
    (line,) = (line for line in str(plan).splitlines() if "down_dgrad reads" in line)
    assert plan.weighted_dgrad == (reason is None)
    assert plan.down_dgrad.problem.lhs.layout == ("dense" if reason is None else "gathered")
    if reason is None:
        assert line == "down_dgrad reads rows times their weights, which down_wgrad gathered"
    else:
        assert line.startswith(f"down_dgrad reads rows without their weights: {reason}")


def test_the_projections_of_these_tokens_are_told():
    line = "XLA multiplies the router's logits: the compiled kernel multiplies one token, not 2."
    assert f"without a gradient, {line}" in str(plan_of(TOY, projections=line)).splitlines()
    assert "router's logits" not in str(plan_of(TOY))


def test_frozen_weights_have_no_wgrad():
    codes = Operand("int4")
    for frozen in ({"w_in"}, {"w_out"}, {"w_in", "w_out"}):
        plan = plan_of(TOY, **dict.fromkeys(frozen, codes))
        assert (plan.up_wgrad is None) == ("w_in" in frozen)
        assert (plan.down_wgrad is None) == ("w_out" in frozen)
        assert (plan.up.problem.rhs == codes) == (plan.up_dgrad.problem.rhs == codes) == ("w_in" in frozen)
        assert (plan.down.problem.rhs == codes) == (plan.down_dgrad.problem.rhs == codes) == ("w_out" in frozen)
        assert str(plan).count("wgrad of") == 2 - len(frozen)


@pytest.mark.parametrize("device", [H200, CPU], ids=["where kernels refuse the widths", "where there are none"])
def test_a_named_backend_that_cannot_run_one_product_says_so(device):
    config = dataclasses.replace(TOY, backend=PallasBackend())
    with pytest.raises(UnsupportedError, match=r"pallas.* cannot run this: .* Use backend='auto' or XlaBackend\(\)"):
        plan_of(config, dtype="bfloat16", device=device)


def test_hidden_rows_behind_the_gate_are_read_where_they_stand(install_library):
    install_library(library(*PLAIN, *FUSED, max_experts=MAX_EXPERTS))
    config = dataclasses.replace(TOY, activation="swiglu", backend=CutlassBackend())
    plan = plan_of(config, 8192, 64, 1024, 1024, "bfloat16", H200)
    assert plan.residual == "gate_hidden"
    for bound in (plan.down, plan.down_wgrad):
        assert bound is not None
        assert bound.problem.lhs == Operand("bfloat16", "columns")
        assert "lhs" in bound.in_place
    assert "lhs: cut out of wider rows in the kernel" in str(plan.down)


def test_small_weights_multiply_tokens_and_hidden_rows_in_float16():
    """Hidden rows times weights are rows of their own, so the kernel does not cut them out of the residual."""
    config = dataclasses.replace(TOY, activation="swiglu", backend=FusingBackend(("gate_hidden",), ("gate_hidden",)))
    apart, together = (plan_of(config, dtype=dtype, by_log=True) for dtype in ("float16", "bfloat16"))
    assert (apart.weighted_hidden, together.weighted_hidden) == (True, False)
    assert (apart.weighted_tokens, together.weighted_tokens) == (True, False)
    for plan, layout in ((apart, "dense"), (together, "columns")):
        assert plan.residual == "gate_hidden"
        assert plan.down.problem.lhs.layout == "columns"
        assert plan.down_wgrad is not None
        assert plan.down_wgrad.problem.lhs.layout == layout
