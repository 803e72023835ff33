"""The `cutlass` backend as far as it goes without a GPU: refusals, loading, the choice of kernel, lowering."""

import collections
import ctypes
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_latent_moe.grouped_matmul.cutlass import Cutlass
from jax_latent_moe.grouped_matmul.fused import ACTIVATIONS, FASTER, fusing_refusal

from jax_latent_moe import CutlassBackend, UnsupportedError, expert_sort, top_k
from jax_latent_moe import native as loader
from jax_latent_moe.config import CutlassTile
from jax_latent_moe.grouped_matmul import (
    FusedActivation,
    GatheredRows,
    Problem,
    cutlass,
    cutlass_tiles,
    explain,
    select,
    select_fusing,
)
from jax_latent_moe.grouped_matmul.operands import LastColumns

H200 = Problem("fwd", 8192, 64, 1024, 2688, "bfloat16", "gpu", "NVIDIA H200")
BUILT = loader.library()
needs_library = pytest.mark.skipif(BUILT.missing is not None, reason=f"{BUILT.missing}")


def test_without_its_library_it_says_how_to_get_it(library_at, tmp_path):
    library_at(tmp_path / loader.FILE)
    with pytest.raises(UnsupportedError, match=r"libjax_latent_moe_cuda.so does not exist: build it with `make cuda`"):
        select(H200, CutlassBackend())


def test_a_file_that_is_no_library_is_named(library_at, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    library_at(tmp_path / "broken.so")
    with pytest.raises(UnsupportedError, match=r"broken.so cannot be loaded .* `make cuda`"):
        select(H200, CutlassBackend())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "for NVIDIA Hopper GPUs"),
        ({"platform": "cpu", "device_kind": "cpu"}, "for NVIDIA Hopper GPUs"),
        ({"dtype": "float32"}, "not float32"),
        ({"in_features": 1004}, "in_features=1004 is not a positive multiple of 8"),
        ({"out_features": 0}, "out_features=0 is not a positive multiple of 8"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_rows": 2**31}, "must be below 2147483392"),
        ({"out_features": 2696, "activation": FusedActivation("swiglu")}, "half of out_features=2696"),
    ],
)
def test_what_it_cannot_run_it_refuses(changes, reason):
    assert reason in (Cutlass(CutlassBackend()).supports(dataclasses.replace(H200, **changes)) or "")


def test_auto_goes_on_where_there_is_no_library(library_at, tmp_path):
    library_at(tmp_path / loader.FILE)
    text = explain(H200)
    assert "does not exist: build it with `make cuda`" in text
    assert type(select(H200)).__name__ == "Pallas"


@needs_library
def test_the_library_lists_kernels_of_each_kind():
    kinds = {(instance.contraction, instance.activation is not None) for instance in BUILT.instances}
    assert kinds == {("fwd", False), ("dgrad", False), ("wgrad", False), ("fwd", True), ("dgrad", True)}
    most = collections.Counter()
    for instance in BUILT.instances:
        kind = instance.dtype, instance.contraction, instance.activation
        most[kind] = max(most[kind], instance.max_experts)
        assert instance.dtype in ("bfloat16", "float16")
        assert instance.activation in (None, *ACTIVATIONS)
        assert instance.rows % 64 == instance.columns % 64 == 0
    assert min(most.values()) >= 896, "Kimi K3's experts fit beside the stages of no tile"


@needs_library
def test_xla_accepts_the_handlers():
    """Registering asks a handler for the version of its interface, which must not be newer than XLA's."""
    loaded = ctypes.CDLL(str(loader._path()))
    for target in loader.TARGETS:
        jax.ffi.register_ffi_target(f"test_{target}", loader.handlers(loaded, target), platform="cpu")


@pytest.fixture
def gathers(monkeypatch):
    """Kernels gather rows of any width that are to be gathered."""
    monkeypatch.setattr(cutlass, "FEW_PRODUCTS", 0)


@pytest.fixture(scope="module")
def on_the_cpu():
    """The handlers answer on the CPU too: they decode a call, and miss a GPU's stream, operand 0, alone."""
    loaded = ctypes.CDLL(str(loader._path()))
    for target in loader.TARGETS:
        execute = {"execute": loader.handlers(loaded, target)["execute"]}
        jax.ffi.register_ffi_target(f"latent_moe_{target}", execute, platform="cpu")


