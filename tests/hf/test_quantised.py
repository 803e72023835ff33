"""Quantised experts held as they are stored: the same values as decoding gives, the same bytes back, or the error."""

import itertools
import math
import os
import shutil
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_latent_moe import dequantize, hf, latent_moe, quantize
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.hf.__main__ import main
from tests.hf import test_errors as breaks
from tests.hf.checkpoints import (
    BFLOAT16,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    KIMI_K3,
    NEMOTRON_H,
    deepseek_v4,
    gated,
    kimi,
    nemotron,
    random_tensors,
    save,
)
from tests.hf.test_encodings import FP8, gpt_oss_mxfp4, random_fp8, random_mxfp4, random_nvfp4, replace
from tests.hf.test_round_trip import same_bits, same_folders, same_trees
from tests.oracle.formats import packed

MUTATIONS = 300
pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


def random_fp8_tiles(rng, out, width, scale_dtype=np.float32):
    scale = rng.uniform(0.5, 2, (math.ceil(out / 128), math.ceil(width / 128))).astype(scale_dtype)
    return {"weight": rng.normal(size=(out, width)).astype(FP8), "weight_scale_inv": scale}, None


def random_fp8_rows(rng, out, width):
    parts, values = random_fp8(rng, out, width)
    return {"weight": parts["weight"], "weight_scale": rng.uniform(0.1, 1, (out, 1)).astype(BFLOAT16)}, values


def fp8_tiles_16(rng, out, width):
    return random_fp8_tiles(rng, out, width, BFLOAT16)


def sized(shapes, sizes):
    return {name: tuple(sizes.get(n, n) for n in shape) for name, shape in shapes.items()}


def nemotron_like(width, m):
    config = NEMOTRON_H | dict(moe_latent_size=width, moe_intermediate_size=m, layers_block_type=["moe"])
    return config, sized(nemotron("backbone.layers.0.mixer."), {8: width, 12: m})


def kimi_like(width, m):
    text = KIMI_K3["text_config"] | dict(routed_expert_hidden_size=width, moe_intermediate_size=m, num_hidden_layers=2)
    shapes = sized(kimi("language_model.model.layers.1.block_sparse_moe."), {8: width, 12: m, 24: 2 * m})
    return KIMI_K3 | dict(text_config=text), shapes


def deepseek_like(d, m):
    config = DEEPSEEK_V3 | dict(hidden_size=d, moe_intermediate_size=m)
    return config, sized(gated("model.layers.1.mlp.", bias=True, shared=True), {16: d, 12: m})


# name: (config and shapes, the experts' encoding, that of projections and shared experts, the format)
STORED = {
    "kimi": (kimi_like(32, 64), random_mxfp4, None, "mxfp4"),
    "nemotron nvfp4": (nemotron_like(16, 48), random_nvfp4, random_fp8, "nvfp4"),
    "nemotron fp8": (nemotron_like(8, 12), random_fp8, random_fp8, "fp8_tensor"),
    "deepseek": (deepseek_like(130, 200), random_fp8_tiles, random_fp8_tiles, "fp8_block"),
    "qwen-like": (deepseek_like(16, 12), fp8_tiles_16, None, "fp8_block"),
    "rows": (deepseek_like(16, 12), random_fp8_rows, None, "fp8_channel"),
}
every_kind = pytest.mark.parametrize("kind", STORED)


def make(folder, rng, kind, files=1):
    """Writes a checkpoint with quantised experts; returns its tensors."""
    (config, shapes), of_experts, of_others, _ = STORED[kind]
    tensors = random_tensors(rng, shapes)
    for name, shape in shapes.items():
        encode = of_experts if ".experts." in name else of_others
        if encode is not None and len(shape) == 2 and ("expert" in name or "latent_proj" in name):
            replace(tensors, name, encode(rng, *shape)[0])
    save(folder, config, tensors, files)
    return tensors


