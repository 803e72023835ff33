"""The command line in a separate process: signals, kills, wrong options."""

import dataclasses
import re
import signal

import pytest

from examples.train.train import main, train
from tests.examples.runs import assert_same_bits, options, start, state_of, toy_config, wait_for, write_text


def test_killed_and_terminated_run_ends_as_if_never_touched(tmp_path):
    write_text(tmp_path)
    broken = toy_config(tmp_path, run=tmp_path / "broken", steps=60, log_every=5, checkpoint_every=3)
    whole = dataclasses.replace(broken, run=tmp_path / "whole", checkpoint_every=60)
    train(whole)

    with start(*options(broken)) as process:
        wait_for(process, "step 15/60")
        process.kill()
    killed_at = int(state_of(broken.folder).step)
    assert 6 <= killed_at < 60

    with start(*options(broken)) as process:
        wait_for(process, f"resumed at step {killed_at}")
        wait_for(process, f"step {(killed_at // 5 + 2) * 5}/60")
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM, "the run is not complete"
    stopped_at = int(state_of(broken.folder).step)
    assert f"Stopped by SIGTERM with step {stopped_at} of 60 saved" in rest
    assert killed_at < stopped_at < 60

    train(broken)
    assert_same_bits(state_of(broken.folder), state_of(whole.folder))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "no/such/folder"], "error: --data no/such/folder does not exist: give shakespeare, stdlib, or"),
        (["--model.heads", "5"], "error: model.hidden_size=32 must be a multiple of twice model.heads=5"),
        (["--model.top-k", "9"], "error: top_k=9 is more than num_experts=8"),
        (
            ["--mlp", "moe", "--model.top-k", "1"],
            "error: --mlp moe multiplies model.num_experts=8 and model.top_k=1 by latent_size",
        ),
        (
            ["--data", "TEXT", "--model.context", "99999"],
            "error: The text has 19000 bytes to train on and 1000 to validate on",
        ),
        (["--preset", "huge"], "error: --preset huge is unknown: use one of auto, toy, cpu, gpu, gpu-80gb, gpu-x8."),
    ],
)
def test_wrong_options_end_in_one_sentence(tmp_path, arguments, sentence):
    text = str(write_text(tmp_path))
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    preset = [] if "--preset" in arguments else ["--preset", "toy"]
    with pytest.raises(SystemExit) as leaving:
        main([*preset, "--run", str(tmp_path / "run"), *arguments])
    assert leaving.value.code.startswith(sentence)
    assert "\n" not in leaving.value.code
    assert not (tmp_path / "run").exists()


def test_wrong_option_in_a_process_shows_no_traceback(tmp_path):
    with start("--preset", "toy", "--run", tmp_path / "run", "--data", tmp_path / "none") as process:
        output = process.stdout.read()
    assert process.returncode == 1
    assert re.fullmatch(r"Reading \S+ \.\.\.\nerror: --data .* does not exist: .*\n", output)


def test_help_shows_every_option_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "--data",
        "--preset",
        "--mlp",
        "--model.latent-size",
        "Width of the latent that the routed experts read and write.",
    ):
        assert words in output
