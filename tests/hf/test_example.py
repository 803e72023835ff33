"""The worked examples run, and their outputs differ from the original only in what they changed."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples import fine_tune
from examples.import_hf import main


@pytest.mark.parametrize("main", [main, fine_tune.main], ids=["import_hf", "fine_tune"])
def test_a_folder_that_exists_is_left_alone(main, tmp_path, capsys):
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


def test_fine_tune(tmp_path, capsys):
    fine_tune.main([str(tmp_path / "run")])
    original, tuned = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("original", "tuned"))
    changed = {name for name in original if original[name].tobytes() != tuned[name].tobytes()}
    mixer = "backbone.layers.0.mixer."
    experts = {name for name in original if name.startswith(f"{mixer}experts.")}
    projections = {f"{mixer}{name}.weight" for name in ("fc1_latent_proj", "fc2_latent_proj")}
    assert changed == experts | projections
    for name in projections:  # dense weights, so the change is the adapter, of rank 4 but for bfloat16's rounding
        sizes = np.linalg.svd(tuned[name].astype(np.float64) - original[name].astype(np.float64), compute_uv=False)
        assert sizes[4] < 0.05 * sizes[0] < sizes[0]
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if "relative error" in line]
    before, after = float(line[5]), float(line[7])
    assert after < before / 3
