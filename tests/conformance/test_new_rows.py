"""A format and a backend that are defined only in this file pass the whole suite, and `explain` shows them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_latent_moe import formats
from jax_latent_moe.config import XlaBackend
from jax_latent_moe.errors import ConfigError, InputError
from jax_latent_moe.formats import FORMATS, Format, ScaledArray, decoded
from jax_latent_moe.grouped_matmul import Backend, Operand, Outputs, explain, grouped_matmul, problem, registry
from jax_latent_moe.grouped_matmul.groups import group_ends
from tests.conformance.rows import Row
from tests.conformance.suite import CHECKS


@dataclasses.dataclass(frozen=True)
class LoopBackend:
    """Settings of a backend with a choice of tiles."""

    tile: int | None = None


@dataclasses.dataclass(frozen=True)
class LoopTile:
    """The loop's tile."""

    size: int


class Loop(Backend):
    """One masked dense product per expert."""

    def supports(self, problem):
        if problem.epilogue is not None:
            return "it has no epilogues."
        return "it is slow beyond 64 experts." if problem.num_experts > 64 else None

    def tiles(self, problem):
        return LoopTile(2), LoopTile(1)

    def given_tile(self, problem):
        return self.config.tile and LoopTile(self.config.tile)

    def tile_type(self, problem):
        return LoopTile

    def run(self, problem, tile, operands):
        lhs, rhs, ends = operands.lhs, operands.rhs, group_ends(operands.group_sizes, problem.num_rows)
        wide = jnp.promote_types(lhs.dtype, jnp.float32)
        rows = jnp.arange(problem.num_rows)[:, None]
        parts = []
        for expert in range(problem.num_experts):
            start = ends[expert - 1] if expert else 0
            own = (rows >= start) & (rows < ends[expert])
            mine = jnp.where(own, lhs, 0)
            other = jnp.where(own, rhs, 0) if problem.contraction == "wgrad" else decoded(rhs[expert], lhs.dtype)
            axes = {"fwd": ((1,), (0,)), "dgrad": ((1,), (1,)), "wgrad": ((0,), (0,))}[problem.contraction]
            product = lax.dot_general(mine, other, (axes, ((), ())), preferred_element_type=wide)
            parts.append(product if problem.contraction == "wgrad" else jnp.where(own, product, 0))
        if problem.contraction == "wgrad":
            return Outputs(jnp.stack(parts).astype(lhs.dtype))
        return Outputs(sum(parts).astype(lhs.dtype))


def encode(values):
    """One scale per output, codes in int8; values are [..., N, K]."""
    scales = jnp.maximum(jnp.max(jnp.abs(values), axis=-1, keepdims=True), 1e-4) / 127
    return jnp.rint(values / scales).astype(jnp.int8), scales


def decode(codes, scales, dtype):
    return (codes.astype(jnp.float32) * scales).astype(dtype)


COLUMNS = Format("columns8", encode, decode, block=(None, 1))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "loop", (LoopBackend, Loop))
    monkeypatch.setitem(FORMATS, COLUMNS.name, COLUMNS)


ROWS = (
    Row("loop", LoopBackend(), ("float32", "bfloat16")),
    Row("columns8", XlaBackend(), ("float32", "bfloat16"), weight_format="columns8"),
    Row("columns8-ragged-dot", XlaBackend(method="ragged_dot"), ("float32",), weight_format="columns8"),
    Row("columns8-loop", LoopBackend(tile=1), ("float32",), weight_format="columns8"),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_new_rows_pass_the_suite(registered, rng, row, check):
    check(row, rng)


def test_explain_shows_them(registered):
    asked = problem("fwd", 24, (8, 5, 7), "bfloat16", rhs=Operand("columns8"))
    text = explain(asked, LoopBackend())
    assert "fwd of bfloat16 and columns8 to bfloat16" in text
    assert "LoopBackend(tile=None) runs it" in text
    assert "tile: LoopTile(size=2), from a heuristic" in text
    assert "tile: LoopTile(size=1), from the config" in explain(asked, LoopBackend(tile=1))
    many = problem("fwd", 24, (65, 5, 7), "bfloat16")
    assert "refuses: it is slow beyond 64 experts." in explain(many, "loop")


def test_names_are_taken_once(registered):
    with pytest.raises(ConfigError, match="'loop' is registered already"):
        registry.register("loop", LoopBackend, Loop)
    for name in (COLUMNS, dataclasses.replace(COLUMNS, name="bfloat16")):
        with pytest.raises(ConfigError, match="is registered already: choose another name"):
            formats.register(name)


@dataclasses.dataclass
class Thawed:
    tile: int = 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("", LoopBackend, Loop), "the backend's name '' must be a string"),
        (("thawed", Thawed, Loop), "Thawed'> must be a frozen dataclass: it holds the settings of backend 'thawed'"),
        (("settings", LoopBackend(), Loop), r"LoopBackend\(tile=None\) must be a frozen dataclass"),
        (("function", LoopTile, print), "must be a subclass of Backend: it runs backend 'function'"),
    ],
)
def test_what_is_no_backend_is_refused(row, message):
    with pytest.raises(ConfigError, match=message):
        registry.register(*row)
    assert row[0] not in registry.BACKENDS


def test_a_weight_that_blocks_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setitem(FORMATS, "blocks", dataclasses.replace(COLUMNS, name="blocks", block=(4, 2)))
    with pytest.raises(ConfigError, match="K=6 of a weight of 6 x 4 is not a multiple of 4, which blocks needs"):
        formats.encode(np.ones((3, 6, 4), np.float32), "blocks")
    with pytest.raises(ConfigError, match=r"format='other' is unknown: registered are .*blocks"):
        formats.encode(np.ones((3, 4, 4), np.float32), "other")
    with pytest.raises(InputError, match="of dtype int32 must be floating"):
        formats.encode(np.ones((3, 4, 4), np.int32), "blocks")
    with pytest.raises(InputError, match="5 columns are not 2 matrices"):
        formats.encode(np.ones((3, 4, 5), np.float32), "blocks", parts=2)


def test_codes_have_no_gradient(registered, rng):
    """Rows have a gradient, that of scales is zero, and integer codes have none."""
    weight = formats.encode(rng.normal(size=(2, 3, 4)).astype(np.float32), COLUMNS.name)
    rows, sizes = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), jnp.asarray([2, 3])
    out, pullback = jax.vjp(lambda rows, weight: grouped_matmul(rows, weight, sizes), rows, weight)
    drows, dweight = pullback(jnp.ones_like(out))
    assert drows.any()
    assert dweight.codes.dtype == jax.dtypes.float0
    assert not dweight.scales.any()


def test_codes_of_another_width_are_refused(registered, rng):
    weight = formats.encode(rng.normal(size=(2, 3, 4)).astype(np.float32), COLUMNS.name)
    assert isinstance(weight, ScaledArray)
    assert weight.shape == (2, 3, 4)
    with pytest.raises(InputError, match=r"w of shape \(2, 3, 4\) does not fit rows of shape \(5, 4\)"):
        grouped_matmul(jnp.ones((5, 4)), weight, jnp.asarray([2, 3]))
