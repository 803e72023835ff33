"""Turns the config.json of a published model into the configuration of each of its MoE layers.

Keys and defaults follow transformers 5.23 (NemotronH, DeepSeek-V2 and V3, GLM-4-MoE, Qwen2-MoE, Qwen3-MoE, Qwen3-Next,
Mixtral, gpt-oss, DeepSeek-V4), TensorRT-LLM (nemotron_h_puzzle) and the published configurations of Kimi K2 and K3.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_latent_moe.config import COMPUTE_DTYPES, LatentMoEConfig, RouterConfig
from jax_latent_moe.hf import names
from jax_latent_moe.hf.names import Layer, Names

Configs = dict[Layer, LatentMoEConfig]


class Keys(Mapping[str, Any]):
    """The keys of a config.json. A key that is missing or has the wrong type raises ValueError with its name.

    A key whose value is null counts as missing: transformers writes null for a feature that the model does not have.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = {key: value for key, value in values.items() if value is not None}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise ValueError(f"{key} is missing")
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def __contains__(self, key):
        return key in self._values

    def integer(self, key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
        """An integer from 0 to the limit."""
        value = self[key] if default is None else self.get(key, default)
        if type(value) is not int or not 0 <= value <= limit:
            raise ValueError(f"{key}={value!r} is not an integer from 0 to {limit}")
        return value

    def layers(self) -> range:
        """The indices of all layers of the model."""
        return range(self.integer("num_hidden_layers", limit=10_000))

    def either(self, *keys: str) -> str:
        """The first of these keys that is present; the first of all if none is."""
        return next((key for key in keys if key in self._values), keys[0])

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default if the key is missing."""
        return self._values.get(key, default)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a value that the layer does not support. A missing key stands for the first allowed value."""
        if self.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key}={self[key]!r} is not supported, only {' or '.join(map(repr, allowed))}")

    def chosen(self, key: str, table: dict[str, str], default: str | None = None) -> Any:
        """The table's entry for the key's value."""
        value = self[key] if default is None else self.get(key, default)
        if not isinstance(value, str) or value not in table:
            raise ValueError(f"{key}={value!r} is not supported, only {' or '.join(map(repr, table))}")
        return table[value]

    def dtype(self) -> str:
        """The dtype in which the model is stored and computed."""
        key = self.either("dtype", "torch_dtype")
        return self.chosen(key, {name: name for name in COMPUTE_DTYPES})


def _common(keys: Keys) -> dict[str, Any]:
    return dict(hidden_size=keys.integer("hidden_size"), dtype=keys.dtype(), param_dtype=keys.dtype())


def _groups(keys: Keys, num_groups: str, topk_groups: str, **when_grouped) -> dict[str, Any]:
    groups = keys.integer(num_groups, 1)
    return dict(num_groups=groups, topk_groups=keys.integer(topk_groups, 1)) | when_grouped if groups > 1 else {}


def _normalised(keys: Keys, key: str, default: bool, **when_on) -> dict[str, Any]:
    norm = keys.get(key, default)
    return dict(norm_topk_prob=norm) | (when_on if norm else {})


_GATED = {"silu": "swiglu", "gelu": "geglu", "situ": "situ_glu"}
_PATTERN = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


def _nemotron_h(keys: Keys) -> Configs:
    keys.only("mlp_bias", False)
    blocks = keys.get("block_configs")
    types = _layer_types(keys, "layers_block_type", "hybrid_override_pattern", blocks)
    if blocks is None:
        overrides = [{}] * len(types)
    elif isinstance(blocks, list) and len(blocks) == len(types) and all(isinstance(b, dict) for b in blocks):
        overrides = blocks
    else:
        raise ValueError(f"block_configs must be a list of {len(types)} objects, one per layer")
    layers: dict[Layer, Keys] = {
        index: Keys({**keys, **Keys(override)})
        for index, (kind, override) in enumerate(zip(types, overrides, strict=True))
        if kind == "moe"
    }
    if keys.get("num_nextn_predict_layers") and blocks is None:
        predictor = _layer_types(keys, "mtp_layers_block_type", "mtp_hybrid_override_pattern", None)
        layers |= {f"mtp.{index}": keys for index, kind in enumerate(predictor) if kind == "moe"}
    return {layer: _nemotron_h_layer(values) for layer, values in layers.items()}


