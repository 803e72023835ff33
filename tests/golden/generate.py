"""Writes the golden files next to this script: values and gradients of transformers' MoE blocks, run by torch.

    pip install -r requirements.txt
    python generate.py [CASE ...]

writes all cases, or the named ones. Each case is a folder. checkpoint/ is the model as `save_pretrained` writes it
(config.json, model.safetensors with the hub's names, in bfloat16 except for the correction bias). The block is run in
float32 and in bfloat16 on the same weights: values_<dtype>.safetensors holds x, dy, y, dx, expert_ids and weights, and
gradients_<dtype>.safetensors the gradients of sum(y * dy) under the checkpoint's names. Some cases also have stacked/,
the same weights under the names of transformers' own modules, with all experts in one tensor.
Each file holds the versions and the seed. Nothing here comes from jax_latent_moe.
"""

import pathlib
import platform
import shutil
import sys
import tempfile

import safetensors.torch
import torch
import transformers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

HERE = pathlib.Path(__file__).parent
BLOCKS = ("mixer", "mlp", "ffn", "block_sparse_moe")
WIDTH, EXPERTS, TOP_K, INNER, BATCH = 16, 8, 3, 12, (2, 7)

ATTENTION = dict(num_attention_heads=1, num_key_value_heads=1)
MLA = ATTENTION | dict(kv_lora_rank=2, q_lora_rank=2, qk_rope_head_dim=2, v_head_dim=2, qk_nope_head_dim=2)
ONE_LAYER = dict(first_k_dense_replace=0, num_hidden_layers=1, n_routed_experts=EXPERTS, intermediate_size=4)
FAMILIES = {
    "nemotron_h": (
        NemotronHConfig,
        NemotronHForCausalLM,
        "mixer",
        ATTENTION
        | dict(head_dim=4, mamba_num_heads=1, mamba_head_dim=4, ssm_state_size=4, n_groups=1)
        | dict(layers_block_type=["moe"], n_routed_experts=EXPERTS, moe_shared_expert_intermediate_size=16),
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        "mlp",
        MLA | ONE_LAYER,
    ),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM, "mlp", MLA | ONE_LAYER),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM, "mlp", ATTENTION | ONE_LAYER | dict(head_dim=4)),
    "qwen3_next": (
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        "mlp",
        ATTENTION
        | dict(
            head_dim=4, num_hidden_layers=1, layer_types=["full_attention"], num_experts=EXPERTS, intermediate_size=4
        )
        | dict(shared_expert_intermediate_size=20),
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        "mlp",
        ATTENTION | dict(head_dim=4, num_hidden_layers=1, num_experts=EXPERTS, intermediate_size=4),
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        "mlp",
        ATTENTION
        | dict(head_dim=4, num_hidden_layers=1, num_local_experts=EXPERTS, intermediate_size=INNER)
        | dict(layer_types=["full_attention"]),
    ),
    "deepseek_v4": (
        DeepseekV4Config,
        DeepseekV4ForCausalLM,
        "mlp",
        ATTENTION
        | dict(head_dim=4, q_lora_rank=2, num_hidden_layers=1, layer_types=["sliding_attention"], o_groups=1)
        | dict(o_lora_rank=2, index_n_heads=1, index_head_dim=4, hc_mult=1, partial_rotary_factor=0.5)
        | dict(vocab_size=11, n_routed_experts=EXPERTS, n_shared_experts=1),
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        "mlp",
        dict(num_attention_heads=2, num_key_value_heads=2, head_dim=2, num_hidden_layers=1)
        | dict(num_local_experts=EXPERTS, intermediate_size=INNER),
    ),
}
LATENT = dict(moe_latent_size=8)
GROUPS = dict(n_group=4, topk_group=2)
V2_GROUPS = GROUPS | dict(topk_method="group_limited_greedy")
# (name, family, config, seed, range of the correction bias). Released NemotronH biases are near 64, within 0.25.
NEAR_64, SMALL, NEGATIVE = (64.0, 64.25), (-0.1, 0.1), (-3.0, -1.0)
CASES = [
    ("nemotron_latent_0", "nemotron_h", LATENT | dict(routed_scaling_factor=5.0), 0, NEAR_64),
    ("nemotron_latent_1", "nemotron_h", LATENT | dict(routed_scaling_factor=5.0), 1, NEAR_64),
    ("nemotron_latent_2", "nemotron_h", LATENT | dict(routed_scaling_factor=5.0), 2, SMALL),
    ("nemotron_latent_unnormalised", "nemotron_h", LATENT | dict(norm_topk_prob=False), 3, NEAR_64),
    ("nemotron_latent_groups", "nemotron_h", LATENT | GROUPS | dict(routed_scaling_factor=2.5), 4, NEAR_64),
    ("nemotron_latent_groups_negative_bias", "nemotron_h", LATENT | GROUPS | dict(norm_topk_prob=False), 5, NEGATIVE),
    ("nemotron_full_width", "nemotron_h", dict(routed_scaling_factor=2.5), 6, NEAR_64),
    ("nemotron_full_width_groups", "nemotron_h", dict(n_group=2, topk_group=1, norm_topk_prob=False), 7, SMALL),
    ("deepseek_groups", "deepseek_v3", GROUPS | dict(n_shared_experts=1), 8, SMALL),
    ("deepseek_two_shared", "deepseek_v3", dict(n_group=1, topk_group=1, n_shared_experts=2), 9, SMALL),
    ("qwen3_normalised", "qwen3_moe", dict(norm_topk_prob=True), 10, None),
    ("qwen3_unnormalised", "qwen3_moe", dict(norm_topk_prob=False), 11, None),
    ("mixtral_0", "mixtral", {}, 12, None),
    ("mixtral_1", "mixtral", {}, 13, None),
    ("deepseek_v2", "deepseek_v2", dict(n_shared_experts=2, routed_scaling_factor=1.0), 14, None),
    ("deepseek_v2_groups", "deepseek_v2", V2_GROUPS | dict(n_shared_experts=1, routed_scaling_factor=16.0), 15, None),
    ("glm4_groups", "glm4_moe", GROUPS | dict(n_shared_experts=1, routed_scaling_factor=2.5), 16, SMALL),
    ("qwen3_next", "qwen3_next", dict(norm_topk_prob=True), 17, None),
    # The random values go beyond these limits, so some are clamped.
    ("gpt_oss", "gpt_oss", dict(swiglu_limit=1.25), 18, None),
    ("deepseek_v4", "deepseek_v4", dict(mlp_layer_types=["moe"], swiglu_limit=1.25), 19, SMALL),
    ("deepseek_v4_hash", "deepseek_v4", dict(mlp_layer_types=["hash_moe"], swiglu_limit=0.75), 20, None),
]
STACKED = ("nemotron_latent_0", "deepseek_groups", "mixtral_0", "qwen3_next", "deepseek_v4")


