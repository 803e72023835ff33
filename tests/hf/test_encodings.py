"""Quantised weights against the definitions of their formats, one value at a time."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_latent_moe import hf
from jax_latent_moe.hf import encodings
from tests.hf.checkpoints import (
    BFLOAT16,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    GPT_OSS,
    KIMI_K3,
    NEMOTRON_H,
    deepseek_v4,
    gated,
    gpt_oss,
    kimi,
    nemotron,
    random_tensors,
    save,
)
from tests.hf.test_round_trip import same_bits

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def e2m1(code: int) -> float:
    """OCP Microscaling Formats 1.0, section 5.3.3: sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def e4m3(code: int) -> float:
    """OCP 8-bit Floating Point 1.0: sign, four bits of exponent (bias 7), three of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


E4M3 = np.array([e4m3(code) for code in range(256)])


def unpacked(packed):
    """The codes of a row. The low four bits of a byte are the first code, the high four bits the second."""
    return np.array([[e2m1(code) for byte in row for code in (byte & 15, byte >> 4)] for row in packed.tolist()])


def random_mxfp4(rng, out, width):
    packed = rng.integers(0, 256, (out, width // 2), dtype=np.uint8)
    scale = rng.integers(100, 140, (out, width // 32), dtype=np.uint8)
    values = unpacked(packed) * np.repeat(2.0 ** (scale.astype(float) - 127), 32, axis=1)
    return {"weight_packed": packed, "weight_scale": scale}, values


def random_nvfp4(rng, out, width):
    packed = rng.integers(0, 256, (out, width // 2), dtype=np.uint8)
    scale = rng.integers(0, 126, (out, width // 16), dtype=np.uint8)
    overall = np.float32(rng.uniform(0.001, 0.1))
    blocks = unpacked(packed) * np.repeat(E4M3[scale], 16, axis=1)
    parts = {"weight": packed, "weight_scale": scale.view(FP8), "weight_scale_2": np.float32(overall)}
    return parts | {"input_scale": np.float32(0.5)}, (blocks * float(overall)).astype(np.float32)


def random_fp8(rng, out, width):
    codes = rng.integers(0, 126, (out, width), dtype=np.uint8) | rng.integers(0, 2, (out, width), dtype=np.uint8) << 7
    scale = np.float32(rng.uniform(0.001, 0.1))
    values = (E4M3[codes] * float(scale)).astype(np.float32)
    return {"weight": codes.view(FP8), "weight_scale": scale, "input_scale": np.float32(1)}, values


def gpt_oss_mxfp4(rng):
    """A layer like the published ones: codes and scales of all experts in one tensor each; and its values."""
    tensors, values = random_tensors(rng, gpt_oss("model.layers.0.mlp.")), {}
    for name, (out, width) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
        parts = [random_mxfp4(rng, out, width) for _ in range(4)]
        base = f"model.layers.0.mlp.experts.{name}"
        del tensors[base]
        tensors[f"{base}_blocks"] = np.stack([part["weight_packed"] for part, _ in parts]).reshape(4, out, -1, 16)
        tensors[f"{base}_scales"] = np.stack([part["weight_scale"] for part, _ in parts])
        tensors[f"{base}_bias"] = rng.normal(size=(4, out)).astype(BFLOAT16)
        values[name] = np.stack([value for _, value in parts])
    tensors["model.layers.0.mlp.router.weight"] = rng.normal(size=(4, 64)).astype(BFLOAT16)
    return GPT_OSS | dict(hidden_size=64, intermediate_size=32), tensors, values


def test_gpt_oss_codes(rng, tmp_path):
    """Exact in bfloat16, gate and up rows taken apart."""
    config, tensors, values = gpt_oss_mxfp4(rng)
    save(tmp_path / "in", config, tensors)
    checkpoint = hf.open_checkpoint(tmp_path / "in")
    experts = hf.import_layer(checkpoint, 0)["experts"]
    assert hf.plan_layer(checkpoint, 0).quantised == ("MXFP4 (gpt-oss)",)
    assert experts["w_in"].dtype == experts["w_out"].dtype == BFLOAT16
    for half in (0, 1):
        same_bits(experts["w_in"][:, :, half], values["gate_up_proj"][:, half::2].swapaxes(1, 2).astype(BFLOAT16))
    same_bits(experts["w_out"], values["down_proj"].swapaxes(1, 2).astype(BFLOAT16))


def test_gpt_oss_codes_of_a_wrong_shape(rng, tmp_path):
    config, tensors, _ = gpt_oss_mxfp4(rng)
    base = "model.layers.0.mlp.experts."
    tensors[f"{base}gate_up_proj_blocks"] = tensors[f"{base}gate_up_proj_blocks"][:, :-1].copy()
    del tensors[f"{base}down_proj_scales"]
    save(tmp_path, config, tensors)
    with pytest.raises(hf.CheckpointError) as error:
        hf.import_layer(hf.open_checkpoint(tmp_path), 0)
    assert sorted(error.value.problems) == [
        f"missing {base}down_proj_scales (MXFP4 (gpt-oss)).",
        f"{base}gate_up_proj_blocks: shape [63, 2, 16], expected [64, 2, 16].",
    ]
    save(tmp_path / "experts", config | dict(num_local_experts=5), tensors)
    with pytest.raises(hf.CheckpointError, match=r"expected \[num_experts=5"):
        hf.import_layer(hf.open_checkpoint(tmp_path / "experts"), 0)


def test_deepseek_v4_codes(rng, tmp_path):
    """MXFP4 experts and FP8 shared experts, whose scales are powers of two."""
    config = DEEPSEEK_V4 | dict(hidden_size=64, moe_intermediate_size=32)
    sizes = {"w1": (32, 64), "w3": (32, 64), "w2": (64, 32)}
    tensors, values = random_tensors(rng, deepseek_v4("layers.0.ffn.")), {}
    tensors["layers.0.ffn.gate.weight"] = rng.normal(size=(4, 64)).astype(BFLOAT16)
    for name in [name for name in tensors if ".w" in name]:
        base, shape = name.removesuffix("weight"), sizes.get(name.split(".")[-2])
        if shape is None:
            continue
        if "shared" in name:
            codes = rng.integers(0, 126, shape, dtype=np.uint8)
            tensors[name], scale = codes.view(FP8), rng.integers(100, 140, (1, 1), dtype=np.uint8)
            values[base] = E4M3[codes] * 2.0 ** (scale.astype(float) - 127)
        else:
            parts, values[base] = random_mxfp4(rng, *shape)
            tensors[name], scale = parts["weight_packed"].view(np.int8), parts["weight_scale"]
        tensors[f"{base}scale"] = scale.view(ml_dtypes.float8_e8m0fnu)
    save(tmp_path, config, tensors)
    checkpoint = hf.open_checkpoint(tmp_path)
    params = hf.import_layer(checkpoint, 0)
    assert hf.plan_layer(checkpoint, 0).quantised == ("FP8 (128 x 128 blocks, DeepSeek-V4)", "MXFP4 (DeepSeek-V4)")
    for e in range(4):
        for half, name in enumerate(("w1", "w3")):
            wanted = values[f"layers.0.ffn.experts.{e}.{name}."]
            same_bits(params["experts"]["w_in"][e, :, half], wanted.T.astype(BFLOAT16))
        same_bits(params["experts"]["w_out"][e], values[f"layers.0.ffn.experts.{e}.w2."].T.astype(BFLOAT16))
    for half, name in enumerate(("w1", "w3")):
        wanted = values[f"layers.0.ffn.shared_experts.{name}."]
        same_bits(params["shared"]["w_in"][:, half], wanted.T.astype(BFLOAT16))


def test_every_e2m1_code():
    assert encodings.E2M1.tolist() == [e2m1(code) for code in range(16)]
    assert [math.copysign(1, value) for value in encodings.E2M1.tolist()] == [1] * 8 + [-1] * 8


def test_the_low_nibble_is_first():
    parts = {"weight_packed": np.full((1, 16), 0x21, np.uint8), "weight_scale": np.full((1, 1), 127, np.uint8)}
    assert encodings.MXFP4.decode(parts).tolist() == [[0.5, 1.0] * 16]


def test_every_mxfp4_scale():
    scale = np.arange(253, dtype=np.uint8).reshape(-1, 1)
    values = encodings.MXFP4.decode({"weight_packed": np.full((253, 16), 0x77, np.uint8), "weight_scale": scale})
    np.testing.assert_array_equal(values, np.repeat(6 * 2.0 ** (np.arange(253.0)[:, None] - 127), 32, axis=1))
    np.testing.assert_array_equal(values.astype(BFLOAT16).astype(np.float64), values)  # exact in bfloat16


def test_compressed_tensors_divides_by_its_global_scale(rng):
    parts, _ = random_nvfp4(rng, 4, 32)
    blocks = encodings.NVFP4_MODELOPT.decode(parts | {"weight_scale_2": np.float32(1)})
    renamed = {"weight_packed": parts["weight"], "weight_scale": parts["weight_scale"]}
    out = encodings.NVFP4_COMPRESSED.decode(renamed | {"weight_global_scale": np.array([768.0], np.float32)})
    np.testing.assert_array_equal(out, blocks / np.float32(768))


def replace(tensors, name, parts):
    del tensors[name]
    tensors |= {name.removesuffix("weight") + suffix: np.asarray(part) for suffix, part in parts.items()}


def quantised_nemotron(rng):
    """A layer like the published NVFP4 ones: NVFP4 experts, FP8 projections and shared expert; and its values."""
    config = NEMOTRON_H | dict(hidden_size=32, moe_latent_size=16, moe_intermediate_size=48)
    config |= dict(moe_shared_expert_intermediate_size=20, layers_block_type=["moe"])
    prefix = "backbone.layers.0.mixer."
    shapes = dict.fromkeys(nemotron(prefix))
    sizes = {"D": 32, "L": 16, "M": 48, "MS": 20}
    for name in shapes:
        key = name.removeprefix(prefix)
        shapes[name] = {
            "gate.weight": (4, sizes["D"]),
            "gate.e_score_correction_bias": (4,),
            "fc1_latent_proj.weight": (sizes["L"], sizes["D"]),
            "fc2_latent_proj.weight": (sizes["D"], sizes["L"]),
            "shared_experts.up_proj.weight": (sizes["MS"], sizes["D"]),
            "shared_experts.down_proj.weight": (sizes["D"], sizes["MS"]),
        }.get(key, (sizes["M"], sizes["L"]) if "up_proj" in key else (sizes["L"], sizes["M"]))
    tensors, values = random_tensors(rng, shapes), {}
    for name, shape in shapes.items():
        if ".experts." in name or "latent_proj" in name or "shared_experts" in name:
            parts, values[name] = (random_nvfp4 if ".experts." in name else random_fp8)(rng, *shape)
            replace(tensors, name, parts)
    return config, prefix, tensors, values


def test_nemotron_nvfp4_and_fp8(rng, tmp_path):
    config, prefix, tensors, values = quantised_nemotron(rng)
    save(tmp_path / "in", config, tensors)
    checkpoint = hf.open_checkpoint(tmp_path / "in")
    assert hf.plan_layer(checkpoint, 0).quantised == ("FP8", "NVFP4 (ModelOpt)")
    wide, narrow = hf.import_layer(checkpoint, 0, dtype="float32"), hf.import_layer(checkpoint, 0)
    for params, dtype in ((wide, np.float32), (narrow, BFLOAT16)):
        same_bits(params["down_proj"]["kernel"], values[prefix + "fc1_latent_proj.weight"].astype(dtype).T)
        same_bits(params["shared"]["w_out"], values[prefix + "shared_experts.down_proj.weight"].astype(dtype).T)
        for e in range(4):
            same_bits(params["experts"]["w_in"][e], values[f"{prefix}experts.{e}.up_proj.weight"].astype(dtype).T)
            same_bits(params["experts"]["w_out"][e], values[f"{prefix}experts.{e}.down_proj.weight"].astype(dtype).T)
    assert narrow["router"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(
        hf.CheckpointError,
        match=r"experts/w_in is stored as NVFP4 \(ModelOpt\) and is dense here: import it with keep_quantized=True",
    ):
        hf.replace_layers(checkpoint, [(0, narrow)], tmp_path / "out")
    hf.write_layers(tmp_path / "out", [(0, wide)], dict(checkpoint.configs), checkpoint.names)
    save(tmp_path / "out", config, {"lm_head.weight": np.zeros(2, np.float32)})
    (tmp_path / "out" / "model.safetensors").unlink()
    same_bits(hf.import_layer(hf.open_checkpoint(tmp_path / "out"), 0)["experts"]["w_in"], wide["experts"]["w_in"])


def test_kimi_mxfp4(rng, tmp_path):
    text = KIMI_K3["text_config"] | dict(routed_expert_hidden_size=32, moe_intermediate_size=64, num_hidden_layers=2)
    prefix = "language_model.model.layers.1.block_sparse_moe."
    shapes = kimi(prefix)
    for name, shape in shapes.items():  # the same layer with l 32 and m 64
        shapes[name] = tuple({8: 32, 12: 64, 24: 128}.get(n, n) for n in shape)
    tensors, values = random_tensors(rng, shapes), {}
    for name, shape in shapes.items():
        if ".experts." in name:
            parts, values[name] = random_mxfp4(rng, *shape)
            replace(tensors, name, parts)
    save(tmp_path, KIMI_K3 | dict(text_config=text), tensors)
    checkpoint = hf.open_checkpoint(tmp_path)
    assert hf.plan_layer(checkpoint, 1).quantised == ("MXFP4",)
    experts = hf.import_layer(checkpoint, 1)["experts"]
    for e in range(4):
        for matrix, name in (
            (experts["w_in"][e, :, 0], "w1"),
            (experts["w_in"][e, :, 1], "w3"),
            (experts["w_out"][e], "w2"),
        ):
            exact = values[f"{prefix}experts.{e}.{name}.weight"]
            np.testing.assert_array_equal(np.asarray(matrix, np.float64), exact.T)


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16, BFLOAT16])
def test_deepseek_fp8_tiles(scale_dtype, rng, tmp_path):
    config = DEEPSEEK_V3 | dict(hidden_size=130, moe_intermediate_size=200)
    shapes = gated("model.layers.1.mlp.", bias=True, shared=True)
    for name, shape in shapes.items():
        shapes[name] = tuple({16: 130, 12: 200}.get(n, n) for n in shape)
    tensors, values = random_tensors(rng, shapes), {}
    for name, (out, width) in ((n, s) for n, s in shapes.items() if "experts" in n):
        weight = rng.normal(size=(out, width)).astype(FP8)
        scale = rng.uniform(0.5, 2, (math.ceil(out / 128), math.ceil(width / 128))).astype(scale_dtype)
        tiled = [[scale[i // 128, j // 128] for j in range(width)] for i in range(out)]
        values[name] = weight.astype(np.float32) * np.array(tiled, np.float32)
        replace(tensors, name, {"weight": weight, "weight_scale_inv": scale})
    save(tmp_path, config, tensors)
    params = hf.import_layer(hf.open_checkpoint(tmp_path), 1, dtype="float32")
    for e in range(4):
        same_bits(params["experts"]["w_in"][e, :, 0], values[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"].T)
        same_bits(params["experts"]["w_out"][e], values[f"model.layers.1.mlp.experts.{e}.down_proj.weight"].T)


@pytest.mark.parametrize("scale_dtype", [np.float16, BFLOAT16])
def test_scales_of_16_bits_are_multiplied_in_float32(scale_dtype, rng):
    codes = np.arange(126, dtype=np.uint8).reshape(2, 63)
    for scale in (rng.uniform(0.5, 2, ()), rng.uniform(0.5, 2, (2, 1))):
        narrow = np.asarray(scale, scale_dtype)
        out = encodings.FP8.decode({"weight": codes.view(FP8), "weight_scale": narrow})
        same_bits(out, (E4M3[codes] * narrow.astype(np.float64)).astype(np.float32))  # 4 + 11 bits: exact
    parts, _ = random_nvfp4(rng, 4, 32)
    blocks = encodings.NVFP4_MODELOPT.decode(parts | {"weight_scale_2": np.float32(1)}).astype(np.float64)
    narrow = np.asarray(rng.uniform(0.5, 2), scale_dtype)
    out = encodings.NVFP4_MODELOPT.decode(parts | {"weight_scale_2": narrow})
    same_bits(out, (blocks * float(narrow)).astype(np.float32))
    renamed = {"weight_packed": parts["weight"], "weight_scale": parts["weight_scale"], "weight_global_scale": narrow}
    same_bits(encodings.NVFP4_COMPRESSED.decode(renamed), (blocks / float(narrow)).astype(np.float32))


@pytest.mark.parametrize(
    ("suffix", "part", "message"),
    [
        ("weight_scale", np.full((48, 1), 0x7F, np.uint8).view(FP8), "NaN or infinity"),
        ("weight_scale_2", np.float32("inf"), "NaN or infinity"),
        ("weight_scale_2", np.float64(1), "dtype F64, expected F32"),
        ("weight_scale", np.ones((48, 2), FP8), r"shape \[48, 2\], expected \[48, 1\]"),
        ("weight_scale", None, r"missing .*up_proj\.weight_scale \(NVFP4"),
        ("weight_zero_point", np.float32(0), "not expected: .*up_proj.weight_zero_point"),
    ],
)
def test_broken_quantised_weights_are_refused(suffix, part, message, rng, tmp_path):
    config, prefix, tensors, _ = quantised_nemotron(rng)
    name = f"{prefix}experts.1.up_proj.{suffix}"
    if part is None:
        del tensors[name]
    else:
        tensors[name] = np.asarray(part)
    save(tmp_path, config, tensors)
    with pytest.raises(hf.CheckpointError, match=message):
        hf.import_layer(hf.open_checkpoint(tmp_path), 0)


@pytest.mark.parametrize("scale", [253, 254, 255])
def test_an_mxfp4_scale_beyond_any_weight_is_refused(scale):
    parts = {"weight_packed": np.zeros((1, 16), np.uint8), "weight_scale": np.full((1, 1), scale, np.uint8)}
    with pytest.raises(ValueError, match=str(scale)):
        encodings.MXFP4.decode(parts)