def _layer_types(keys: Keys, listed: str, pattern: str, blocks: Any) -> list[str]:
    """The kind of each layer, from a list (newer files), a string of letters (older ones) or block_configs (Puzzle)."""
    if keys.get(listed) is not None:
        types = keys[listed]
    elif pattern in keys and isinstance(keys[pattern], str):
        types = [_PATTERN.get(letter, letter) for letter in keys[pattern]]
    elif isinstance(blocks, list):
        types: Any = [block.get("block_type") if isinstance(block, dict) else None for block in blocks]
    else:
        raise ValueError(f"{listed} and {pattern} are both missing")
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise ValueError(f"{listed} or {pattern} does not say what every layer is")
    return types


def _nemotron_h_layer(keys: Keys) -> LatentMoEConfig:
    latent = keys.get("moe_latent_size")
    return LatentMoEConfig(
        **_common(keys),
        latent_size=None if latent is None else keys.integer("moe_latent_size"),
        num_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        expert_intermediate_size=keys.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=keys.integer("moe_shared_expert_intermediate_size"),
        activation=keys.chosen("mlp_hidden_act", {"relu2": "relu2", "gelu": "gelu"}, "relu2"),
        router=RouterConfig(
            routed_scaling_factor=keys.get("routed_scaling_factor", 1.0),
            **_normalised(keys, "norm_topk_prob", True),
            **_groups(keys, "n_group", "topk_group"),
        ),
    )


def _text(keys: Keys) -> Keys:
    """The keys of the language model within a model of text and images."""
    if "text_config" not in keys:
        return keys
    if not isinstance(keys["text_config"], dict):
        raise ValueError(f"text_config is a {type(keys['text_config']).__name__}, not an object")
    dtypes = {key: keys[key] for key in ("dtype", "torch_dtype") if key in keys}
    return Keys({**dtypes, **Keys(keys["text_config"])})


def _kimi_k3(keys: Keys) -> Configs:
    keys = _text(keys)
    latent = keys.get("routed_expert_hidden_size")
    activation = keys.chosen("hidden_act", _GATED)
    fields: dict[str, Any] = {}
    if activation == "situ_glu":
        fields |= dict(situ_beta=keys["activation_situ_beta"], situ_linear_beta=keys.get("activation_situ_linear_beta"))
    if latent is not None and keys.get("latent_moe_use_norm", False):
        fields |= dict(latent_norm="post", latent_norm_eps=keys["rms_norm_eps"])
    config = LatentMoEConfig(
        **_common(keys),
        **fields,
        latent_size=None if latent is None else keys.integer("routed_expert_hidden_size"),
        num_experts=keys.integer("num_experts"),
        top_k=keys.integer("num_experts_per_token"),
        expert_intermediate_size=keys.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=keys.integer("num_shared_experts", 0) * keys.integer("moe_intermediate_size"),
        activation=activation,
        router=RouterConfig(
            score_function=keys.chosen("moe_router_activation_func", {"sigmoid": "sigmoid", "softmax": "softmax"}),
            routed_scaling_factor=keys["routed_scaling_factor"],
            **_normalised(keys, "moe_renormalize", True),
            **_groups(keys, "num_expert_group", "topk_group"),
        ),
    )
    return dict.fromkeys(_after_dense(keys), config)


def _after_dense(keys: Keys) -> list[int]:
    """The layers from first_k_dense_replace on whose index is a multiple of moe_layer_freq."""
    frequency = keys.integer("moe_layer_freq", 1)
    first = keys.integer("first_k_dense_replace")
    return [layer for layer in keys.layers() if layer >= first and layer % max(frequency, 1) == 0]


def _kimi_k25(keys: Keys) -> Configs:
    return _deepseek_v3(_text(keys))


