"""Padding rows that token rounding saves, counted on drawn routings: no kernel runs.

    python -m benchmarks.rounding

prints the table of docs/routing.md. Logits are an expert's popularity, a token's topic (one of 64) and noise. The
popularity is 0 for "even" loads, which a correction bias leaves, and normal with a deviation of 0.4 for "skewed" ones.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_latent_moe import presets
from jax_latent_moe.piped import piped
from jax_latent_moe.routing.rounding import round_to_tile, with_next_choices
from jax_latent_moe.routing.router import route

SUPER = presets.NEMOTRON_3_SUPER
TOKENS, TOPICS, TOPIC_DEVIATION = (2048, 8192, 32768), 64, 0.5
POPULARITY = {"even": 0.0, "skewed": 0.4}


def drawn_logits(tokens: int, deviation: float) -> jax.Array:
    """[T, E] with the loads that the module's docstring describes."""
    popularity, topics, topic, noise = jax.random.split(jax.random.key(0), 4)
    experts = SUPER.num_experts
    of_topic = TOPIC_DEVIATION * jax.random.normal(topics, (TOPICS, experts))
    logits = of_topic[jax.random.randint(topic, (tokens,), 0, TOPICS)] + jax.random.normal(noise, (tokens, experts))
    return logits + deviation * jax.random.normal(popularity, (experts,))


def counts(tokens: int, deviation: float, tile: int) -> dict[str, jax.Array]:
    """Shares of the routed rows T k: padding without rounding, and choices that rounding drops and adds."""
    router = dataclasses.replace(SUPER.router, correction_bias=False, round_to_tile=tile)
    logits, k, experts = drawn_logits(tokens, deviation), SUPER.top_k, SUPER.num_experts
    routing = route(logits, router, k)
    ids, weights = with_next_choices(logits, routing, router, bias=None, scale=None, factor=1.0)[:2]
    kept = round_to_tile(ids, weights, k, experts, tile)
    loads = jnp.bincount(routing.expert_ids.reshape(-1), length=experts)
    rounded = jnp.bincount(jnp.where(kept, ids, experts).reshape(-1), length=experts + 1)[:experts]
    assert not (rounded % tile).any()
    own, rows = kept[:, :k], tokens * k
    return {
        "busiest": loads.max() * experts / rows,
        "padding": (-loads % tile).sum() / rows,
        "dropped": (~own).sum() / rows,
        "dropped weight": jnp.where(own, 0, weights[:, :k]).sum() / weights[:, :k].sum(),
        "added": kept[:, k:].sum() / rows,
        "computed": rounded.sum() / ((loads + -loads % tile).sum()),
    }


def main() -> None:
    """Prints the table."""
    heads = "tokens", "loads", "busiest over mean", "tile", "padding before", "dropped (weight)", "added"
    print(f"| {' | '.join(heads)} | rows after / before |\n|" + "---|" * (len(heads) + 1))
    for tokens in TOKENS:
        for loads, deviation in POPULARITY.items():
            for tile in (64, 128):
                found = counts(tokens, deviation, tile)
                print(
                    f"| {tokens} | {loads} | {found['busiest']:.1f} | {tile} | {found['padding']:.1%} | "
                    f"{found['dropped']:.1%} ({found['dropped weight']:.1%}) | {found['added']:.1%} | "
                    f"{found['computed']:.2f} |"
                )


if __name__ == "__main__":
    with piped():
        main()
