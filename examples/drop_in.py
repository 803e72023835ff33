"""Puts the layer into an ordinary Flax transformer block, in linen and in nnx: `python examples/drop_in.py`.

Each half is a small language model. Comments mark the lines that the latent mixture of experts adds. The model learns
the bytes of this file for a few steps. That takes seconds on a CPU.
"""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_latent_moe import LatentMoEConfig, RouterConfig
from jax_latent_moe import linen as linen_moe
from jax_latent_moe import nnx as nnx_moe

HIDDEN, HEADS, VOCABULARY = 64, 4, 256
CONFIG = LatentMoEConfig(
    hidden_size=HIDDEN,
    latent_size=16,
    num_experts=16,
    top_k=4,
    expert_intermediate_size=32,
    shared_expert_intermediate_size=64,
    router=RouterConfig(sequence_loss_coef=1e-4, bias_update_rate=1e-2),
    dtype="float32",
)
OPTIMISER = optax.adamw(3e-3, weight_decay=0.1)


def batches(seed: int = 0, size: int = 8, length: int = 64) -> Iterator[Int[np.ndarray, "b s"]]:
    """Random pieces of this file, as bytes."""
    text = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(text) - length, size=(size, 1))
        yield text[starts + np.arange(length)]


def cross_entropy(logits: Float[Array, "b s v"], targets: Int[Array, "b s"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        causal = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=causal)
        # Before: nn.Sequential([nn.Dense(4 * HIDDEN), nn.gelu, nn.Dense(HIDDEN)])(nn.LayerNorm()(x))
        return x + linen_moe.LatentMoE(CONFIG)(nn.LayerNorm()(x))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = LinenBlock()(nn.Embed(VOCABULARY, HIDDEN)(tokens))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


def train_linen(steps: int) -> list[float]:
    """Cross-entropy before each step."""
    model, data = LinenModel(), batches()
    variables = jax.jit(model.init)(jax.random.key(0), next(data))
    opt_state = OPTIMISER.init(variables["params"])  # the correction bias is in another collection
    print(jax.tree.map(jnp.shape, nn.unbox(variables["params"]["LinenBlock_0"]["LatentMoE_0"])))

    @jax.jit
    def step(variables, opt_state, tokens):
        def objective(params):
            logits, sown = model.apply(
                variables | {"params": params},
                tokens[:, :-1],
                mutable=["losses", "intermediates"],  # added: the layers sow into these collections
            )
            loss = cross_entropy(logits, tokens[:, 1:])
            return loss + sum(jax.tree.leaves(sown["losses"])), (loss, sown["intermediates"])  # added: the losses

        grads, (loss, intermediates) = jax.grad(objective, has_aux=True)(variables["params"])
        updates, opt_state = OPTIMISER.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        bias = linen_moe.update_correction_bias(  # added: experts with few tokens will be chosen more often
            variables["correction_bias"], intermediates, CONFIG.router.bias_update_rate
        )
        return {"params": params, "correction_bias": bias}, opt_state, loss

    losses = []
    for _ in range(steps):
        variables, opt_state, loss = step(variables, opt_state, next(data))
        losses.append(float(loss))
    return losses


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(HIDDEN, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, HIDDEN, decode=False, rngs=rngs)
        # Before: nnx.Sequential(nnx.Linear(HIDDEN, 4 * HIDDEN, rngs=rngs), nnx.gelu, nnx.Linear(4 * HIDDEN, ...
        self.mlp = nnx_moe.LatentMoE(CONFIG, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.mlp(self.mlp_norm(x))


class NnxModel(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.block = NnxBlock(rngs=rngs)
        self.norm = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.norm(self.block(self.embed(tokens))))


def train_nnx(steps: int) -> list[float]:
    """Cross-entropy before each step."""
    model, data = nnx.jit(lambda: NnxModel(rngs=nnx.Rngs(0)))(), batches()
    optimiser = nnx.Optimizer(model, OPTIMISER, wrt=nnx.Param)  # the correction bias is not an nnx.Param
    print(jax.tree.map(jnp.shape, nnx_moe.to_params(model.block.mlp)))

    @nnx.jit
    def step(model, optimiser, tokens):
        def objective(model):
            forward = nnx.capture(model, nnx_moe.AuxiliaryLoss, nnx.Intermediate)  # added: the layers sow these
            logits, losses, intermediates = forward(tokens[:, :-1])
            loss = cross_entropy(logits, tokens[:, 1:])
            return loss + sum(jax.tree.leaves(losses)), (loss, intermediates)  # added: the losses

        grads, (loss, intermediates) = nnx.grad(objective, has_aux=True)(model)
        optimiser.update(model, grads)
        nnx_moe.update_correction_bias(model, intermediates)  # added: experts with few tokens will be chosen more often
        return loss

    return [float(step(model, optimiser, next(data))) for _ in range(steps)]


def main(steps: int = 30) -> None:
    """Trains the same model in both APIs and prints the losses."""
    for name, train in (("linen", train_linen), ("nnx", train_nnx)):
        print(f"{name}: the layer's parameters")
        losses = train(steps)
        print(f"{name}: loss {' '.join(f'{loss:.2f}' for loss in losses[:: max(1, steps // 6)])}")


if __name__ == "__main__":
    main()
