"""The converter writes a new folder, complete and readable, and changes nothing that existed before."""

import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jax_latent_moe import hf
from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.hf import outputs
from jax_latent_moe.hf.__main__ import main
from tests.hf.checkpoints import DEEPSEEK_V3, gated, make, random_tensors, save
from tests.hf.test_round_trip import same_trees


def snapshot(folder):
    """Every path below a folder, with a link's target, a file's bytes, or None for a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def write(checkpoint, how, path, layers=None):
    """Writes a checkpoint in one of the three ways."""
    layers = hf.import_layers(checkpoint) if layers is None else layers
    if how == "replace_layers":
        hf.replace_layers(checkpoint, layers, path)
    elif how == "write_layers":
        hf.write_layers(path, layers, checkpoint.configs, checkpoint.names)
    else:
        assert main(["convert", str(checkpoint.folder.path), str(path)]) == 0


WAYS = ["replace_layers", "write_layers", "convert"]


def refuses(checkpoint, how, path, capsys) -> str:
    """The sentence with which one way of writing refuses a path."""
    if how == "convert":
        assert main(["convert", str(checkpoint.folder.path), str(path)]) == 1
        return capsys.readouterr().err
    with pytest.raises(hf.CheckpointError) as caught:
        write(checkpoint, how, path)
    return str(caught.value)


@pytest.fixture
def checkpoint(rng, tmp_path):
    make(tmp_path / "in", rng, "nemotron", files=3)
    return hf.open_checkpoint(tmp_path / "in")


@pytest.mark.parametrize("how", WAYS)
def test_folders_that_others_left_beside_the_output_stay(how, checkpoint, tmp_path, capsys):
    for name in ("out.partial", "out.part", ".out", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    (tmp_path / "out.tmp2").write_text("mine as well")
    before = snapshot(tmp_path)
    write(checkpoint, how, tmp_path / "out")
    after = snapshot(tmp_path)
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after} == {name.split("/")[0] for name in before} | {"out"}


def a_file(path):
    path.write_text("mine")


def a_folder_with_a_file(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def an_empty_folder(path):
    path.mkdir()


def a_dangling_link(path):
    path.symlink_to(path.parent / "nowhere")


def a_link_to_a_folder(path):
    path.symlink_to(path.parent / "in")


def a_parent_that_is_a_file(path):
    path.parent.rmdir()
    path.parent.write_text("mine")


TAKEN = [a_file, a_folder_with_a_file, an_empty_folder, a_dangling_link, a_link_to_a_folder, a_parent_that_is_a_file]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("take", TAKEN)
def test_a_name_that_is_taken_is_refused_in_a_sentence(how, take, checkpoint, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    take(tmp_path / "there" / "out")
    before = snapshot(tmp_path)
    message = refuses(checkpoint, how, tmp_path / "there" / "out", capsys)
    assert str(tmp_path / "there" / "out") in message
    assert "name a new folder" in message or "cannot be written: Not a directory" in message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("how", ["replace_layers", "convert"])
@pytest.mark.parametrize("inside", ["in/out", "in/new/out", "link/out", "other/../in/out"])
def test_an_output_inside_of_the_source_is_refused(how, inside, checkpoint, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = snapshot(tmp_path)
    assert "which is being read: name a folder outside of it" in refuses(checkpoint, how, tmp_path / inside, capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", [".", "..", "../in", "../beside"])
def test_a_source_that_leads_back_to_itself_is_not_copied_without_end(target, checkpoint, tmp_path):
    (tmp_path / "beside").mkdir()
    (tmp_path / "in" / "link").symlink_to(target)
    before = snapshot(tmp_path)
    with pytest.raises(hf.CheckpointError, match="holds the folder being copied"):
        write(checkpoint, "replace_layers", tmp_path / "beside" / "out")
    assert snapshot(tmp_path) == before


def test_a_copy_shares_no_file_with_links_in_the_source(checkpoint, tmp_path):
    """The hub's cache holds links to its files: writing through one would change the cache."""
    file = tmp_path / "in" / "model-00001-of-00003.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    (tmp_path / "blob").chmod(0o444)
    before = (tmp_path / "blob").read_bytes()
    layers = [(layer, jax.tree.map(lambda leaf: leaf + 1, params)) for layer, params in hf.import_layers(checkpoint)]
    write(checkpoint, "replace_layers", tmp_path / "out", layers)
    assert (tmp_path / "blob").read_bytes() == before
    copy = tmp_path / "out" / file.name
    assert not copy.is_symlink()
    assert copy.read_bytes() != before


