"""The compiled kernels on a Hopper GPU: `CUDA_LAUNCH_BLOCKING=1` has an error point at the call that made it."""

import ctypes
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import CutlassBackend
from jax_latent_moe.grouped_matmul import (
    FusedActivation,
    GatheredRows,
    grouped_matmul,
    grouped_outer,
    problem,
    reference,
)
from jax_latent_moe.grouped_matmul.cutlass import Cutlass
from jax_latent_moe.grouped_matmul.cutlass_library import _path, library
from jax_latent_moe.grouped_matmul.cutlass_tiles import compiled as compiled_tiles
from jax_latent_moe.grouped_matmul.fused import ACTIVATIONS
from jax_latent_moe.grouped_matmul.rows import gathered
from tests.gpu.grouped import (
    check,
    check_fused,
    check_weights_beyond_two_to_the_31_elements,
    float64,
    needs_hopper,
)
from tests.tolerances import assert_close

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]
BACKEND = CutlassBackend()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("features", [(256, 320), (72, 136), (1000, 2696)])
def test_random_groups_with_empty_experts(rng, dtype, features):
    for total in (1517, 900, 1):
        sizes = rng.multinomial(total, rng.dirichlet(np.full(16, 0.3)))
        check(BACKEND, rng, dtype, sizes, 1517, *features)


def test_one_expert_has_all_and_none_has_any(rng):
    for sizes in (np.eye(16, dtype=int)[11] * 1517, np.zeros(16, int)):
        check(BACKEND, rng, "bfloat16", sizes, 1517, 256, 320)


@pytest.mark.parametrize("num_rows", [1, 8, 22])
def test_few_rows(rng, num_rows):
    check(BACKEND, rng, "bfloat16", rng.multinomial(num_rows, np.full(40, 1 / 40)), num_rows, 128, 192)


def test_more_tiles_than_multiprocessors(rng):
    check(BACKEND, rng, "bfloat16", rng.multinomial(2500, np.full(40, 1 / 40)), 3000, 264, 1032)


@pytest.mark.parametrize(("num_rows", "owned"), [(3000, 2500), (517, 517), (1, 1)])
def test_rows_that_the_kernel_gathers_are_those_gathered_before(rng, num_rows, owned):
    """To the bit, by every tile, ids outside of the table included; and they are right."""
    experts, in_features, width, tokens = 40, 264, 1040, 90
    sizes = rng.multinomial(owned, rng.dirichlet(np.full(experts, 0.5)))
    table, w = rng.normal(size=(tokens, in_features)), rng.normal(size=(experts, in_features, width)) / 16
    ids = rng.integers(-3, tokens + 3, num_rows)
    rows = GatheredRows(jnp.asarray(table, jnp.bfloat16), jnp.asarray(ids, jnp.int32))
    w, groups = jnp.asarray(w, jnp.bfloat16), jnp.asarray(sizes, jnp.int32)
    expected = reference.grouped_matmul(float64(rows.table)[np.clip(ids, 0, tokens - 1)], float64(w), sizes)
    for tile in compiled_tiles(problem("rows_w", num_rows, w.shape, "bfloat16")):
        multiply = jax.jit(functools.partial(grouped_matmul, backend=CutlassBackend(matmul_tile=tile)))
        out = multiply(rows, w, groups)
        assert_close(float64(out), expected, "bfloat16", repr(tile))
        assert (np.asarray(out) == np.asarray(multiply(gathered(rows), w, groups))).all()
    for name in ("relu2", "swiglu"):
        activate = jax.jit(
            functools.partial(
                Cutlass(CutlassBackend(fuse="always")).matmul_activation,
                activation=FusedActivation(name),
                keep_pre=True,
            )
        )
        pairs = zip(activate(rows, w, groups), activate(gathered(rows), w, groups), strict=True)
        assert all((np.asarray(value) == np.asarray(same)).all() for value, same in pairs)


def test_weights_beyond_two_to_the_31_elements(rng):
    check_weights_beyond_two_to_the_31_elements(BACKEND, rng)


@pytest.mark.parametrize("contraction", ["rows_w", "rows_wt", "outer"])
def test_every_compiled_tile(rng, contraction):
    sizes = rng.multinomial(2500, rng.dirichlet(np.full(40, 0.5)))
    w_shape = 40, 264, 1032
    for tile in compiled_tiles(problem(contraction, 3000, w_shape, "bfloat16")):
        kind = "outer_tile" if contraction == "outer" else "matmul_tile"
        check(dataclasses.replace(BACKEND, **{kind: tile}), rng, "bfloat16", sizes, 3000, *w_shape[1:])


def test_the_halves_of_the_l2_cache_are_told_apart(rng):
    check(BACKEND, rng, "bfloat16", np.asarray([3, 5]), 8, 64, 64)
    bits = (ctypes.c_uint32 * 8)()
    ctypes.CDLL(str(_path())).latent_moe_sides(0, bits)
    multiprocessors = jax.devices()[0].core_count
    ones = sum(bin(word).count("1") for word in bits)
    assert 0.4 < ones / multiprocessors < 0.6


def test_many_calls_in_one_program(rng):
    """Enough of them that XLA may put them into one CUDA graph."""
    sizes = rng.multinomial(2500, np.full(40, 1 / 40))
    shapes = (3000, 264), (40, 264, 1032), (3000, 1032)
    rows, w, dout = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    @jax.jit
    def run(rows, w, dout, sizes):
        return [
            (
                grouped_matmul(rows * i, w, sizes, backend=BACKEND),
                grouped_matmul(dout * i, w, sizes, transpose_w=True, backend=BACKEND),
                grouped_outer(rows * i, dout, sizes, backend=BACKEND),
            )
            for i in (1, 2, 4, 8, 16, 32)
        ]

    first = run(rows, w, dout, jnp.asarray(sizes, jnp.int32))
    again = run(rows, w, dout, jnp.asarray(sizes, jnp.int32))
    out = reference.grouped_matmul(float64(rows), float64(w), sizes)
    dw = reference.grouped_outer(float64(rows), float64(dout), sizes)
    for i, (one, two) in enumerate(zip(first, again, strict=True)):
        assert_close(float64(one[0]) / 2**i, out, "bfloat16")
        assert_close(float64(one[2]) / 2**i, dw, "bfloat16")
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fused_activations(rng, name):
    fusing = Cutlass(CutlassBackend(fuse="always"))
    check_fused(fusing, rng, name, "bfloat16", np.asarray([0, 300, 1, 77, 200]), 700, 72, 200)
    check_fused(fusing, rng, name, "bfloat16", rng.multinomial(900, rng.dirichlet(np.full(16, 0.3))), 1517, 128, 704)
