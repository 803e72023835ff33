"""Which tile runs and where it comes from; the user's tables, one for each device; and tables that are refused."""

import dataclasses
import json

import jax
import pytest

from jax_latent_moe.activations import BoundActivation
from jax_latent_moe.config import CutlassTile, PallasBackend, PallasMatmulTile, PallasWgradTile, XlaBackend
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.formats import DENSE
from jax_latent_moe.grouped_matmul import Epilogue, Operand, Operands, explain, problem, select
from jax_latent_moe.grouped_matmul.tuning import table as tables
from jax_latent_moe.grouped_matmul.tuning.table import FIELDS, add_to_table, entry_of, file_of
from tests.kernels import H100, H200

SUPER_UP = problem("fwd", 180224, (512, 1024, 2688), "bfloat16", device=H200)
TILE = PallasMatmulTile(rows=64, columns=64, stages=3)


def entry(asked=SUPER_UP, tile=TILE, ms=1.0, **fields):
    return entry_of(asked, "pallas", dataclasses.asdict(tile) | fields, ms)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "mine"
    monkeypatch.setenv(tables.VARIABLE, str(path))
    return path


@pytest.fixture
def table(folder):
    """The H200's file in the user's folder, which is not there yet."""
    return file_of(folder, H200)


PALLAS = PallasBackend()


def tile_of(asked, backend=PALLAS):
    bound = select(asked, backend)
    assert bound.tile is not None
    return bound.tile, bound.source


def changed(**changes):
    return dataclasses.replace(SUPER_UP, **changes)


def test_the_committed_tables_hold_tiles_that_exist():
    committed = tables._committed()
    assert {H200.kind, H100.kind} <= set(committed)
    for kind, entries in committed.items():
        assert entries, kind
        for each in entries:
            assert each.keys() == set(FIELDS)
            assert each["lhs"] in (*DENSE, "fp8_block")
            cls = PallasWgradTile if each["contraction"] == "wgrad" else PallasMatmulTile
            if each["backend"] == "cutlass":
                cls = CutlassTile
            assert cls(**each["tile"])
        identities = [tables._identity(each) for each in entries]
        assert len(set(identities)) == len(identities), kind


def test_the_config_comes_first_then_the_users_table_then_the_committed_one_then_a_heuristic(table):
    assert tile_of(SUPER_UP)[1] == "the committed table of NVIDIA H200, measured at 180224 rows"
    add_to_table(table, H200, [entry()])
    assert tile_of(SUPER_UP) == (TILE, f"your table {table}, measured at 180224 rows")
    given = PallasMatmulTile(columns=64)
    assert tile_of(SUPER_UP, PallasBackend(matmul_tile=given)) == (given, "the config")
    assert tile_of(changed(num_experts=511))[1].startswith("a heuristic")


def test_the_table_of_another_gpu_of_the_architecture_comes_last(table):
    elsewhere = dataclasses.replace(H200, kind="NVIDIA H20")
    tile, source = tile_of(changed(device=elsewhere))
    assert source.startswith("the committed table of NVIDIA H")
    asked = problem("dgrad", 180224, (512, 2688, 1024), "bfloat16", device=H100)
    assert tile_of(asked)[1] == "the committed table of NVIDIA H100 80GB HBM3, measured at 180224 rows"
    assert tile in select(SUPER_UP, PALLAS).backend.tiles(SUPER_UP)


def test_the_users_table_serves_its_device_and_its_problem_alone(table):
    add_to_table(table, H200, [entry()])
    gathered, float16 = Operand("bfloat16", "gathered"), Operand("float16")
    for changes in (
        {"device": H100},
        {"contraction": "dgrad"},
        {"num_rows": 80000},
        {"num_rows": 400000},
        {"n": 2752},
        {"lhs": float16, "rhs": float16, "out": float16},
    ):
        assert "your table" not in tile_of(changed(**changes))[1]
    epilogue = Epilogue(BoundActivation("relu2"), "hidden")
    assert "your table" not in tile_of(changed(epilogue=epilogue), PallasBackend(fuse="always"))[1]
    assert "your table" in tile_of(changed(num_rows=100000))[1]
    assert "your table" in tile_of(changed(lhs=gathered))[1], "gathered rows take the tile of dense rows"


def test_float16_and_bfloat16_do_not_overwrite_each_other(table):
    float16 = problem("fwd", 180224, (512, 1024, 2688), "float16", device=H200)
    other = PallasMatmulTile(rows=64, columns=128, stages=2)
    add_to_table(table, H200, [entry()])
    add_to_table(table, H200, [entry(float16, other)])
    assert tile_of(SUPER_UP)[0] == TILE
    assert tile_of(float16)[0] == other
    assert len(json.loads(table.read_text())["entries"]) == 2


def test_a_tile_that_no_kernel_has_is_not_taken(table):
    """Pallas builds a plain product with any tile, and one with an activation with few."""
    asked = changed(epilogue=Epilogue(BoundActivation("relu2"), "hidden"))
    add_to_table(table, H200, [entry(), entry(asked)])
    backend = PallasBackend(fuse="always")
    assert tile_of(SUPER_UP, backend)[0] == TILE
    tile, source = tile_of(asked, backend)
    assert tile != TILE
    assert source == f"a heuristic: no kernel has {TILE!r} of your table {table}, measured at 180224 rows"


