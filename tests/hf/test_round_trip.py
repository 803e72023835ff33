"""Every mapping puts each tensor in the right place, and writes every byte back."""

import filecmp
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_latent_moe import InputError, hf
from jax_latent_moe.hf.__main__ import main
from jax_latent_moe.params import check_params
from tests.hf.checkpoints import BFLOAT16, MAPPINGS, make, save


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


def same_bits(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(bits(one), bits(other))


def same_trees(one, other):
    assert {part: set(leaves) for part, leaves in one.items()} == {part: set(leaves) for part, leaves in other.items()}
    for part, leaves in one.items():
        for name, leaf in leaves.items():
            same_bits(leaf, other[part][name])


def same_folders(one, other):
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


STACKED = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_is_imported_is_exported_bit_for_bit(mapping, files, rng, tmp_path):
    naming, _ = make(tmp_path / "in", rng, mapping, files)
    checkpoint = hf.open_checkpoint(tmp_path / "in", naming=naming)
    layers = list(hf.import_layers(checkpoint))
    assert [layer for layer, _ in layers] == list(checkpoint.layers)
    for layer, params in layers:
        check_params(params, checkpoint.configs[layer])
        assert hf.differing_tensors(hf.plan_layer(checkpoint, layer), params) == []
    hf.replace_layers(checkpoint, iter(layers), tmp_path / "out")
    same_folders(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("to", ["own names", "stacked", "megatron"])
@pytest.mark.parametrize("mapping", [name for name in MAPPINGS if name not in ("nemotron_mtp", "deepseek_v4_hash")])
def test_layers_alone_come_back_under_either_names(mapping, to, rng, tmp_path):
    naming, tensors = make(tmp_path / "in", rng, mapping)
    checkpoint = hf.open_checkpoint(tmp_path / "in", naming=naming)
    layers = dict(hf.import_layers(checkpoint))
    names = {"own names": checkpoint.names, "stacked": checkpoint.stacked_names, "megatron": hf.MEGATRON}[to]
    if naming == "megatron" and to == "stacked":
        names = hf.open_checkpoint(tmp_path / "in").stacked_names
    if mapping in ("kimi", "gpt_oss") and to == "megatron":
        with pytest.raises(hf.CheckpointError, match=r"(latent_norm/scale|router/logit_bias) has no name"):
            hf.write_layers(tmp_path / "out", layers.items(), dict(checkpoint.configs), names)
        assert not (tmp_path / "out").exists()
        return
    hf.write_layers(tmp_path / "out", layers.items(), dict(checkpoint.configs), names)
    if names is checkpoint.names and mapping not in ("nemotron_renamed", "qwen3_next") and "stacked" not in mapping:
        written = {
            name: tensor
            for file in (tmp_path / "out").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        assert written.keys() <= tensors.keys()
        for name, tensor in written.items():
            same_bits(tensor, tensors[name])
    shutil.copy(tmp_path / "in" / "config.json", tmp_path / "out")
    again = hf.open_checkpoint(tmp_path / "out", naming="megatron" if names is hf.MEGATRON else "hf")
    for layer, params in hf.import_layers(again):
        same_trees(params, layers[layer])


def test_each_nemotron_tensor_is_where_it_belongs(rng, tmp_path):
    _, tensors = make(tmp_path, rng, "nemotron")
    params = hf.import_layer(hf.open_checkpoint(tmp_path), 2)
    layer = "backbone.layers.2.mixer."
    for (part, name), tensor in {
        ("router", "kernel"): "gate.weight",
        ("down_proj", "kernel"): "fc1_latent_proj.weight",
        ("up_proj", "kernel"): "fc2_latent_proj.weight",
        ("shared", "w_in"): "shared_experts.up_proj.weight",
        ("shared", "w_out"): "shared_experts.down_proj.weight",
    }.items():
        same_bits(params[part][name], tensors[layer + tensor].T)
    same_bits(params["router"]["bias"], tensors[layer + "gate.e_score_correction_bias"])
    for e in range(4):
        same_bits(params["experts"]["w_in"][e], tensors[f"{layer}experts.{e}.up_proj.weight"].T)
        same_bits(params["experts"]["w_out"][e], tensors[f"{layer}experts.{e}.down_proj.weight"].T)


def test_each_kimi_tensor_is_where_it_belongs(rng, tmp_path):
    _, tensors = make(tmp_path, rng, "kimi")
    params = hf.import_layer(hf.open_checkpoint(tmp_path), 1)
    layer = "language_model.model.layers.1.block_sparse_moe."
    same_bits(params["down_proj"]["kernel"], tensors[layer + "routed_expert_down_proj.weight"].T)
    same_bits(params["up_proj"]["kernel"], tensors[layer + "routed_expert_up_proj.weight"].T)
    same_bits(params["latent_norm"]["scale"], tensors[layer + "routed_expert_norm.weight"])
    same_bits(params["shared"]["w_in"][:, 0], tensors[layer + "shared_experts.gate_proj.weight"].T)
    same_bits(params["shared"]["w_in"][:, 1], tensors[layer + "shared_experts.up_proj.weight"].T)
    same_bits(params["shared"]["w_out"], tensors[layer + "shared_experts.down_proj.weight"].T)
    for e in range(4):
        same_bits(params["experts"]["w_in"][e, :, 0], tensors[f"{layer}experts.{e}.w1.weight"].T)
        same_bits(params["experts"]["w_in"][e, :, 1], tensors[f"{layer}experts.{e}.w3.weight"].T)
        same_bits(params["experts"]["w_out"][e], tensors[f"{layer}experts.{e}.w2.weight"].T)


def test_each_gpt_oss_tensor_is_where_it_belongs(rng, tmp_path):
    """Tensors are [experts, in, out], and gate and up columns alternate."""
    _, tensors = make(tmp_path, rng, "gpt_oss")
    params = hf.import_layer(hf.open_checkpoint(tmp_path), 0)
    tensors = {name.removeprefix("model.layers.0.mlp."): tensor for name, tensor in tensors.items()}
    same_bits(params["router"]["kernel"], tensors["router.weight"].T)
    same_bits(params["router"]["logit_bias"], tensors["router.bias"])
    same_bits(params["experts"]["w_out"], tensors["experts.down_proj"])
    same_bits(params["experts"]["b_out"], tensors["experts.down_proj_bias"])
    for half in (0, 1):
        same_bits(params["experts"]["w_in"][:, :, half], tensors["experts.gate_up_proj"][..., half::2])
        same_bits(params["experts"]["b_in"][:, half], tensors["experts.gate_up_proj_bias"][..., half::2])


def test_the_table_of_a_hash_layer(rng, tmp_path):
    """It comes beside the parameters, stays in a replaced checkpoint, and is refused where it would be lost."""
    _, tensors = make(tmp_path / "in", rng, "deepseek_v4_hash")
    checkpoint = hf.open_checkpoint(tmp_path / "in")
    table = hf.import_token_experts(checkpoint, 0)
    assert table.dtype == jnp.int32
    np.testing.assert_array_equal(table, tensors["layers.0.ffn.gate.tid2eid"])
    with pytest.raises(hf.CheckpointError, match="layer 1 chooses its experts itself"):
        hf.import_token_experts(checkpoint, 1)
    layers, configs = list(hf.import_layers(checkpoint)), dict(checkpoint.configs)
    with pytest.raises(hf.CheckpointError, match=r"layer 0 has a table of token ids, .* write it with replace_layers"):
        hf.write_layers(tmp_path / "out", layers, configs, checkpoint.names)
    tensors["layers.0.ffn.gate.tid2eid"][0, 0] = 4
    save(tmp_path / "wrong", checkpoint_config(tmp_path / "in"), tensors)
    with pytest.raises(hf.CheckpointError, match="names experts 0 to 4; there are 0 to 3"):
        hf.import_token_experts(hf.open_checkpoint(tmp_path / "wrong"), 0)
    del tensors["layers.0.ffn.gate.tid2eid"]
    save(tmp_path / "without", checkpoint_config(tmp_path / "in"), tensors)
    with pytest.raises(hf.CheckpointError, match=r"missing layers.0.ffn.gate.tid2eid"):
        hf.import_layer(hf.open_checkpoint(tmp_path / "without"), 0)


def checkpoint_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("mapping", ["deepseek_stacked", "mixtral_stacked", "nemotron_stacked"])
def test_each_stacked_expert_is_where_it_belongs(mapping, rng, tmp_path):
    _, tensors = make(tmp_path, rng, mapping)
    checkpoint = hf.open_checkpoint(tmp_path)
    params = hf.import_layer(checkpoint, checkpoint.layers[0])["experts"]
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if ".experts." in name}
    for e in range(4):
        if "up_proj" in tensors:
            same_bits(params["w_in"][e], tensors["up_proj"][e].T)
        else:
            same_bits(params["w_in"][e, :, 0], tensors["gate_up_proj"][e, :12].T)
            same_bits(params["w_in"][e, :, 1], tensors["gate_up_proj"][e, 12:].T)
        same_bits(params["w_out"][e], tensors["down_proj"][e].T)


def test_stacked_experts_are_the_stack_of_the_others(rng, tmp_path):
    _, tensors = make(tmp_path / "in", rng, "mixtral")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "stacked"]) == 0
    written = load_file(tmp_path / "out" / "moe-layer-0.safetensors")
    assert set(written) == {f"model.layers.0.mlp.{name}" for name in ("gate.weight", *STACKED)}
    w1, w2, w3 = (
        np.stack([tensors[f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"] for e in range(4)])
        for name in ("w1", "w2", "w3")
    )
    same_bits(written["model.layers.0.mlp.experts.gate_up_proj"], np.concatenate([w1, w3], axis=1))
    same_bits(written["model.layers.0.mlp.experts.down_proj"], w2)


@pytest.mark.parametrize(
    ("mapping", "layer", "name"),
    [
        ("qwen3_next", 2, "model.layers.2.mlp.shared_expert_gate.weight"),
        ("megatron_shared_gate", 2, "decoder.layers.2.mlp.shared_experts.gate_weight"),
    ],
)
def test_the_gate_of_the_shared_expert_is_where_it_belongs(mapping, layer, name, rng, tmp_path):
    naming, tensors = make(tmp_path, rng, mapping)
    params = hf.import_layer(hf.open_checkpoint(tmp_path, naming=naming), layer)
    same_bits(params["shared"]["gate"], tensors[name].T)


def test_megatron_packs_the_gate_before_up(rng, tmp_path):
    _, tensors = make(tmp_path, rng, "megatron_gated")
    params = hf.import_layer(hf.open_checkpoint(tmp_path, naming="megatron"), 1)
    packed = tensors["decoder.layers.1.mlp.experts.linear_fc1.weight3"]
    same_bits(params["experts"]["w_in"][3, :, 0], packed[:12].T)
    same_bits(params["experts"]["w_in"][3, :, 1], packed[12:].T)


def test_megatron_without_config_json_takes_a_config(rng, tmp_path):
    naming, _ = make(tmp_path, rng, "megatron_latent")
    config = hf.open_checkpoint(tmp_path, naming=naming).configs[0]
    (tmp_path / "config.json").unlink()
    checkpoint = hf.open_checkpoint(tmp_path, naming="megatron", config=config)
    assert checkpoint.layers == (0, 2)
    check_params(hf.import_layer(checkpoint, 2), config)
    with pytest.raises(hf.CheckpointError, match=r"config\.json"):
        hf.open_checkpoint(tmp_path, naming="megatron")
    with pytest.raises(hf.CheckpointError, match="config= needs naming='megatron'"):
        hf.open_checkpoint(tmp_path, config=config)


def test_layers_of_a_puzzle_differ(rng, tmp_path):
    make(tmp_path, rng, "puzzle")
    configs = hf.open_checkpoint(tmp_path).configs
    assert {layer: (c.expert_intermediate_size, c.top_k) for layer, c in configs.items()} == {0: (12, 2), 2: (24, 3)}


def test_one_layer_needs_its_own_files_only(rng, tmp_path):
    naming, tensors = make(tmp_path, rng, "nemotron", files=3)
    checkpoint = hf.open_checkpoint(tmp_path, naming=naming)
    hf.write_layers(tmp_path / "split", hf.import_layers(checkpoint), dict(checkpoint.configs), checkpoint.names)
    shutil.copy(tmp_path / "config.json", tmp_path / "split")
    (tmp_path / "split" / "moe-layer-0.safetensors").unlink()
    part = hf.open_checkpoint(tmp_path / "split")
    same_bits(hf.import_layer(part, 2)["router"]["kernel"], tensors["backbone.layers.2.mixer.gate.weight"].T)
    with pytest.raises(hf.CheckpointError, match=r"moe-layer-0\.safetensors.*\n.*No such file"):
        hf.import_layer(part, 0)


def test_dtype_is_converted_but_for_the_bias(rng, tmp_path):
    _, tensors = make(tmp_path, rng, "nemotron")
    checkpoint = hf.open_checkpoint(tmp_path)
    params = hf.import_layer(checkpoint, 0, dtype="float16")
    assert {leaf.dtype for part, leaves in params.items() for name, leaf in leaves.items() if name != "bias"} == {
        np.dtype("float16")
    }
    assert params["router"]["bias"].dtype == jnp.float32
    wanted = tensors["backbone.layers.0.mixer.experts.1.up_proj.weight"].astype(np.float16)
    same_bits(params["experts"]["w_in"][1], wanted.T)
    with pytest.raises(InputError, match="int8"):
        hf.import_layer(checkpoint, 0, dtype="int8")


def test_changed_parameters_are_written_in_the_stored_dtype(rng, tmp_path):
    _, tensors = make(tmp_path / "in", rng, "nemotron")
    checkpoint = hf.open_checkpoint(tmp_path / "in")
    params = hf.import_layer(checkpoint, 0, dtype="float32")
    params["router"]["bias"] += 1
    params["experts"]["w_out"] *= 1.001
    hf.replace_layers(checkpoint, [(0, params)], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "backbone.layers.0.mixer.experts.2.down_proj.weight"
    same_bits(written[name], (tensors[name].astype(np.float32) * np.float32(1.001)).astype(BFLOAT16))
    bias = "backbone.layers.0.mixer.gate.e_score_correction_bias"
    same_bits(written[bias], tensors[bias] + np.float32(1))
    changed = {name for name in tensors if bits(tensors[name]).tobytes() != bits(written[name]).tobytes()}
    assert changed <= {bias} | {name for name in tensors if "layers.0.mixer.experts" in name and "down" in name}
    assert hf.differing_tensors(hf.plan_layer(checkpoint, 0), params)


def test_export_refuses_what_would_be_lost(rng, tmp_path):
    make(tmp_path / "in", rng, "nemotron")
    checkpoint = hf.open_checkpoint(tmp_path / "in")
    layers = dict(hf.import_layers(checkpoint))
    with pytest.raises(hf.CheckpointError, match="exists already"):
        hf.replace_layers(checkpoint, layers.items(), tmp_path / "in")
    del layers[0]["shared"]
    with pytest.raises(InputError, match="missing shared/w_in"):
        hf.replace_layers(checkpoint, layers.items(), tmp_path / "out")
    with pytest.raises(InputError, match="missing shared/w_in"):
        hf.write_layers(tmp_path / "out", layers.items(), dict(checkpoint.configs), checkpoint.names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
