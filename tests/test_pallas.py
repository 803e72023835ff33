"""The Pallas kernels without a GPU: interpreted against the oracle with race detection, and lowered for CUDA."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_latent_moe.config import PallasBackend, PallasFp8Tile, PallasMatmulTile, PallasWgradTile, PallasWidenTile
from jax_latent_moe.device import Device
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.formats import encode, encode_rows
from jax_latent_moe.grouped_matmul import Operand, Operands, explain, operand_of, problem, reference, select
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.pallas_sm90.matmul import matmul
from jax_latent_moe.grouped_matmul.pallas_sm90.schedule import max_row_tiles, row_tiles
from jax_latent_moe.grouped_matmul.pallas_sm90.wgrad import wgrad
from jax_latent_moe.grouped_matmul.registry import bind
from tests.drawn import drawn
from tests.kernels import A100, CPU, H200
from tests.tolerances import assert_close

EXPERTS, ROWS, IN, OUT = 5, 100, 128, 192
GROUPS = {
    "uneven with empty experts": [0, 75, 1, 0, 17],
    "one expert has all": [0, 0, 100, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}
MATMUL_TILES = [
    PallasMatmulTile(rows=64, columns=192, stages=2, store_buffers=2),
    PallasMatmulTile(rows=192, columns=64, stages=2, store_buffers=1, band=2, cluster=2),
]
WGRAD_TILES = [
    PallasWgradTile(rows=128, columns=192, stages=2, store_buffers=2),
    PallasWgradTile(rows=64, columns=64, stages=2, store_buffers=1, cluster=2),
]


PROBLEM = problem("fwd", 4096, (64, 256, 512), "bfloat16", device=H200)
FLOAT32 = Operand("float32")


def operands(dtype, sizes, num_rows=ROWS, seed=0):
    """Rows, weights, output gradients and group sizes in NumPy; NaN in the rows that belong to no expert."""
    rng = np.random.default_rng(seed)
    shapes = (num_rows, IN), (EXPERTS, IN, OUT), (num_rows, OUT)
    rows, w, dout = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    rows[sum(sizes) :] = dout[sum(sizes) :] = np.nan
    return *(x.astype(jnp.dtype(dtype)) for x in (rows, w, dout)), np.asarray(sizes, np.int32)


def run_matmul(rows, w, group_sizes, **settings):
    return matmul(*map(jnp.asarray, (rows, w, group_sizes)), **settings)


def run_wgrad(rows, dout, group_sizes, **settings):
    return wgrad(*map(jnp.asarray, (rows, dout, group_sizes)), **settings)


@pytest.fixture
def interpreter():
    """Parameters of the interpreter; no race may have been found when the test ends."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("sizes", "transpose_w"), [(sizes, i != 1) for i, sizes in enumerate(GROUPS.values())], ids=GROUPS
)
def test_matmul_interpreted(sizes, transpose_w, interpreter):
    rows, w, dout, group_sizes = operands("bfloat16", sizes)
    left = dout if transpose_w else rows
    out = run_matmul(
        left, w, group_sizes, transpose_w=transpose_w, tile=MATMUL_TILES[0], num_sms=2, interpret=interpreter
    )
    assert_close(out, reference.grouped_matmul(left, w, group_sizes, transpose_w=transpose_w), "bfloat16")
    assert not out[sum(sizes) :].any()


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_wgrad_interpreted(sizes, interpreter):
    rows, _, dout, group_sizes = operands("bfloat16", sizes)
    out = run_wgrad(rows, dout, group_sizes, tile=WGRAD_TILES[0], num_sms=2, interpret=interpreter)
    assert_close(out, reference.grouped_wgrad(rows, dout, group_sizes), "bfloat16")
    assert not out[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("num_rows", [7, 75])
def test_clusters_and_rows_that_no_block_divides(num_rows, interpreter):
    sizes = [num_rows // 2, 0, 0, num_rows - num_rows // 2, 0]
    rows, w, dout, group_sizes = operands("float16", sizes, num_rows)
    out = run_matmul(rows, w, group_sizes, transpose_w=False, tile=MATMUL_TILES[1], num_sms=4, interpret=interpreter)
    assert_close(out, reference.grouped_matmul(rows, w, group_sizes), "float16")
    out = run_wgrad(rows, dout, group_sizes, tile=WGRAD_TILES[1], num_sms=4, interpret=interpreter)
    assert_close(out, reference.grouped_wgrad(rows, dout, group_sizes), "float16")


@pytest.mark.parametrize("sizes", [[-5, 10, 0, 3, 0], [60, 0, 35, 30, 35]], ids=["negative", "more than there are"])
def test_impossible_group_sizes_stay_in_bounds(sizes, interpreter):
    """Under jit they cannot be refused: a negative size counts as 0, and rows that do not exist are left out."""
    rows, w, _, _ = operands("bfloat16", [ROWS, 0, 0, 0, 0])
    out = run_matmul(
        rows, w, np.asarray(sizes), transpose_w=False, tile=MATMUL_TILES[0], num_sms=2, interpret=interpreter
    )
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), ROWS)
    assert_close(out, reference.grouped_matmul(rows, w, np.diff(ends, prepend=0)), "bfloat16")


