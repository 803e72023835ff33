"""Experts moved to a GPU in parts: the values, and the memory of the device while they arrive."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe import hf
from jax_latent_moe.hf.placing import place
from tests.gpu.grouped import needs_hopper
from tests.hf.test_quantised import every_kind, make
from tests.hf.test_round_trip import same_bits

pytestmark = needs_hopper


def test_bytes_beyond_two_to_the_31():
    """Codes of Kimi K3 are one array of 9.9 GB. The device never holds them twice."""
    device = jax.devices()[0]
    before = device.memory_stats()

    def fill(array, index):
        for place_of, expert in enumerate(range(*index[0].indices(21))):
            array[place_of] = expert
            array[place_of, -1] = 100 + expert

    array = place((21, 2**27 + 3), np.dtype(np.uint8), None, fill, experts=True)
    peak = device.memory_stats()["peak_bytes_in_use"]
    assert array.nbytes > 2**31
    np.testing.assert_array_equal(array[:, 0], np.arange(21))
    np.testing.assert_array_equal(array[:, -1], 100 + np.arange(21))
    wrong = jnp.sum(array[:, :-1] != jnp.arange(21, dtype=jnp.uint8)[:, None], axis=1, dtype=jnp.int32)
    assert not wrong.any()
    if peak > before["peak_bytes_in_use"]:  # else an earlier test used more
        # An expert of this array is 5 % of it, and two are on their way.
        assert peak - before["bytes_in_use"] < 1.2 * array.nbytes


@every_kind
def test_a_layer_is_that_of_the_cpu(kind, rng, tmp_path, monkeypatch):
    make(tmp_path, rng, kind)
    checkpoint = hf.open_checkpoint(tmp_path)
    layer = checkpoint.layers[0]
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = hf.import_layer(checkpoint, layer, keep_quantized=True, sharding=cpu)
    monkeypatch.setattr("jax_latent_moe.hf.placing.PART", 700)
    found = hf.import_layer(checkpoint, layer, keep_quantized=True)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.devices() == {jax.devices()[0]}
        same_bits(np.asarray(one), np.asarray(other))
