"""Random layers: configurations, parameters and inputs for comparison with the oracle."""

import dataclasses
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jax_latent_moe.config import ACTIVATIONS, LATENT_NORMS, SCORE_FUNCTIONS, LatentMoEConfig, RouterConfig
from tests import oracle

MARGIN = 2e-5
"""Least distance between discrete choices for which ids of float32 and float64 must agree."""

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

TOY = LatentMoEConfig(
    hidden_size=12,
    latent_size=6,
    num_experts=8,
    top_k=3,
    expert_intermediate_size=5,
    shared_expert_intermediate_size=7,
    dtype="float32",
)


class Case(NamedTuple):
    """A layer, its inputs, and the gradient of its output: float64 values that config.dtype holds exactly."""

    config: LatentMoEConfig
    params: dict
    x: np.ndarray
    token_mask: np.ndarray | None
    expert_ids: np.ndarray | None
    dy: np.ndarray

    def oracle(self) -> oracle.Result:
        return oracle.forward(self.params, self.x, self.config, self.token_mask, self.expert_ids)


def param_shapes(config) -> dict:
    """Shapes of the parameter tree, from the documented contract."""
    d, latent = config.hidden_size, config.latent_width
    experts, m = config.num_experts, config.expert_intermediate_size
    ms, gate = config.shared_expert_intermediate_size, (2,) if config.gated else ()
    shapes = {
        "router": {"kernel": (d, experts)},
        "experts": {"w_in": (experts, latent, *gate, m), "w_out": (experts, m, latent)},
    }
    if config.router.correction_bias:
        shapes["router"]["bias"] = (experts,)
    if config.router.per_expert_scale:
        shapes["router"]["scale"] = (experts,)
    if config.latent_size is not None:
        shapes["down_proj"] = {"kernel": (d, latent)}
        shapes["up_proj"] = {"kernel": (latent, d)}
    if config.latent_norm != "none":
        shapes["latent_norm"] = {"scale": (latent,)}
    if ms:
        shapes["shared"] = {"w_in": (d, *gate, ms), "w_out": (ms, d)}
    return shapes


def rounded(values, dtype: str) -> np.ndarray:
    """Values that dtype holds exactly, as float64."""
    return np.asarray(values, DTYPES[dtype]).astype(np.float64)


def random_params(rng, config) -> dict:
    def draw(path, shape):
        if path == ("router", "bias"):
            return rounded(0.2 * rng.normal(size=shape), "float32")
        if path[-1] == "scale":
            return rounded(rng.uniform(0.5, 1.5, size=shape), config.dtype)
        fan_in = shape[1] if path[0] == "experts" else shape[0]
        return rounded(rng.normal(size=shape) / np.sqrt(fan_in), config.dtype)

    return {
        part: {name: draw((part, name), shape) for name, shape in leaves.items()}
        for part, leaves in param_shapes(config).items()
    }


def random_inputs(rng, config, leading, masked=False, replay=False) -> Case:
    """Draws until no discrete choice is within rounding of another."""
    experts, k = config.num_experts, config.top_k
    for _ in range(100):
        x = rounded(rng.normal(size=(*leading, config.hidden_size)), config.dtype)
        ids = rng.permuted(np.broadcast_to(np.arange(experts), (*leading, experts)), axis=-1)[..., :k]
        case = Case(
            config=config,
            params=random_params(rng, config),
            x=x,
            token_mask=rng.random(leading) < 0.7 if masked else None,
            expert_ids=np.where(rng.random(ids.shape) < 0.9, ids, -1) if replay else None,
            dy=rounded(rng.normal(size=x.shape), config.dtype),
        )
        if case.oracle().margin > MARGIN:
            return case
    raise AssertionError(f"no inputs without near-ties found for {config}")


def random_router(rng, num_groups, topk_groups, group_score_topk) -> RouterConfig:
    def maybe(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    conditional = {}
    if norm_topk_prob := maybe(True, False):
        conditional |= dict(norm_topk_eps=maybe(1e-20, 0.25))
    if num_groups > 1:
        conditional |= dict(group_score_topk=group_score_topk)
    if rng.random() < 0.5:
        conditional |= dict(capacity_factor=maybe(0.75, 1.25), min_capacity=maybe(0, 2))
        conditional |= dict(drop_policy=maybe("probs", "position"))
    return RouterConfig(
        score_function=rng.choice(SCORE_FUNCTIONS).item(),
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=maybe(1.0, 2.5),
        correction_bias=maybe(True, False),
        selection=maybe("score", "logit"),
        per_expert_scale=maybe(True, False),
        num_groups=num_groups,
        topk_groups=topk_groups,
        switch_loss_coef=maybe(0.0, 0.3),
        sequence_loss_coef=maybe(0.0, 0.2),
        z_loss_coef=maybe(0.0, 0.1),
        **conditional,
    )


def random_case(rng, **fixed) -> Case:
    """A random layer with random inputs; `fixed` sets fields of the configuration."""
    groups = rng.choice([1, 1, 2, 4]).item()
    group = rng.integers(2, 6).item() if groups > 1 else rng.integers(1, 17).item()
    topk_groups = rng.integers(1, groups, endpoint=True).item()
    experts = groups * group
    router = random_router(rng, groups, topk_groups, rng.integers(1, min(group, 2), endpoint=True).item())
    k = rng.integers(1, topk_groups * group, endpoint=True).item()
    activation, latent_norm = rng.choice(ACTIVATIONS).item(), rng.choice(LATENT_NORMS).item()
    fields = dict(
        hidden_size=rng.integers(3, 12).item(),
        latent_size=rng.choice([None, 2, 4, 8]),
        num_experts=experts,
        top_k=k,
        expert_intermediate_size=rng.integers(1, 9).item(),
        shared_expert_intermediate_size=rng.choice([0, 5]).item(),
        activation=activation,
        latent_norm=latent_norm,
        apply_probs_on_input=k == 1 and rng.random() < 0.5,
        apply_routed_scale_to_output=rng.random() < 0.5,
        router=router,
        dtype="float32",
    )
    if activation in ("gelu", "geglu"):
        fields |= dict(gelu_approximate=rng.random() < 0.5)
    if activation == "situ_glu":
        fields |= dict(situ_beta=1.5, situ_linear_beta=rng.choice([None, 2.0]))
    if latent_norm != "none":
        fields |= dict(latent_norm_eps=1e-2)
    config = LatentMoEConfig(**(fields | fixed))
    leading = [(7,), (2, 5), (1, 1), (2, 2, 3)][rng.integers(4)]
    return random_inputs(rng, config, leading, masked=rng.random() < 0.4, replay=rng.random() < 0.2)


def with_router(config, **changes) -> LatentMoEConfig:
    """The configuration with fields of its router changed."""
    return dataclasses.replace(config, router=dataclasses.replace(config.router, **changes))
