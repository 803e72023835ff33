"""The MoE blocks of transformers, with experts on torch's grouped matmul and the values of our parameters."""

from benchmarks.peers import torch_layer
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate


def candidates(config: LatentMoEConfig, params, x, dy) -> dict[str, Candidate]:
    """One candidate per pass: forward without a graph; forward_backward with gradients of x and of every parameter.

    Args:
        config: a layer without shared expert: relu2 or swiglu experts behind NemotronH's router and projections, or
            swiglu experts behind Qwen3's router.
        params: from `jax_latent_moe.init_params`, bfloat16; copied into transformers' layout.
        x: [T, d].
        dy: [T, d].
    """

    def make():
        block = _block(config, params)
        parameters = tuple(leaf for leaf in block.parameters() if leaf.requires_grad)
        return lambda tokens: block(tokens[None])[0], parameters

    return torch_layer.candidates(make, x, dy)


def _block(config, params):
    """The module on the GPU. It is made without memory and then gets its tensors."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.device("meta"):
        block = _nemotron_h(config) if config.router.score_function == "sigmoid" else _qwen3(config)

    def give(module, name, kernel):
        """Our kernel [.., in, out] in their layout [.., out, in]."""
        tensor = torch.from_dlpack(kernel).transpose(-2, -1).contiguous()
        setattr(module, name, torch.nn.Parameter(tensor))

    w_in, w_out = params["experts"]["w_in"], params["experts"]["w_out"]
    give(block.gate, "weight", params["router"]["kernel"])
    give(block.experts, "gate_up_proj" if config.gated else "up_proj", w_in.reshape(*w_in.shape[:2], -1))
    give(block.experts, "down_proj", w_out)
    if config.latent_size is not None:
        give(block.fc1_latent_proj, "weight", params["down_proj"]["kernel"])
        give(block.fc2_latent_proj, "weight", params["up_proj"]["kernel"])
    if config.router.correction_bias:
        block.gate.e_score_correction_bias = torch.from_dlpack(params["router"]["bias"])
    return block


def _nemotron_h(config):
    from transformers.models.nemotron_h import modeling_nemotron_h  # pyright: ignore[reportMissingImports]
    from transformers.models.nemotron_h.configuration_nemotron_h import (  # pyright: ignore[reportMissingImports]
        NemotronHConfig,
    )

    theirs = NemotronHConfig(
        hidden_size=config.hidden_size,
        moe_latent_size=config.latent_size,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_intermediate_size,
        routed_scaling_factor=config.router.routed_scaling_factor,
        norm_topk_prob=config.router.norm_topk_prob,
        mlp_hidden_act="relu2",
    )
    theirs._experts_implementation = "grouped_mm"
    block = modeling_nemotron_h.NemotronHMoE(theirs)
    del block.shared_experts
    block.shared_experts = lambda x: 0.0  # adds a pass over y, some 0.03 ms at 8192 tokens
    if config.gated:
        block.experts = _qwen3_experts(config)
    return block


def _qwen3(config):
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # pyright: ignore[reportMissingImports]

    return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(_qwen3_config(config))


def _qwen3_experts(config):
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # pyright: ignore[reportMissingImports]

    return modeling_qwen3_moe.Qwen3MoeExperts(_qwen3_config(config))


def _qwen3_config(config):
    from transformers.models.qwen3_moe.configuration_qwen3_moe import (  # pyright: ignore[reportMissingImports]
        Qwen3MoeConfig,
    )

    theirs = Qwen3MoeConfig(
        hidden_size=config.latent_width,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_intermediate_size,
        norm_topk_prob=config.router.norm_topk_prob,
        hidden_act="silu",
    )
    theirs._experts_implementation = "grouped_mm"
    return theirs