def test_a_call_takes_the_tile_of_the_table(table):
    asked = problem("fwd", 4096, (8, 128, 256), "bfloat16", device=H200)

    def kernel():
        rows, w, sizes = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (((4096, 128), "bfloat16"), ((8, 128, 256), "bfloat16"), ((8,), "int32"))
        )
        return str(jax.make_jaxpr(lambda *arrays: select(asked, PALLAS)(Operands(*arrays)).out)(rows, w, sizes))

    before = kernel()
    add_to_table(table, H200, [entry(asked)])
    assert kernel() != before


def test_the_nearest_number_of_rows_is_taken(table):
    near, far = (entry(changed(num_rows=rows), stages=stages) for rows, stages in ((900, 2), (1500, 4)))
    add_to_table(table, H200, [far, near])
    assert tile_of(changed(num_rows=1000))[0].stages == 2
    assert tile_of(changed(num_rows=1400))[0].stages == 4


def test_writing_replaces_the_same_problem_and_keeps_the_rest(table):
    other = entry(changed(contraction="dgrad"))
    add_to_table(table, H200, [entry(), other])
    faster = entry(ms=0.5)
    add_to_table(table, H200, [faster])
    assert json.loads(table.read_text()) == {"version": 1, "device": "NVIDIA H200", "entries": [other, faster]}
    assert list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "[1]",
        '[{"device": "NVIDIA H200"}]',
        '{"version": 1, "device": "NVIDIA H200", "entries": [{"ms": 1}]}',
        '{"version": 1, "device": 200, "entries": []}',
        '{"version": 1, "device": "NVIDIA H200", "entries": 3}',
    ],
)
def test_a_file_that_is_no_table_is_named(table, text):
    table.parent.mkdir()
    table.write_text(text)
    for use in (lambda: tile_of(SUPER_UP), lambda: add_to_table(table, H200, [entry()])):
        with pytest.raises(ConfigError, match=f"{table} .*: remove it, or write one with `tune`"):
            use()
    assert table.read_text() == text


@pytest.mark.parametrize(
    ("device", "version", "message"),
    [
        ("NVIDIA H100 80GB HBM3", 1, "holds tiles of 'NVIDIA H100 80GB HBM3', not of 'NVIDIA H200': remove or move"),
        ("NVIDIA H200", 0, "must have version 1, a device, and entries with backend, contraction, .*: remove it"),
        ("NVIDIA H200", 2, "must have version 1"),
    ],
)
def test_a_table_of_another_device_or_version_is_refused(table, device, version, message):
    table.parent.mkdir()
    table.write_text(json.dumps({"version": version, "device": device, "entries": [entry()]}))
    for use in (lambda: tile_of(SUPER_UP), lambda: add_to_table(table, H200, [entry()])):
        with pytest.raises(ConfigError, match=f"{table} {message}"):
            use()


OLD = [
    {"device": "NVIDIA H200", "backend": "pallas", "contraction": "rows_w", "num_rows": 180224, "ms": 1.0}
    | {"w_shape": [512, 1024, 2688], "tile": {"rows": 64, "columns": 64, "stages": 3, "stores": 1}}
]


@pytest.mark.parametrize("named", [True, False], ids=["by the variable", "beside the default folder"])
def test_a_table_of_version_0_1_is_refused(monkeypatch, tmp_path, named):
    """It was one file, and did not say which dtype had been measured."""
    if named:
        old = tmp_path / "mine.json"
        monkeypatch.setenv(tables.VARIABLE, str(old))
    else:
        monkeypatch.delenv(tables.VARIABLE)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        old = tmp_path / "jax_latent_moe/tuning.json"
        old.parent.mkdir()
    old.write_text(json.dumps(OLD))
    for use in (lambda: tile_of(SUPER_UP), lambda: explain(SUPER_UP, "pallas")):
        with pytest.raises(ConfigError, match=f"{old} is a table of tiles of version 0.1.*remove it, and run") as info:
            use()
        assert "does not name the measured dtype" in str(info.value)
    assert explain(SUPER_UP, XlaBackend()), "what has no tiles reads no table"
    assert json.loads(old.read_text()) == OLD


@pytest.mark.parametrize("tile", [{"rows": 100}, {"height": 64}])
def test_a_table_with_an_impossible_tile_is_named(table, tile):
    add_to_table(table, H200, [entry() | {"tile": dataclasses.asdict(TILE) | tile}])
    with pytest.raises(ConfigError, match=f"{table}.*Run `tune` again"):
        tile_of(SUPER_UP)


def test_where_the_users_tables_lie(monkeypatch, tmp_path):
    monkeypatch.delenv(tables.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tables.user_folder() == tmp_path / "jax_latent_moe/tuning"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.user_folder() == tmp_path / ".config/jax_latent_moe/tuning"
    assert file_of(tables.user_folder(), H100).name == "nvidia_h100_80gb_hbm3.json"


def test_explain_names_the_tile_and_its_source(table):
    add_to_table(table, H200, [entry()])
    last = explain(SUPER_UP, "pallas").splitlines()[-1]
    assert last.strip().startswith("tile: PallasMatmulTile(rows=64, columns=64, stages=3")
    assert f"from your table {table}" in last
    assert explain(SUPER_UP, XlaBackend()).splitlines()[-1].endswith("runs it")
