"""config.json to configurations: the published values give the presets, and unsupported features are refused."""

import dataclasses
import json

import pytest

from jax_latent_moe import RouterConfig, cost, hf, presets
from jax_latent_moe.hf.checkpoint import read_config
from tests.hf.checkpoints import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    GLM4_MOE,
    GPT_OSS,
    KIMI_K2,
    KIMI_K3,
    KIMI_K25,
    MIXTRAL,
    NEMOTRON_H,
    NEMOTRON_H_MTP,
    PUZZLE,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
)

SUPER = NEMOTRON_H | dict(
    hidden_size=4096,
    moe_latent_size=1024,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_shared_expert_intermediate_size=5376,
    layers_block_type=["moe"] * 40 + ["mamba"] * 48,
)
ULTRA = SUPER | dict(
    hidden_size=8192, moe_latent_size=2048, moe_intermediate_size=5120, moe_shared_expert_intermediate_size=10240
)
NANO = SUPER | dict(
    hidden_size=2688,
    moe_latent_size=None,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
)
K3 = KIMI_K3 | dict(
    text_config=KIMI_K3["text_config"]
    | dict(
        hidden_size=7168,
        routed_expert_hidden_size=3584,
        num_experts=896,
        num_experts_per_token=16,
        moe_intermediate_size=3072,
        num_hidden_layers=93,
    )
)
V3 = DEEPSEEK_V3 | dict(
    hidden_size=7168,
    n_routed_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    n_group=8,
    topk_group=4,
    num_hidden_layers=61,
    first_k_dense_replace=3,
)
QWEN3 = QWEN3_MOE | dict(
    hidden_size=2048,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    mlp_only_layers=[],
)


def configs_of(values, folder):
    (folder / "config.json").write_text(json.dumps(values))
    return read_config(folder / "config.json")[0]


@pytest.mark.parametrize(
    ("values", "preset", "layers"),
    [
        (SUPER, "NEMOTRON_3_SUPER", 40),
        (ULTRA, "NEMOTRON_3_ULTRA", 40),
        (NANO, "NEMOTRON_3_NANO", 40),
        (K3, "KIMI_K3", 92),
        (V3, "DEEPSEEK_V3", 58),
        (QWEN3, "QWEN3_30B_A3B", 48),
    ],
)
def test_published_values_give_the_preset(values, preset, layers, tmp_path):
    configs = configs_of(values, tmp_path)
    assert len(configs) == layers
    expected = dataclasses.replace(getattr(presets, preset), dtype="bfloat16", param_dtype="bfloat16")
    assert set(configs.values()) == {expected}


# Published totals, in billions of parameters. The MoE layers are most of a model, and never more than all of it.
@pytest.mark.parametrize(
    ("preset", "layers", "total"),
    [
        ("NEMOTRON_3_SUPER", 40, 120),
        ("NEMOTRON_3_ULTRA", 48, 550),
        ("NEMOTRON_3_NANO", 23, 31.6),
        ("KIMI_K3", 92, 2780),
        ("DEEPSEEK_V3", 58, 671),
        ("QWEN3_30B_A3B", 48, 30.5),
    ],
)
def test_the_moe_layers_are_most_of_the_published_total(preset, layers, total):
    share = layers * cost.parameters(getattr(presets, preset)) / 1e9 / total
    assert 0.93 < share < 1, share


K2 = KIMI_K2 | dict(
    hidden_size=7168,
    n_routed_experts=384,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    routed_scaling_factor=2.827,
)
GLM_45 = GLM4_MOE | dict(
    hidden_size=5120,
    n_routed_experts=160,
    num_experts_per_tok=8,
    moe_intermediate_size=1536,
    num_hidden_layers=92,
    first_k_dense_replace=3,
)
V2 = DEEPSEEK_V2 | dict(
    hidden_size=5120,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    n_group=8,
    topk_group=3,
)
NEXT_80B = QWEN3_NEXT | dict(
    hidden_size=2048,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    num_hidden_layers=48,
    mlp_only_layers=[],
)


GPT_OSS_120B = GPT_OSS | dict(
    hidden_size=2880, intermediate_size=2880, num_local_experts=128, num_experts_per_tok=4, num_hidden_layers=36
)
V4_FLASH = DEEPSEEK_V4 | dict(
    hidden_size=4096,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=6,
    num_hidden_layers=43,
    num_hash_layers=3,
)


