"""Random layers and inputs for comparison with the oracle."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jax_latent_moe.config import LatentMoEConfig
from tests import oracle
from tests.oracle.rounding import Rounding
from tests.random_configs import random_config
from tests.tolerances import relative_error

MARGIN = 2e-5
"""Least distance between discrete choices for which ids of float32 and float64 must agree."""

PERTURBATION, AMPLIFICATION, NUDGES = 1e-7, 20, 5
"""Inputs whose exact result moves by more than AMPLIFICATION times their own relative change are not used. They are
nudged several times: in one random direction alone, what a cancellation loses can cancel too.
"""

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
    segment_ids: np.ndarray | None = None
    global_counts: np.ndarray | None = None
    seed: int | None = None  # of the jitter's key

    def oracle(self, rounding: Rounding | None = None) -> oracle.Result:
        factors = None if self.seed is None else jitter(self.seed, self.x.shape, self.config.router.input_jitter)
        return oracle.forward(
            self.params,
            self.x,
            self.config,
            self.token_mask,
            self.expert_ids,
            self.segment_ids,
            self.global_counts,
            factors,
            rounding,
        )

    def optional(self) -> dict[str, Any]:
        """The optional arguments of `latent_moe` that are not None."""
        key = None if self.seed is None else jax.random.key(self.seed)
        names = ("token_mask", "expert_ids", "segment_ids", "global_counts")
        given = {name: getattr(self, name) for name in names} | {"key": key}
        return {name: value for name, value in given.items() if value is not None}

    def everything(self, result) -> list[np.ndarray]:
        """Outputs, losses and gradients of the oracle's result, one after the other."""
        dparams, dx = oracle.backward(self.params, self.config, result, self.dy)
        gradients = [leaf for leaves in dparams.values() for leaf in leaves.values()]
        return [result.y, result.weights, *map(np.asarray, result.losses.values()), dx, *gradients]

    def is_comparable(self, rng) -> bool:
        """Whether another precision must make the same choices and give values within its rounding."""
        result = self.oracle()
        if result.margin < MARGIN:
            return False
        config, expected = nudge_sums(self.config, oracle.norm_sums(result)), self.everything(result)
        if result.rounding.margin < MARGIN:
            return False
        return all(self._moved(rng, config, expected) <= AMPLIFICATION * PERTURBATION for _ in range(NUDGES))

    def _moved(self, rng, config, expected) -> float:
        """The relative error of the exact result after a random change of all inputs and codes."""

        def nudge(values):
            return values * (1 + PERTURBATION * rng.uniform(-1, 1, size=values.shape))

        params = {part: {name: nudge(p) for name, p in leaves.items()} for part, leaves in self.params.items()}
        nudged = self._replace(config=config, x=nudge(self.x), params=params)
        nudged = nudged.everything(nudged.oracle(Rounding(nudge)))
        return max(relative_error(a, b) for a, b in zip(nudged, expected, strict=True))


@functools.cache
def jitter(seed, shape, eps) -> np.ndarray:
    """The documented factors of the router's input: uniform, from the key folded with the number of each token in x."""
    key, tokens = jax.random.key(seed), np.prod(shape[:-1], dtype=int)
    rows = [
        jax.random.uniform(jax.random.fold_in(key, number), shape[-1:], "float32", 1 - eps, 1 + eps)
        for number in range(tokens)
    ]
    return np.asarray(rows, np.float64).reshape(shape)


def nudge_sums(config, norm_sums) -> LatentMoEConfig:
    """The layer if the divisor of a norm's input is off by one rounding.

    The gradient of whatever scales the input of a norm, such as the weight of the only expert that gives anything,
    cancels but for epsilon: rounding may be all that is left of it. The same goes for the weight of an expert that a
    replay leaves alone, which is normalised to 1.
    """
    if config.router.norm_topk_prob and config.router.norm_topk_eps:
        config = with_router(config, norm_topk_eps=config.router.norm_topk_eps + PERTURBATION)
    if norm_sums:
        config = dataclasses.replace(config, latent_norm_eps=config.latent_norm_eps + PERTURBATION * min(norm_sums))
    return config


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
    if config.router.logit_bias:
        shapes["router"]["logit_bias"] = (experts,)
    if config.expert_bias:
        shapes["experts"] |= {"b_in": (experts, *gate, m), "b_out": (experts, latent)}
    if config.router.per_expert_scale:
        shapes["router"]["scale"] = (experts,)
    if config.latent_size is not None:
        shapes["down_proj"] = {"kernel": (d, latent)}
        shapes["up_proj"] = {"kernel": (latent, d)}
    if config.latent_norm != "none":
        shapes["latent_norm"] = {"scale": (latent,)}
    if ms:
        shapes["shared"] = {"w_in": (d, *gate, ms), "w_out": (ms, d)}
        if config.shared_expert_gate:
            shapes["shared"]["gate"] = (d, 1)
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


def draw(rng, config, leading, masked=False, replay=False, packed=False) -> Case:
    """Random parameters and inputs for a layer, comparable or not."""
    experts, k = config.num_experts, config.top_k
    x = rounded(rng.normal(size=(*leading, config.hidden_size)), config.dtype)
    ids = rng.permuted(np.broadcast_to(np.arange(experts), (*leading, experts)), axis=-1)[..., :k]
    router = config.router
    return Case(
        config=config,
        params=random_params(rng, config),
        x=x,
        token_mask=rng.random(leading) < 0.7 if masked else None,
        expert_ids=np.where(rng.random(ids.shape) < 0.9, ids, -1) if replay else None,
        dy=rounded(rng.normal(size=x.shape), config.dtype),
        segment_ids=rng.integers(3, size=leading) if packed else None,
        global_counts=rng.integers(9, size=experts) if router.global_loss_coef and rng.random() < 0.7 else None,
        seed=rng.integers(4).item() if router.input_jitter else None,
    )


def random_inputs(rng, config, leading, masked=False, replay=False) -> Case:
    """Comparable inputs for a layer."""
    for _ in range(100):
        case = draw(rng, config, leading, masked, replay)
        if case.is_comparable(rng):
            return case
    raise AssertionError(f"no comparable inputs found for {config}")


def random_case(rng, **fixed) -> Case:
    """A random layer with comparable inputs; `fixed` sets fields of the configuration."""
    for _ in range(100):
        leading = [(7,), (2, 5), (1, 1), (2, 2, 3)][rng.integers(4)]
        chances = dict(masked=rng.random() < 0.4, replay=rng.random() < 0.2, packed=rng.random() < 0.3)
        case = draw(rng, random_config(rng, **fixed), leading, **chances)
        if case.is_comparable(rng):
            return case
    raise AssertionError(f"no comparable layer found with {fixed}")


def with_router(config, **changes) -> LatentMoEConfig:
    """The configuration with fields of its router changed."""
    return dataclasses.replace(config, router=dataclasses.replace(config.router, **changes))