@pytest.mark.parametrize("tile_rows", [64, 128, 192])
def test_row_tiles_cover_each_row_once(tile_rows):
    rng, tiles = np.random.default_rng(1), jax.jit(row_tiles, static_argnums=(1, 2))
    for experts, num_rows in ((1, 1), (7, 40), (16, 700)):
        for total in (0, num_rows // 2, num_rows):
            sizes = rng.multinomial(total, rng.dirichlet(np.full(experts, 0.3)))
            table, counts = jax.device_get(tiles(jnp.asarray(sizes), num_rows, tile_rows))
            assert counts[1] <= max_row_tiles(experts, num_rows, tile_rows) == table.shape[1]
            owner = np.repeat(np.arange(experts), sizes)
            covered = np.zeros(num_rows, int)
            for tile, (expert, row, begin, end) in enumerate(table.T[: counts[1]]):
                assert row % 8 == 0
                assert 0 <= begin < end <= tile_rows
                covered[row + begin : row + end] += 1
                if tile < counts[0]:
                    assert (owner[row + begin : row + end] == expert).all()
                else:
                    assert row + begin >= total
            assert (covered == 1).all()


SHAPES = [(512, 1024, 2688), (128, 2048, 1536), (512, 2048, 5120), (8, 64, 128)]


# Tiles depend on the shapes, not on which of the two types of 16 bits it is.
@pytest.mark.parametrize(
    ("dtype", "w_shape", "num_rows"),
    drawn(itertools.product(["bfloat16", "float16"], SHAPES, [22, 180224]), 4),
    ids=str,
)
def test_lowers_for_cuda(dtype, w_shape, num_rows):
    """Layouts, transforms and shared memory are checked by the lowering, which needs no GPU."""
    experts, k, n = w_shape
    rows, dout = (jax.ShapeDtypeStruct((num_rows, size), dtype) for size in (k, n))
    w, sizes = jax.ShapeDtypeStruct(w_shape, dtype), jax.ShapeDtypeStruct((experts,), jnp.int32)

    def product(contraction, *arrays):
        asked = problem(contraction, num_rows, w_shape, dtype, device=H200)
        return select(asked, PallasBackend())(Operands(*arrays)).out

    def run(rows, w, dout, sizes):
        return (
            product("fwd", rows, w, sizes),
            product("dgrad", dout, w, sizes),
            product("wgrad", rows, dout, sizes),
        )

    text = jax.jit(run).trace(rows, w, dout, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3


def test_vmap_runs_one_after_the_other(interpreter):
    """Group sizes of their own, one weight for all."""
    sizes = np.asarray([GROUPS["uneven with empty experts"], GROUPS["one expert has all"]], np.int32)
    drawn = [operands("bfloat16", each, seed=seed) for seed, each in enumerate(sizes)]
    rows, dout, w = np.stack([d[0] for d in drawn]), np.stack([d[2] for d in drawn]), drawn[0][1]
    tiles = PallasBackend(matmul_tile=PallasMatmulTile(64, 64, 2, 1), wgrad_tile=PallasWgradTile(64, 64, 2, 1))
    interpreted = type("Interpreted", (Pallas,), {"interpret": interpreter})(tiles)

    def product(contraction):
        asked = problem(contraction, ROWS, w.shape, "bfloat16", device=Device("gpu", "NVIDIA H200", 2))
        return lambda *arrays: bind(interpreted, asked)(Operands(*arrays)).out

    products = jax.vmap(product("fwd"), (0, None, 0))(rows, w, sizes)
    wgrads = jax.vmap(product("wgrad"))(rows, dout, sizes)
    for index, each in enumerate(sizes):
        assert_close(products[index], reference.grouped_matmul(rows[index], w, each), "bfloat16")
        assert_close(wgrads[index], reference.grouped_wgrad(rows[index], dout[index], each), "bfloat16")


FIELDS = {
    "matmul_tile": {"rows": 64, "columns": 128, "stages": 3, "store_buffers": 1, "band": 2, "cluster": 2},
    "wgrad_tile": {"rows": 64, "columns": 128, "stages": 3, "store_buffers": 1, "cluster": 2},
    "fp8_tile": {"rows": 64, "columns": 64, "stages": 3, "store_buffers": 1, "band": 2, "cluster": 2},
    "widen_tile": {"features": 256, "rows": 32, "stages": 3, "scale_buffers": 1, "store_buffers": 2, "band": 2},
}


def product_of(tile: str, backend):
    """The program of one product that has this tile."""
    shapes = (512, 128), (4, 128, 256), (512, 256)
    rows, w, dout = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)

    def product(contraction, *arrays):
        operands = {"lhs": operand_of(arrays[0]), "rhs": operand_of(arrays[1])}
        asked = problem(contraction, 512, shapes[1], "bfloat16", **operands, device=H200)
        return select(asked, backend)(Operands(*arrays)).out

    products = {
        "matmul_tile": lambda rows, w, dout, sizes: product("fwd", rows, w, sizes),
        "wgrad_tile": lambda rows, w, dout, sizes: product("wgrad", rows, dout, sizes),
        "fp8_tile": lambda rows, w, dout, sizes: product(
            "fwd", encode_rows(rows, "fp8_block"), encode(w, "fp8_block"), sizes
        ),
        "widen_tile": lambda rows, w, dout, sizes: product("fwd", rows, encode(w, "mxfp4"), sizes),
    }
    return str(jax.make_jaxpr(products[tile])(rows, w, dout, jax.ShapeDtypeStruct((4,), jnp.int32)))


def test_each_field_of_a_tile_is_read():
    base = PallasBackend(PallasMatmulTile(), PallasWgradTile(), PallasFp8Tile(columns=128), PallasWidenTile())
    assert FIELDS.keys() | {"fuse"} == {field.name for field in dataclasses.fields(base)}
    for name, changes in FIELDS.items():
        tile, before = getattr(base, name), product_of(name, base)
        assert changes.keys() == {field.name for field in dataclasses.fields(tile)}
        for field, value in changes.items():
            changed = dataclasses.replace(base, **{name: dataclasses.replace(tile, **{field: value})})
            assert product_of(name, changed) != before, f"{name}.{field} is not read"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(device=CPU), "for NVIDIA Hopper GPUs .* not 'cpu'"),
        (dict(device=A100), "not 'NVIDIA A100-SXM4-80GB'"),
        (dict(device=Device("gpu", "NVIDIA B200")), "not 'NVIDIA B200'"),
        (dict(lhs=FLOAT32, rhs=FLOAT32, out=FLOAT32), "in bfloat16 or all in float16, not float32 x float32"),
        (dict(rhs=Operand("float16")), "all in float16, not bfloat16 x float16 to bfloat16"),
        (dict(rhs=Operand("int4")), "all in float16, not bfloat16 x int4 to bfloat16"),
        (dict(k=1000), "k=1000 is not a positive multiple of 64"),
        (dict(n=2696), "n=2696 is not a positive multiple of 64"),
        (dict(n=0), "n=0 is not a positive multiple of 64"),
        (dict(num_rows=0), "num_rows=0 must be"),
        (dict(num_experts=0), "num_experts=0 must be"),
    ],
)
def test_refuses(changes, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(Pallas(PallasBackend()).supports(dataclasses.replace(PROBLEM, **changes)))


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_auto_takes_it_on_hopper_without_compiled_kernels(kind, library_at, tmp_path):
    library_at(tmp_path / "none.so")
    text = explain(dataclasses.replace(PROBLEM, device=Device("gpu", kind)))
    assert "PallasBackend(matmul_tile=None, wgrad_tile=None, fp8_tile=None, widen_tile=None, " in text
    assert "fuse='measured') runs it" in text


def chosen(contraction, num_rows, w_shape):
    return select(problem(contraction, num_rows, w_shape, "bfloat16", device=H200), PallasBackend())


def test_a_measured_tile_comes_from_the_table():
    for num_rows, band in ((180224, 4), (100000, 4), (45056, 1)):
        bound = chosen("dgrad", num_rows, (512, 1024, 2688))
        assert bound.tile.band == band
        assert ("committed table" in bound.source) == (band == 4)


@pytest.mark.parametrize("columns", [64, 128, 192, 320, 1024, 2688, 5120])
def test_a_tile_pads_little(columns):
    for num_rows in (64, 100000):
        tile = chosen("fwd", num_rows, (64, 512, columns)).tile
        width = tile.columns * tile.cluster
        assert -(-columns // width) * width <= max(1.25 * columns, 256)
        tile = chosen("wgrad", num_rows, (64, columns, 512)).tile
        height = tile.rows * tile.cluster
        assert -(-columns // height) * height <= max(1.25 * columns, 256)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (PallasMatmulTile, dict(rows=100), "rows=100 must be 64, 128 or 192 and columns=192 a multiple of 64"),
        (PallasMatmulTile, dict(rows=192, columns=192), "does not fit the registers"),
        (PallasMatmulTile, dict(rows=64, columns=320), "columns are at most 256"),
        (PallasWgradTile, dict(stages=6), "bytes of shared memory, more than"),
        (PallasWgradTile, dict(cluster=4), "cluster=4 must be 1 or 2"),
        (PallasMatmulTile, dict(band=0), "band=0 must be an integer"),
        (PallasBackend, dict(matmul_tile=PallasWgradTile()), "must be a PallasMatmulTile"),
    ],
)
def test_config_refuses(cls, fields, message):
    with pytest.raises(ConfigError, match=message):
        cls(**fields)
