"""The calls of the `cutlass` backend to its compiled library: targets, attributes, shapes of results."""

import ctypes
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe import CutlassBackend, native
from jax_latent_moe.formats import encode, encode_rows
from jax_latent_moe.formats.both_layouts import encode_both
from jax_latent_moe.grouped_matmul import GatheredRows, LastColumns, Operands, operand_of, problem
from jax_latent_moe.grouped_matmul.cutlass_sm90 import backend as cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.routing.expert_sort import compiled_sort_by_expert
from jax_latent_moe.routing.top_k import compiled_top_k_ids
from jax_latent_moe.row_encoders import GradientEncoder, RowEncoder
from tests.kernels import H200, epilogue_of

BUILT = native.library()
needs_library = pytest.mark.skipif(BUILT.missing is not None, reason=f"{BUILT.missing}")


@pytest.fixture
def gathers(monkeypatch):
    """Kernels gather rows of any width that are to be gathered."""
    monkeypatch.setattr(cutlass, "FEW_PRODUCTS", 0)


@pytest.fixture(scope="module")
def on_the_cpu():
    """The handlers answer on the CPU too: they decode a call, and miss a GPU's stream, operand 0, alone."""
    loaded = ctypes.CDLL(str(native.library_path()))
    for target in native.INTERFACE:
        execute = {"execute": native.handlers(loaded, target)["execute"]}
        jax.ffi.register_ffi_target(native.PREFIX + target, execute, platform="cpu")


def run(contraction, lhs, rhs, *more, epilogue=None, config=None):
    """One product as a bound decision runs it, on the operands as they are stored."""
    width = lhs.shape[1]
    w_shape = (2, width, rhs.shape[1]) if contraction == "wgrad" else rhs.shape
    asked = problem(
        contraction,
        lhs.shape[0],
        w_shape,
        lhs.dtype,
        lhs=operand_of(lhs),
        rhs=operand_of(rhs),
        epilogue=epilogue,
        device=H200,
    )
    backend = Cutlass(config or CutlassBackend(fuse="always"))
    assert backend.supports(asked) is None
    outputs = bind(backend, asked)(Operands(lhs, rhs, jnp.asarray([9, 7]), *more))
    return outputs.out.matrix if isinstance(outputs.out, LastColumns) else outputs.out


