"""The layer's program for a published preset does not grow with features that the preset does not use."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from jax_latent_moe import latent_moe, param_shapes, presets, total_loss

# preset: equations of the forward pass, and of the forward and backward passes together, inner jaxprs included.
# The numbers are from jax 0.12.0.1 on a CPU.
EQUATIONS = {
    "DEEPSEEK_V3": (406, 1027),
    "KIMI_K3": (495, 1211),
    "NEMOTRON_3_NANO": (366, 989),
    "NEMOTRON_3_SUPER": (530, 1257),
    "NEMOTRON_3_ULTRA": (530, 1257),
    "QWEN3_30B_A3B": (376, 982),
    "TOY": (330, 937),
}


def equations(jaxpr: core.Jaxpr) -> int:
    """Equations of a jaxpr and of all jaxprs in their parameters."""
    inner = [
        leaf for equation in jaxpr.eqns for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    ]
    return len(jaxpr.eqns) + sum(equations(getattr(leaf, "jaxpr", leaf)) for leaf in inner if is_jaxpr(leaf))


def is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def traced(config) -> tuple[int, int]:
    """Equations of the forward pass, and of forward and backward."""
    params, x = param_shapes(config), jax.ShapeDtypeStruct((2, 64, config.hidden_size), config.dtype)

    def loss(params, x):
        y, aux = latent_moe(params, x, config)
        return jnp.sum(y.astype(jnp.float32)) + total_loss(aux)

    forward = jax.make_jaxpr(latent_moe, static_argnums=2)(params, x, config)
    return equations(forward.jaxpr), equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x).jaxpr)


@pytest.mark.parametrize("name", EQUATIONS)
def test_no_preset_grows(name):
    forward, both = traced(getattr(presets, name))
    assert forward <= EQUATIONS[name][0]
    assert both <= EQUATIONS[name][1]
