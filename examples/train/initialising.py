"""Draws the first parameters of a model, with a program whose size does not grow with the depth.

`LanguageModel.init` has separate code for each parameter of each layer, which XLA compiles for minutes on a GPU. All
blocks after the first are alike, so this module draws them in a loop. Unrolled and scanned layers get the same values.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from examples.train.attention import rotary_table
from examples.train.model import Block, Embedding, Head, LanguageModel, RMSNorm
from examples.train.placing import LAYERS


def alone(model: LanguageModel) -> LanguageModel:
    """The same model without a mesh, with operations that run on any device."""
    moe = None if model.moe is None else dataclasses.replace(model.moe, parallel=None)
    return model.clone(moe=moe, attention="blocks", remat="none", norms="xla")


def shapes(model: LanguageModel) -> PyTree:
    """The shapes of the model's variables, in Flax's boxes."""
    tokens = jax.ShapeDtypeStruct((1, model.model.context), jnp.int32)
    return jax.eval_shape(alone(model).init, jax.random.key(0), tokens)


def draw(model: LanguageModel, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
    """The model's parameters and correction biases, without boxes."""
    model = alone(model)
    config, count = model.model, model.model.layers - 1
    x = jnp.zeros((1, config.context, config.hidden_size), config.dtype)
    table = rotary_table(jnp.arange(config.context), config.hidden_size // config.heads, config.dtype)
    embed_key, head_key, first_key, rest_key = jax.random.split(key, 4)

    def block(moe, key):
        variables = nn.unbox(Block(config, moe, model.attention, True).init(key, (x, None), table, None, None))
        return variables["params"], variables.get("correction_bias", {})

    embedding = Embedding(model.vocabulary, config.hidden_size, config.dtype)
    params = {
        "embed": embedding.init(embed_key, jnp.zeros((1, 1), jnp.int32))["params"],
        "block_00": block(None, first_key)[0],
        "norm": RMSNorm("xla").init(key, x)["params"],
        "head": Head(model.vocabulary).init(head_key, x)["params"],
    }
    if not count:
        return params, {}
    stacked = jax.lax.map(lambda key: block(model.moe, key), jax.random.split(rest_key, count))
    if model.scan_layers:
        layers = {LAYERS: stacked}
    else:
        layers = {f"block_{i + 1:02d}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)}
    biases = {name: bias for name, (_, bias) in layers.items() if bias}
    return params | {name: part for name, (part, _) in layers.items()}, biases
