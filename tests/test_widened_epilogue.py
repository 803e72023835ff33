"""The epilogue of products with widened weights, emulated on the CPU, against activations in float64."""

import ctypes

import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS
from tests import emulated
from tests.kernels import RESIDUAL, layer_of
from tests.oracle.fused import activation_of_rows, kept_of
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")
SIZES = ([0, 1, 130, 0, 257, 64, 300, 63], [0, 520, 0], [0, 0], [600])
UNWRITTEN = 77.0
# groups: the warpgroups that share a tile, whose sizes differ.


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("product", "out", "hidden", "sizes")),
        *((name, ctypes.c_int) for name in ("experts", "rows", "width")),
        *((name, ctypes.c_bool) for name in ("rows_first", "keep_residual")),
        *((name, ctypes.c_float) for name in ("beta", "linear_beta")),
    )


def stored(product, sizes, width, activation, groups, *, keep, rows_first, config):
    """(out, hidden) as float64, which hold `UNWRITTEN` where nothing was written."""
    product, sizes = emulated.aligned(product), emulated.aligned(np.asarray(sizes, np.int32))
    out = emulated.aligned(np.full(product.shape, UNWRITTEN, jnp.bfloat16))
    hidden = emulated.aligned(np.full((len(product), width), UNWRITTEN, jnp.bfloat16))
    pointers = (array.ctypes.data for array in (product, out, hidden, sizes))
    call = Call(*pointers, len(sizes), len(product), width, rows_first, keep, config.situ_beta, config.situ_linear_beta)
    index = emulated.ACTIVATIONS.index(activation)
    emulated.compiled("widened_epilogue").widened_epilogue(ctypes.byref(call), index, groups)
    return out.astype(np.float64), hidden.astype(np.float64)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("width", [8, 136, 264])
def test_products_are_rounded(rng, width, rows_first, groups):
    """Every element once, to the bit; zeros in padding rows."""
    for sizes in SIZES:
        owned = sum(sizes)
        product = rng.normal(size=(owned + 300, width)).astype(np.float32)
        order = dict(rows_first=rows_first, config=layer_of("relu2"))
        out, hidden = stored(product, sizes, width, "none", groups, keep=False, **order)
        np.testing.assert_array_equal(out[:owned], product[:owned].astype(jnp.bfloat16).astype(np.float64))
        assert not out[owned:].any()
        assert (hidden == UNWRITTEN).all()


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize(
    ("activation", "keep"),
    [(name, keep) for name in KERNEL_ACTIVATIONS for keep in (True, False) if not keep or RESIDUAL[name] != "hidden"],
)
def test_activations(rng, activation, keep, groups):
    """Hidden rows of the rounded pre-activation, and what is kept of it."""
    config, residual = layer_of(activation), RESIDUAL[activation]
    for sizes, width in ((SIZES[0], 72), (SIZES[1], 264), (SIZES[2], 8)):
        owned = sum(sizes)
        product = rng.normal(size=(owned + 70, (1 + config.gated) * width)).astype(np.float32)
        found = stored(product, sizes, width, activation, groups, keep=keep, rows_first=True, config=config)
        pre = product.astype(jnp.bfloat16).astype(np.float64)
        pre[owned:] = 0
        expected, _ = activation_of_rows(config, pre)
        in_one = keep and residual == "gate_hidden"
        if in_one:
            assert (found[1] == UNWRITTEN).all()
        else:
            assert_close(found[1], expected, "bfloat16", "hidden")
        if keep:
            assert_close(found[0][:owned], kept_of(config, pre, residual)[:owned], "bfloat16", "kept")
        else:
            assert (found[0] == UNWRITTEN).all()
