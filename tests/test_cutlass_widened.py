"""The compiled kernels that widen codes, without a GPU: refusals, choice, tiles, calls and the plan of a layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import (
    CutlassBackend,
    PallasBackend,
    UnsupportedError,
    expert_plan,
    init_params,
    latent_moe,
    merge_state,
    native,
    presets,
    quantize,
    split_state,
)
from jax_latent_moe.config import CutlassTile
from jax_latent_moe.errors import InputError
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.formats import FORMATS, ScaledArray, encode
from jax_latent_moe.grouped_matmul import (
    Epilogue,
    GatheredRows,
    Operand,
    Operands,
    explain,
    fused,
    operand_of,
    problem,
    reference,
    select,
)
from jax_latent_moe.grouped_matmul.cutlass_sm90 import widened
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import FASTER, Cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES
from jax_latent_moe.grouped_matmul.cutlass_sm90.tiles import kernel_name
from jax_latent_moe.grouped_matmul.cutlass_sm90.widened import FEWEST_ROWS
from jax_latent_moe.grouped_matmul.pallas_sm90.widening import WIDENINGS
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS
from tests.kernels import A100, FUSED, H200, PLAIN, RESIDUAL, WHOLE, WIDENING, bound_activation, epilogue_of, library
from tests.tolerances import assert_close

every_format = pytest.mark.parametrize("name", CODES)
E, K, N, ROWS = 64, 1024, 2688, 64 * 128
TILES = "256x128x4", "192x192x5"
WHOLE_H200 = dataclasses.replace(H200, kernels=tuple(WHOLE.kernels.items()))


def asked(name="mxfp4", device=WHOLE_H200, **changes):
    made = problem("fwd", ROWS, (E, K, N), "bfloat16", rhs=Operand(name), device=device)
    return dataclasses.replace(made, **changes)


def float64(array):
    return np.asarray(jnp.asarray(array, "float32"), np.float64)


def test_every_format_is_read():
    assert set(CODES) == set(WIDENINGS) == set(FORMATS)


REFUSED = {
    "device": (dict(device=A100), "for NVIDIA Hopper GPUs (H100, H200), not 'NVIDIA A100-SXM4-80GB'"),
    "wgrad": (dict(contraction="wgrad"), "its kernel for bfloat16 x mxfp4 computes only fwd: XlaBackend() decodes"),
    "dgrad with an activation": (
        dict(contraction="dgrad", epilogue=epilogue_of("relu2")),
        "its gradients through codes have no epilogue: XLA computes",
    ),
    "dgrad of few rows": (dict(contraction="dgrad", num_rows=4 * E - 1), "255 rows are fewer than 4 for each of 64"),
    "dgrad of odd inputs": (
        dict(contraction="dgrad", k=1040),
        "its kernel decodes weights with a multiple of 32 inputs, not 1040: XlaBackend() decodes others.",
    ),
    "dgrad to float32": (dict(contraction="dgrad", out=Operand("float32")), "keep the dtype of the rows, bfloat16"),
    "float16": (
        dict(lhs=Operand("float16"), out=Operand("float16")),
        "widens codes to bfloat16, not float16 x mxfp4 to float16: cast the rows",
    ),
    "result": (dict(out=Operand("float32")), "not bfloat16 x mxfp4 to float32"),
    "float32 rows": (
        dict(lhs=Operand("float32")),
        "it has no kernels for float32 x mxfp4: it widens codes of a weight",
    ),
    "4-bit K": (dict(k=1040), "k=1040 of a weight in mxfp4 is not a positive multiple of 32"),
    "8-bit K": (dict(rhs=Operand("int8"), k=1032), "k=1032 of a weight in int8 is not a positive multiple of 16"),
    "no K": (dict(k=0), "k=0 of a weight in mxfp4 is not a positive multiple of 32"),
    "N": (dict(n=2692), "n=2692 is not a positive multiple of 8"),
    "half of N": (dict(n=2696, epilogue=epilogue_of("swiglu")), "half of n=2696 is not a multiple of 8"),
    "experts": (dict(num_experts=897), "no kernel was compiled for fwd of bfloat16 and mxfp4 and 897 experts"),
    "rows": (dict(num_rows=2**31), "must be below 2147483392"),
    "residual": (dict(epilogue=Epilogue(bound_activation("swiglu"), "pre")), "no kernel was compiled for fwd of"),
    "encoder": (
        dict(epilogue=dataclasses.replace(epilogue_of("relu2"), encodes="fp8_block")),
        "only its FP8 kernels encode hidden rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_run_it_refuses(case):
    changes, reason = REFUSED[case]
    changes = {"device": WHOLE_H200} | changes
    assert reason in (Cutlass(CutlassBackend()).supports(asked(**changes)) or "")


@every_format
def test_auto_takes_it_for_many_rows_and_a_named_backend_for_any(name):
    """Fewer rows go to the Pallas kernel, whose tiles are smaller, if it takes the problem."""
    many, few = (asked(name, num_rows=E * FEWEST_ROWS - less) for less in (0, 1))
    assert isinstance(select(many).backend, Cutlass)
    assert type(select(few).backend).__name__ == "Pallas"
    assert isinstance(select(few, CutlassBackend()).backend, Cutlass)
    assert isinstance(select(dataclasses.replace(few, n=2696)).backend, Cutlass)
    (tokens,) = jax.export.symbolic_shape("t")
    assert isinstance(select(asked(name, num_rows=22 * tokens)).backend, Cutlass)


def test_explain_says_the_choice():
    lines = explain(asked()).splitlines()
    assert lines[0].startswith("fwd of bfloat16 and mxfp4 to bfloat16, 8192 rows, 64 experts of 1024 x 2688 on gpu")
    assert lines[1:] == [
        f"  {CutlassBackend()!r} runs it",
        "  tile: CutlassTile(rows=192, columns=192, stages=5, cluster_rows=1, cluster_columns=1, rows_first=True), "
        "from a heuristic: no table has this problem",
    ]
    few = explain(asked(num_rows=E)).splitlines()
    assert few[1] == "  a weight in codes and fewer than 56 rows an expert: PallasBackend() is asked first"
    assert few[2] == f"  {PallasBackend()!r} runs it"
    dgrad = explain(asked(contraction="dgrad", num_rows=E)).splitlines()
    assert [line.split("(")[0] for line in dgrad[1:]] == ["  CutlassBackend", "  PallasBackend", "  XlaBackend"]
    assert dgrad[-1] == "  XlaBackend(method='blocked', block_rows=None) runs it"
    assert explain(asked(contraction="dgrad")).splitlines()[1] == f"  {CutlassBackend()!r} runs it"
    without = dataclasses.replace(H200, kernels=tuple((name, 512) for name in PLAIN))
    assert "refuses: no kernel was compiled for fwd of bfloat16 and mxfp4" in explain(asked(device=without))


def test_a_library_without_its_kernels_leaves_it_to_pallas(install_library):
    install_library(library(*PLAIN, *FUSED))
    assert type(select(asked(device=H200)).backend).__name__ == "Pallas"


def test_tiles_are_those_that_were_compiled_and_names_are_theirs():
    backend = Cutlass(CutlassBackend())
    assert {kernel_name(asked(), tile) for tile in backend.tiles(asked())} == set(WIDENING[:2])
    for activation in KERNEL_ACTIVATIONS:
        for residual in (RESIDUAL[activation], None):
            found = asked(epilogue=dataclasses.replace(epilogue_of(activation), residual=residual))
            names = {kernel_name(found, tile) for tile in backend.tiles(found)}
            prefix = f"sm90.fwd.bf16_codes.{activation}:{RESIDUAL[activation]}."
            assert names == {f"{prefix}{tile}.1x1" for tile in TILES}
    with pytest.raises(UnsupportedError, match=r"rows=128.* was not compiled for fwd of bfloat16 and mxfp4; these"):
        select(asked(), CutlassBackend(matmul_tile=CutlassTile()))


@pytest.mark.parametrize("activation", [None, "relu2", "swiglu"])
@pytest.mark.parametrize(
    ("k", "n", "rows", "columns"), [(1024, 2688, 192, 192), (512, 768, 192, 192), (2688, 1024, 256, 128)]
)
def test_three_warpgroups_unless_their_tiles_pad_more(activation, k, n, rows, columns):
    """Also with many rows. What was fitted to dense weights does not count."""
    for count in (11, 44, 352, 4096):
        epilogue = None if activation is None else epilogue_of(activation)
        found = asked(num_rows=E * count, k=k, n=n, epilogue=epilogue)
        tile = Cutlass(CutlassBackend()).tiles(found)[0]
        assert (tile.rows, tile.columns) == (rows, columns)


def test_fuse_chooses_the_activations():
    for name in KERNEL_ACTIVATIONS:
        for fuse, expected in (("always", True), ("measured", name in FASTER["fwd"]), ("never", False)):
            found = fused(select(asked(), CutlassBackend(fuse=fuse)), epilogue_of(name))
            assert (found is not None) == expected


@pytest.mark.parametrize(
    ("layout", "n", "in_place"),
    [("gathered", 2688, ("lhs",)), ("gathered", 1016, ()), ("columns", 2688, ()), ("dense", 2688, ())],
)
def test_which_rows_are_read_in_place(layout, n, in_place):
    found = asked(lhs=Operand("bfloat16", layout), n=n)
    assert bind(Cutlass(CutlassBackend()), found).in_place == in_place


def product(w, *, epilogue=None):
    """One product of 16 rows as it lowers for CUDA."""
    sizes = jnp.asarray([9, 7], jnp.int32)

    def run(rows, w):
        made = problem("fwd", 16, w.shape, "bfloat16", rhs=operand_of(w), epilogue=epilogue, device=WHOLE_H200)
        backend = Cutlass(CutlassBackend(fuse="always"))
        assert backend.supports(made) is None
        outputs = bind(backend, made)(Operands(rows, w, sizes))
        return outputs.out if epilogue is None else outputs.residual

    return jax.jit(run).trace(jnp.zeros((16, w.shape[1]), "bfloat16"), w).lower(lowering_platforms=("cuda",))


@every_format
def test_codes_and_scales_are_passed_as_they_are_stored(name):
    """4-bit codes [2, 1, 64, 64], 8-bit codes [2, 1, 64, 128]; the kernels' word for the format."""
    w = encode(jnp.zeros((2, 128, 64)), name)
    lowered = product(w)
    text = lowered.as_text()
    assert lowered.out_info.shape == (16, 64)
    assert f'code = "{CODES[name][0]}"' in text
    (line,) = (line for line in text.splitlines() if "@latent_moe_matmul_widened(" in line)
    operands = line.rsplit(" : ", 1)[1].split(" -> ")[0]
    for leaf in jax.tree.leaves(w):
        shape, dtype = "x".join(map(str, leaf.shape)), {"bfloat16": "bf16", "float32": "f32", "int8": "i8"}
        assert f"tensor<{shape}x{dtype.get(leaf.dtype.name, 'ui8')}>" in operands