def build(family, extra, seed, bias_range):
    """A one-layer model with random bfloat16 weights, in bfloat16."""
    make_config, make_model, _, fixed = FAMILIES[family]
    sizes = dict(vocab_size=2, hidden_size=WIDTH, num_experts_per_tok=TOP_K, pad_token_id=0, bos_token_id=0)
    if family not in ("mixtral", "gpt_oss"):
        sizes |= dict(moe_intermediate_size=INNER)
    config = make_config(**sizes | fixed | extra, eos_token_id=1, dtype="bfloat16", experts_implementation="eager")
    model = make_model(config).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator)
            router = name.endswith(("gate.weight", "router.weight"))
            parameter.copy_(drawn if router else drawn / parameter.shape[-1] ** 0.5)
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                low, high = bias_range
                drawn = low + (high - low) * torch.rand(EXPERTS, generator=generator)
                module.e_score_correction_bias = drawn.to(torch.float32)
            if hasattr(module, "tid2eid"):
                order = torch.rand(module.tid2eid.shape[0], EXPERTS, generator=generator).argsort(dim=1)
                module.tid2eid = order[:, : module.top_k].contiguous()
    return model, generator


def run(model, block_name, dtype, x, dy, token_ids):
    """Values and gradients of the MoE block, in dtype."""
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    model = model.to(dtype)
    for name, bias in biases.items():  # .to(dtype) would round them
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    block = getattr(model.model.layers[0], block_name)
    x = x.detach().to(dtype, copy=True).requires_grad_()
    router = block.gate if hasattr(block, "gate") else block.router
    given = (token_ids,) if hasattr(router, "tid2eid") else ()
    rows = x if hasattr(block, "gate") else x.reshape(-1, WIDTH)
    _, weights, expert_ids = router(rows, *given)
    model.zero_grad()
    y = block(x, *given)
    y = y[0] if isinstance(y, tuple) else y
    (y * dy.to(dtype)).sum().backward()
    values = dict(x=x.detach(), dy=dy.to(dtype), y=y.detach(), dx=x.grad, expert_ids=expert_ids.int(), weights=weights)
    return {name: value.detach().contiguous() for name, value in values.items()}


def hub_named_gradients(model, names):
    """The gradients under the checkpoint's names, which transformers gives them when it saves."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.zero_()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = safetensors.torch.load_file(pathlib.Path(folder, "model.safetensors"))
    return {name: saved[name] for name in names}


def main():
    """Writes all cases, or those named on the command line."""
    transformers.utils.logging.disable_progress_bar()
    for case, family, extra, seed, bias_range in CASES:
        if sys.argv[1:] and case not in sys.argv[1:]:
            continue
        folder = HERE / case
        shutil.rmtree(folder, ignore_errors=True)
        model, generator = build(family, extra, seed, bias_range)
        model.save_pretrained(folder / "checkpoint")
        (folder / "checkpoint" / "generation_config.json").unlink(missing_ok=True)
        if case in STACKED:
            model.save_pretrained(folder / "stacked", save_original_format=False)
            (folder / "stacked" / "generation_config.json").unlink(missing_ok=True)
        stored = safetensors.torch.load_file(folder / "checkpoint" / "model.safetensors")
        moe = [name for name in stored if any(f".0.{block}." in name for block in BLOCKS)]
        x, dy = (torch.randn(*BATCH, WIDTH, generator=generator).to(torch.bfloat16) for _ in range(2))
        token_ids = torch.randint(model.config.vocab_size, BATCH, generator=generator)
        metadata = dict(
            generator="tests/golden/generate.py",
            seed=str(seed),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        )
        for dtype in ("bfloat16", "float32"):
            model, _ = build(family, extra, seed, bias_range)
            values = run(model, FAMILIES[family][2], getattr(torch, dtype), x, dy, token_ids)
            if case.endswith("hash"):
                values["token_ids"] = token_ids
            safetensors.torch.save_file(values, folder / f"values_{dtype}.safetensors", metadata)
            gradients = hub_named_gradients(model, moe)
            safetensors.torch.save_file(gradients, folder / f"gradients_{dtype}.safetensors", metadata)
        print(case, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


if __name__ == "__main__":
    main()
