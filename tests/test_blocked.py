"""Blocked products with as many blocks a step as on a GPU. By default, a CPU takes few."""

import functools
import itertools

import jax
import numpy as np
import pytest

from jax_latent_moe.device import current_device
from jax_latent_moe.grouped_matmul.xla import blocked
from tests.cases import DTYPES
from tests.conformance.oracle import oracle_matmul, oracle_wgrad, random_group_sizes
from tests.tolerances import assert_close

EXPERTS, K, N, ROWS = 6, 4, 3, 22
BLOCKS_PER_STEP = [1, 2, 3, 64]


@pytest.fixture(scope="module", params=BLOCKS_PER_STEP, ids=lambda blocks: f"{blocks} blocks a step")
def products(request):
    """Jitted matmul and wgrad, traced with that many blocks a step."""
    step_bytes = request.param * K * N * np.dtype(np.float32).itemsize
    sizes = blocked._Sizes(rows=(2, 4), matmul_bytes=step_bytes, wgrad_bytes=step_bytes)
    settings = dict(block_rows=None, device=current_device())
    matmul = functools.partial(blocked.blocked_matmul, transpose_w=False, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_sizes", lambda device: sizes)
        yield jax.jit(matmul), jax.jit(functools.partial(blocked.blocked_wgrad, **settings))


def draw(rng, dtype="float32"):
    return (rng.normal(size=shape).astype(DTYPES[dtype]) for shape in ((ROWS, K), (EXPERTS, K, N), (ROWS, N)))


def check(products, rows, w, group_sizes, dout, dtype="float32"):
    matmul, wgrad = products
    assert_close(matmul(rows, w, group_sizes), oracle_matmul(rows, w, group_sizes), dtype, f"sizes {group_sizes}")
    assert_close(wgrad(rows, dout, group_sizes), oracle_wgrad(rows, dout, group_sizes), dtype, f"sizes {group_sizes}")


def test_every_pattern_of_empty_experts(rng, products):
    rows, w, dout = draw(rng)
    for pattern in itertools.product([0, 1], repeat=EXPERTS):
        present = np.flatnonzero(pattern)
        group_sizes = np.zeros(EXPERTS, np.int32)
        if present.size:
            group_sizes[present] = np.bincount(rng.integers(present.size, size=ROWS), minlength=present.size)
        check(products, rows, w, group_sizes, dout)


@pytest.mark.parametrize("expert", [0, 3, EXPERTS - 1])
def test_one_expert_over_many_steps(rng, products, expert):
    rows, w, dout = draw(rng)
    check(products, rows, w, ROWS * np.eye(EXPERTS, dtype=np.int32)[expert], dout)


def test_bfloat16(rng, products):
    rows, w, dout = draw(rng, "bfloat16")
    check(products, rows, w, random_group_sizes(rng, EXPERTS, ROWS), dout, "bfloat16")


def test_rows_beyond_the_groups_leak_nowhere(rng, products):
    rows, w, dout = draw(rng)
    group_sizes = random_group_sizes(rng, EXPERTS, ROWS - 5)
    expected = oracle_matmul(rows, w, group_sizes), oracle_wgrad(rows, dout, group_sizes)
    rows[-5:], dout[-5:] = np.nan, np.nan
    matmul, wgrad = products
    assert_close(matmul(rows, w, group_sizes), expected[0], "float32")
    assert_close(wgrad(rows, dout, group_sizes), expected[1], "float32")


def test_a_row_of_nan_stays_with_its_expert(rng, products):
    rows, _, dout = draw(rng)
    group_sizes = np.array([5, 0, 7, 1, 6, 3], np.int32)
    expected = oracle_wgrad(rows, dout, group_sizes)
    rows[8] = np.nan  # of expert 2
    out = np.asarray(products[1](rows, dout, group_sizes))
    others = [0, 1, 3, 4, 5]
    assert np.isnan(out[2]).all()
    assert_close(out[others], expected[others], "float32")
