"""The drop-in example trains in both APIs."""

import re

from examples import drop_in


def test_the_example_learns_in_both_apis(capsys):
    drop_in.main(steps=12)
    lines = capsys.readouterr().out.splitlines()
    for name in ("linen", "nnx"):
        assert f"{name}: the layer's parameters" in lines
        (losses,) = [re.findall(r"\d+\.\d+", line) for line in lines if line.startswith(f"{name}: loss")]
        assert float(losses[-1]) < float(losses[0]) - 0.5
