"""How a backend is chosen: a named one runs or says why not, "auto" takes the first that can, `explain` tells."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import ConfigError, CutlassBackend, InputError, PallasBackend, UnsupportedError, XlaBackend
from jax_latent_moe.grouped_matmul import GatheredRows, explain, grouped_matmul, problem, reference, select
from jax_latent_moe.grouped_matmul import rows as row_tables
from jax_latent_moe.grouped_matmul.registry import AUTO
from tests.tolerances import assert_close

PROBLEM = problem("fwd", 64, (4, 8, 16), jnp.bfloat16)
ARRAYS = np.ones((6, 4), np.float32), np.ones((3, 4, 5), np.float32), np.array([1, 2, 3], np.int32)


def test_a_problem_describes_the_call():
    assert dataclasses.asdict(PROBLEM) | {"device_kind": ""} == {
        "contraction": "fwd",
        "num_rows": 64,
        "num_experts": 4,
        "in_features": 8,
        "out_features": 16,
        "dtype": "bfloat16",
        "platform": PROBLEM.platform,
        "device_kind": "",
        "activation": None,
    }


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
    elsewhere = dataclasses.replace(PROBLEM, platform=platform)
    assert select(elsewhere, "auto").supports(elsewhere) is None
    for config in AUTO.get(platform, ()):
        assert f"{config!r}" in explain(elsewhere) or select(elsewhere).config != config


def test_explain_says_who_was_asked_and_what_they_said():
    lines = explain(dataclasses.replace(PROBLEM, platform="gpu")).splitlines()
    assert "rows_w on gpu" in lines[0]
    assert lines[1].strip().startswith("CutlassBackend(")
    assert all("refuses: " in line or "runs it" in line for line in lines[1:])
    assert lines[-1].endswith("runs it")
    assert "refuses: its kernels are for NVIDIA Hopper GPUs" in explain(PROBLEM, PallasBackend())


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
    monkeypatch.setattr(row_tables, "default_device", lambda: ("gpu", "NVIDIA H200"))
    table, w = jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16), jnp.ones((1, 6, 2), jnp.bfloat16)

    def total(table, weights):
        rows = GatheredRows(table, jnp.asarray([2, 0, 2]), weights)
        return jnp.sum(grouped_matmul(rows, w, jnp.asarray([3]), backend="xla"), dtype=jnp.float32)

    dtable, dweights = jax.grad(total, (0, 1))(table, jnp.asarray([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(np.float64(dtable), np.array([[4.0], [0], [10], [0]]) * np.ones(6))
    expected = 2 * np.float64(table)[[2, 0, 2]].sum(axis=1)
    assert_close(np.asarray(dweights), expected, "bfloat16")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (GatheredRows(np.ones((6, 4), np.float32), np.zeros((2, 3), int)), r"row_ids of shape \(2, 3\)"),
        (GatheredRows(np.ones((6, 4), np.float32), np.zeros(6)), "dtype float32 must be integers"),
        (
            GatheredRows(np.ones((6, 4), np.float32), np.zeros(6, int), np.ones(5)),
            r"weights of shape \(5,\) .* 6 row_ids",
        ),
        (GatheredRows(np.ones((0, 4), np.float32), np.zeros(6, int)), "has no row for 6 row_ids"),
        (GatheredRows(np.ones((6, 3), np.float32), np.zeros(6, int)), r"does not fit rows of shape \(6, 3\)"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(rows, reason):
    with pytest.raises(InputError, match=reason):
        grouped_matmul(rows, *ARRAYS[1:])
