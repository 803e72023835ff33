"""The shared expert in compiled kernels against NumPy in float64, at sizes that no tile divides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import CutlassBackend
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import FASTER
from jax_latent_moe.native import library
from jax_latent_moe.shared_expert import LEAST_ROWS, SharedPlan, plan_shared_expert, shared_expert
from tests.cases import TOY
from tests.gpu.grouped import needs_hopper
from tests.oracle.shared import shared
from tests.tolerances import relative_error

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]

D, INNER, ROWS = 264, 200, LEAST_ROWS + 131


@pytest.mark.parametrize("name", FASTER["dgrad"])
def test_values_and_gradients(rng, name):
    name, approximate = name.removesuffix("_tanh"), name.endswith("_tanh")
    fields = dict(activation=name, hidden_size=D, gelu_approximate=approximate, backend=CutlassBackend())
    config = dataclasses.replace(TOY, dtype="bfloat16", **fields)
    assert isinstance(plan_shared_expert(config, ROWS, INNER, "bfloat16"), SharedPlan)
    two = (2,) if config.gated else ()
    shapes = (ROWS, D), (D, *two, INNER), (INNER, D), (ROWS, D)
    scales = 1, D**-0.5, INNER**-0.5, 1
    arrays = [jnp.asarray(s * rng.normal(size=shape), jnp.bfloat16) for shape, s in zip(shapes, scales, strict=True)]

    @jax.jit
    def run(x, w_in, w_out, dout):
        def apply(x, w_in, w_out):
            return shared_expert(x, {"w_in": w_in, "w_out": w_out}, config)

        out, pullback = jax.vjp(apply, x, w_in, w_out)
        return out, *pullback(dout), apply(x, w_in, w_out)

    *found, alone = run(*arrays)
    x, w_in, w_out, dout = (np.asarray(array, np.float64) for array in arrays)
    expected = shared(config, x, w_in, w_out, dout)
    for (what, wanted), value in zip(expected.items(), found, strict=True):
        error = relative_error(value, wanted)
        assert error < 1e-2, (what, error)
    assert relative_error(alone, expected["out"]) < 1e-2