def test_a_dangling_link_in_the_source_is_named(checkpoint, tmp_path):
    (tmp_path / "in" / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(hf.CheckpointError, match=r"tokenizer\.json"):
        write(checkpoint, "replace_layers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "model.safetensors.index.json").unlink()
    (tmp_path / "in" / "model.safetensors.index.json").symlink_to("nowhere")
    with pytest.raises(hf.CheckpointError, match=r"index\.json(.|\n)*No such file"):
        hf.open_checkpoint(tmp_path / "in")


@pytest.mark.parametrize("how", ["replace_layers", "write_layers"])
def test_what_fails_midway_leaves_nothing(how, checkpoint, tmp_path):
    before = snapshot(tmp_path)

    def layers():
        yield from hf.import_layers(checkpoint, [0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, how, tmp_path / "out", layers())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("how", ["replace_layers", "write_layers"])
def test_a_folder_that_appears_meanwhile_is_not_replaced(how, checkpoint, tmp_path):
    def layers():
        yield from hf.import_layers(checkpoint)
        (tmp_path / "out").mkdir()

    with pytest.raises(hf.CheckpointError, match="File exists"):
        write(checkpoint, how, tmp_path / "out", layers())
    assert list((tmp_path / "out").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_the_system_s_own_errors_become_a_sentence(checkpoint, tmp_path, monkeypatch):
    def full(path, tensors):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("jax_latent_moe.hf.exporting.create", full)
    with pytest.raises(hf.CheckpointError, match="cannot be written: No space left on device"):
        write(checkpoint, "write_layers", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("how", ["replace_layers", "write_layers"])
@pytest.mark.parametrize(
    ("layer", "message"),
    [(1, "layer 1"), (7, "layer 7"), ("mtp.1", "mtp.1"), ("../../x", "x"), ("a.b.c", "a.b.c"), ("", "layer ")],
)
def test_a_layer_that_does_not_exist(how, layer, message, checkpoint, tmp_path):
    params = hf.import_layer(checkpoint, 0)
    with pytest.raises(hf.CheckpointError, match=message):
        write(checkpoint, how, tmp_path / "out", [(layer, params)])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("how", ["replace_layers", "write_layers"])
def test_a_layer_that_comes_twice(how, checkpoint, tmp_path):
    params = hf.import_layer(checkpoint, 0)
    with pytest.raises(hf.CheckpointError, match="layer 0 comes twice"):
        write(checkpoint, how, tmp_path / "out", [(0, params), (0, params)])


@pytest.mark.parametrize("layers", ["5", "", "0,", "x", "mtp.1", "0.5", "-1", "²", "9" * 5000, "lm_head.weight", "0,0"])
def test_the_command_refuses_layers_that_there_are_not(layers, checkpoint, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), f"--layers={layers}"]) == 1
    assert "layer" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_names_of_layers_that_no_system_has(checkpoint, tmp_path):
    params, config = hf.import_layer(checkpoint, 0), checkpoint.configs[0]
    for layer in ("../../x", "a.b.c", "mtp", "mtp.x", ""):
        with pytest.raises(hf.CheckpointError, match="names no layer"):
            hf.write_layers(tmp_path / "out", [(layer, params)], {layer: config}, checkpoint.names)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["experts.{i}.w", "experts.{}.w", "experts.{e.w", "experts.{e.x}.w", 3])
def test_names_that_cannot_tell_experts_apart(name, checkpoint):
    fields = {field: getattr(checkpoint.names, field) for field in checkpoint.names.__dataclass_fields__}
    with pytest.raises(ConfigError, match=r"Names\.w_out=.* must be text with \{e\}"):
        hf.Names(**fields | {"w_out": name})


def test_what_is_asked_for_and_is_not_there_is_named(checkpoint, tmp_path):
    with pytest.raises(hf.CheckpointError, match="no tensor is called lm_head\\.bias") as caught:
        checkpoint.folder.locate(["lm_head.bias", "lm_head.weight", "x"])
    assert len(caught.value.problems) == 2
    for layer in (1, "mtp.1", "", [0], None, 0.5):
        with pytest.raises(hf.CheckpointError, match="is not an MoE layer: the MoE layers are 0, 2"):
            hf.import_layer(checkpoint, layer)
    with pytest.raises(hf.CheckpointError, match="naming='jax' is unknown: use one of hf, megatron"):
        hf.open_checkpoint(tmp_path / "in", naming="jax")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(InputError, match="sharding has none for router/bias, experts/w_in, experts/w_out"):
        hf.import_layer(checkpoint, 0, sharding={"router": {"kernel": device}})


def test_a_dtype_that_no_safetensors_file_has(checkpoint, tmp_path):
    params = hf.import_layer(checkpoint, 0)
    params["shared"]["w_out"] = params["shared"]["w_out"].astype("float8_e4m3b11fnuz")
    with pytest.raises(hf.CheckpointError, match="shared/w_out is float8_e4m3b11fnuz"):
        write(checkpoint, "write_layers", tmp_path / "out", [(0, params)])


@pytest.mark.parametrize("name", ["\0", "a\0b", "x" * 300, "a" * 250 + "/b\0"])
def test_names_that_no_file_can_have(name, checkpoint, tmp_path, capsys):
    for how in ("replace_layers", "write_layers"):
        with pytest.raises(hf.CheckpointError, match=r"NUL|File name too long"):
            write(checkpoint, how, tmp_path / name)
    if "\0" in name:
        with pytest.raises(hf.CheckpointError, match="NUL"):
            hf.open_checkpoint(tmp_path / name)
    else:
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_names_that_are_not_utf_8(checkpoint, tmp_path, capsys):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out\xff")
    assert main(["convert", str(tmp_path / "in"), out]) == 0
    assert "out\\udcff" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert main(["convert", str(tmp_path / "in"), out]) == 1
    assert "out\\udcff: 1 problem" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("mapping", ["nemotron", "kimi", "deepseek"])
def test_what_is_converted_can_be_read_again(mapping, dtype, rng, tmp_path):
    make(tmp_path / "in", rng, mapping)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    before, after = hf.open_checkpoint(tmp_path / "in"), hf.open_checkpoint(tmp_path / "out")
    assert after.layers == before.layers
    with jax.enable_x64(True):
        for layer in after.layers:
            assert after.configs[layer].param_dtype == dtype
            params = hf.import_layer(after, layer)
            assert {leaf.dtype.name for part in params.values() for leaf in part.values()} <= {dtype, "float32"}
            same_trees(params, hf.import_layer(before, layer, dtype=dtype))


def test_what_was_quantised_is_no_longer_called_so(rng, tmp_path):
    names = gated("model.layers.1.mlp.", bias=True, shared=True)
    tensors = random_tensors(rng, names)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].astype("float8_e4m3fn")
    tensors[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    save(tmp_path / "in", DEEPSEEK_V3 | dict(quantization_config=dict(quant_method="fp8")), tensors)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_float64_without_jax_s_64_bit_types_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match="jax_enable_x64"):
        hf.import_layer(checkpoint, 0, dtype="float64")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "wide"), "--dtype", "float64"]) == 0
    with pytest.raises(InputError, match="jax_enable_x64"):
        hf.import_layer(hf.open_checkpoint(tmp_path / "wide"), 0)
    hf.import_layer(hf.open_checkpoint(tmp_path / "wide"), 0, dtype="float32")