def calls():
    """Every kind of call that the package makes: the target, what makes it, and what the call says of itself."""
    shape = (16, 64)
    rows, weights = jnp.zeros(shape, jnp.bfloat16), jnp.zeros(16)
    w, wide = jnp.zeros((2, 64, 64), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
    many, wide_rows = GatheredRows(rows, jnp.arange(256)), jnp.zeros((256, 64), jnp.bfloat16)
    weighted, columns = many._replace(weights=jnp.ones(256)), LastColumns(jnp.zeros((16, 96), jnp.bfloat16), 64)
    relu2, swiglu, two = epilogue_of("relu2"), epilogue_of("swiglu"), jnp.zeros((16, 128), jnp.bfloat16)
    alone = dataclasses.replace(relu2, residual=None)
    situ_glu = dataclasses.replace(epilogue_of("situ_glu"), residual=None)
    codes, of_w, of_wide = encode_rows(rows, "fp8_block"), encode(w, "fp8_block"), encode(wide, "fp8_block", parts=2)
    fwd, dgrad, grad = "matmul", "matmul", "matmul_activation_grad"
    widened, in_4_bits = "matmul_widened", encode(w, "int4_32_zero")
    return {
        "fwd": (fwd, lambda: run("fwd", rows, w), "gathered = false"),
        "fwd of gathered rows": (fwd, lambda: run("fwd", many, w), "gathered = true"),
        "fwd of columns": (fwd, lambda: run("fwd", columns, w), "first_column = 32 : i32"),
        "dgrad": (dgrad, lambda: run("dgrad", rows, w), "sm90.dgrad.bf16."),
        "wgrad": ("wgrad", lambda: run("wgrad", rows, rows), "sm90.wgrad.bf16."),
        "wgrad of columns": ("wgrad", lambda: run("wgrad", columns, rows), "first_column = 32 : i32"),
        "wgrad of gathered rows": ("wgrad", lambda: run("wgrad", many, wide_rows), "gathered_lhs = true"),
        "wgrad of gathered and weighted gradients": (
            "wgrad",
            lambda: run("wgrad", wide_rows, weighted),
            "gathered_rhs = true",
        ),
        "relu2": ("matmul_activation", lambda: run("fwd", rows, w, epilogue=alone), "keep_residual = false"),
        "relu2 of gathered rows": (
            "matmul_activation",
            lambda: run("fwd", many, w, epilogue=relu2),
            "sm90.fwd.bf16.relu2:hidden.",
        ),
        "gelu": (
            "matmul_activation",
            lambda: run("fwd", rows, w, epilogue=epilogue_of("gelu")),
            "keep_residual = true",
        ),
        "situ_glu": (
            "matmul_activation",
            lambda: run("fwd", rows, wide, epilogue=epilogue_of("situ_glu")),
            "linear_beta = 2.500000e+01 : f32",
        ),
        "swiglu": (
            "matmul_activation",
            lambda: run("fwd", rows, wide, epilogue=swiglu),
            "sm90.fwd.bf16.swiglu:gate_hidden.",
        ),
        "relu2's gradient": (
            grad,
            lambda: run("dgrad", rows, w, rows, weights, epilogue=relu2),
            "output_operand_alias",
        ),
        "relu2's gradient of gathered rows": (
            grad,
            lambda: run("dgrad", many, w, wide_rows, jnp.zeros(256), epilogue=relu2),
            "gathered = true",
        ),
        "swiglu's gradient": (
            grad,
            lambda: run("dgrad", rows, w, two, weights, epilogue=swiglu),
            "sm90.dgrad.bf16.swiglu:gate_hidden.",
        ),
        "codes": ("matmul_codes", lambda: run("fwd", codes, of_w), "sm90.fwd.e4m3."),
        "codes through relu2": (
            "matmul_codes",
            lambda: run("fwd", codes, of_w, epilogue=relu2),
            "sm90.fwd.e4m3.relu2:hidden.",
        ),
        "relu2, encoded": (
            "matmul_encoded",
            lambda: run("fwd", codes, of_w, epilogue=dataclasses.replace(relu2, encodes="fp8_block")),
            "keep_residual = true",
        ),
        "situ_glu, encoded": (
            "matmul_encoded",
            lambda: run("fwd", codes, of_wide, epilogue=dataclasses.replace(situ_glu, encodes="fp8_block_pow2")),
            "linear_beta = 2.500000e+01 : f32",
        ),
        "rows by widened codes": (widened, lambda: run("fwd", rows, of_w), 'code = "e4m3"'),
        "gathered rows by widened codes": (widened, lambda: run("fwd", many, in_4_bits), "gathered = true"),
        "columns by widened codes": (widened, lambda: run("fwd", columns, in_4_bits), 'code = "int4"'),
        "relu2 of widened codes": (
            widened,
            lambda: run("fwd", rows, in_4_bits, epilogue=relu2),
            "sm90.fwd.bf16_codes.relu2:hidden.",
        ),
        "situ_glu of widened codes": (
            widened,
            lambda: run("fwd", rows, of_wide, epilogue=situ_glu),
            "linear_beta = 2.500000e+01 : f32",
        ),
        "swiglu of widened codes": (
            widened,
            lambda: run("fwd", many, of_wide, epilogue=swiglu),
            "keep_residual = true",
        ),
        "dgrad by decoded codes": ("decode_weight", lambda: run("dgrad", rows, in_4_bits), 'code = "int4"'),
        "dgrad by two decoded matrices": ("matmul", lambda: run("dgrad", two, of_wide), "sm90.fwd.bf16."),
        "top_k": ("top_k", lambda: compiled_top_k_ids(jnp.zeros((5, 40)), 3), ""),
        "encode": (
            "encode_blocks",
            lambda: encode_both(jnp.zeros((2, 128, 256)), "fp8_block_pow2", 2),
            "power_of_two = true",
        ),
        "encode rows": ("encode_rows", lambda: RowEncoder("fp8_block_pow2", None)(rows).codes, "power_of_two = true"),
        "encode relu2's gradient": (
            "relu2_gradient",
            lambda: GradientEncoder("fp8_block", None)(rows, rows, weights)[0],
            "power_of_two = false",
        ),
        "sort": ("sort_by_expert", lambda: compiled_sort_by_expert(jnp.zeros(700, jnp.int32), 3), ""),
    }


@pytest.mark.usefixtures("install_library", "gathers")
@pytest.mark.parametrize("name", calls())
def test_calls_lower_for_cuda(name):
    """To their target, with the attributes of the interface: `native.call` refuses others."""
    target, call, says = calls()[name]
    text = jax.jit(call).trace().lower(lowering_platforms=("cuda",)).as_text()
    assert f"@latent_moe_{target}(" in text
    assert says in text


@needs_library
@pytest.mark.usefixtures("on_the_cpu", "install_library", "gathers")
@pytest.mark.parametrize("name", calls())
def test_the_library_understands_what_the_package_calls(name):
    _, call, _ = calls()[name]
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"\(bad operands at: 0\)"):
        jax.block_until_ready(call())


