"""Every way to run a grouped matmul, one row for each. One new row adds a backend or format to the whole suite.

Kernels run on a GPU if there is one. Those that can be interpreted also run on the CPU: a few cells of the suite, or
all of them with JAX_LATENT_MOE_EVERY_CELL=1.
"""

import dataclasses
import os
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_latent_moe.config import CutlassBackend, PallasBackend, XlaBackend
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.formats import encode, encode_rows
from jax_latent_moe.grouped_matmul import register
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.pallas_sm90.widening import WIDENINGS
from tests.tolerances import RELATIVE

EVERY_CELL = bool(os.environ.get("JAX_LATENT_MOE_EVERY_CELL"))
_encode = jax.jit(encode, static_argnames="name")
_encode_rows = jax.jit(encode_rows, static_argnames="name")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One way to run a grouped matmul, with its limits.

    Attributes:
        name: the row's name.
        backend: the backend's settings.
        dtypes: the dtypes that rows may have.
        multiple: K and N must be multiples of it; the suite scales its sizes by it.
        weight_format: the registered format of the weights; None leaves them as arrays.
        row_format: the registered format of the rows; None leaves them as arrays. Rows in one get no gradient.
        transposes: whether it contracts the last axis of a weight.
        tolerance: the relative error allowed against the float64 oracle on decoded operands, by dtype.
        hopper: whether it needs a Hopper GPU.
        interpreted: whether kernels are interpreted, which takes seconds per call; most cells then need EVERY_CELL.
        isolates: whether an expert with NaN weights spoils only its own rows.
        any_rows: whether it can run without any rows.
    """

    name: str
    backend: Any
    dtypes: tuple[str, ...] = tuple(DTYPES)
    multiple: int = 1
    weight_format: str | None = None
    row_format: str | None = None
    transposes: bool = True
    tolerance: dict[str, float] = dataclasses.field(default_factory=lambda: RELATIVE)
    hopper: bool = False
    interpreted: bool = False
    isolates: bool = True
    any_rows: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> str:
        """The most exact of the dtypes."""
        return self.dtypes[0]

    def size(self, size: int) -> int:
        """A feature size of the suite, scaled to the row's multiple."""
        return size if self.multiple == 1 else self.multiple * max(1, size // 3)

    def weight(self, w: np.ndarray) -> Any:
        """A weight as the row stores it."""
        return w if self.weight_format is None else _encode(np.asarray(w), name=self.weight_format)

    def values(self, weight: Any) -> np.ndarray:
        """The values of a weight as products read them, in float64."""
        return np.float64(np.asarray(weight if self.weight_format is None else weight.decode("float32")))

    def rows(self, rows: Any) -> Any:
        """Rows as products take them; it can be traced."""
        return rows if self.row_format is None else encode_rows(rows, self.row_format)

    def values_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The values of rows as products read them, in float64."""
        if self.row_format is None:
            return np.float64(rows)
        return np.float64(np.asarray(_encode_rows(np.asarray(rows), name=self.row_format).decode("float32")))


@dataclasses.dataclass(frozen=True)
class InterpretedPallas:
    """Settings of the `pallas` kernels, run on a CPU by Pallas' GPU interpreter."""

    fuse: str = "never"
    matmul_tile: None = None
    wgrad_tile: None = None
    fp8_tile: None = None
    widen_tile: None = None


class Interpreted(Pallas):
    """Runs the kernels of `pallas` as if the device were an H200 with few SMs."""

    interpret = plgpu.InterpretGPUParams()

    def supports(self, problem):
        """See `Backend.supports`."""
        return super().supports(on_hopper(problem))

    def tiles(self, problem):
        """See `Backend.tiles`."""
        return super().tiles(on_hopper(problem))

    def run(self, problem, tile, operands):
        """See `Backend.run`."""
        return super().run(on_hopper(problem), tile, operands)


def on_hopper(problem):
    """The same problem on an H200 with 4 SMs, which are quick to interpret."""
    return dataclasses.replace(problem, device=Device("gpu", "NVIDIA H200", 4))


register("interpreted-pallas", InterpretedPallas, Interpreted)

HALVES = ("bfloat16", "float16")
ROWS = (
    Row("xla", XlaBackend()),
    Row("xla-block-1", XlaBackend(block_rows=1)),
    Row("xla-block-3", XlaBackend(block_rows=3)),
    Row("xla-ragged-dot", XlaBackend(method="ragged_dot"), isolates=False),
    Row(
        "interpreted-pallas",
        InterpretedPallas(),
        HALVES if EVERY_CELL else HALVES[:1],
        64,
        interpreted=True,
        any_rows=False,
    ),
    Row("pallas", PallasBackend(), HALVES, 64, hopper=True, any_rows=False),
    Row("cutlass", CutlassBackend(), HALVES, 8, hopper=True),
)

FORMAT_ROWS = tuple(
    Row(name, XlaBackend(), ("float32", "bfloat16"), multiple, weight_format=name)
    for name, multiple in {
        "fp8_block": 130,  # the last of its blocks of 128 are partial
        "fp8_block_pow2": 130,
        "fp8_tensor": 1,
        "fp8_channel": 1,
        "mxfp4": 32,
        "nvfp4": 16,
        "int4_32": 32,
        "int4_128": 128,
        "int4_32_zero": 32,
        "int4_128_zero": 128,
        "int8": 1,
    }.items()
)
"""Weight formats of the package on the portable path, which every device has."""


SCALED_ROWS = (
    *(
        Row(f"{name}-rows", XlaBackend(), ("float32", "bfloat16"), 130, weight_format=name, row_format=name)
        for name in ("fp8_block", "fp8_block_pow2")
    ),
    Row(
        "fp8-rows-ragged-dot",
        XlaBackend(method="ragged_dot"),
        ("bfloat16",),
        weight_format="fp8_tensor",
        row_format="fp8_block",
        isolates=False,
    ),
)
"""Products of codes with codes on the portable path."""
KERNELS_OF_CODES = (
    Row(
        "interpreted-pallas-fp8",
        InterpretedPallas(),
        ("bfloat16", "float16"),
        128,
        weight_format="fp8_block",
        row_format="fp8_block",
        transposes=False,
        interpreted=True,
        any_rows=False,
    ),
    Row(
        "cutlass-fp8",
        CutlassBackend(),
        ("bfloat16",),
        16,
        weight_format="fp8_block",
        row_format="fp8_block",
        transposes=False,
        hopper=True,
    ),
    Row(
        "pallas-fp8",
        PallasBackend(),
        ("bfloat16", "float16"),
        128,
        weight_format="fp8_block",
        row_format="fp8_block",
        transposes=False,
        hopper=True,
        any_rows=False,
    ),
)
"""Kernels that multiply codes with codes."""
WIDENING_KERNELS = (
    *(
        Row(
            f"cutlass-{name}",
            CutlassBackend(),
            ("bfloat16",),
            128,
            weight_format=name,
            transposes=False,
            hopper=True,
        )
        for name in WIDENINGS
    ),
    *(
        Row(
            f"{backend}-{name}",
            InterpretedPallas() if interpreted else PallasBackend(),
            ("bfloat16",),
            128,
            weight_format=name,
            transposes=False,
            hopper=not interpreted,
            interpreted=interpreted,
            any_rows=False,
        )
        for backend, interpreted in (("interpreted-pallas", True), ("pallas", False))
        for name in WIDENINGS
    ),
)
"""Kernels that widen codes on their way to the matrix units. The gradient of rows decodes."""


def every_row(check):
    """Runs a check for every row. Interpreted rows are skipped unless EVERY_CELL is set; see `few_cells`."""
    return pytest.mark.parametrize("row", [param(row, few=False) for row in ROWS])(check)


def few_cells(check):
    """Runs a check for every row, including interpreted ones."""
    return pytest.mark.parametrize("row", [param(row, few=True) for row in ROWS])(check)


def param(row, *, few):
    """A row as a parameter of a test, skipped where it cannot run."""
    marks = []
    if row.hopper:
        hopper = current_device().architecture == "sm90"
        marks.append(pytest.mark.skipif(not hopper, reason="needs a Hopper GPU"))
    if row.interpreted:
        marks.append(pytest.mark.skipif(not (few or EVERY_CELL), reason="JAX_LATENT_MOE_EVERY_CELL=1 interprets it"))
        marks.append(pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels are interpreted on a CPU"))
    return pytest.param(row, marks=marks, id=row.name)