def test_parameters_of_two_types_fit_no_config_json(checkpoint, tmp_path):
    params = hf.import_layer(checkpoint, 0)
    params["shared"] = jax.tree.map(lambda leaf: leaf.astype("float16"), params["shared"])
    with pytest.raises(hf.CheckpointError, match="BF16 and F16"):
        hf.write_layers(tmp_path / "out", [(0, params)], checkpoint.configs, checkpoint.names, config_json={})


PARTS = ["in", "out", "there", "link", "dangling", "file", ".", "..", "a b", "ü", "\ud800", "\0", "", "~"]


@hypothesis.given(parts=st.lists(st.sampled_from(PARTS), max_size=5), how=st.sampled_from(["new_folder", "copy"]))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_path_is_made_whole_or_refused_in_a_sentence(tmp_path_factory, parts, how):
    root = tmp_path_factory.mktemp("fuzz")
    for folder in ("in", "there"):
        (root / folder).mkdir()
        (root / folder / "mine").write_text("mine")
    (root / "file").write_text("mine")
    (root / "link").symlink_to("in")
    (root / "dangling").symlink_to("nowhere")
    before = snapshot(root)
    path = pathlib.Path(os.path.join(root, *parts))
    error = None
    try:
        with outputs.new_folder(path, root / "in") as partial:
            if how == "copy":
                outputs.copy_folder(root / "in", partial)
            (partial / "new").write_text("new")
    except hf.CheckpointError as caught:
        error = caught
    if error is None:
        assert snapshot(path.resolve()) == {"new": b"new"} | ({"mine": b"mine"} if how == "copy" else {})
    else:
        assert len(error.problems) == 1
    after = snapshot(root)
    assert before.items() <= after.items()
    assert not [name for name in after if name.endswith(".partial")]