@pytest.mark.usefixtures("install_library", "gathers")
def test_results_have_the_shapes_of_the_contractions():
    num_rows, (experts, k, n) = 3000, (8, 72, 136)
    rows, dout, kept = (jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16) for width in (k, n, n))
    w, w_out = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((experts, k, n), (experts, n, k)))
    sizes, weights = jax.ShapeDtypeStruct((experts,), jnp.int32), jax.ShapeDtypeStruct((num_rows,), jnp.float32)

    def product(contraction, w_shape, lhs, rhs, sizes, *more, epilogue=None):
        asked = problem(contraction, num_rows, w_shape, "bfloat16", lhs=operand_of(lhs), epilogue=epilogue, device=H200)
        return bind(Cutlass(CutlassBackend(fuse="always")), asked)(Operands(lhs, rhs, sizes, *more))

    def run(rows, w, dout, sizes, w_out, kept, weights):
        table, relu2 = GatheredRows(rows[:100], jnp.arange(num_rows)), epilogue_of("relu2")
        up = product("fwd", w.shape, rows, w, sizes, epilogue=relu2)
        down = product("dgrad", w_out.shape, rows, w_out, sizes, kept, weights, epilogue=relu2)
        assert up.residual is up.out, "relu2's hidden rows are what is kept"
        assert down.hidden is None
        gathered = product("fwd", w.shape, table, w, sizes)
        assert gathered.lhs.shape == rows.shape
        return (
            gathered.out,
            product("dgrad", w.shape, dout, w, sizes).out,
            product("wgrad", w.shape, table, dout, sizes).out,
            up.out,
            (down.out, down.row_weight_gradients),
        )

    lowered = jax.jit(run).trace(rows, w, dout, sizes, w_out, kept, weights).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("gathered = true") == text.count("gathered_lhs = true") == 1
    for target in ("matmul", "wgrad", "matmul_activation", "matmul_activation_grad"):
        assert f"@latent_moe_{target}(" in text
    shapes = [value.shape for value in jax.tree.leaves(lowered.out_info)]
    assert shapes[:3] == [(num_rows, n), (num_rows, k), (experts, k, n)]
    assert shapes[3:] == [(num_rows, n)] * 2 + [(num_rows,)]