@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_residuals_have_the_shapes_of_dense_products(activation):
    """The pre-activation, gate and hidden rows side by side, or the hidden rows."""
    gated = epilogue_of(activation).activation.gated
    w = encode(jnp.zeros((2, 128, 64)), "mxfp4", parts=2 if gated else 1)
    assert product(w, epilogue=epilogue_of(activation)).out_info.shape == (16, 64)


@pytest.mark.parametrize("n", [20, 64, 128])
@every_format
def test_gate_and_up_without_an_activation(monkeypatch, rng, name, n):
    """As one matrix whose scales lie side by side, or as experts of their own, of which the others have no rows.

    A kernel in JAX stands for the compiled one. Each matrix has other scales.
    """
    sizes, calls, k = np.asarray([5, 0, 9, 2]), [], 128
    values = rng.normal(size=(4, k, 2 * n)) * np.repeat([1, 8], n)
    w, rows = encode(jnp.asarray(values, jnp.float32), name, parts=2), jnp.asarray(rng.normal(size=(18, k)), "bfloat16")

    def kernel(target, operands, results, **attributes):
        table, codes, scales, more, group_sizes, ids, _ = operands
        calls.append(codes.shape)
        assert (target, codes.shape[1]) == ("matmul_widened", 1)
        own = ScaledArray(codes, dict(zip(CODES[name][1], (scales, more), strict=False)), name)
        given = float64(table[ids] if attributes["gathered"] else table)
        out = reference.grouped_matmul(given, float64(own.decode("float32")), np.asarray(group_sizes))
        made = [jnp.zeros(result.shape, result.dtype) for result in results]
        made[1], made[2] = jnp.asarray(out, "bfloat16"), jnp.asarray(given, "bfloat16")
        return made

    monkeypatch.setattr(native, "call", kernel)
    expected = reference.grouped_matmul(float64(rows), float64(w.decode("float32")), sizes)
    for lhs in (rows, GatheredRows(rows[::-1], jnp.arange(18)[::-1])):
        run = widened.run(asked(name), Operands(lhs, w, jnp.asarray(sizes)), {}).out
        assert_close(float64(run), expected, "bfloat16")
    separate = name == "nvfp4" or (name.startswith("fp8_block") and n % 128 > 0)
    assert {shape[0] for shape in calls} == {8 if separate else 4}