def check_round_trip(folder, name, out):
    """Decoding gives what decoding on import gives, and the files come back byte for byte."""
    checkpoint = hf.open_checkpoint(folder)
    (layer,), config = checkpoint.layers, next(iter(checkpoint.configs.values()))
    params = hf.import_layer(checkpoint, layer, keep_quantized=True)
    for leaf in (params["experts"]["w_in"], params["experts"]["w_out"]):
        assert leaf.format == name
        assert leaf.codes.dtype == np.uint8
    same_trees(dequantize(params, config), hf.import_layer(checkpoint, layer))
    assert hf.differing_tensors(hf.plan_layer(checkpoint, layer), params) == []
    hf.replace_layers(checkpoint, [(layer, params)], out)
    same_folders(folder, out)


@every_kind
def test_values_are_those_of_decoding_and_bytes_come_back(kind, rng, tmp_path, capsys):
    make(tmp_path / "in", rng, kind, files=2)
    check_round_trip(tmp_path / "in", STORED[kind][-1], tmp_path / "out")
    assert main(["verify", str(tmp_path / "in")]) == 0
    assert "come back bit for bit" in capsys.readouterr().out


def neighbours(plain):
    """The codes of checkpoints' bytes."""
    return np.stack([plain & 15, plain >> 4], axis=-1).reshape(*plain.shape[:-1], -1)


@pytest.mark.parametrize("kind", ["kimi", "nemotron nvfp4"])
def test_codes_are_in_the_order_of_kernels(kind, rng, tmp_path):
    """Also those of the last 16 inputs."""
    tensors, name = make(tmp_path, rng, kind), STORED[kind][-1]
    checkpoint = hf.open_checkpoint(tmp_path)
    codes = hf.import_layer(checkpoint, checkpoint.layers[0], keep_quantized=True)["experts"]["w_out"].codes
    down = {"mxfp4": ".experts.2.w2.weight_packed", "nvfp4": ".experts.2.down_proj.weight"}[name]
    (plain,) = (tensor for key, tensor in tensors.items() if key.endswith(down))
    np.testing.assert_array_equal(codes[2, 0], packed(name, neighbours(plain)))


def test_gpt_oss(rng, tmp_path):
    """Its codes are one tensor of all experts, in which gate and up rows alternate."""
    config, tensors, _ = gpt_oss_mxfp4(rng)
    save(tmp_path / "in", config, tensors)
    check_round_trip(tmp_path / "in", "mxfp4", tmp_path / "out")
    checkpoint = hf.open_checkpoint(tmp_path / "in")
    params = hf.import_layer(checkpoint, 0, keep_quantized=True)
    codes = params["experts"]["w_in"].codes
    blocks = tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"].reshape(4, codes.shape[2], 2, -1)
    np.testing.assert_array_equal(codes, packed("mxfp4", neighbours(blocks.swapaxes(1, 2))))
    other = dataclass_with(params, "w_in", codes=codes.at[3, 1, 0].set(0x35))
    assert hf.differing_tensors(hf.plan_layer(checkpoint, 0), other) == ["experts.gate_up_proj_blocks"]


