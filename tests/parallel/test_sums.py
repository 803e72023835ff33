"""Where the parts of split inner widths are added: as few and as narrow sums as the norms allow."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe import latent_moe, param_shapes
from tests.parallel.meshes import BASE, make_mesh

D, LATENT = BASE.hidden_size, BASE.latent_width


@pytest.mark.parametrize(
    ("norm", "shared", "widths"),
    [
        ("none", 8, [D]),  # once, with the shared expert's, after the up-projection
        ("pre", 8, [D]),
        ("post", 8, [LATENT, D]),  # a norm of parts is not a part of the norm
        ("none", 0, [LATENT]),  # nothing to share a sum with: the narrower one
        ("post", 0, [LATENT]),
    ],
)
def test_sums_over_tensor(norm, shared, widths):
    config = dataclasses.replace(BASE, latent_norm=norm, shared_expert_intermediate_size=shared)
    x = jax.ShapeDtypeStruct((8, D), jnp.float32)
    with jax.set_mesh(make_mesh(1, 1, 1, 2)):
        program = jax.jit(latent_moe, static_argnums=2).lower(param_shapes(config), x, config).as_text()
    summed = re.findall(r'"stablehlo\.all_reduce".*?\}\) : \(tensor<8x(\d+)xf32>\)', program, re.S)
    assert [int(width) for width in summed] == widths
    assert program.count("stablehlo.all_reduce") == len(widths)
