"""Import straight into shards, on four devices, in a separate process."""

import os
import subprocess
import sys

import pytest

from jax_latent_moe import hf
from tests.hf.checkpoints import make
from tests.hf.test_round_trip import same_trees

SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_latent_moe import hf

checkpoint = hf.open_checkpoint(sys.argv[1])
layer = checkpoint.layers[0]
plain = hf.import_layer(checkpoint, layer)
mesh = jax.make_mesh((2, 2), ("expert", "model"))
specs = {"w_in": P("expert", *[None] * (plain["experts"]["w_in"].ndim - 2), "model"), "w_out": P("expert", "model")}
specs |= {"b_in": P("expert", None, "model"), "b_out": P("expert")}
everywhere = {
    part: {name: NamedSharding(mesh, specs[name] if part == "experts" else P()) for name in leaves}
    for part, leaves in plain.items()
}
for sharding in (everywhere, NamedSharding(mesh, P()), jax.sharding.SingleDeviceSharding(jax.devices()[3])):
    params = hf.import_layer(checkpoint, layer, sharding=sharding)
    for part, leaves in plain.items():
        for name, leaf in leaves.items():
            wanted = sharding[part][name] if isinstance(sharding, dict) else sharding
            assert params[part][name].sharding == wanted, (part, name)
            assert np.asarray(params[part][name]).tobytes() == np.asarray(leaf).tobytes(), (part, name)
shard = hf.import_layer(checkpoint, layer, sharding=everywhere)["experts"]["w_out"].addressable_shards[0]
assert shard.data.shape == (2, 6, shard.data.shape[2])
"""


@pytest.mark.parametrize("mapping", ["kimi", "megatron_gated", "gpt_oss"])
def test_shards_hold_their_part(mapping, rng, tmp_path):
    naming, _ = make(tmp_path, rng, mapping)
    script = SHARDED.replace("sys.argv[1])", f"sys.argv[1], naming={naming!r})")
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    flags["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=os.environ | flags, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_parameters_are_the_same_from_one_file_or_three(rng, tmp_path):
    state = rng.bit_generator.state
    make(tmp_path / "one", rng, "kimi", files=1)
    rng.bit_generator.state = state
    make(tmp_path / "three", rng, "kimi", files=3)
    one, three = (dict(hf.import_layers(hf.open_checkpoint(tmp_path / name))) for name in ("one", "three"))
    for layer in one:
        same_trees(one[layer], three[layer])
