"""What `keep_gathered_rows` adds to a plan's memory and takes off its time."""

import dataclasses

import pytest

from jax_latent_moe.plan import GPUS, make_cost_plan
from tests.cases import TOY

TOKENS, LAYERS = 4096, 3
SIZES = dict(hidden_size=128, latent_size=256, expert_intermediate_size=512, num_experts=16, top_k=9)
GATHERED_AGAIN = dataclasses.replace(TOY, dtype="bfloat16", shared_expert_intermediate_size=0, **SIZES)
KEPT = dataclasses.replace(GATHERED_AGAIN, keep_gathered_rows=True)


def plans(**options):
    """With the rows kept, and with the rows gathered again."""
    configs, gpu = (KEPT, GATHERED_AGAIN), GPUS["h200"]
    return [make_cost_plan(config, {}, TOKENS, gpu, layers=LAYERS, **options) for config in configs]


@pytest.mark.parametrize("remat", [False, True])
def test_gathered_rows_that_are_kept_take_memory_and_save_time(remat):
    """Rows [T k, l] in bfloat16: of each layer, or of the one that is recomputed."""
    kept, again = plans(remat=remat)
    rows = TOKENS * 9 * 256 * 2
    more = {name: kept.memory[name] - size for name, size in again.memory.items()}
    assert more == dict.fromkeys(more, 0) | {"kept for the backward pass": rows * (1 if remat else LAYERS)}
    assert kept.compute_ms < again.compute_ms


@pytest.mark.parametrize("options", [{"training": False}, {"format": "mxfp4"}], ids=str)
def test_without_a_gradient_of_w_in_no_rows_are_kept(options):
    kept, again = plans(**options)
    assert kept.memory == again.memory
