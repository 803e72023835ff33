"""Which tile runs and who says so; the user's table; the command that writes it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax_latent_moe.grouped_matmul.pallas_hopper import Pallas

from jax_latent_moe.config import CutlassTile, PallasBackend, PallasMatmulTile, PallasWgradTile, XlaBackend
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.grouped_matmul import Problem, explain, select, tune, tuning

SUPER_UP = Problem("fwd", 180224, 512, 1024, 2688, "bfloat16", "gpu", "NVIDIA H200")
ENTRY = {
    "device": "NVIDIA H200",
    "backend": "pallas",
    "contraction": "fwd",
    "num_rows": 180224,
    "w_shape": [512, 1024, 2688],
    "tile": dataclasses.asdict(PallasMatmulTile(rows=64, columns=64, stages=3)),
    "ms": 1.0,
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "mine" / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    return path


PALLAS = PallasBackend()


def tile_of(problem, backend=PALLAS):
    choice = select(problem, backend).tile(problem)
    assert choice is not None
    return choice


def test_the_committed_table_holds_tiles_that_exist():
    for entry in tuning._committed():
        assert entry.keys() == ENTRY.keys()
        cls = PallasWgradTile if entry["contraction"] == "wgrad" else PallasMatmulTile
        if entry["backend"] == "cutlass":
            cls = CutlassTile
        assert cls(**entry["tile"])


def test_the_config_comes_first_then_the_users_table_then_the_committed_one_then_a_heuristic(table):
    assert tile_of(SUPER_UP).source == "the committed table, measured at 180224 rows on NVIDIA H200"
    tuning.add_to_table(table, [ENTRY])
    assert tile_of(SUPER_UP) == (
        PallasMatmulTile(**ENTRY["tile"]),
        f"your table {table}, measured at 180224 rows on NVIDIA H200",
    )
    given = PallasMatmulTile(columns=64)
    assert tile_of(SUPER_UP, PallasBackend(matmul_tile=given)) == (given, "the config")
    assert tile_of(dataclasses.replace(SUPER_UP, num_experts=511)).source.startswith("a heuristic")


def test_the_users_table_serves_its_device_and_its_weights_alone(table):
    tuning.add_to_table(table, [ENTRY])
    for changes in (
        {"device_kind": "NVIDIA H100 80GB HBM3"},
        {"contraction": "dgrad"},
        {"num_rows": 80000},
        {"num_rows": 400000},
        {"out_features": 2752},
    ):
        assert "your table" not in tile_of(dataclasses.replace(SUPER_UP, **changes)).source
    assert "your table" in tile_of(dataclasses.replace(SUPER_UP, num_rows=100000)).source


def test_a_call_takes_the_tile_of_the_table(table, monkeypatch):
    monkeypatch.setattr("jax_latent_moe.grouped_matmul.pallas_hopper.default_device", lambda: ("gpu", "NVIDIA H200"))

    def kernel():
        shapes = (4096, 128), (8, 128, 256), (8,)
        rows, w, sizes = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(shapes, ("bfloat16", "bfloat16", "int32"), strict=True)
        )
        return str(
            jax.make_jaxpr(lambda r, w, s: Pallas(PallasBackend()).matmul(r, w, s, transpose_w=False))(rows, w, sizes)
        )

    before = kernel()
    tuning.add_to_table(table, [ENTRY | {"num_rows": 4096, "w_shape": [8, 128, 256]}])
    assert kernel() != before


def test_the_nearest_number_of_rows_is_taken(table):
    near, far = (
        ENTRY | {"num_rows": rows, "tile": ENTRY["tile"] | {"stages": stages}} for rows, stages in ((900, 2), (1500, 4))
    )
    tuning.add_to_table(table, [far, near])
    assert tile_of(dataclasses.replace(SUPER_UP, num_rows=1000)).tile.stages == 2
    assert tile_of(dataclasses.replace(SUPER_UP, num_rows=1400)).tile.stages == 4


def test_writing_replaces_the_same_key_and_keeps_the_rest(table):
    other = ENTRY | {"contraction": "dgrad"}
    tuning.add_to_table(table, [ENTRY, other])
    faster = ENTRY | {"ms": 0.5}
    tuning.add_to_table(table, [faster])
    assert json.loads(table.read_text()) == [other, faster]
    assert list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"device": "NVIDIA H200"}]'])
def test_a_file_that_is_no_table_is_named(table, text):
    table.parent.mkdir()
    table.write_text(text)
    for use in (lambda: tile_of(SUPER_UP), lambda: tuning.add_to_table(table, [ENTRY])):
        with pytest.raises(ConfigError, match=str(table)):
            use()
    assert table.read_text() == text


@pytest.mark.parametrize("tile", [{"rows": 100}, {"height": 64}])
def test_a_table_with_an_impossible_tile_is_named(table, tile):
    tuning.add_to_table(table, [ENTRY | {"tile": tile}])
    with pytest.raises(ConfigError, match=f"{table}.*Run `tune` again"):
        tile_of(SUPER_UP)


def test_where_the_users_table_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(tuning.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuning.user_table() == tmp_path / "jax_latent_moe/tuning.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.user_table() == tmp_path / ".config/jax_latent_moe/tuning.json"


def test_explain_names_the_tile_and_its_source(table):
    tuning.add_to_table(table, [ENTRY])
    last = explain(SUPER_UP, "pallas").splitlines()[-1]
    assert last.strip().startswith("PallasMatmulTile(rows=64, columns=64, stages=3")
    assert f"from your table {table}" in last
    assert explain(SUPER_UP, XlaBackend()).splitlines()[-1].endswith("runs it")


def test_candidates_differ_in_the_tile_of_the_contraction_alone(rng):
    for contraction, field in (("fwd", "matmul_tile"), ("dgrad", "matmul_tile"), ("wgrad", "wgrad_tile")):
        asked = dataclasses.replace(SUPER_UP, contraction=contraction)
        found = select(asked, PallasBackend()).candidates(asked)
        assert len(set(found)) == len(found) > 1
        for config in found:
            assert config == PallasBackend(**{field: getattr(config, field)})
            assert tile_of(asked, config) == (getattr(config, field), "the config")


def test_candidates_lower_for_cuda(rng):
    """A few of them, others in each run: layouts and shared memory are checked by the lowering."""
    shapes = {"fwd": ((4096, 128), (8, 128, 256)), "wgrad": ((4096, 128), (4096, 256))}
    for contraction, operands in shapes.items():
        asked = dataclasses.replace(SUPER_UP, contraction=contraction)
        left, right = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in operands)
        found = select(asked, PallasBackend()).candidates(asked)
        for index in rng.choice(len(found), 3, replace=False):
            backend = Pallas(found[index])
            call = (
                backend.outer if contraction == "wgrad" else lambda *args, b=backend: b.matmul(*args, transpose_w=False)
            )
            sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
            text = jax.jit(call).trace(left, right, sizes).lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu_v2" in text


SIZES = ["--rows", "64", "--experts", "4", "--in", "64", "--out", "128"]


def test_tune_refuses_where_it_cannot_measure(table, capsys):
    assert tune.main(SIZES) == 1
    error = capsys.readouterr().err
    assert "Hopper GPUs (H100, H200), not 'cpu'" in error
    assert "on the GPU that is to run it" in error
    assert not table.exists()


@pytest.mark.parametrize("arguments", [SIZES[:-2], [*SIZES, "--rows", "0"], [*SIZES, "--backend", "xla"]])
def test_tune_refuses_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert "error:" in capsys.readouterr().err


class Blocks:
    """A backend with tiles for the CPU: block sizes of the portable one, of which one does not run."""

    def __init__(self, config):
        self.config = config

    def candidates(self, problem):
        del problem
        return *(XlaBackend(block_rows=rows) for rows in (1, 8)), PallasBackend()

    def tile(self, problem):
        del problem
        return tuning.Choice(self.config, "the config")


@pytest.mark.parametrize("named", [True, False])
def test_tune_times_writes_and_tells(table, tmp_path, monkeypatch, capsys, named):
    monkeypatch.setattr(tune, "select", lambda problem, config: Blocks(config))
    target = tmp_path / "elsewhere.json" if named else table
    assert tune.main([*SIZES, *(["--table", str(target)] if named else [])]) == 0
    entries = json.loads(target.read_text())
    assert [entry["contraction"] for entry in entries] == ["fwd", "dgrad", "wgrad"]
    for entry in entries:
        assert entry.keys() == ENTRY.keys()
        assert entry["tile"] in [dataclasses.asdict(XlaBackend(block_rows=rows)) for rows in (1, 8)]
        assert (entry["num_rows"], entry["w_shape"]) == (64, [4, 64, 128])
    printed = capsys.readouterr().out
    assert printed.count("TFLOP/s  XlaBackend(") == 6
    assert "left out PallasBackend(" in printed
    assert f"written to {target}" in printed