def test_gpt_oss_and_deepseek_v4(tmp_path):
    """The clamped swiglu of each, gpt-oss's biases, and the layers of DeepSeek-V4 that read a table."""
    (oss,) = set(configs_of(GPT_OSS_120B, tmp_path).values())
    assert (oss.activation, oss.swiglu_alpha, oss.swiglu_limit, oss.swiglu_shift) == ("clamped_swiglu", 1.702, 7.0, 1.0)
    softmax = RouterConfig(score_function="softmax_topk", norm_topk_prob=False, correction_bias=False, logit_bias=True)
    assert (oss.expert_bias, oss.router) == (True, softmax)
    assert 0.93 < 36 * cost.parameters(oss) / 1e9 / 116.8 < 1
    v4 = configs_of(V4_FLASH, tmp_path)
    assert [config.router.selection for config in v4.values()] == ["given"] * 3 + ["score"] * 40
    assert v4[3].router == RouterConfig(score_function="sqrt_softplus", routed_scaling_factor=1.5)
    assert v4[0] == dataclasses.replace(
        v4[3], router=dataclasses.replace(v4[3].router, selection="given", correction_bias=False)
    )
    assert (v4[3].swiglu_alpha, v4[3].swiglu_limit, v4[3].swiglu_shift) == (1.0, 10.0, 0.0)
    listed = {key: value for key, value in DEEPSEEK_V4.items() if key != "num_hash_layers"}
    named = configs_of(listed | dict(num_hidden_layers=2, mlp_layer_types=["moe", "hash_moe"]), tmp_path)
    assert [config.router.selection for config in named.values()] == ["score", "given"]


# Published values of config.json, and published total and active parameters in billions.
@pytest.mark.parametrize(
    ("values", "layers", "total", "active"),
    [(K2, 60, 1026, 32), (GLM_45, 89, 355, 32), (V2, 59, 236, 21), (NEXT_80B, 48, 80, 3)],
    ids=["kimi_k2", "glm_4.5", "deepseek_v2", "qwen3_next_80b"],
)
def test_published_values_give_most_of_the_published_totals(values, layers, total, active, tmp_path):
    configs = configs_of(values, tmp_path)
    assert len(configs) == layers
    (config,) = set(configs.values())
    assert 0.93 < layers * cost.parameters(config) / 1e9 / total < 1
    assert 0.5 < layers * cost.matmul_flops_per_token(config) / 2e9 / active < 1


def test_routers_of_newer_families(tmp_path):
    routers = {
        values["model_type"]: configs_of(values, tmp_path)[values.get("first_k_dense_replace", 0)].router
        for values in (KIMI_K2, GLM4_MOE, DEEPSEEK_V2, QWEN3_NEXT, QWEN2_MOE)
    }
    assert configs_of(KIMI_K25, tmp_path) == configs_of(KIMI_K2, tmp_path)
    assert routers["glm4_moe"] == configs_of(DEEPSEEK_V3, tmp_path)[1].router
    assert routers["kimi_k2"] == RouterConfig(routed_scaling_factor=2.5)
    softmax = RouterConfig(score_function="softmax", correction_bias=False, norm_topk_prob=False)
    v2 = dict(routed_scaling_factor=16.0, num_groups=2, topk_groups=1, group_score_topk=1)
    assert routers["deepseek_v2"] == dataclasses.replace(softmax, **v2)
    greedy = configs_of(DEEPSEEK_V2 | dict(topk_method="greedy", n_group=None), tmp_path)[1].router
    assert greedy == dataclasses.replace(softmax, routed_scaling_factor=16.0)
    normalised = dataclasses.replace(softmax, norm_topk_prob=True, norm_topk_eps=0.0)
    assert routers["qwen3_next"] == routers["qwen2_moe"] == normalised
    for values, norm in ((QWEN3_NEXT, True), (QWEN2_MOE, False)):  # the defaults differ
        assert configs_of(values | dict(norm_topk_prob=None), tmp_path)[0].router.norm_topk_prob is norm


def test_the_shared_expert_has_a_gate_where_there_is_one(tmp_path):
    assert configs_of(QWEN3_NEXT, tmp_path)[0].shared_expert_gate
    none = configs_of(QWEN3_NEXT | dict(shared_expert_intermediate_size=0), tmp_path)[0]
    assert (none.shared_expert_intermediate_size, none.shared_expert_gate) == (0, False)


def test_older_nemotron_files_name_layers_by_letters(tmp_path):
    values = {key: value for key, value in NEMOTRON_H.items() if key != "layers_block_type"}
    assert list(configs_of(values | dict(hybrid_override_pattern="ME*E-"), tmp_path)) == [1, 3]


def test_the_multi_token_predictor_has_a_layer_of_its_own(tmp_path):
    assert list(configs_of(NEMOTRON_H_MTP, tmp_path)) == [0, 2, "mtp.1"]
    letters = {key: value for key, value in NEMOTRON_H_MTP.items() if key != "mtp_layers_block_type"}
    assert list(configs_of(letters | dict(mtp_hybrid_override_pattern="E*E"), tmp_path)) == [0, 2, "mtp.0", "mtp.2"]


