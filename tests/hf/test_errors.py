"""Broken checkpoints: one error lists every problem, and nothing is returned."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest

from jax_latent_moe import InputError, hf
from tests.hf.checkpoints import BFLOAT16, MAPPINGS, NEMOTRON_H, make, nemotron, random_tensors, save

MUTATIONS = 300
GATED = ("gate", "up", "down")
LAYER = "backbone.layers.0.mixer."


def open_and_import(folder):
    checkpoint = hf.open_checkpoint(folder)
    return dict(hf.import_layers(checkpoint))


def test_every_wrong_tensor_is_listed_at_once(rng, tmp_path):
    tensors = random_tensors(rng, nemotron(LAYER) | nemotron("backbone.layers.2.mixer."))
    del tensors[LAYER + "experts.1.up_proj.weight"]
    del tensors[LAYER + "gate.e_score_correction_bias"]
    tensors[LAYER + "experts.9.up_proj.weight"] = np.zeros((12, 8), BFLOAT16)
    tensors[LAYER + "gate.bias"] = np.zeros(4, np.float32)
    tensors[LAYER + "experts.2.down_proj.weight"] = np.zeros((12, 8), BFLOAT16)
    tensors[LAYER + "experts.3.down_proj.weight"] = np.zeros((8, 12), np.float16)
    tensors[LAYER + "experts.0.up_proj.weight"] = np.zeros((12, 8), np.int32)
    save(tmp_path, NEMOTRON_H, tensors)
    with pytest.raises(hf.CheckpointError) as caught:
        hf.import_layer(hf.open_checkpoint(tmp_path), 0)
    for problem in (
        "missing backbone.layers.0.mixer.experts.1.up_proj.weight.",
        "missing backbone.layers.0.mixer.gate.e_score_correction_bias.",
        "not expected: backbone.layers.0.mixer.experts.9.up_proj.weight.",
        "not expected: backbone.layers.0.mixer.gate.bias",
        "backbone.layers.0.mixer.experts.2.down_proj.weight: shape [12, 8], expected [8, 12].",
        "backbone.layers.0.mixer.experts.3.down_proj.weight: dtype F16, expected BF16",
        "backbone.layers.0.mixer.experts.0.up_proj.weight: dtype I32, expected BF16 or F16 or F32 or F64.",
    ):
        assert sum(found.startswith(problem) for found in caught.value.problems) == 1, problem
    assert len(caught.value.problems) == 7
    hf.import_layer(hf.open_checkpoint(tmp_path), 2)  # the other layer is whole


def test_a_narrow_correction_bias_is_refused(rng, tmp_path):
    tensors = random_tensors(rng, nemotron(LAYER) | nemotron("backbone.layers.2.mixer."))
    name = LAYER + "gate.e_score_correction_bias"
    tensors[name] = tensors[name].astype(BFLOAT16)
    save(tmp_path, NEMOTRON_H, tensors)
    with pytest.raises(hf.CheckpointError, match="dtype BF16, expected F32, float32 always"):
        hf.import_layer(hf.open_checkpoint(tmp_path), 0)


@pytest.mark.parametrize("mapping", ["deepseek_stacked", "nemotron_stacked"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda down: None, r"missing .*experts\.down_proj\."),
        (lambda down: down[:3], r"experts\.down_proj: shape \[3, .*expected \[num_experts=4, out, in\]"),
        (lambda down: down[..., 0], r"experts\.down_proj: shape \[4, \d+\], expected \[num_experts=4, out, in\]"),
        (lambda down: down[..., :0], r"experts\.down_proj: shape \[4, \d+, 0\], expected \[num_experts=4, out, in\]"),
        (lambda down: down[:, 1:], r"experts\.down_proj: shape \[4, \d+, 12\], expected \[4, \d+, 12\]"),
        (lambda down: down.astype(np.float16), r"experts\.down_proj: dtype F16, expected BF16"),
        (lambda down: down.astype(np.int8), r"experts\.down_proj: dtype I8, expected BF16"),
    ],
)
def test_broken_stacked_experts_are_one_line(mapping, change, message, rng, tmp_path):
    config, _, shapes = MAPPINGS[mapping]
    tensors = random_tensors(rng, shapes)
    (name,) = (name for name in tensors if name.endswith("experts.down_proj"))
    changed = change(tensors.pop(name))
    save(tmp_path, config, tensors if changed is None else tensors | {name: np.ascontiguousarray(changed)})
    checkpoint = hf.open_checkpoint(tmp_path)
    with pytest.raises(hf.CheckpointError, match=message) as caught:
        hf.import_layer(checkpoint, checkpoint.layers[0])
    assert len(caught.value.problems) == 1


def test_experts_under_unknown_names_are_told_in_a_few_lines(rng, tmp_path):
    config, _, shapes = MAPPINGS["deepseek"]
    shapes = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    shapes["model.layers.1.mlp.experts.w123"] = (4, 16, 36)
    save(tmp_path, config, random_tensors(rng, shapes))
    with pytest.raises(hf.CheckpointError) as caught:
        hf.import_layer(hf.open_checkpoint(tmp_path), 1)
    assert [problem.removeprefix("missing model.layers.1.mlp.experts.") for problem in caught.value.problems] == [
        "{e}.gate_proj.weight of all 4 experts.",
        "{e}.up_proj.weight of all 4 experts.",
        "{e}.down_proj.weight of all 4 experts.",
        "not expected: model.layers.1.mlp.experts.w123.",
    ]


@pytest.mark.parametrize(
    ("mapping", "missing", "lines"),
    [
        (
            "kimi",
            [".w1.", ".w2."],
            ["experts.{e}.w1.weight of all 4 experts", "experts.{e}.w2.weight of all 4 experts"],
        ),
        ("nemotron", ["fc1_", "fc2_"], ["fc1_latent_proj.weight", "fc2_latent_proj.weight"]),
        ("megatron_latent", ["experts.linear_fc1"], ["experts.linear_fc1.weight{e} of all 4 experts"]),
        ("deepseek", ["experts.0.", "experts.1."], [f"experts.{e}.{n}_proj.weight" for e in (0, 1) for n in GATED]),
    ],
)
def test_what_every_expert_lacks_is_one_line(mapping, missing, lines, rng, tmp_path):
    config, naming, shapes = MAPPINGS[mapping]
    left = {name: shape for name, shape in shapes.items() if not any(part in name for part in missing)}
    if mapping == "megatron_latent":
        left |= {name: shape for name, shape in shapes.items() if "shared_experts" in name}
    save(tmp_path, config, random_tensors(rng, left))
    checkpoint = hf.open_checkpoint(tmp_path, naming=naming)
    with pytest.raises(hf.CheckpointError) as caught:
        hf.import_layer(checkpoint, checkpoint.layers[-1])
    prefix = checkpoint.names.prefix(checkpoint.layers[-1], left)
    assert sorted(caught.value.problems) == sorted(f"missing {prefix}{line}." for line in lines)


def test_a_layer_that_is_no_moe_layer(rng, tmp_path):
    make(tmp_path, rng, "nemotron")
    with pytest.raises(hf.CheckpointError, match="layer 1 is not an MoE layer: the MoE layers are 0, 2"):
        hf.import_layer(hf.open_checkpoint(tmp_path), 1)


def test_a_truncated_file_is_named(rng, tmp_path):
    make(tmp_path, rng, "nemotron", files=3)
    file = tmp_path / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(hf.CheckpointError, match=r"model-00002-of-00003\.safetensors.*\n.*truncated"):
        open_and_import(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(rng, tmp_path):
    make(tmp_path, rng, "nemotron")
    checkpoint = hf.open_checkpoint(tmp_path)
    hf.plan_layer(checkpoint, 0)
    os.truncate(tmp_path / "model.safetensors", 3000)
    with pytest.raises(hf.CheckpointError, match="truncated while it was read"):
        open_layers(checkpoint)


def open_layers(checkpoint):
    return dict(hf.import_layers(checkpoint))


def test_a_pipe_is_not_waited_for(rng, tmp_path):
    make(tmp_path, rng, "nemotron")
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(hf.CheckpointError, match="not a regular file"):
        hf.open_checkpoint(tmp_path)


# Each mutation breaks a folder of three indexed files, or of one file, in a random way.


def header_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file, header, data, encoded=None):
    encoded = json.dumps(header).encode() if encoded is None else encoded
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def any_file(folder, rng):
    return sorted(folder.glob("*.safetensors"))[rng.integers(len(list(folder.glob("*.safetensors"))))]


def any_tensor(header, rng):
    names = sorted(name for name in header if ".mixer." in name)
    return names[rng.integers(len(names))]


def truncate(folder, rng):
    file = any_file(folder, rng)
    os.truncate(file, rng.integers(file.stat().st_size))


def lengthen(folder, rng):
    with any_file(folder, rng).open("ab") as file:
        file.write(bytes(rng.integers(1, 100)))


def rename(folder, rng):
    file = any_file(folder, rng)
    header, data = header_of(file)
    name = any_tensor(header, rng)
    position = rng.integers(len(name))
    header[name[:position] + "~" + name[position + 1 :]] = header.pop(name)
    write(file, header, data)


def wrong_dtype(folder, rng):
    file = any_file(folder, rng)
    header, data = header_of(file)
    entry = header[any_tensor(header, rng)]
    entry["dtype"] = rng.choice(
        [d for d in ("F16", "I16", "U8", "F64", "F8_E4M3", "Q4", 7, None) if d != entry["dtype"]]
    )
    write(file, header, data)


def wrong_shape(folder, rng):
    file = any_file(folder, rng)
    header, data = header_of(file)
    entry = header[any_tensor(header, rng)]
    shape = entry["shape"]
    wrong = [
        [*shape, 1],
        [0, *shape],
        [-n for n in shape],
        [2**62, 2**62],
        "x",
        None,
        [1.5],
        [True],
        [n + 1 for n in shape],
    ]
    if len(set(shape)) > 1:
        wrong.append(shape[::-1])
    entry["shape"] = wrong[rng.integers(len(wrong))]
    write(file, header, data)


def wrong_offsets(folder, rng):
    file = any_file(folder, rng)
    header, data = header_of(file)
    entry = header[any_tensor(header, rng)]
    first, last = entry["data_offsets"]
    wrong = [
        [last, first],
        [first + 2, last + 2],
        [first, last + 2],
        [-first - 1, last],
        [2**70, 2**70 + last - first],
        [0],
        5,
    ]
    entry["data_offsets"] = wrong[rng.integers(len(wrong))]
    write(file, header, data)


def duplicate_key(folder, rng):
    file = any_file(folder, rng)
    header, data = header_of(file)
    name = any_tensor(header, rng)
    encoded = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"
    write(file, header, data, encoded.encode())


def bad_header_json(folder, rng):
    file = any_file(folder, rng)
    header, data = header_of(file)
    encoded = json.dumps(header).encode()
    wrong = [b"", b"[]", b"null", encoded[:-1], b"[" * 200_000, b"\xff" + encoded, b"9" * 10_000, encoded + b"}", b"{]"]
    write(file, header, data, wrong[rng.integers(len(wrong))])


def huge_header(folder, rng):
    file = any_file(folder, rng)
    data = file.read_bytes()
    length = int(rng.choice([2**63, 2**40, 200_000_000, len(data)]))
    file.write_bytes(length.to_bytes(8, "little") + data[8:])
    if length == 200_000_000:
        os.truncate(file, 200_000_100)  # a hole: it takes no space


def bad_index(folder, rng):
    path = folder / "model.safetensors.index.json"
    names = sorted(name for file in folder.glob("*.safetensors") for name in header_of(file)[0] if ".mixer." in name)
    weight_map = {name: file.name for file in folder.glob("*.safetensors") for name in header_of(file)[0]}
    weight_map.pop("__metadata__", None)
    name = names[rng.integers(len(names))]
    wrong = ["no.safetensors", "../x.safetensors", "/etc/passwd", 3, None, "\0.safetensors", "\ud800.safetensors", ""]
    choice = rng.integers(len(wrong) + 4)
    if choice < len(wrong):
        weight_map[name] = wrong[choice]
    elif choice == len(wrong):
        del weight_map[name]
    elif choice == len(wrong) + 1:
        weight_map[name + "x"] = weight_map.pop(name)
    index = [] if choice == len(wrong) + 2 else {"weight_map": [weight_map] if choice == len(wrong) + 3 else weight_map}
    path.write_text(json.dumps(index))


def bad_config(folder, rng):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    keys = ("model_type", "hidden_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "dtype")
    key = keys[rng.integers(len(keys))]
    wrong = [None, "", -1, 0, 1.5, [], {}, True, 2**31 - 1, 2**200, "nemotron", float("nan")]
    value = wrong[rng.integers(len(wrong) + 1) - 1]
    if rng.random() < 0.2:
        del config[key]
    else:
        config[key] = value
    path.write_text(json.dumps(config))


def bad_json(folder, rng):
    path = folder / "config.json"
    text = path.read_bytes()
    wrong = [
        b"",
        b"[]",
        text[: rng.integers(len(text))],
        b"\xfe" + text,
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a": 01}',
    ]
    path.write_bytes(wrong[rng.integers(len(wrong))])


def remove_file(folder, rng):
    any_file(folder, rng).unlink()


def file_becomes_folder(folder, rng):
    file = any_file(folder, rng)
    file.unlink()
    file.mkdir()


BREAKS = (
    truncate,
    lengthen,
    rename,
    wrong_dtype,
    wrong_shape,
    wrong_offsets,
    duplicate_key,
    bad_header_json,
    huge_header,
    bad_index,
    bad_config,
    bad_json,
    remove_file,
    file_becomes_folder,
)


@pytest.mark.parametrize("files", [1, 3])
def test_mutated_checkpoints_end_in_the_documented_error(files, rng, tmp_path):
    make(tmp_path / "whole", rng, "nemotron", files)
    open_and_import(tmp_path / "whole")
    for number, mutate in zip(range(MUTATIONS // 2), itertools.cycle(BREAKS), strict=False):
        broken = tmp_path / f"{number}-{mutate.__name__}"
        shutil.copytree(tmp_path / "whole", broken)
        mutate(broken, rng)
        with pytest.raises(hf.CheckpointError) as caught:
            open_and_import(broken)
        assert caught.value.problems, broken
        assert str(tmp_path) in str(caught.value), "the error names the file or the folder"
        shutil.rmtree(broken)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "file", "it is a file, not a folder"),
        (None, r"None: 1 problem.*\n.*it must be a path"),
    ):
        with pytest.raises(hf.CheckpointError, match=message):
            hf.open_checkpoint(path)
    with pytest.raises(InputError, match="checkpoint of type str must be what open_checkpoint"):
        hf.import_layer("folder", 0)
