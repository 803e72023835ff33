"""The MaxText-style example trains on eight devices as it does on one, and its rules place the experts."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from examples import maxtext_block
from jax_latent_moe import InputError, ParallelConfig
from jax_latent_moe.parallel import MAXTEXT_AXES, logical_axis_rules
from tests.parallel.meshes import make_mesh


@pytest.fixture
def quick_compilation():
    """XLA without its costly optimisations, which double the time of this test and change no value."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_eight_devices_train_as_one(quick_compilation, capsys):
    mesh = jax.make_mesh((1, 2, 2, 2), ("data", "fsdp", "expert", "tensor"), axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh), nn.logical_axis_rules(maxtext_block.RULES):
        losses = maxtext_block.train(2, mesh)
    np.testing.assert_allclose(losses, maxtext_block.train(2, None), rtol=1e-4)
    on_eight, on_one = capsys.readouterr().out.splitlines()
    assert on_eight == "experts/w_in (2, 8, 16, 16): (2, 4, 8, 8) on each device"
    assert on_one == "experts/w_in (2, 8, 16, 16): (2, 8, 16, 16) on each device"


def test_rules_in_maxtexts_names():
    rules = logical_axis_rules(ParallelConfig(), make_mesh(1, 2, 2, 2), MAXTEXT_AXES)
    assert dict(rules) == {"exp": "expert", "mlp": "tensor", "embed": "fsdp", "embed_no_exp": "fsdp"}
    assert len(rules) == 4
    one = dict(logical_axis_rules(ParallelConfig(), make_mesh(1, 1, 1, 1), MAXTEXT_AXES))
    assert one == dict.fromkeys(("exp", "mlp", "embed", "embed_no_exp"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"embed": "hidden"}, "axis_names rename 'embed', which is not one of 'hidden'"),
        (
            {"hidden": "mlp", "expert_intermediate": "mlp"},
            "give 'mlp' to .* split over tensor and to 'hidden'",
        ),
    ],
)
def test_refusals(names, message):
    with pytest.raises(InputError, match=message):
        logical_axis_rules(ParallelConfig(), make_mesh(1, 2, 2, 2), names)
