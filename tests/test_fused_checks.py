"""The checks of fused kernels, here on fake kernels: they accept right results and nothing else."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.fusing import Fusing, FusingBackend
from tests.gpu.grouped import check_fused
from tests.kernels import RESIDUAL

SIZES, SHAPE = np.asarray([0, 40, 1, 5]), (60, 16, 24)


@dataclasses.dataclass(frozen=True)
class Spoiled(Fusing):
    """Spoils one result of one contraction."""

    contraction: str = "fwd"
    field: str = "out"

    def run(self, problem, tile, operands):
        outputs = super().run(problem, tile, operands)
        value = getattr(outputs, self.field)
        if problem.contraction != self.contraction or not isinstance(value, jnp.ndarray):
            return outputs
        return dataclasses.replace(outputs, **{self.field: value.at[-1].set(1)})


def config_of(residual):
    return FusingBackend((residual,), (residual,), in_place=True)


@pytest.mark.parametrize(("name", "residual"), [*RESIDUAL.items(), ("relu2", "pre"), ("swiglu", "pre")])
def test_what_is_right_passes(rng, name, residual):
    check_fused(Fusing(config_of(residual)), rng, name, residual, "bfloat16", SIZES, *SHAPE)


@pytest.mark.parametrize(
    ("contraction", "field"),
    [
        ("fwd", "out"),
        ("fwd", "residual"),
        ("dgrad", "out"),
        ("dgrad", "hidden"),
        ("dgrad", "row_weight_gradients"),
    ],
)
def test_what_writes_a_padding_row_does_not(rng, contraction, field):
    backend = Spoiled(config_of("pre"), contraction, field)
    with pytest.raises(AssertionError):
        check_fused(backend, rng, "gelu", "pre", "bfloat16", SIZES, *SHAPE)
