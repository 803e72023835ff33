"""Random checkpoints, written by the safetensors package under names spelled out here. Nothing comes from hf itself."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
D, L, E, M, MS = 16, 8, 4, 12, 20

NEMOTRON_H = dict(
    model_type="nemotron_h",
    dtype="bfloat16",
    hidden_size=D,
    layers_block_type=["moe", "full_attention", "moe"],
    n_routed_experts=E,
    num_experts_per_tok=2,
    moe_latent_size=L,
    moe_intermediate_size=M,
    moe_shared_expert_intermediate_size=MS,
    mlp_hidden_act="relu2",
    routed_scaling_factor=5.0,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
)
NEMOTRON_H_MTP = NEMOTRON_H | dict(
    torch_dtype="bfloat16", num_nextn_predict_layers=1, mtp_layers_block_type=["full_attention", "moe"]
)
PUZZLE = {key: value for key, value in NEMOTRON_H.items() if key != "layers_block_type"} | dict(
    model_type="nemotron_h_puzzle",
    hybrid_override_pattern="EME",
    block_configs=[
        dict(block_type="moe", moe_intermediate_size=M, num_experts_per_tok=2),
        dict(block_type="mamba"),
        dict(block_type="moe", moe_intermediate_size=2 * M, num_experts_per_tok=3),
    ],
)
KIMI_K3 = dict(
    model_type="kimi_k3",
    dtype="bfloat16",
    text_config=dict(
        model_type="kimi_linear",
        hidden_size=D,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        routed_expert_hidden_size=L,
        latent_moe_use_norm=True,
        rms_norm_eps=1e-5,
        num_experts=E,
        num_experts_per_token=2,
        num_shared_experts=2,
        moe_intermediate_size=M,
        num_expert_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        moe_renormalize=True,
        moe_router_activation_func="sigmoid",
        hidden_act="situ",
        activation_situ_beta=4.0,
        activation_situ_linear_beta=25.0,
    ),
)
DEEPSEEK_V3 = dict(
    model_type="deepseek_v3",
    torch_dtype="bfloat16",
    hidden_size=D,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    n_routed_experts=E,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=M,
    hidden_act="silu",
    n_group=2,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
)
QWEN3_MOE = dict(
    model_type="qwen3_moe",
    dtype="bfloat16",
    hidden_size=D,
    num_hidden_layers=3,
    decoder_sparse_step=1,
    mlp_only_layers=[1],
    num_experts=E,
    num_experts_per_tok=2,
    moe_intermediate_size=M,
    hidden_act="silu",
    norm_topk_prob=True,
)
MIXTRAL = dict(
    model_type="mixtral",
    dtype="bfloat16",
    hidden_size=D,
    num_hidden_layers=1,
    num_local_experts=E,
    num_experts_per_tok=2,
    intermediate_size=M,
    hidden_act="silu",
)


KIMI_K2 = DEEPSEEK_V3 | dict(model_type="kimi_k2", n_group=1, topk_group=1)
KIMI_K25 = dict(model_type="kimi_k25", dtype="bfloat16", text_config=KIMI_K2 | dict(torch_dtype=None))
GLM4_MOE = {key: value for key, value in DEEPSEEK_V3.items() if key not in ("scoring_func", "topk_method")} | dict(
    model_type="glm4_moe"
)
DEEPSEEK_V2 = DEEPSEEK_V3 | dict(
    model_type="deepseek_v2",
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)
QWEN3_NEXT = QWEN3_MOE | dict(model_type="qwen3_next", shared_expert_intermediate_size=MS)
QWEN2_MOE = QWEN3_NEXT | dict(model_type="qwen2_moe")


GPT_OSS = dict(
    model_type="gpt_oss",
    dtype="bfloat16",
    hidden_size=D,
    num_hidden_layers=1,
    num_local_experts=E,
    num_experts_per_tok=2,
    intermediate_size=M,
    hidden_act="silu",
    swiglu_limit=7.0,
)
DEEPSEEK_V4 = dict(
    model_type="deepseek_v4",
    dtype="bfloat16",
    hidden_size=D,
    num_hidden_layers=1,
    num_hash_layers=0,
    n_routed_experts=E,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=M,
    hidden_act="silu",
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    scoring_func="sqrtsoftplus",
    swiglu_limit=10.0,
)


def gpt_oss(prefix):
    shapes = {
        "router.weight": (E, D),
        "router.bias": (E,),
        "experts.gate_up_proj": (E, D, 2 * M),
        "experts.gate_up_proj_bias": (E, 2 * M),
        "experts.down_proj": (E, M, D),
        "experts.down_proj_bias": (E, D),
    }
    return {prefix + name: shape for name, shape in shapes.items()}


def deepseek_v4(prefix, table=False):
    shapes = {"gate.weight": (E, D)} | ({"gate.tid2eid": (9, 2)} if table else {"gate.bias": (E,)})
    for expert in [f"experts.{e}" for e in range(E)] + ["shared_experts"]:
        shapes |= {f"{expert}.w1.weight": (M, D), f"{expert}.w3.weight": (M, D), f"{expert}.w2.weight": (D, M)}
    return {prefix + name: shape for name, shape in shapes.items()}


def nemotron(prefix, m=M):
    shapes = {
        "gate.weight": (E, D),
        "gate.e_score_correction_bias": (E,),
        "fc1_latent_proj.weight": (L, D),
        "fc2_latent_proj.weight": (D, L),
        "shared_experts.up_proj.weight": (MS, D),
        "shared_experts.down_proj.weight": (D, MS),
    }
    for e in range(E):
        shapes |= {f"experts.{e}.up_proj.weight": (m, L), f"experts.{e}.down_proj.weight": (L, m)}
    return {prefix + name: shape for name, shape in shapes.items()}


def kimi(prefix):
    shapes = {
        "gate.weight": (E, D),
        "gate.e_score_correction_bias": (E,),
        "routed_expert_down_proj.weight": (L, D),
        "routed_expert_norm.weight": (L,),
        "routed_expert_up_proj.weight": (D, L),
        "shared_experts.gate_proj.weight": (2 * M, D),
        "shared_experts.up_proj.weight": (2 * M, D),
        "shared_experts.down_proj.weight": (D, 2 * M),
    }
    for e in range(E):
        shapes |= {f"experts.{e}.w1.weight": (M, L), f"experts.{e}.w3.weight": (M, L), f"experts.{e}.w2.weight": (L, M)}
    return {prefix + name: shape for name, shape in shapes.items()}


def gated(prefix, names=("gate_proj", "up_proj", "down_proj"), bias=False, shared=False):
    gate, up, down = names
    shapes = {"gate.weight": (E, D)}
    if bias:
        shapes["gate.e_score_correction_bias"] = (E,)
    for expert in [f"experts.{e}" for e in range(E)] + (["shared_experts"] if shared else []):
        shapes |= {
            f"{expert}.{gate}.weight": (M, D),
            f"{expert}.{up}.weight": (M, D),
            f"{expert}.{down}.weight": (D, M),
        }
    return {prefix + name: shape for name, shape in shapes.items()}


def qwen_next(prefix):
    shared = {"gate_proj": (MS, D), "up_proj": (MS, D), "down_proj": (D, MS)}
    shapes = {f"{prefix}shared_expert.{name}.weight": shape for name, shape in shared.items()}
    return gated(prefix) | shapes | {f"{prefix}shared_expert_gate.weight": (1, D)}


def stacked(shapes, prefix, gated):
    """The same layer with its experts in two tensors [E, out, in], gate rows before up rows."""
    rest = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    width, m = (D, M) if gated else (L, M)
    w_in = (
        {f"{prefix}experts.gate_up_proj": (E, 2 * m, width)} if gated else {f"{prefix}experts.up_proj": (E, m, width)}
    )
    return rest | w_in | {f"{prefix}experts.down_proj": (E, width, m)}


def megatron(prefix, two=1, latent=True, shared=True, bias=True, ms=None, gate=False):
    width = L if latent else D
    shapes = {"router.weight": (E, D)}
    if bias:
        shapes["router.expert_bias"] = (E,)
    if latent:
        shapes |= {"fc1_latent_proj.weight": (L, D), "fc2_latent_proj.weight": (D, L)}
    if shared:
        ms = ms or (MS if two == 1 else M)
        shapes |= {"shared_experts.linear_fc1.weight": (two * ms, D), "shared_experts.linear_fc2.weight": (D, ms)}
    if gate:
        shapes["shared_experts.gate_weight"] = (1, D)
    for e in range(E):
        shapes |= {
            f"experts.linear_fc1.weight{e}": (two * M, width),
            f"experts.linear_fc2.weight{e}": (width, M),
        }
    return {prefix + name: shape for name, shape in shapes.items()}


def other(layer):
    """Tensors outside of MoE layers."""
    return {f"model.layers.{layer}.self_attn.q_proj.weight": (D, D), "lm_head.weight": (5, D)}


W1_W3_W2 = ("w1", "w3", "w2")
# name -> (config.json, naming, tensors)
MAPPINGS = {
    "nemotron": (
        NEMOTRON_H,
        "hf",
        nemotron("backbone.layers.0.mixer.") | nemotron("backbone.layers.2.mixer.") | other(1),
    ),
    "nemotron_renamed": (
        NEMOTRON_H,
        "hf",
        nemotron("model.layers.0.mixer.") | nemotron("model.layers.2.mixer.") | other(1),
    ),
    "nemotron_mtp": (
        NEMOTRON_H_MTP,
        "hf",
        nemotron("backbone.layers.0.mixer.") | nemotron("backbone.layers.2.mixer.") | nemotron("mtp.layers.1.mixer."),
    ),
    "puzzle": (
        PUZZLE,
        "hf",
        nemotron("backbone.layers.0.mixer.") | nemotron("backbone.layers.2.mixer.", 2 * M) | other(1),
    ),
    "kimi": (
        KIMI_K3,
        "hf",
        kimi("language_model.model.layers.1.block_sparse_moe.")
        | kimi("language_model.model.layers.2.block_sparse_moe.")
        | other(0),
    ),
    "deepseek": (DEEPSEEK_V3, "hf", gated("model.layers.1.mlp.", bias=True, shared=True) | other(0)),
    "qwen3": (QWEN3_MOE, "hf", gated("model.layers.0.mlp.") | gated("model.layers.2.mlp.") | other(1)),
    "qwen3_next": (
        QWEN3_NEXT,
        "hf",
        qwen_next("model.layers.0.mlp.")
        | stacked(qwen_next("model.layers.2.mlp."), "model.layers.2.mlp.", gated=True)
        | other(1),
    ),
    "qwen2": (QWEN2_MOE, "hf", qwen_next("model.layers.0.mlp.") | qwen_next("model.layers.2.mlp.") | other(1)),
    "glm4": (GLM4_MOE, "hf", gated("model.layers.1.mlp.", bias=True, shared=True) | other(0)),
    "kimi_k2": (KIMI_K2, "hf", gated("model.layers.1.mlp.", bias=True, shared=True) | other(0)),
    "kimi_k25": (KIMI_K25, "hf", gated("language_model.model.layers.1.mlp.", bias=True, shared=True) | other(0)),
    "deepseek_v2": (DEEPSEEK_V2, "hf", gated("model.layers.1.mlp.", shared=True) | other(0)),
    "megatron_shared_gate": (
        QWEN2_MOE,
        "megatron",
        megatron("decoder.layers.0.mlp.", two=2, latent=False, bias=False, ms=MS, gate=True)
        | megatron("decoder.layers.2.mlp.", two=2, latent=False, bias=False, ms=MS, gate=True),
    ),
    "gpt_oss": (GPT_OSS, "hf", gpt_oss("model.layers.0.mlp.") | other(0)),
    "deepseek_v4": (DEEPSEEK_V4, "hf", deepseek_v4("layers.0.ffn.") | other(0)),
    "deepseek_v4_hash": (
        DEEPSEEK_V4 | dict(num_hidden_layers=2, num_hash_layers=1),
        "hf",
        deepseek_v4("layers.0.ffn.", table=True) | deepseek_v4("layers.1.ffn."),
    ),
    "deepseek_v4_stacked": (
        DEEPSEEK_V4,
        "hf",
        stacked(gated("model.layers.0.mlp.", bias=True, shared=True), "model.layers.0.mlp.", gated=True) | other(0),
    ),
    "mixtral": (MIXTRAL, "hf", gated("model.layers.0.block_sparse_moe.", W1_W3_W2) | other(0)),
    "nemotron_stacked": (
        NEMOTRON_H,
        "hf",
        stacked(nemotron("model.layers.0.mixer."), "model.layers.0.mixer.", gated=False)
        | nemotron("model.layers.2.mixer.")  # a layer of each kind
        | other(1),
    ),
    "deepseek_stacked": (
        DEEPSEEK_V3,
        "hf",
        stacked(gated("model.layers.1.mlp.", bias=True, shared=True), "model.layers.1.mlp.", gated=True) | other(0),
    ),
    "mixtral_stacked": (
        MIXTRAL,
        "hf",
        stacked(gated("model.layers.0.mlp."), "model.layers.0.mlp.", gated=True) | other(0),
    ),
    "megatron_latent": (
        NEMOTRON_H,
        "megatron",
        megatron("decoder.layers.0.mlp.") | megatron("decoder.layers.2.mlp.") | other(1),
    ),
    "megatron_gated": (DEEPSEEK_V3, "megatron", megatron("decoder.layers.1.mlp.", two=2, latent=False) | other(0)),
    "megatron_softmax": (
        MIXTRAL,
        "megatron",
        megatron("decoder.layers.0.mlp.", two=2, latent=False, shared=False, bias=False),
    ),
}


def random_tensors(rng, shapes):
    """Tensors in bfloat16, except for correction biases, which are float32 and near 64, and tables of experts."""

    def tensor(name, shape):
        if name.endswith(("correction_bias", "expert_bias", "gate.bias")):
            return (64 + rng.uniform(0, 0.25, shape)).astype(np.float32)
        if name.endswith("tid2eid"):
            return rng.integers(E, size=shape)
        return rng.normal(size=shape).astype(BFLOAT16)

    return {name: tensor(name, shape) for name, shape in shapes.items()}


def save(folder: pathlib.Path, config, tensors, files: int = 1):
    """Writes a checkpoint folder with this number of files, and an index if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % files:05}-of-{files:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make(folder: pathlib.Path, rng, mapping: str, files: int = 1):
    """Writes one of MAPPINGS; returns (naming, tensors)."""
    config, naming, shapes = MAPPINGS[mapping]
    tensors = random_tensors(rng, shapes)
    save(folder, config, tensors, files)
    return naming, tensors
