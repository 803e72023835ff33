"""The shapes of the measured kernels and layers, and their inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe import CutlassBackend, LatentMoEConfig, PallasBackend, XlaBackend, presets

BACKENDS = {"cutlass": CutlassBackend(), "pallas": PallasBackend(), "xla": XlaBackend()}


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A grouped matmul with the group sizes of a router.

    Attributes:
        tokens: T. Each token has a row for each of top_k distinct experts.
        top_k: k.
        num_experts: E.
        in_features: K.
        out_features: N.
        spread: standard deviation of the logarithm of the experts' shares.
        empty: share of the experts that no token chooses.
    """

    tokens: int
    top_k: int
    num_experts: int
    in_features: int
    out_features: int
    spread: float = 0.42
    empty: float = 0.03

    @property
    def rows(self) -> int:
        """R = T k."""
        return self.tokens * self.top_k

    def group_sizes(self, rng: np.random.Generator) -> np.ndarray:
        """[E] int32, the rows of each expert. Every token draws top_k distinct experts by their shares."""
        log_share = rng.normal(0, self.spread, self.num_experts)
        log_share[rng.choice(self.num_experts, int(self.empty * self.num_experts), replace=False)] = -np.inf
        # The k largest of log-shares with Gumbel noise are k draws without replacement (arXiv 1903.06059).
        keys = log_share + rng.gumbel(size=(self.tokens, self.num_experts))
        chosen = np.argpartition(-keys, self.top_k - 1, axis=1)[:, : self.top_k]
        return np.bincount(chosen.reshape(-1), minlength=self.num_experts).astype(np.int32)

    def weights(self, seed: int) -> jax.Array:
        """Normal bfloat16 weights [E, K, N]."""
        shape = self.num_experts, self.in_features, self.out_features
        return jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(seed), shape, jnp.bfloat16)

    def operands(self, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normal bfloat16 rows [R, K], weights [E, K, N] and output gradients [R, N]."""
        shapes = (
            (self.rows, self.in_features),
            (self.num_experts, self.in_features, self.out_features),
            (self.rows, self.out_features),
        )
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        x, w, dout = (
            draw(key, shape, jnp.bfloat16)
            for key, shape in zip(jax.random.split(jax.random.key(seed), 3), shapes, strict=True)
        )
        return x, w, dout


KERNELS = {
    "super_up_t8192": Grouped(8192, 22, 512, 1024, 2688),
    "super_down_t8192": Grouped(8192, 22, 512, 2688, 1024),
    "super_up_t2048": Grouped(2048, 22, 512, 1024, 2688),
    "super_up_t32768": Grouped(32768, 22, 512, 1024, 2688),
    "ultra_up_t4096": Grouped(4096, 22, 512, 2048, 5120),
    "qwen3_up_t16384": Grouped(16384, 8, 128, 2048, 1536),
    "qwen3_down_t16384": Grouped(16384, 8, 128, 768, 2048),
    "kimi_k3_up_64_experts": Grouped(16384, 2, 64, 3584, 6144),
    "odd_l1000_m2696": Grouped(8192, 8, 128, 1000, 2696),
    "super_up_t8192_skewed": Grouped(8192, 22, 512, 1024, 2688, spread=1.5, empty=0.5),
}
QUICK_KERNELS = ("super_up_t8192", "super_down_t8192")
FP8 = {
    "super_up_t8192": KERNELS["super_up_t8192"],
    "super_down_t8192": KERNELS["super_down_t8192"],
    "super_up_t2048": KERNELS["super_up_t2048"],
    "super_down_t2048": Grouped(2048, 22, 512, 2688, 1024),
    "super_up_t32768": KERNELS["super_up_t32768"],
    "super_down_t32768": Grouped(32768, 22, 512, 2688, 1024),
    "super_up_t64": Grouped(64, 22, 512, 1024, 2688, empty=0.0),
}
DECODE_KERNELS = {f"super_up_t{tokens}": Grouped(tokens, 22, 512, 1024, 2688, empty=0.0) for tokens in (1, 8, 64)}


def _routed_part(config: LatentMoEConfig, **changes) -> LatentMoEConfig:
    """The layer without its shared expert, in bfloat16."""
    changes |= dict(shared_expert_intermediate_size=0, dtype="bfloat16", param_dtype="bfloat16")
    return dataclasses.replace(config, **changes)


SUPER = _routed_part(presets.NEMOTRON_3_SUPER)
MIDDLE = LatentMoEConfig(
    hidden_size=1024,
    latent_size=256,
    num_experts=64,
    top_k=8,
    expert_intermediate_size=512,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
"""The layer of the size "middle" in the suite "train"."""
LAYERS = {
    "super_t8192": (8192, SUPER),
    "super_swiglu_m1792_t8192": (8192, _routed_part(SUPER, activation="swiglu", expert_intermediate_size=1792)),
    "qwen3_t16384": (16384, _routed_part(presets.QWEN3_30B_A3B)),
    "middle_t8192": (8192, MIDDLE),
}
QUICK_LAYERS = ("super_t8192",)
FUSED = {name: LAYERS[name] for name in ("super_t8192", "super_swiglu_m1792_t8192")}
DECODE_LAYERS = {f"super_t{tokens}": (tokens, SUPER) for tokens in (1, 8, 64)}
QUICK_DECODE_LAYERS = ("super_t64",)
STEPS = {"trainer_preset_gpu": {}}
"""Fields of the trainer's preset to change."""
