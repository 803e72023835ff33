"""The command's printed output, written files and exit status."""

from safetensors.numpy import load_file

from jax_latent_moe.hf.__main__ import main
from tests.hf.checkpoints import make
from tests.hf.test_round_trip import same_bits


def test_inspect(rng, tmp_path, capsys):
    make(tmp_path, rng, "nemotron")
    assert main(["inspect", str(tmp_path), "--layers", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("layer 2: d 16, l 8, experts 4, k 2, m 12, shared 20, relu2:")
    assert printed.endswith("unquantised\n")


def test_verify_shows_progress(rng, tmp_path, capsys):
    make(tmp_path, rng, "kimi")
    assert main(["verify", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("20 tensors come back bit for bit") == 2
    assert "layer [1/2] 1: experts/w_in" in printed.err


def test_convert_to_megatron_and_back(rng, tmp_path, capsys):
    _, tensors = make(tmp_path / "in", rng, "deepseek")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "megatron"), "--to", "megatron"]) == 0
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight3" in load_file(tmp_path / "megatron/moe-layer-1.safetensors")
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "back"), "--naming", "megatron"]) == 0
    back = load_file(tmp_path / "back/moe-layer-1.safetensors")
    assert back.keys() == {name for name in tensors if ".layers.1.mlp." in name}
    for name, tensor in back.items():
        same_bits(tensor, tensors[name])


def test_errors_are_printed_and_told_by_the_status(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "neither model.safetensors.index.json nor any *.safetensors file" in capsys.readouterr().err
