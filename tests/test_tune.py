"""The command that measures tiles and writes the fastest into the user's table."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe.config import PallasBackend, XlaBackend
from jax_latent_moe.device import current_device
from jax_latent_moe.grouped_matmul import Backend, Bound, Operands, explain, problem, registry, select
from jax_latent_moe.grouped_matmul.registry import bind
from jax_latent_moe.grouped_matmul.tuning import table as tables
from jax_latent_moe.grouped_matmul.tuning import tune
from jax_latent_moe.grouped_matmul.xla.backend import Xla
from tests.kernels import H200

SUPER = (512, 1024, 2688)
CONTRACTIONS = ("fwd", "dgrad", "wgrad")
SIZES = ["--rows", "64", "--experts", "4", "--in", "64", "--out", "128"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "mine"
    monkeypatch.setenv(tables.VARIABLE, str(path))
    return path


def test_tiles_to_time_differ_and_are_taken_from_the_config():
    for contraction, field in zip(CONTRACTIONS, ("matmul_tile", "matmul_tile", "wgrad_tile"), strict=True):
        asked = problem(contraction, 180224, SUPER, "bfloat16", device=H200)
        found = select(asked, PallasBackend()).backend.tiles(asked)
        assert len(set(found)) == len(found) > 1
        for tile in found:
            given = select(asked, PallasBackend(**{field: tile}))
            assert (given.tile, given.source) == (tile, "the config")


def test_tiles_to_time_lower_for_cuda(rng):
    """A few of them, others in each run: layouts and shared memory are checked by the lowering."""
    shapes = {"fwd": ((4096, 128), (8, 128, 256)), "wgrad": ((4096, 128), (4096, 256))}
    for contraction, operands in shapes.items():
        asked = problem(contraction, 4096, (8, 128, 256), "bfloat16", device=H200)
        left, right = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in operands)
        bound = select(asked, PallasBackend())
        tiles = bound.backend.tiles(asked)
        for index in rng.choice(len(tiles), 3, replace=False):
            chosen = dataclasses.replace(bound, tile=tiles[index])
            sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
            call = jax.jit(lambda *arrays, chosen=chosen: chosen(Operands(*arrays)).out)
            text = call.trace(left, right, sizes).lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu_v2" in text


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("pallas", "Hopper GPUs (H100, H200), not 'cpu'"), ("auto", "it has no choice of tiles")],
)
def test_it_refuses_where_it_cannot_measure(folder, capsys, backend, reason):
    assert tune.main([*SIZES, "--backend", backend]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert "on the GPU that will run it" in error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SIZES[:-2], "required: --out"),
        ([*SIZES, "--rows", "0"], "--rows: 0 must be an integer of at least 1"),
        ([*SIZES, "--rows", "many"], "--rows: many must be an integer of at least 1"),
        ([*SIZES, "--backend", "xla"], "--backend: invalid choice: 'xla'"),
    ],
)
def test_it_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class BlocksBackend:
    """Settings of a backend with tiles for the CPU."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A tile: rows of a block of the portable backend."""

    rows: int


BROKEN = Block(3)


class Blocks(Backend):
    """The portable backend with its block sizes as tiles, one of which does not run."""

    def supports(self, problem):
        return None if problem.epilogue is None else "it has no epilogues."

    def tiles(self, problem):
        return Block(1), Block(8), BROKEN

    def tile_type(self, problem):
        return Block

    def run(self, problem, tile, operands):
        if tile == BROKEN:
            raise RuntimeError("a block of three rows")
        return Xla(XlaBackend(block_rows=tile.rows)).run(problem, None, operands)


class Broken(Blocks):
    """None of its tiles runs."""

    def tiles(self, problem):
        return (BROKEN,)


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "blocks", (BlocksBackend, Blocks))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("named", [True, False])
def test_it_times_writes_and_tells(blocks, folder, tmp_path, capsys, named, dtype):
    target = tmp_path / "elsewhere" if named else folder
    arguments = [*SIZES, "--backend", "blocks", "--dtype", dtype, *(["--folder", str(target)] if named else [])]
    assert tune.main(arguments) == 0
    path = tables.file_of(target, current_device())
    table = json.loads(path.read_text())
    assert (table["version"], table["device"]) == (tables.VERSION, current_device().kind)
    assert [entry["contraction"] for entry in table["entries"]] == list(CONTRACTIONS)
    for entry in table["entries"]:
        assert entry.keys() == set(tables.FIELDS)
        assert entry["tile"] in [{"rows": rows} for rows in (1, 8)]
        assert (entry["num_rows"], entry["num_experts"], entry["k"], entry["n"]) == (64, 4, 64, 128)
        assert (entry["backend"], entry["epilogue"]) == ("blocks", None)
        assert entry["lhs"] == entry["rhs"] == entry["out"] == dtype
        assert entry["ms"] > 0
    printed = capsys.readouterr().out
    assert printed.count("TFLOP/s  Block(rows=") == 6
    assert printed.count("left out Block(rows=3): RuntimeError: a block of three rows") == 3
    assert f"written to {path}" in printed
    assert (f"; set JAX_LATENT_MOE_TUNING={target} to use it" in printed) == named


def test_the_fastest_runs_from_then_on(blocks, folder):
    asked = problem("fwd", 64, (4, 64, 128), "bfloat16")
    assert "from a heuristic: no table has this problem" in explain(asked, "blocks")
    assert tune.main([*SIZES, "--backend", "blocks"]) == 0
    table = tables.file_of(folder, current_device())
    (entry,) = (entry for entry in json.loads(table.read_text())["entries"] if entry["contraction"] == "fwd")
    assert f"tile: {Block(**entry['tile'])!r}, from your table {table}, measured at 64 rows" in explain(asked, "blocks")


def test_only_tiles_that_run_are_timed(blocks):
    asked = problem("fwd", 64, (4, 64, 128), "bfloat16")
    bound = bind(Blocks(BlocksBackend()), asked)
    assert isinstance(bound, Bound)
    assert tune.time_tiles(bound).keys() == {Block(1), Block(8)}


def test_where_no_tile_runs_nothing_is_written(monkeypatch, folder, capsys):
    monkeypatch.setitem(registry.BACKENDS, "blocks", (BlocksBackend, Broken))
    assert tune.main([*SIZES, "--backend", "blocks"]) == 1
    assert "none of its tiles ran fwd" in capsys.readouterr().err
    assert not folder.exists()
