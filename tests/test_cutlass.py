"""The `cutlass` backend without a GPU: refusals and the choice of kernel."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_latent_moe import (
    CutlassBackend,
    PallasBackend,
    UnsupportedError,
    decode,
    expert_plan,
    init_params,
    latent_moe,
    native,
    projections,
)
from jax_latent_moe.config import CutlassTile
from jax_latent_moe.device import Device
from jax_latent_moe.grouped_matmul import (
    Epilogue,
    Operand,
    explain,
    fused,
    problem,
    select,
)
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import FASTER, Cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.tiles import kernel_name
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS, fuse_refusal
from jax_latent_moe.plan.kernels import KERNELS
from jax_latent_moe.routing import compiled
from tests import kernels
from tests.engineering.sandbox import ROOT
from tests.kernels import (
    A100,
    CPU,
    FUSED,
    H200,
    PLAIN,
    RESIDUAL,
    WHOLE,
    bound_activation,
    epilogue_of,
    layer_of,
    library,
)

W_SHAPE = (64, 1024, 2688)
PROBLEM = problem("fwd", 8192, W_SHAPE, "bfloat16", device=H200)
FLOAT32 = Operand("float32")
DESCRIBED = dataclasses.replace(H200, kernels=tuple(KERNELS))
"""An H200 with the kernels that the build compiles."""


def test_without_its_library_it_says_how_to_get_it(library_at, tmp_path):
    library_at(tmp_path / native.FILE)
    with pytest.raises(UnsupportedError, match=r"libjax_latent_moe_cuda.so is not installed: `pip install"):
        select(PROBLEM, CutlassBackend())


def test_a_file_that_is_no_library_is_named(library_at, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    library_at(tmp_path / "broken.so")
    with (
        pytest.warns(RuntimeWarning, match="cannot be loaded"),
        pytest.raises(UnsupportedError, match=r"broken.so cannot be loaded .* `make cuda`"),
    ):
        select(PROBLEM, CutlassBackend())


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": A100}, "for NVIDIA Hopper GPUs"),
        ({"device": CPU}, "for NVIDIA Hopper GPUs"),
        ({"device": Device("gpu", "NVIDIA B200")}, "for NVIDIA Hopper GPUs"),
        (dict.fromkeys(("lhs", "rhs", "out"), FLOAT32), "not float32 x float32 to float32"),
        ({"rhs": Operand("float16")}, "all in float16, not bfloat16 x float16 to bfloat16"),
        ({"rhs": Operand("int4")}, "all in float16, not bfloat16 x int4 to bfloat16"),
        ({"out": FLOAT32}, "not bfloat16 x bfloat16 to float32"),
        ({"k": 1004}, "k=1004 is not a positive multiple of 8"),
        ({"n": 0}, "n=0 is not a positive multiple of 8"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_experts": kernels.MAX_EXPERTS + 1}, "no kernel was compiled for fwd of bfloat16 and 897 experts"),
        ({"num_rows": 2**31}, "must be below 2147483392"),
        ({"n": 2696, "epilogue": epilogue_of("swiglu")}, "half of n=2696"),
        ({"epilogue": Epilogue(bound_activation("gelu"), "pre")}, None),
        ({"epilogue": Epilogue(bound_activation("swiglu"), "pre")}, "no kernel was compiled for fwd of bfloat16 with"),
        ({"contraction": "dgrad", "epilogue": Epilogue(bound_activation("swiglu"), "gate_hidden")}, None),
        ({}, None),
    ],
)
def test_what_it_cannot_run_it_refuses(changes, reason):
    found = Cutlass(CutlassBackend()).supports(dataclasses.replace(PROBLEM, **changes))
    assert found is None if reason is None else reason in (found or "")


def test_auto_goes_on_where_there_is_no_library(library_at, tmp_path):
    library_at(tmp_path / native.FILE)
    text = explain(PROBLEM)
    assert "is not installed: `pip install" in text
    assert type(select(PROBLEM).backend).__name__ == "Pallas"


@pytest.mark.usefixtures("install_library")
def test_auto_takes_it():
    assert type(select(PROBLEM).backend).__name__ == "Cutlass"


@pytest.mark.usefixtures("install_library")
def test_a_tile_that_was_not_compiled_is_refused_with_those_that_were():
    backend = CutlassBackend(matmul_tile=CutlassTile(rows=128, columns=64))
    with pytest.raises(UnsupportedError, match=r"columns=64.* was not compiled .*; these were: CutlassTile\("):
        select(PROBLEM, backend)
    wgrad = dataclasses.replace(PROBLEM, contraction="wgrad")
    with pytest.raises(UnsupportedError, match=r"columns=64.* was not compiled for wgrad of bfloat16; these were:"):
        select(wgrad, CutlassBackend(wgrad_tile=CutlassTile(rows=128, columns=64)))
    chosen = select(PROBLEM, CutlassBackend())
    assert chosen.tile in chosen.backend.tiles(PROBLEM)
    assert select(PROBLEM, CutlassBackend(matmul_tile=chosen.tile)).tile == chosen.tile


@pytest.mark.usefixtures("install_library")
def test_tiles_are_those_that_were_compiled_and_names_are_theirs():
    """In either order of rows and columns, except in wgrad."""
    for contraction in ("fwd", "dgrad", "wgrad"):
        for dtype, short in (("bfloat16", "bf16"), ("float16", "f16")):
            asked = problem(contraction, 8192, W_SHAPE, dtype, device=H200)
            found = Cutlass(CutlassBackend()).tiles(asked)
            names = {kernel_name(asked, tile) for tile in found}
            assert names == {name for name in PLAIN if name.startswith(f"sm90.{contraction}.{short}.")}
            assert len(found) == len(set(found)) == (1 if contraction == "wgrad" else 2) * len(names)
    for activation in KERNEL_ACTIVATIONS:
        asked = dataclasses.replace(PROBLEM, epilogue=epilogue_of(activation))
        for epilogue in (asked.epilogue, dataclasses.replace(asked.epilogue, residual=None)):
            same = dataclasses.replace(asked, epilogue=epilogue)
            (name,) = {kernel_name(same, tile) for tile in Cutlass(CutlassBackend()).tiles(same)}
            assert name.startswith(f"sm90.fwd.bf16.{activation}:{RESIDUAL[activation]}.")


def test_a_kernel_that_takes_fewer_experts_is_no_choice(install_library):
    install_library(library(*PLAIN[:1], max_experts=512, **{PLAIN[1]: 2048}))
    few, many = (dataclasses.replace(PROBLEM, num_experts=experts) for experts in (512, 513))
    backend = Cutlass(CutlassBackend())
    assert {kernel_name(few, tile) for tile in backend.tiles(few)} == set(PLAIN[:2])
    assert {kernel_name(many, tile) for tile in backend.tiles(many)} == {PLAIN[1]}


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("n", [1016, 1024, 2688])
def test_a_shape_that_no_table_has_takes_a_tile_that_pads_least(n):
    """Few rows an expert take small tiles."""
    for num_rows, fits in ((64 * 1024, lambda tile: tile.rows > 64), (64 * 48, lambda tile: tile.rows == 64)):
        asked = dataclasses.replace(PROBLEM, num_rows=num_rows, k=1000, n=n)
        bound = select(asked, CutlassBackend())
        widths = {other: other.columns * other.cluster_columns for other in bound.backend.tiles(asked)}
        padded = {other: -(-n // width) * width for other, width in widths.items() if fits(other)}
        assert bound.tile in widths
        assert padded[bound.tile] == min(padded.values())


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("epilogue", [None, epilogue_of("relu2")])
@pytest.mark.parametrize(("rows_of_expert", "rows_first"), [(100, True), (512, True), (513, False)])
def test_tiles_of_few_rows_run_down_an_expert_first(epilogue, rows_of_expert, rows_first):
    num_rows = rows_of_expert * PROBLEM.num_experts
    bound = select(dataclasses.replace(PROBLEM, num_rows=num_rows, k=1000, epilogue=epilogue), CutlassBackend())
    assert bound.source.startswith("a heuristic")
    assert bound.tile.rows_first == rows_first


@pytest.mark.parametrize(
    ("rows_of_expert", "k", "n", "shape"),
    [
        (48, 1000, 1024, (64, 128)),
        (49, 1000, 1024, (192, 128)),  # some experts have more than 64 rows
        (128, 1000, 1408, (128, 128)),  # larger tiles would hold no more rows
        (129, 1000, 1408, (128, 192)),
        (400, 520, 1024, (192, 128)),
        (400, 512, 1024, (128, 192)),  # shallow
        (26, 1000, 128, (64, 128)),  # few tiles
        (384, 1000, 96, (64, 128)),
        (385, 1000, 96, (128, 128)),
        (385, 1000, 72, (128, 128)),
        (385, 1000, 64, (128, 64)),
    ],
)
def test_rows_and_depth_choose_the_tile(rows_of_expert, k, n, shape):
    """In fwd and, with K and N swapped, in dgrad."""
    fwd = dataclasses.replace(PROBLEM, num_rows=64 * rows_of_expert, k=k, n=n, device=DESCRIBED)
    for asked in (fwd, dataclasses.replace(fwd, contraction="dgrad", k=n, n=k)):
        tile = select(asked, CutlassBackend()).tile
        assert (tile.rows, tile.columns) == shape


@pytest.mark.parametrize(
    ("rows_of_expert", "n", "shape"),
    [(512, 1024, (128, 128)), (513, 1024, (192, 128)), (513, 1536, (192, 128)), (513, 1152, (128, 192))],
)
def test_many_rows_in_fp8_take_three_warpgroups_unless_columns_would_be_padded(rows_of_expert, n, shape):
    codes = Operand("fp8_block")
    asked = dataclasses.replace(
        PROBLEM, num_rows=64 * rows_of_expert, k=1008, n=n, lhs=codes, rhs=codes, device=DESCRIBED
    )
    tile = select(asked, CutlassBackend()).tile
    assert (tile.rows, tile.columns) == shape


@pytest.mark.parametrize(("rows_of_expert", "rows"), [(128, 128), (129, 192)])
def test_relu2_gradients_in_fp8_take_three_warpgroups_from_fewer_rows_on(rows_of_expert, rows):
    codes, relu2 = Operand("fp8_block"), Epilogue(bound_activation("relu2"), "hidden", encodes="fp8_block")
    asked = dataclasses.replace(
        PROBLEM,
        contraction="dgrad",
        num_rows=64 * rows_of_expert,
        lhs=codes,
        rhs=codes,
        epilogue=relu2,
        device=DESCRIBED,
    )
    assert select(asked, CutlassBackend(fuse="always")).tile.rows == rows


@pytest.mark.parametrize("contraction", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize("layout", ["dense", "gathered"])
def test_a_symbolic_number_of_rows_takes_the_tile_of_a_large_call(contraction, layout):
    (tokens,) = jax.export.symbolic_shape("t")
    lhs = Operand("bfloat16", layout)
    asked = dataclasses.replace(PROBLEM, contraction=contraction, lhs=lhs, device=DESCRIBED)
    symbolic, large = (select(dataclasses.replace(asked, num_rows=rows)) for rows in (8 * tokens, 2**28))
    assert isinstance(symbolic.backend, Cutlass)
    assert (symbolic.tile, symbolic.in_place) == (large.tile, large.in_place)
    assert symbolic.source.startswith("a heuristic")
    reason = (
        r"num_rows=8\*t is symbolic, but its kernels are compiled for one number of rows: use CutlassBackend\(\) or"
    )
    with pytest.raises(UnsupportedError, match=reason):
        select(symbolic.problem, PallasBackend())


def test_a_layer_with_a_symbolic_number_of_tokens_exports_its_kernels(monkeypatch):
    for module in (compiled, decode, expert_plan, projections):
        monkeypatch.setattr(module, "current_device", lambda: DESCRIBED)
    config = dataclasses.replace(layer_of("relu2"), hidden_size=64, latent_size=64, expert_intermediate_size=64)
    config = dataclasses.replace(config, num_experts=8, dtype="bfloat16", param_dtype="bfloat16")
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("t, 64"), "bfloat16")
    program = jax.jit(jax.grad(lambda params, x: latent_moe(params, x, config)[0].astype("float32").sum()))
    exported = jax.export.export(program, platforms=("cuda",), disabled_checks=native.export_checks())(params, x)
    for target in ("matmul_activation", "matmul_activation_grad", "matmul", "wgrad"):
        assert f"@{native.PREFIX}{target}(" in exported.mlir_module()


@pytest.mark.parametrize("contraction", ["fwd", "dgrad"])
@pytest.mark.parametrize("compiled", [WHOLE, library(*PLAIN, *FUSED[:6])], ids=["all", "some"])
def test_fuse_says_what_is_fused(install_library, contraction, compiled):
    install_library(compiled)
    there = {name for name in KERNEL_ACTIVATIONS if any(f".{contraction}.bf16.{name}:" in k for k in compiled.kernels)}
    plain = dataclasses.replace(PROBLEM, contraction=contraction)
    for name in KERNEL_ACTIVATIONS:
        for fuse, expected in (
            ("always", name in there),
            ("measured", name in there and name in FASTER[contraction]),
            ("never", False),
        ):
            bound = select(plain, CutlassBackend(fuse=fuse))
            found = fused(bound, epilogue_of(name))
            assert (found is not None) == expected
            assert found is None or found.backend == bound.backend
        other = Epilogue(bound_activation(name), "pre" if RESIDUAL[name] != "pre" else "hidden")
        assert fused(select(plain, CutlassBackend(fuse="always")), other) is None


def test_a_device_that_is_described_has_its_own_kernels(library_at, tmp_path):
    """No library is here, and a backend decides for a machine that has one."""
    library_at(tmp_path / native.FILE)
    names = [name for name in (*PLAIN, *FUSED) if "swiglu" not in name]
    described = dataclasses.replace(H200, kernels=tuple((name, 64) for name in names))
    asked = dataclasses.replace(PROBLEM, device=described)
    bound = select(asked)
    assert isinstance(bound.backend, Cutlass)
    assert fused(bound, epilogue_of("gelu")) is not None
    assert fused(bound, epilogue_of("swiglu")) is None
    with pytest.raises(UnsupportedError, match="no kernel was compiled for fwd of bfloat16 and 65 experts"):
        select(dataclasses.replace(asked, num_experts=65), CutlassBackend())


def test_the_kernels_of_a_plan_are_those_that_are_compiled():
    """The list of the build has their names. A library that was built says how many experts each takes."""
    lines = (ROOT / "custom_calls/src/sm90/kernels.txt").read_text().splitlines()
    assert [name for name, _ in KERNELS] == [line.split()[0] for line in lines if not line.startswith("#")]
    assert native.library().kernels.items() <= dict(KERNELS).items()


def test_what_fuse_leaves_to_xla_is_said():
    asked = dataclasses.replace(PROBLEM, epilogue=epilogue_of("relu2"))
    assert "fuse='always' fuses it" in (fuse_refusal(asked, "never", FASTER) or "")


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize(
    ("contraction", "epilogue", "layouts", "sizes", "in_place"),
    [
        ("fwd", None, ("gathered", "dense"), (1024, 1024), ("lhs",)),
        ("fwd", None, ("gathered", "dense"), (1024, 1016), ()),
        ("fwd", "relu2", ("gathered", "dense"), (512, 1024), ("lhs",)),
        ("dgrad", None, ("gathered", "dense"), (1024, 1024), ()),
        ("dgrad", "relu2", ("gathered", "dense"), (1024, 512), ("lhs",)),
        ("dgrad", "relu2", ("gathered", "dense"), (1016, 512), ()),
        ("wgrad", None, ("gathered", "dense"), (512, 1024), ("lhs",)),
        ("wgrad", None, ("dense", "gathered"), (1024, 512), ("rhs",)),
        ("wgrad", None, ("gathered", "gathered"), (1024, 1024), ("lhs",)),
        ("wgrad", None, ("gathered", "gathered"), (1024, 512), ("rhs",)),
        ("wgrad", None, ("columns", "gathered"), (1024, 512), ("lhs", "rhs")),
        ("fwd", None, ("columns", "dense"), (64, 64), ("lhs",)),
        ("fwd", "relu2", ("columns", "dense"), (1024, 1024), ()),
    ],
)
def test_which_rows_are_read_in_place(contraction, epilogue, layouts, sizes, in_place):
    lhs, rhs = (Operand("bfloat16", layout) for layout in layouts)
    k, n = sizes
    epilogue = epilogue and epilogue_of(epilogue)
    for num_rows, expected in ((65536, in_place), (0, tuple(name for name in in_place if layouts[0] == "columns"))):
        asked = problem(contraction, num_rows, (64, k, n), "bfloat16", lhs=lhs, rhs=rhs, epilogue=epilogue, device=H200)
        found = bind(Cutlass(CutlassBackend(fuse="always")), asked)
        assert found.in_place == (expected if num_rows else tuple(set(expected) & {"lhs"}))


@pytest.mark.usefixtures("install_library")
def test_small_tiles_gather_no_rows():
    asked = problem("fwd", 640, W_SHAPE, "bfloat16", lhs=Operand("bfloat16", "gathered"), device=H200)
    bound = select(asked, CutlassBackend())
    assert bound.tile.rows == 64
    assert bound.in_place == ()


def test_the_kernels_by_hand_keep_what_those_that_are_compiled_keep():
    of_16_bits = [name.split(".")[3].split(":") for name, _ in KERNELS if ":" in name and ".bf16." in name]
    assert dict(of_16_bits) == RESIDUAL
    assert np.prod([len(KERNEL_ACTIVATIONS), 2]) == len(FUSED)