def test_scales_of_other_types():
    """Scales of 8-bit codes are made float32. Those of 4-bit codes must be what the format stores."""
    w = encode(jnp.ones((2, 128, 64)), "fp8_block")
    for scales in (w.scales["block"].astype("bfloat16"), jnp.full((2, 1, 1, 1), 127, jnp.uint8)):
        assert "tensor<2x1x1x1xf32>" in product(ScaledArray(w.codes, {"block": scales}, "fp8_block")).as_text()
    w = encode(jnp.ones((2, 128, 64)), "int4_32")
    wide = ScaledArray(w.codes, {"block": w.scales["block"].astype("float32")}, "int4_32")
    with pytest.raises(InputError, match=r"the scales 'block' of w are float32, not bfloat16: convert them, or decode"):
        product(wide)


def test_gate_and_up_are_two_matrices():
    with pytest.raises(
        InputError, match=r"codes of w are 1 matrices side by side, but swiglu needs 2: encode them with"
    ):
        product(encode(jnp.ones((2, 128, 64)), "mxfp4"), epilogue=epilogue_of("swiglu"))


@pytest.mark.parametrize(
    ("activation", "residual", "up", "alone"),
    [("relu2", "hidden", True, True), ("gelu", "pre", True, True), ("swiglu", "pre", False, True)],
)
def test_the_plan_of_a_layer(activation, residual, up, alone):
    """The forward products widen, by `auto` and by name. The input gradients decode the weights."""
    config = dataclasses.replace(presets.NEMOTRON_3_SUPER, activation=activation)
    shapes, codes = ((512, 1024, 2688 * (1 + config.gated)), (512, 2688, 1024)), Operand("mxfp4")
    for backend in ("auto", CutlassBackend()):
        given = dataclasses.replace(config, backend=backend)
        plan = plan_experts(given, 90112, *shapes, "bfloat16", w_in=codes, w_out=codes, device=WHOLE_H200)
        assert plan.residual == residual
        for product in (plan.up, plan.up_without_gradient, plan.down):
            assert isinstance(product.backend, Cutlass)
        assert (plan.up.problem.epilogue is not None, plan.up_without_gradient.problem.epilogue is not None) == (
            up,
            alone,
        )
        assert plan.up_without_gradient.in_place == ("lhs",)
        assert {type(product.backend).__name__ for product in (plan.down_dgrad, plan.up_dgrad)} == {"Cutlass"}
        assert plan.down_wgrad is plan.up_wgrad is None
        lines = str(plan).splitlines()
        above = next(i for i, line in enumerate(lines) if line.startswith("down: fwd of bfloat16 and mxfp4"))
        assert lines[above + 1] == f"  {CutlassBackend()!r} runs it"


def test_a_layer_trains_beside_frozen_codes(monkeypatch):
    """Both forward products widen codes; the gradients of the rows decode them."""
    monkeypatch.setattr(expert_plan, "current_device", lambda: WHOLE_H200)
    config = dataclasses.replace(presets.TOY, hidden_size=64, latent_size=64, expert_intermediate_size=64)
    config = dataclasses.replace(config, backend=CutlassBackend(decode="never"), dtype="bfloat16")
    codes = jax.eval_shape(lambda: quantize(init_params(jax.random.key(0), config), config, "mxfp4"))
    x = jax.ShapeDtypeStruct((32, 64), "bfloat16")

    def loss(params, x):
        trainable, state = split_state(params)
        return jax.grad(
            lambda trainable: jnp.sum(latent_moe(merge_state(trainable, state), x, config)[0].astype("float32"))
        )(trainable)

    text = jax.jit(loss).trace(codes, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@latent_moe_matmul_widened(") == 2