def _deepseek_v3(keys: Keys) -> Configs:
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    return _deepseek(
        keys,
        RouterConfig(
            routed_scaling_factor=keys["routed_scaling_factor"],
            **_normalised(keys, "norm_topk_prob", True),
            **_groups(keys, "n_group", "topk_group"),
        ),
    )


def _deepseek_v2(keys: Keys) -> Configs:
    keys.only("scoring_func", "softmax")
    keys.only("topk_method", "greedy", "group_limited_greedy")
    keys.only("norm_topk_prob", False)  # transformers ignores it; DeepSeek's code then drops the factor
    groups: dict[str, Any] = {}
    if keys.get("topk_method") == "group_limited_greedy":  # a group's score is its best expert's
        groups = _groups(keys, "n_group", "topk_group", group_score_topk=1)
    return _deepseek(
        keys,
        RouterConfig(
            score_function="softmax",
            correction_bias=False,
            norm_topk_prob=False,
            routed_scaling_factor=keys.get("routed_scaling_factor", 1.0),
            **groups,
        ),
    )


def _deepseek(keys: Keys, router: RouterConfig) -> Configs:
    config = LatentMoEConfig(
        **_common(keys),
        latent_size=None,
        num_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        expert_intermediate_size=keys.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=keys.integer("n_shared_experts", 0) * keys.integer("moe_intermediate_size"),
        activation=keys.chosen("hidden_act", _GATED, "silu"),
        router=router,
    )
    return dict.fromkeys(_after_dense(keys), config)


def _qwen3_moe(keys: Keys) -> Configs:
    return _qwen(keys, normalised=False)


def _qwen2_moe(keys: Keys) -> Configs:
    return _qwen(keys, normalised=False, **_gated_shared(keys))


def _qwen3_next(keys: Keys) -> Configs:
    return _qwen(keys, normalised=True, **_gated_shared(keys))


def _gated_shared(keys: Keys) -> dict[str, Any]:
    width = keys.integer("shared_expert_intermediate_size")
    return dict(shared_expert_intermediate_size=width, shared_expert_gate=width > 0)


def _qwen(keys: Keys, normalised: bool, **shared) -> Configs:
    config = LatentMoEConfig(
        **_common(keys),
        latent_size=None,
        num_experts=keys.integer(keys.either("num_experts", "num_local_experts")),
        top_k=keys.integer("num_experts_per_tok"),
        expert_intermediate_size=keys.integer("moe_intermediate_size"),
        activation=keys.chosen("hidden_act", _GATED, "silu"),
        router=RouterConfig(
            score_function="softmax",
            correction_bias=False,
            **_normalised(keys, "norm_topk_prob", normalised, norm_topk_eps=0.0),
        ),
        **shared,
    )
    dense = keys.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers={dense!r} is not a list")
    step = max(keys.integer("decoder_sparse_step", 1), 1)
    return {layer: config for layer in keys.layers() if layer not in dense and (layer + 1) % step == 0}


