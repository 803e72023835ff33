"""How a backend is chosen: a named one runs or says why not, "auto" takes the first that can, `explain` says so."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import ConfigError, CutlassBackend, InputError, PallasBackend, UnsupportedError, XlaBackend
from jax_latent_moe.activations import BoundActivation
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.grouped_matmul import (
    Epilogue,
    GatheredRows,
    Operand,
    explain,
    grouped_matmul,
    operands,
    problem,
    reference,
    select,
)
from jax_latent_moe.grouped_matmul.registry import AUTO
from tests.kernels import H100, H200, PLAIN, library
from tests.tolerances import assert_close

PROBLEM = problem("fwd", 64, (4, 8, 16), jnp.bfloat16)
ARRAYS = np.ones((6, 4), np.float32), np.ones((3, 4, 5), np.float32), np.array([1, 2, 3], np.int32)


def test_a_problem_describes_the_call():
    dense = {"format": "bfloat16", "layout": "dense"}
    assert dataclasses.asdict(PROBLEM) == {
        "contraction": "fwd",
        "num_rows": 64,
        "num_experts": 4,
        "k": 8,
        "n": 16,
        "lhs": dense,
        "rhs": dense,
        "out": dense,
        "device": dataclasses.asdict(current_device()),
        "epilogue": None,
    }
    hash(PROBLEM)


def test_a_problem_is_told_in_one_line():
    epilogue = Epilogue(BoundActivation("situ_glu", (("situ_beta", 4.0),)), "pre")
    asked = problem(
        "dgrad", 64, (4, 8, 16), "float16", lhs=Operand("float16", "gathered"), rhs=Operand("int4"), epilogue=epilogue
    )
    assert str(asked) == (
        "dgrad with situ_glu(situ_beta=4.0) keeping pre of gathered float16 and int4 to float16, "
        "64 rows, 4 experts of 8 x 16"
    )
    assert str(asked.plain()) == str(asked).replace(" with situ_glu(situ_beta=4.0) keeping pre", "")
    assert str(asked.dense()) == str(asked).replace("gathered float16", "float16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("forward", 8, (2, 3, 4)), "contraction='forward' is unknown: use one of 'fwd', 'dgrad', 'wgrad'"),
        (("fwd", 8, (3, 4)), r"w_shape=\(3, 4\) must be three integers"),
        (("fwd", 8, (2, 3, 4.5)), r"w_shape=\(2, 3, 4.5\) must be three integers"),
        (("fwd", 8, (2, -3, 4)), r"w_shape=\(2, -3, 4\) must be three integers"),
        (("fwd", -1, (2, 3, 4)), "num_rows=-1 must be an integer of at least 0"),
        (("fwd", None, (2, 3, 4)), "num_rows=None must be an integer of at least 0"),
        (("fwd", 8, (2, 3, 4), None), "dtype=None must be a floating dtype, such as 'bfloat16'"),
        (("fwd", 8, (2, 3, 4), float), "dtype=<class 'float'> must be a floating dtype"),
        (("fwd", 8, (2, 3, 4), "int32"), "dtype='int32' must be a floating dtype"),
        (("fwd", 8, (2, 3, 4), "half a float"), "dtype='half a float' must be a floating dtype"),
    ],
)
def test_a_problem_that_is_none_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        problem(*arguments, *["float32"][len(arguments) - 3 :])


def test_what_is_no_problem_is_refused():
    with pytest.raises(ConfigError, match="rhs='int8' must be an Operand"):
        problem("fwd", 8, (2, 3, 4), "float32", rhs="int8")
    for function in (explain, select):
        with pytest.raises(ConfigError, match="problem='fwd' must be a Problem"):
            function("fwd")


def test_an_epilogue_belongs_to_fwd_or_dgrad():
    epilogue = Epilogue(BoundActivation("relu2"), "hidden")
    with pytest.raises(ConfigError, match="a wgrad with relu2 keeping hidden is unknown"):
        problem("wgrad", 8, (2, 3, 4), "float32", epilogue=epilogue)
    with pytest.raises(ConfigError, match="layout='sparse' is unknown: use one of 'dense', 'gathered', 'columns'"):
        Operand("float32", "sparse")  # type: ignore
    with pytest.raises(UnsupportedError, match="Ask for the product without its epilogue"):
        select(problem("fwd", 8, (2, 3, 4), "float32", epilogue=epilogue), "xla")


@pytest.mark.parametrize(
    ("platform", "kind", "architecture"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "sm90"),
        ("gpu", "NVIDIA H200", "sm90"),
        ("gpu", "NVIDIA GH200 480GB", "sm90"),
        ("gpu", "NVIDIA H20", "sm90"),
        ("gpu", "NVIDIA H100 PCIe", "sm90"),
        ("gpu", "H100-PCIE-80GB", "sm90"),
        ("gpu", "GRID H100L-94C", "sm90"),
        ("gpu", "NVIDIA RTX PRO 6000", "gpu"),
        ("gpu", "NVIDIA H2000", "gpu"),
        ("gpu", "NVIDIA B200", "gpu"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "gpu"),
        ("cpu", "H100", "cpu"),
        ("tpu", "TPU v5 lite", "tpu"),
    ],
)
def test_kernels_are_chosen_by_architecture(platform, kind, architecture):
    assert Device(platform, kind).architecture == architecture


@pytest.mark.parametrize("backend", [PallasBackend(), CutlassBackend(), "pallas", "cutlass"])
def test_a_named_backend_runs_or_raises_its_reason(backend):
    with pytest.raises(UnsupportedError) as info:
        select(PROBLEM, backend)
    error = info.value
    assert error.backend in str(error)
    assert error.reason in str(error)
    assert "XlaBackend()" in error.remedy
    with pytest.raises(UnsupportedError):
        grouped_matmul(*ARRAYS, backend=backend)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="'auto', 'xla', 'pallas', 'cutlass'"):
        grouped_matmul(*ARRAYS, backend="triton")


def test_names_mean_their_defaults():
    np.testing.assert_array_equal(grouped_matmul(*ARRAYS, backend="xla"), grouped_matmul(*ARRAYS, backend=XlaBackend()))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", "a platform of next year"])
def test_auto_ends_with_a_backend_that_runs_anything(platform):
    elsewhere = dataclasses.replace(PROBLEM, device=Device(platform, "of any kind"))
    chosen = select(elsewhere, "auto").backend
    assert chosen.supports(elsewhere) is None
    asked = [line.strip() for line in explain(elsewhere).splitlines()[1:]]
    configs = AUTO.get(platform, (XlaBackend(),))
    assert len(asked) == len(configs)
    for line, config in zip(asked, configs, strict=True):
        assert line.startswith(f"{config!r} runs it" if config == chosen.config else f"{config!r} refuses: ")


def test_explain_lists_the_backends_that_were_asked_and_their_answers():
    lines = explain(dataclasses.replace(PROBLEM, device=Device("gpu", "NVIDIA A100-SXM4-80GB"))).splitlines()
    assert lines[0] == (
        "fwd of bfloat16 and bfloat16 to bfloat16, 64 rows, 4 experts of 8 x 16 on gpu (NVIDIA A100-SXM4-80GB), "
        "backend='auto':"
    )
    assert lines[1].strip().startswith("CutlassBackend(")
    assert all(" refuses: " in line for line in lines[1:-1])
    assert lines[-1].strip() == f"{XlaBackend()!r} runs it"
    assert "refuses: its kernels are for NVIDIA Hopper GPUs" in explain(PROBLEM, PallasBackend())


@pytest.mark.usefixtures("install_library")
def test_explain_prints_the_whole_decision():
    """Backend, tile, where the tile comes from, the epilogue, and where rows are gathered."""
    epilogue, gathered = Epilogue(BoundActivation("relu2"), "hidden"), Operand("bfloat16", "gathered")
    asked = problem("fwd", 180224, (512, 1024, 2688), "bfloat16", lhs=gathered, epilogue=epilogue, device=H200)
    asked_of = "fwd with relu2 keeping hidden of gathered bfloat16 and bfloat16 to bfloat16, 180224 rows, 512 experts"
    assert explain(asked).splitlines() == [
        f"{asked_of} of 1024 x 2688 on gpu (NVIDIA H200), backend='auto':",
        "  CutlassBackend(matmul_tile=None, wgrad_tile=None, fuse='measured', decode='measured') runs it",
        "  tile: CutlassTile(rows=128, columns=192, stages=5, cluster_rows=1, cluster_columns=2, rows_first=True), "
        "from a heuristic: no table has this problem",
        "  lhs: gathered in the kernel",
    ]
    assert explain(asked, "pallas").splitlines()[1:] == [
        "  PallasBackend(matmul_tile=None, wgrad_tile=None, fp8_tile=None, widen_tile=None, fuse='measured') runs it",
        "  tile: PallasMatmulTile(rows=128, columns=192, stages=4, store_buffers=2, band=1, cluster=2), "
        "from a heuristic: no table has this problem",
        "  lhs: gathered before the kernel",
    ]
    few = dataclasses.replace(asked, k=2688, n=512, epilogue=None)
    assert "  lhs: gathered before the kernel" in explain(few).splitlines()
    columns = dataclasses.replace(few, lhs=Operand("bfloat16", "columns"))
    assert "  lhs: cut out of wider rows in the kernel" in explain(columns).splitlines()
    assert "  lhs: cut out of wider rows before the kernel" in explain(columns, "pallas").splitlines()
    both = dataclasses.replace(few, contraction="wgrad", n=1024, rhs=gathered)
    assert explain(both).splitlines()[-2:] == ["  lhs: gathered in the kernel", "  rhs: gathered before the kernel"]
    dense = dataclasses.replace(both, lhs=Operand("bfloat16"), device=H100)
    assert explain(dense).splitlines()[-2:] == [
        "  tile: CutlassTile(rows=192, columns=128, stages=4, cluster_rows=2, cluster_columns=1, rows_first=False), "
        "from the committed table of NVIDIA H100 80GB HBM3, measured at 180224 rows",
        "  rhs: gathered in the kernel",
    ]


def test_a_table_s_tile_that_was_not_compiled_is_said(install_library):
    asked = problem("fwd", 180224, (512, 1024, 2688), "bfloat16", device=H200)
    (tile,) = {line for line in explain(asked, "cutlass").splitlines() if "tile: " in line}
    assert "from the committed table of NVIDIA H200" in tile
    install_library(library(*(name for name in PLAIN if "64x128x8" in name)))
    (tile,) = {line for line in explain(asked, "cutlass").splitlines() if "tile: " in line}
    assert "from a heuristic: no kernel has CutlassTile(" in tile
    assert "of the committed table of NVIDIA H200, measured at 180224 rows" in tile


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("transpose_w", [False, True])
def test_rows_named_in_a_table_are_those_gathered_before(rng, transpose_w, weighted):
    """Values, and gradients of the table, the weights and w; an id outside of the table takes its nearest row."""
    width, tokens, sizes = (7, 5), 6, np.array([4, 0, 5], np.int32)
    ids = rng.integers(-2, tokens + 2, 11)
    nearest = np.clip(ids, 0, tokens - 1)
    table, w, dout = (
        rng.normal(size=shape)
        for shape in ((tokens, width[transpose_w]), (3, *width), (len(ids), width[not transpose_w]))
    )

    weights = rng.normal(size=len(ids)) if weighted else None

    def run(table, weights, w):
        return grouped_matmul(GatheredRows(table, ids, weights), w, sizes, transpose_w=transpose_w)

    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (table, weights, w))
    out, pullback = jax.vjp(run, *arguments)
    dtable, dweights, dw = pullback(jnp.asarray(dout, jnp.float32))
    scale = np.ones(len(ids)) if weights is None else weights
    rows, expected_dtable = scale[:, None] * table[nearest], np.zeros_like(table)
    drows = reference.grouped_matmul(dout, w, sizes, transpose_w=not transpose_w)
    np.add.at(expected_dtable, nearest, scale[:, None] * drows)
    expected_dw = reference.grouped_wgrad(*((dout, rows) if transpose_w else (rows, dout)), sizes)
    assert_close(np.asarray(out), reference.grouped_matmul(rows, w, sizes, transpose_w=transpose_w), "float32")
    assert_close(np.asarray(dtable), expected_dtable, "float32")
    assert_close(np.asarray(dw), expected_dw, "float32")
    if weights is not None:
        assert_close(np.asarray(dweights), (drows * table[nearest]).sum(axis=1), "float32")
    assert not np.asarray(dw)[1].any()


def test_tables_have_gradients_where_rows_are_gathered_in_pairs(rng, monkeypatch):
    """On a GPU two elements are gathered as one integer, through which no derivative would pass."""
    for module in (operands, inspect.getmodule(problem)):
        monkeypatch.setattr(module, "current_device", lambda: H200)
    table, w = jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16), jnp.ones((1, 6, 2), jnp.bfloat16)

    def total(table, weights):
        rows = GatheredRows(table, jnp.asarray([2, 0, 2]), weights)
        return jnp.sum(grouped_matmul(rows, w, jnp.asarray([3]), backend="xla"), dtype=jnp.float32)

    assert "bitcast_convert_type" in str(jax.make_jaxpr(total)(table, None))
    dtable, dweights = jax.grad(total, (0, 1))(table, jnp.asarray([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(np.float64(dtable), np.array([[4.0], [0], [10], [0]]) * np.ones(6))
    expected = 2 * np.float64(table)[[2, 0, 2]].sum(axis=1)
    assert_close(np.asarray(dweights), expected, "bfloat16")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (GatheredRows(np.ones((6, 4), np.float32), np.zeros((2, 3), int)), r"row_ids of shape \(2, 3\)"),
        (GatheredRows(np.ones((6, 4), np.float32), np.zeros(6)), "dtype float64 must be integers"),
        (
            GatheredRows(np.ones((6, 4), np.float32), np.zeros(6, int), np.ones(5)),
            r"weights of shape \(5,\) .* 6 row_ids",
        ),
        (GatheredRows(np.ones((0, 4), np.float32), np.zeros(6, int)), "has no rows, but there are 6 row_ids"),
        (GatheredRows(np.ones((6, 3), np.float32), np.zeros(6, int)), r"does not fit rows of shape \(6, 3\)"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(rows, reason):
    with pytest.raises(InputError, match=reason):
        grouped_matmul(rows, *ARRAYS[1:])