def calls():
    """Every kind of call that the package makes, by name."""
    backend, shape = Cutlass(CutlassBackend(fuse="always")), (16, 64)
    rows, sizes, weights = jnp.zeros(shape, jnp.bfloat16), jnp.asarray([9, 7]), jnp.zeros(16)
    w, wide = jnp.zeros((2, 64, 64), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
    relu2, swiglu, grad = FusedActivation("relu2"), FusedActivation("swiglu"), backend.matmul_activation_grad
    many, wide_rows = GatheredRows(rows, jnp.arange(256)), jnp.zeros((256, 64), jnp.bfloat16)
    weighted, columns = many._replace(weights=jnp.ones(256)), LastColumns(jnp.zeros((16, 96), jnp.bfloat16), 64)
    found = {
        "rows x w": lambda: backend.matmul(rows, w, sizes, transpose_w=False),
        "gathered rows x w": lambda: backend.matmul(many, w, sizes, transpose_w=False),
        "relu2 of gathered rows": lambda: backend.matmul_activation(many, w, sizes, activation=relu2, keep_pre=True),
        "rows x w^T": lambda: backend.matmul(rows, w, sizes, transpose_w=True),
        "wgrad": lambda: backend.outer(rows, rows, sizes),
        "columns x w": lambda: backend.matmul(columns, w, sizes, transpose_w=False),
        "outer of columns": lambda: backend.outer(columns, rows, sizes),
        "relu2": lambda: backend.matmul_activation(rows, w, sizes, activation=relu2, keep_pre=False),
        "outer of gathered rows": lambda: backend.outer(many, wide_rows, sizes),
        "outer with gathered and weighted gradients": lambda: backend.outer(wide_rows, weighted, sizes),
        "relu2's gradient": lambda: grad(rows, w, sizes, rows, weights, activation=relu2),
        "relu2's gradient of gathered rows": lambda: grad(many, w, sizes, wide_rows, jnp.zeros(256), activation=relu2),
        "top_k": lambda: top_k.compiled_top_k_ids(jnp.zeros((5, 40)), 3),
        "sort": lambda: expert_sort.compiled_sort_by_expert(jnp.zeros(700, jnp.int32), 3),
    }
    if any(instance.activation == "swiglu" for instance in BUILT.instances):
        two = jnp.zeros((16, 128), jnp.bfloat16)
        found |= {
            "swiglu": lambda: backend.matmul_activation(rows, wide, sizes, activation=swiglu, keep_pre=True),
            "swiglu's gradient": lambda: grad(rows, w, sizes, two, weights, activation=swiglu),
        }
    return found


@needs_library
@pytest.mark.parametrize("name", calls() if BUILT.missing is None else [])
def test_the_library_understands_what_the_package_calls(name, on_the_cpu, gathers):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"\(bad operands at: 0\)"):
        jax.block_until_ready(calls()[name]())


ATTRIBUTES = {
    "gathered": False,
    "transpose_w": False,
    "first_column": np.int32(0),
    "tile_rows": np.int32(128),
    "tile_columns": np.int32(128),
    "stages": np.int32(6),
    "cluster": np.int32(2),
    "rows_first": False,
}


def matmul_call(num_arguments=5, num_results=3, **attributes):
    rows, w = jnp.zeros((16, 64), jnp.bfloat16), jnp.zeros((2, 64, 64), jnp.bfloat16)
    arguments = rows, w, jnp.asarray([9, 7]), jnp.zeros(0, jnp.int32), jnp.zeros(0)
    shapes = ((16, 64), jnp.bfloat16), ((0, 0), jnp.bfloat16), ((2,), jnp.int32)
    results = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    call = jax.ffi.ffi_call("latent_moe_matmul", results[:num_results])
    jax.block_until_ready(call(*arguments[:num_arguments], **attributes))


@needs_library
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_missing_or_of_another_type_is_refused(name, on_the_cpu):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Wrong number of attributes: expected 8 but got 7"):
        matmul_call(**{other: value for other, value in ATTRIBUTES.items() if other != name})
    for value in (np.float32(1), np.int16(1), "1"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"\(bad operands at: 0, \d+\)"):
            matmul_call(**ATTRIBUTES | {name: value})