OPTIONAL = {
    "nemotron": (
        NEMOTRON_H,
        ["moe_latent_size", "n_group", "topk_group", "norm_topk_prob", "mlp_hidden_act", "mlp_bias"],
    ),
    "nemotron_mtp": (NEMOTRON_H_MTP, ["torch_dtype", "block_configs", "mtp_hybrid_override_pattern"]),
    "deepseek": (
        DEEPSEEK_V3,
        ["hidden_act", "n_group", "norm_topk_prob", "scoring_func", "topk_method", "moe_layer_freq"],
    ),
    "qwen3": (QWEN3_MOE, ["decoder_sparse_step", "mlp_only_layers", "hidden_act", "norm_topk_prob"]),
    "mixtral": (MIXTRAL, ["hidden_act"]),
}


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, (_, keys) in OPTIONAL.items() for key in keys])
def test_null_is_read_as_absent(family, key, tmp_path):
    values = OPTIONAL[family][0]
    absent = {name: value for name, value in values.items() if name != key}
    assert configs_of(values | {key: None}, tmp_path) == configs_of(absent, tmp_path)


def test_null_is_read_as_absent_within_other_objects(tmp_path):
    blocks = [block | dict(moe_latent_size=None, n_routed_experts=None) for block in PUZZLE["block_configs"]]
    assert configs_of(PUZZLE | dict(block_configs=blocks), tmp_path) == configs_of(PUZZLE, tmp_path)
    text = KIMI_K3["text_config"]
    for key in ("dtype", "latent_moe_use_norm", "activation_situ_linear_beta", "moe_renormalize", "num_expert_group"):
        absent = {name: value for name, value in text.items() if name != key}
        nulled = configs_of(KIMI_K3 | dict(text_config=text | {key: None}), tmp_path)
        assert nulled == configs_of(KIMI_K3 | dict(text_config=absent), tmp_path), key


@pytest.mark.parametrize("key", ["hidden_size", "n_routed_experts", "dtype", "model_type"])
def test_null_where_a_value_is_needed_is_named(key, tmp_path):
    with pytest.raises(hf.CheckpointError, match=rf"(torch_)?{key} is missing"):
        configs_of(NEMOTRON_H | {key: None}, tmp_path)


def test_routers(tmp_path):
    mixtral = configs_of(MIXTRAL, tmp_path)[0].router
    assert (mixtral.score_function, mixtral.correction_bias) == ("softmax_topk", False)
    qwen = configs_of(QWEN3_MOE | dict(norm_topk_prob=False), tmp_path)[0].router
    assert (qwen.score_function, qwen.norm_topk_prob) == ("softmax", False)
    grouped = configs_of(NEMOTRON_H | dict(n_group=2, topk_group=1), tmp_path)[0].router
    assert (grouped.num_groups, grouped.topk_groups, grouped.group_score_topk) == (2, 1, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (NEMOTRON_H | dict(model_type="llama"), "model_type='llama' is unknown"),
        (NEMOTRON_H | dict(mlp_bias=True), "mlp_bias=True is not supported"),
        (NEMOTRON_H | dict(mlp_hidden_act="silu"), "mlp_hidden_act='silu' is not supported"),
        (NEMOTRON_H | dict(num_experts_per_tok=9), "top_k=9 is more than num_experts=4"),
        (NEMOTRON_H | dict(layers_block_type=["mlp"]), "no MoE layer"),
        (NEMOTRON_H | dict(dtype="float8"), "dtype='float8' is not supported"),
        (NEMOTRON_H | dict(routed_scaling_factor="5"), "routed_scaling_factor='5' must be a finite number"),
        ({key: value for key, value in NEMOTRON_H.items() if key != "hidden_size"}, "hidden_size is missing"),
        (PUZZLE | dict(block_configs=[{}]), "block_configs must be a list of 3 objects"),
        (DEEPSEEK_V3 | dict(scoring_func="softmax"), "scoring_func='softmax' is not supported"),
        (GPT_OSS | dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (GPT_OSS | dict(swiglu_limit=0), "swiglu_limit=0.* must be more than 0"),
        (DEEPSEEK_V4 | dict(norm_topk_prob=False), "norm_topk_prob=False is not supported"),
        (DEEPSEEK_V4 | dict(scoring_func="relu"), "scoring_func='relu' is not supported"),
        (DEEPSEEK_V4 | dict(mlp_layer_types=["dense"]), "mlp_layer_types=.*must be a list of 1 names"),
        (NEMOTRON_H | dict(model_type=[]), r"model_type=\[\] is unknown"),
        (DEEPSEEK_V2 | dict(norm_topk_prob=True), "norm_topk_prob=True is not supported"),
        (DEEPSEEK_V2 | dict(topk_method="noaux_tc"), "topk_method='noaux_tc' is not supported"),
        (GLM4_MOE | dict(scoring_func="softmax"), "scoring_func='softmax' is not supported"),
        (KIMI_K25 | dict(text_config=3), r"text_config is a (int|list), not an object"),
        (QWEN3_NEXT | dict(shared_expert_intermediate_size=None), "shared_expert_intermediate_size is missing"),
        (DEEPSEEK_V3 | dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000 is not an integer"),
        (QWEN3_MOE | dict(mlp_only_layers=3), "mlp_only_layers=3 is not a list"),
        (KIMI_K3 | dict(text_config=[]), r"text_config is a (int|list), not an object"),
    ],
)
def test_what_is_not_computed_is_refused(values, message, tmp_path):
    with pytest.raises(hf.CheckpointError, match=message):
        configs_of(values, tmp_path)
