"""Puts the layer under a MaxText-style decoder block: `python examples/maxtext_block.py`.

The block names its axes and constrains its activations as MaxText does, and nn.scan stacks the layers. The rules come
from MaxText's base.yml, cut to four mesh axes. On a CPU, eight virtual devices learn this file's bytes.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Int

from jax_latent_moe import LatentMoEConfig, ParallelConfig, RouterConfig
from jax_latent_moe.linen import LatentMoE, after_step, total_loss
from jax_latent_moe.parallel import MAXTEXT_AXES

EMBED, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 256
CONFIG = LatentMoEConfig(
    hidden_size=EMBED,
    latent_size=16,
    num_experts=8,
    top_k=2,
    expert_intermediate_size=16,
    shared_expert_intermediate_size=32,
    router=RouterConfig(sequence_loss_coef=1e-4, bias_update_rate=1e-2),
    dtype="float32",
    parallel=ParallelConfig(),  # its mesh axes are called as MaxText's: data, fsdp, expert, tensor
)
RULES = (
    ("activation_batch", ("data", "fsdp", "expert")),
    ("activation_length", None),
    ("activation_embed", "tensor"),
    ("activation_heads", "tensor"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", ("fsdp", "expert")),
    ("embed_no_exp", "fsdp"),
    ("exp", "expert"),
)
ACTIVATIONS = ("activation_batch", "activation_length", "activation_embed")


def kernel(*axes: str | None):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        def project(name):
            heads = nn.Dense(EMBED, use_bias=False, kernel_init=kernel("embed", "heads"), name=name)(x)
            heads = heads.reshape(*x.shape[:2], HEADS, EMBED // HEADS)
            return nn.with_logical_constraint(
                heads, ("activation_batch", "activation_length", "activation_heads", None)
            )

        out = jax.nn.dot_product_attention(*map(project, ("query", "key", "value")), is_causal=True)
        return nn.Dense(EMBED, use_bias=False, kernel_init=kernel("heads", "embed"), name="out")(out.reshape(x.shape))


class DecoderLayer(nn.Module):
    """MaxText's order: norm, attention, norm, MLP, each with a residual and a constraint."""

    config: LatentMoEConfig

    @nn.compact
    def __call__(self, x, _):
        x = nn.with_logical_constraint(x, ACTIVATIONS)
        x = x + Attention(name="self_attention")(nn.RMSNorm(name="pre_self_attention_layer_norm")(x))
        hidden = nn.RMSNorm(name="post_self_attention_layer_norm")(x)
        # It was: x + MlpBlock(...)(hidden)
        x = x + LatentMoE(self.config, axis_names=MAXTEXT_AXES, name="mlp")(hidden)
        return nn.with_logical_constraint(x, ACTIVATIONS), None


class Decoder(nn.Module):
    config: LatentMoEConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s v"]:
        x = nn.Embed(VOCABULARY, EMBED, embedding_init=kernel("vocab", "embed"))(tokens)
        x, _ = nn.scan(
            DecoderLayer,
            variable_axes={name: 0 for name in ("params", "correction_bias", "losses", "intermediates")},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, name="layers")(x, None)
        return nn.Dense(VOCABULARY, kernel_init=kernel("embed", "vocab"))(nn.RMSNorm()(x))


def batches(size: int = 8, length: int = 32) -> Iterator[Int[np.ndarray, "b s"]]:
    """Random pieces of this file, as bytes."""
    text = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    while True:
        yield text[rng.integers(len(text) - length, size=(size, 1)) + np.arange(length)]


def train(steps: int, mesh: Mesh | None) -> list[float]:
    """Cross-entropy before each step, on the devices of a mesh or on one device."""
    model = Decoder(CONFIG if mesh is not None else dataclasses.replace(CONFIG, parallel=None))
    data, optimiser = batches(), optax.adam(1e-2)

    def init(key, tokens):
        variables = model.init(key, tokens)
        return variables, optimiser.init(variables["params"])

    def step(variables, opt_state, tokens):
        def objective(params):
            logits, sown = model.apply(
                variables | {"params": params}, tokens[:, :-1], mutable=["losses", "intermediates"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
            return loss + total_loss(sown), (loss, sown)

        grads, (loss, sown) = jax.grad(objective, has_aux=True)(variables["params"])
        updates, opt_state = optimiser.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        variables = after_step(variables | {"params": params}, sown, CONFIG.router.bias_update_rate)
        return variables, opt_state, loss

    arguments = jax.random.key(0), next(data)[:, :-1]
    shardings = None, None
    if mesh is not None:
        specs = nn.get_partition_spec(jax.eval_shape(init, *arguments))
        shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    state = jax.jit(init, out_shardings=shardings)(*arguments)
    # Without them XLA chooses other shardings for the new state, and the second step compiles again.
    step = jax.jit(step, out_shardings=(*shardings, None), donate_argnums=(0, 1))
    experts = nn.unbox(state[0]["params"]["layers"]["mlp"]["experts"]["w_in"])
    print(f"experts/w_in {experts.shape}: {experts.sharding.shard_shape(experts.shape)} on each device")
    losses = []
    for _ in range(steps):
        *state, loss = step(*state, next(data))
        losses.append(float(loss))
    return losses


def main(steps: int = 20) -> list[float]:
    """Trains on a mesh of all devices. Eight devices have two along each of fsdp, expert and tensor."""
    jax.config.update("jax_num_cpu_devices", 8)
    inner = 2 if jax.device_count() % 8 == 0 else 1
    sizes = jax.device_count() // inner**3, inner, inner, inner
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "expert", "tensor"), axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        losses = train(steps, mesh)
    print(f"{dict(mesh.shape)}: loss {' '.join(f'{loss:.2f}' for loss in losses[:: max(1, steps // 5)])}")
    return losses


if __name__ == "__main__":
    main()
