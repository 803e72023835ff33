"""The worked example runs, and its output differs from the original only in the correction biases."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.import_hf import main


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").symlink_to("nowhere")
    for folder in ("run", "."):
        with pytest.raises(SystemExit):
            main([str(tmp_path / folder)])
        assert "exists already, and the example overwrites nothing: name a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_import_hf(tmp_path, capsys):
    main([str(tmp_path / "run")])
    original, balanced = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("original", "balanced"))
    changed = {name for name in original if original[name].tobytes() != balanced[name].tobytes()}
    assert changed == {f"backbone.layers.{layer}.mixer.gate.e_score_correction_bias" for layer in (0, 1)}
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "over the mean" in line]
    assert len(lines) == 2
    for before, after in ((float(line[8]), float(line[10])) for line in lines):
        assert after < before
    assert np.load(tmp_path / "run" / "balanced" / "expected.npz")["y1"].shape == (512, 32)