@pytest.mark.parametrize(("encode", "name"), [(random_mxfp4, "mxfp4"), (random_fp8_tiles, "fp8_block")])
def test_deepseek_v4(encode, name, rng, tmp_path):
    """Its scales are E8M0 bytes, those of 128 x 128 blocks too."""
    tensors = random_tensors(rng, deepseek_v4("layers.0.ffn."))
    tensors = {
        key: rng.normal(size=[{16: 64, 12: 32}.get(n, n) for n in t.shape]).astype(t.dtype)
        for key, t in tensors.items()
    }
    for key in [key for key in tensors if ".experts." in key]:
        weight, scale = encode(rng, *tensors[key].shape)[0].values()
        scale = rng.integers(100, 140, scale.shape, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
        weight = weight.view(np.int8) if name == "mxfp4" else weight
        replace(tensors, key, {"weight": weight, "scale": scale})
    save(tmp_path / "in", DEEPSEEK_V4 | dict(hidden_size=64, moe_intermediate_size=32), tensors)
    check_round_trip(tmp_path / "in", name, tmp_path / "out")


def test_a_layer_computes_with_them(rng, tmp_path):
    make(tmp_path, rng, "nemotron nvfp4")
    checkpoint = hf.open_checkpoint(tmp_path)
    config, x = checkpoint.configs[0], rng.normal(size=(3, 16)).astype(BFLOAT16)
    run = jax.jit(latent_moe, static_argnums=2)
    codes = run(hf.import_layer(checkpoint, 0, keep_quantized=True), x, config)[0]
    same_bits(codes, run(hf.import_layer(checkpoint, 0), x, config)[0])


def test_changed_codes_are_written_and_what_cannot_be_written_is_refused(rng, tmp_path):
    tensors = make(tmp_path / "in", rng, "nemotron nvfp4")
    checkpoint, prefix = hf.open_checkpoint(tmp_path / "in"), "backbone.layers.0.mixer."
    config = checkpoint.configs[0]
    params = hf.import_layer(checkpoint, 0, keep_quantized=True)
    w_out = params["experts"]["w_out"]
    inputs = w_out.scales["input"]
    assert inputs.shape == (4, 1, 1, 1)
    same_bits(inputs[2, 0, 0, 0], tensors[f"{prefix}experts.2.down_proj.input_scale"].reshape(()))

    changed = dataclass_with(params, "w_out", codes=w_out.codes.at[2].set(0x33))
    assert hf.differing_tensors(hf.plan_layer(checkpoint, 0), changed) == ["experts.2.down_proj.weight"]
    hf.replace_layers(checkpoint, [(0, changed)], tmp_path / "out")
    again = hf.import_layer(hf.open_checkpoint(tmp_path / "out"), 0, keep_quantized=True)
    same_bits(again["experts"]["w_out"].codes, changed["experts"]["w_out"].codes)

    def refused(broken, match):
        with pytest.raises(hf.CheckpointError, match=match):
            hf.replace_layers(checkpoint, [(0, broken)], tmp_path / "no")
        assert not (tmp_path / "no").exists()

    dense = dequantize(params, config)
    refused(dense, "experts/w_in is stored as NVFP4 .* dense here: import it with keep_quantized=True")
    refused(quantize(dense, config, "int8"), "experts/w_in is in format int8, and the file holds NVFP4")
    without = {name: scale for name, scale in w_out.scales.items() if name != "input"}
    refused(dataclass_with(params, "w_out", scales=without), "experts/w_out is in format nvfp4, and the file holds")
    wide = w_out.scales | {"tensor": w_out.scales["tensor"].astype("bfloat16")}
    refused(dataclass_with(params, "w_out", scales=wide), "weight_scale_2 of experts/w_out is bfloat16, .* holds F32")
    up = params | {"up_proj": {"kernel": params["up_proj"]["kernel"] * 2}}
    refused(up, "fc2_latent_proj.weight is stored as FP8 and was changed")
    with pytest.raises(hf.CheckpointError, match=r"experts/w_in is in format nvfp4, .* dequantize\(params, config\)"):
        hf.write_layers(tmp_path / "no", [(0, params)], dict(checkpoint.configs), checkpoint.names)


def dataclass_with(params, name, **changes):
    leaf = params["experts"][name]
    leaf = ScaledArray(**{"codes": leaf.codes, "scales": leaf.scales, "format": leaf.format} | changes)
    return params | {"experts": params["experts"] | {name: leaf}}


def test_what_no_format_holds_is_refused_and_decoded_on_request(rng, tmp_path):
    tensors = make(tmp_path, rng, "nemotron nvfp4")
    prefix = "backbone.layers.0.mixer.experts.1.up_proj."
    packed, scale, _ = (tensors.pop(prefix + suffix) for suffix in ("weight", "weight_scale", "weight_scale_2"))
    del tensors[prefix + "input_scale"]
    tensors |= {prefix + "weight_packed": packed, prefix + "weight_scale": scale}
    tensors[prefix + "weight_global_scale"] = np.float32([768])
    save(tmp_path, STORED["nemotron nvfp4"][0][0], tensors)
    checkpoint = hf.open_checkpoint(tmp_path)
    with pytest.raises(hf.CheckpointError, match=r"experts/w_in is stored as NVFP4 .*keep_quantized=False decodes it"):
        hf.import_layer(checkpoint, 0, keep_quantized=True)
    assert hf.import_layer(checkpoint, 0)["experts"]["w_in"].dtype == BFLOAT16
    tensors = make(tmp_path, rng, "nemotron fp8")
    tensors["backbone.layers.0.mixer.experts.0.down_proj.input_scale"] = np.ones((2, 2), np.float32)
    save(tmp_path, STORED["nemotron fp8"][0][0], tensors)
    with pytest.raises(hf.CheckpointError, match="experts/w_out is stored as FP8, and not all of its matrices"):
        hf.import_layer(hf.open_checkpoint(tmp_path), 0, keep_quantized=True)


def test_unquantised_experts_stay_arrays(rng, tmp_path):
    config, shapes = kimi_like(32, 64)
    save(tmp_path, config, random_tensors(rng, shapes))
    checkpoint = hf.open_checkpoint(tmp_path)
    same_trees(hf.import_layer(checkpoint, 1, keep_quantized=True), hf.import_layer(checkpoint, 1))


def large_kimi(folder, rng):
    """Writes a checkpoint of 32 experts, each of 240 KB."""
    config, shapes = kimi_like(256, 512)
    config = config | dict(text_config=config["text_config"] | dict(num_experts=32))
    prefix = "language_model.model.layers.1.block_sparse_moe."
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        shapes[prefix + name] = (32, *shapes[prefix + name][1:])
    shapes |= {
        f"{prefix}experts.{e}.{w}.weight": shapes[f"{prefix}experts.0.{w}.weight"]
        for e in range(32)
        for w in ("w1", "w2", "w3")
    }
    tensors = random_tensors(rng, {n: s for n, s in shapes.items() if ".experts." not in n})
    for name, (out, width) in ((name, shape) for name, shape in shapes.items() if ".experts." in name):
        base = name.removesuffix("weight")
        tensors[base + "weight_packed"] = np.zeros((out, width // 2), np.uint8)
        tensors[base + "weight_scale"] = np.full((out, width // 32), 120, np.uint8)
    save(folder, config, tensors)


def test_host_memory_is_bounded_by_the_packed_bytes(rng, tmp_path, monkeypatch):
    """A CPU device keeps the buffers, so the peak is the layer itself and what is read at once."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    large_kimi(tmp_path, rng)
    checkpoint = hf.open_checkpoint(tmp_path)
    plan = hf.plan_layer(checkpoint, 1)
    tracemalloc.start()
    params = hf.import_layer(checkpoint, 1, keep_quantized=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1.1 * plan.nbytes
    assert sum(leaf.nbytes for leaf in params["experts"].values()) < plan.nbytes


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_latent_moe import ParallelConfig, hf
from jax_latent_moe.hf import placing
import dataclasses
from jax_latent_moe.parallel import param_specs

checkpoint = hf.open_checkpoint(sys.argv[1])
layer = checkpoint.layers[0]
config = dataclasses.replace(checkpoint.configs[layer], parallel=ParallelConfig())
plain = hf.import_layer(checkpoint, layer, keep_quantized=True)
if sys.argv[2] == "parts":  # as to accelerators
    placing._has_own_memory, placing.PART = lambda sharding: True, 1000
mesh = jax.make_mesh((2, 2), ("expert", "tensor"))
place = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda n: isinstance(n, P))
dense, codes = place(param_specs(config, mesh)), place(param_specs(config, mesh, plain))
for sharding in (dense, codes, NamedSharding(mesh, P()), jax.sharding.SingleDeviceSharding(jax.devices()[3]), None):
    params = hf.import_layer(checkpoint, layer, keep_quantized=True, sharding=sharding)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    if isinstance(sharding, dict):
        for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(codes), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        assert params["experts"]["w_in"].codes.addressable_shards[0].data.shape == (2, 2, 32, 16)

# Parts of 8 bytes along K, which begin within codes that are stored together.
w_out = codes["experts"]["w_out"]
cut = dataclasses.replace(w_out, codes=NamedSharding(mesh, P(None, None, None, ("expert", "tensor"))))
sharding = codes | {"experts": codes["experts"] | {"w_out": cut}}
params = hf.import_layer(checkpoint, layer, keep_quantized=True, sharding=sharding)
found, wanted = (tree["experts"]["w_out"].codes for tree in (params, plain))
assert found.addressable_shards[0].data.shape[-1] == 8
assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
"""


@pytest.mark.parametrize("moved", ["whole", "parts"])
def test_shards_hold_their_part(moved, rng, tmp_path):
    make(tmp_path, rng, "kimi")
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    flags["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SHARDED, tmp_path, moved]
    run = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def spoil(folder, rng):
    """A NaN among E4M3 codes, block scales or other scales."""
    file = breaks.any_file(folder, rng)
    header, data = breaks.header_of(file)
    names = [name for name in header if ".experts." in name and name.endswith(("weight_scale", "weight_scale_2"))]
    entry = header[names[rng.integers(len(names))]]
    first, last = entry["data_offsets"]
    nan = b"\x7f" * (last - first) if entry["dtype"] == "F8_E4M3" else np.float32("nan").tobytes()
    breaks.write(file, header, data[:first] + nan + data[last:])


def add_a_tensor(folder, rng):
    file = breaks.any_file(folder, rng)
    header, data = breaks.header_of(file)
    name = breaks.any_tensor(header, rng).rpartition(".")[0] + ".weight_zero_point"
    header[name] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    breaks.write(file, header, data + b"\0")


def a_tensor_of_several_numbers(header, rng):
    """A scale of one number may have the shape [] or [1]: such a change is none."""
    names = sorted(name for name in header if ".mixer." in name and header[name]["shape"])
    return names[rng.integers(len(names))]


def test_mutated_quantised_checkpoints_end_in_the_documented_error(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(breaks, "any_tensor", a_tensor_of_several_numbers)
    make(tmp_path / "whole", rng, "nemotron nvfp4")
    kinds = (*(kind for kind in breaks.BREAKS if kind is not breaks.bad_index), spoil, add_a_tensor)

    def load(folder):
        checkpoint = hf.open_checkpoint(folder)
        return hf.import_layer(checkpoint, 0, keep_quantized=True)

    load(tmp_path / "whole")
    for number, mutate in zip(range(MUTATIONS), itertools.cycle(kinds), strict=False):
        broken = tmp_path / f"{number}-{mutate.__name__}"
        shutil.copytree(tmp_path / "whole", broken)
        mutate(broken, rng)
        with pytest.raises(hf.CheckpointError) as caught:
            load(broken)
        assert caught.value.problems, broken
        assert str(tmp_path) in str(caught.value), "the error names the file or the folder"
        shutil.rmtree(broken)


def test_every_byte_of_codes_is_read(rng, tmp_path):
    """All 256 bytes of two E2M1 codes and all finite E4M3 bytes come through, whatever their order."""
    parts = {"weight": np.arange(256, dtype=np.uint8).reshape(16, 16)}
    finite = (parts["weight"] & 0x7F) != 0x7F
    parts["weight"] = np.where(finite, parts["weight"], 0).view(ml_dtypes.float8_e4m3fn)
    (config, shapes), *_ = STORED["rows"]
    config, shapes = deepseek_like(16, 16)
    tensors = random_tensors(rng, shapes)
    for name in [name for name in shapes if ".experts." in name]:
        replace(tensors, name, parts | {"weight_scale": np.float32(0.5)})
    save(tmp_path, config, tensors)
    w_out = hf.import_layer(hf.open_checkpoint(tmp_path), 1, keep_quantized=True)["experts"]["w_out"]
    np.testing.assert_array_equal(w_out.codes[3, 0], parts["weight"].view(np.uint8))
