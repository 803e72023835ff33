"""The trainer's documents reach the layers: with --sequence-loss-coef each document has its own loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from examples.train.initialising import draw
from examples.train.model import language_model
from examples.train.presets import TOY


def test_the_sequence_loss_is_within_documents(rng):
    config = dataclasses.replace(
        TOY, model=dataclasses.replace(TOY.model, layers=2, dropout=0.0), sequence_loss_coef=1.0, switch_loss_coef=0.0
    )
    model = language_model(config)
    params, bias = draw(model, jax.random.key(0))
    tokens = jnp.asarray(rng.integers(0, 256, (2, 16)))

    @jax.jit
    def loss(documents):
        variables = {"params": params, "correction_bias": bias}
        _, sown = model.apply(variables, tokens, documents=documents, mutable=["losses"])
        return sown["losses"]["block_01"]["mlp"]["sequence"][0]

    one, none = loss(jnp.zeros((2, 16), jnp.int32)), loss(None)
    np.testing.assert_allclose(one, none, rtol=1e-4)
    # A token's own k experts have the largest of its probabilities, so no other token's choice gives it a larger loss.
    # For 400 draws of tokens it was 1.07 to 1.46 times as large.
    alone = loss(jnp.broadcast_to(jnp.arange(16), (2, 16)))
    assert float(alone) > 1.01 * float(one)
