"""Every way to run a grouped matmul, a row each. A new backend or format joins the whole suite by one row.

Kernels run on a GPU where there is one, and those that can be interpreted run on the CPU too: a few cells of the
suite, or all of them with JAX_LATENT_MOE_EVERY_CELL=1.
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
from jax_latent_moe.formats import encode
from jax_latent_moe.grouped_matmul import register
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from tests.tolerances import RELATIVE

EVERY_CELL = bool(os.environ.get("JAX_LATENT_MOE_EVERY_CELL"))
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One way to run a grouped matmul, and what it declares.

    Attributes:
        name: of the row.
        backend: the settings.
        dtypes: what its rows can be.
        multiple: what its K and N must be multiples of; the suite scales its sizes by it.
        weight_format: a registered format that weights are encoded in; None leaves them as arrays.
        tolerance: relative error allowed against the float64 oracle on decoded operands, by dtype.
        hopper: whether it needs a Hopper GPU.
        interpreted: whether it interprets kernels, seconds a call: then most cells need EVERY_CELL.
        isolates: whether an expert whose weights are NaN spoils its own rows alone.
        any_rows: whether it runs with no rows.
    """

    name: str
    backend: Any
    dtypes: tuple[str, ...] = tuple(DTYPES)
    multiple: int = 1
    weight_format: str | None = None
    tolerance: dict[str, float] = dataclasses.field(default_factory=lambda: RELATIVE)
    hopper: bool = False
    interpreted: bool = False
    isolates: bool = True
    any_rows: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> str:
        """The most exact of its dtypes."""
        return self.dtypes[0]

    def size(self, size: int) -> int:
        """A feature size of the suite, scaled to what the row can run."""
        return size if self.multiple == 1 else self.multiple * max(1, size // 3)

    def weight(self, w: np.ndarray) -> Any:
        """A weight as the row stores it."""
        return w if self.weight_format is None else encode(np.asarray(w), self.weight_format)

    def values(self, weight: Any) -> np.ndarray:
        """The values that products see, in float64."""
        return np.float64(np.asarray(weight if self.weight_format is None else weight.decode("float32")))


@dataclasses.dataclass(frozen=True)
class InterpretedPallas:
    """Settings of the `pallas` kernels as Pallas' GPU interpreter runs them on a CPU."""

    fuse: str = "never"
    matmul_tile: None = None
    wgrad_tile: None = None


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
    Row("interpreted-pallas", InterpretedPallas(), HALVES, 64, interpreted=True, any_rows=False),
    Row("pallas", PallasBackend(), HALVES, 64, hopper=True, any_rows=False),
    Row("cutlass", CutlassBackend(), HALVES, 8, hopper=True),
)


def every_row(check):
    """Runs a check for every row; an interpreted one skips it unless EVERY_CELL is set: see `few_cells`."""
    return pytest.mark.parametrize("row", [_param(row, few=False) for row in ROWS])(check)


def few_cells(check):
    """Runs a check for every row, interpreted ones included."""
    return pytest.mark.parametrize("row", [_param(row, few=True) for row in ROWS])(check)


def _param(row, *, few):
    marks = []
    if row.hopper:
        hopper = current_device().architecture == "sm90"
        marks.append(pytest.mark.skipif(not hopper, reason="needs a Hopper GPU"))
    if row.interpreted:
        marks.append(pytest.mark.skipif(not (few or EVERY_CELL), reason="JAX_LATENT_MOE_EVERY_CELL=1 interprets it"))
        marks.append(pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels are interpreted on a CPU"))
    return pytest.param(row, marks=marks, id=row.name)
