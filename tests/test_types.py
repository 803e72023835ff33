"""The shapes written in the signatures hold: layers run with every jaxtyping annotation checked by beartype."""

import subprocess
import sys

CHECKED = """
import dataclasses, warnings
import jaxtyping
with jaxtyping.install_import_hook("jax_latent_moe", "beartype.beartype"):
    import jax, jax.numpy as jnp
    from jax_latent_moe import RouterConfig, XlaBackend, init_params, latent_moe, presets, update_correction_bias
    from jax_latent_moe.grouped_matmul import grouped_matmul

base = dataclasses.replace(presets.TOY, dtype="float32", hidden_size=12, latent_size=6, expert_intermediate_size=5)
router = RouterConfig(num_groups=2, switch_loss_coef=0.1, sequence_loss_coef=0.1, z_loss_coef=0.1,
                      capacity_factor=1.0, per_expert_scale=True)
for config in (
    base,
    dataclasses.replace(base, activation="swiglu", latent_norm="post", router=router, backend=XlaBackend()),
    dataclasses.replace(
        base, latent_size=None, activation="geglu", latent_norm="pre", shared_expert_intermediate_size=0
    ),
):
    params = init_params(jax.random.key(0), config)
    def loss(params, x, mask):
        y, aux = latent_moe(params, x, config, token_mask=mask)
        y, _ = latent_moe(params, y, config, expert_ids=aux.expert_ids)
        return jnp.sum(y) + sum(aux.losses.values())
    jax.eval_shape(jax.grad(loss), params, jnp.ones((2, 3, 12)), jnp.ones((2, 3), bool))
update_correction_bias(jnp.zeros(8), jnp.zeros(8, jnp.int32), 0.1)

try:
    update_correction_bias(jnp.zeros(8), jnp.zeros(7, jnp.int32), 0.1)
except jaxtyping.TypeCheckError as error:
    assert "tokens_per_expert" in str(error)
    print("annotations are checked")
"""


def test_annotated_shapes_hold():
    run = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "annotations are checked"