@needs_library
def test_a_call_with_too_many_or_too_few_parts_is_refused(on_the_cpu):
    for changes, reason in (
        ({"more": 1}, "Wrong number of attributes: expected 8 but got 9"),
        ({"num_arguments": 2}, "Wrong number of arguments: expected 5 but got 2"),
        ({"num_results": 1}, "Wrong number of results: expected 3 but got 1"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=reason):
            matmul_call(**ATTRIBUTES, **changes)


@needs_library
def test_a_tile_that_was_not_compiled_is_refused_with_those_that_were():
    backend = CutlassBackend(matmul_tile=CutlassTile(rows=128, columns=64))
    with pytest.raises(UnsupportedError, match=r"columns=64.* was not compiled .*; these were: CutlassTile\("):
        select(H200, backend)
    chosen = select(H200, CutlassBackend())
    assert set(chosen.candidates(H200)) >= {CutlassBackend(matmul_tile=chosen.tile(H200).tile)}


@needs_library
@pytest.mark.parametrize("out_features", [1016, 1024, 2688])
def test_a_shape_that_no_table_has_takes_a_tile_that_pads_least(out_features):
    """Few rows an expert take small tiles, where there are any."""
    for num_rows, fits in ((64 * 1024, lambda tile: tile.rows > 64), (64 * 64, lambda tile: tile.rows == 64)):
        problem = dataclasses.replace(H200, num_rows=num_rows, in_features=1000, out_features=out_features)
        tile = select(problem, CutlassBackend()).tile(problem).tile
        widths = {other: other.columns * other.cluster_columns for other in cutlass_tiles.compiled(problem)}
        padded = {other: -(-out_features // width) * width for other, width in widths.items() if fits(other)}
        assert tile in widths
        assert not padded or padded[tile] == min(padded.values())


@needs_library
@pytest.mark.parametrize("activation", [None, FusedActivation("relu2")])
@pytest.mark.parametrize(("rows_of_expert", "rows_first"), [(100, True), (512, True), (513, False)])
def test_tiles_of_few_rows_run_down_an_expert_first(activation, rows_of_expert, rows_first):
    num_rows = rows_of_expert * H200.num_experts
    problem = dataclasses.replace(H200, num_rows=num_rows, in_features=1000, activation=activation)
    tile, source = select(problem, CutlassBackend()).tile(problem)
    assert source.startswith("a heuristic")
    assert tile.rows_first == rows_first


@needs_library
@pytest.mark.parametrize("contraction", ["fwd", "dgrad"])
def test_fuse_says_what_is_fused(contraction):
    fused = {instance.activation for instance in BUILT.instances if instance.contraction == contraction}
    for name in ACTIVATIONS:
        problem = dataclasses.replace(H200, contraction=contraction, activation=FusedActivation(name, 4.0, 25.0))
        for fuse, expected in (
            ("always", name in fused),
            ("measured", name in fused and name in FASTER["cutlass"][contraction]),
            ("never", False),
        ):
            assert (select_fusing(problem, CutlassBackend(fuse=fuse)) is not None) == expected


def test_what_fuse_leaves_to_xla_is_said():
    assert "fuse='always' has the kernel" in (fusing_refusal("cutlass", "never", "fwd", "relu2") or "")


@needs_library
def test_auto_takes_it():
    assert type(select(H200)).__name__ == "Cutlass"


@needs_library
def test_lowers_for_cuda(gathers):
    backend, activation = Cutlass(CutlassBackend(fuse="always")), FusedActivation("relu2")
    num_rows, (experts, k, n) = 3000, (8, 72, 136)
    rows, dout, kept = (jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16) for width in (k, n, n))
    w, w_out = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((experts, k, n), (experts, n, k)))
    sizes, weights = jax.ShapeDtypeStruct((experts,), jnp.int32), jax.ShapeDtypeStruct((num_rows,), jnp.float32)

    def run(rows, w, dout, sizes, w_out, kept, weights):
        return (
            backend.matmul(GatheredRows(rows[:100], jnp.arange(num_rows)), w, sizes, transpose_w=False),
            backend.matmul(dout, w, sizes, transpose_w=True),
            backend.outer(GatheredRows(rows[:100], jnp.arange(num_rows)), dout, sizes)[0],
            backend.matmul_activation(rows, w, sizes, activation=activation, keep_pre=True),
            backend.matmul_activation_grad(rows, w_out, sizes, kept, weights, activation=activation)[:3],
        )

    lowered = jax.jit(run).trace(rows, w, dout, sizes, w_out, kept, weights).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("gathered = true") == text.count("gathered_rows = true") == 1
    for target in ("matmul", "wgrad", "matmul_activation", "matmul_activation_grad"):
        assert f"@latent_moe_{target}(" in text
    shapes = [value.shape for value in jax.tree.leaves(lowered.out_info)]
    assert shapes[:3] == [(num_rows, n), (num_rows, k), (experts, k, n)]
    assert shapes[3:] == [(num_rows, n)] * 3 + [(num_rows,)]