def _mixtral(keys: Keys) -> Configs:
    config = LatentMoEConfig(
        **_common(keys),
        latent_size=None,
        num_experts=keys.integer("num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        expert_intermediate_size=keys.integer("intermediate_size"),
        activation=keys.chosen("hidden_act", _GATED, "silu"),
        router=RouterConfig(score_function="softmax_topk", correction_bias=False, norm_topk_prob=False),
    )
    return dict.fromkeys(keys.layers(), config)


def _gpt_oss(keys: Keys) -> Configs:
    keys.only("hidden_act", "silu")
    config = LatentMoEConfig(
        **_common(keys),
        latent_size=None,
        num_experts=keys.integer(keys.either("num_local_experts", "num_experts")),
        top_k=keys.integer(keys.either("num_experts_per_tok", "experts_per_token")),
        expert_intermediate_size=keys.integer("intermediate_size"),
        activation="clamped_swiglu",
        swiglu_alpha=keys.get("swiglu_alpha", 1.702),
        swiglu_limit=keys.get("swiglu_limit", 7.0),
        swiglu_shift=1.0,
        expert_bias=True,
        router=RouterConfig(
            score_function="softmax_topk", correction_bias=False, norm_topk_prob=False, logit_bias=True
        ),
    )
    return dict.fromkeys(keys.layers(), config)


def _deepseek_v4(keys: Keys) -> Configs:
    keys.only("mlp_bias", False)
    keys.only("hidden_act", "silu")
    keys.only("topk_method", "noaux_tc")
    keys.only("norm_topk_prob", True)  # its code divides by the sum whatever the key says
    score = keys.chosen("scoring_func", {name: name.replace("sqrts", "sqrt_s") for name in _V4_SCORES}, "sqrtsoftplus")
    width = keys.integer("moe_intermediate_size")
    router = RouterConfig(score_function=score, routed_scaling_factor=keys.get("routed_scaling_factor", 1.5))
    config = LatentMoEConfig(
        **_common(keys),
        latent_size=None,
        num_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        expert_intermediate_size=width,
        shared_expert_intermediate_size=keys.integer("n_shared_experts", 1) * width,
        activation="clamped_swiglu",
        swiglu_alpha=1.0,
        swiglu_limit=keys.get("swiglu_limit", 10.0),
        swiglu_shift=0.0,
        router=router,
    )
    given = dataclasses.replace(config, router=dataclasses.replace(router, selection="given", correction_bias=False))
    kinds = _v4_layers(keys)
    return {layer: given if kind == "hash_moe" else config for layer, kind in enumerate(kinds)}


_V4_SCORES = ("sqrtsoftplus", "sigmoid", "softmax")


def _v4_layers(keys: Keys) -> list[str]:
    """Whether a table gives a layer's experts, or the router chooses them: listed, or the first ones by number."""
    layers = len(keys.layers())
    kinds = keys.get("mlp_layer_types")
    if kinds is None:
        tables = min(keys.integer("num_hash_layers", 3), layers)
        return ["hash_moe"] * tables + ["moe"] * (layers - tables)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {"hash_moe", "moe"}:
        raise ValueError(f"mlp_layer_types={kinds!r} must be a list of {layers} names, 'hash_moe' or 'moe'")
    return kinds


FAMILIES: dict[str, tuple[Callable[[Keys], Configs], Names]] = {
    "nemotron_h": (_nemotron_h, names.NEMOTRON_H),
    "nemotron_h_puzzle": (_nemotron_h, names.NEMOTRON_H),
    "kimi_k3": (_kimi_k3, names.KIMI),
    "kimi_linear": (_kimi_k3, names.KIMI),
    "kimi_k2": (_deepseek_v3, names.DEEPSEEK_V3),
    "kimi_k25": (_kimi_k25, names.KIMI_K25),
    "deepseek_v3": (_deepseek_v3, names.DEEPSEEK_V3),
    "deepseek_v2": (_deepseek_v2, names.DEEPSEEK_V3),
    "glm4_moe": (_deepseek_v3, names.DEEPSEEK_V3),
    "qwen2_moe": (_qwen2_moe, names.QWEN3_NEXT),
    "qwen3_moe": (_qwen3_moe, names.QWEN3_MOE),
    "qwen3_next": (_qwen3_next, names.QWEN3_NEXT),
    "mixtral": (_mixtral, names.MIXTRAL),
    "gpt_oss": (_gpt_oss, names.GPT_OSS),
    "deepseek_v4": (_deepseek_v4, names.DEEPSEEK_V4),
}
"""By model_type: the function that configures its layers, and the names of their tensors."""


def layer_configs(values: dict[str, Any]) -> tuple[Configs, Names]:
    """The MoE layers that a config.json describes, and the names of their tensors.

    Raises:
        ValueError: a key is missing, or its value is not supported by the layer (`ConfigError` is a ValueError).
    """
    keys = Keys(values)
    model_type = keys["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is unknown: known are {', '.join(FAMILIES)}")
    configs_of, naming = FAMILIES[model_type]
    configs = configs_of(keys)
    if not configs:
        raise ValueError("it describes no MoE layer")
    return configs, naming
