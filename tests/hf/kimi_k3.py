"""Kimi K3's MoE block by its published definition, in float64, one token at a time, from the checkpoint's tensors.

It is written from the model's report and the keys of its config.json. The router and the shared experts read the full
width. Routed experts are between routed_expert_down_proj and routed_expert_up_proj. An RMSNorm follows the weighted
sum. Every gated unit is SiTU. Nothing here comes from jax_latent_moe.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def situ(gate, up, beta, linear_beta):
    """SiTU-GLU: beta tanh(g / beta) sigmoid(g) * linear_beta tanh(u / linear_beta)."""
    if linear_beta is not None:
        up = linear_beta * np.tanh(up / linear_beta)
    return beta * np.tanh(gate / beta) * sigmoid(gate) * up


def block(tensors, config, x):
    """Output [t, d] for x [t, d]; `tensors` by name within block_sparse_moe, [out, in], unquantised."""
    weight = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    beta, linear_beta = config["activation_situ_beta"], config["activation_situ_linear_beta"]
    out = []
    for token in np.asarray(x, np.float64):
        scores = sigmoid(weight["gate.weight"] @ token)
        for_choice = scores + weight["gate.e_score_correction_bias"]
        for_choice = limit_groups(for_choice, config["num_expert_group"], config["topk_group"])
        chosen = np.argsort(-for_choice)[: config["num_experts_per_token"]]
        weights = scores[chosen]
        if config["moe_renormalize"]:
            weights = weights / (weights.sum() + 1e-20)
        weights = weights * config["routed_scaling_factor"]

        latent = weight["routed_expert_down_proj.weight"] @ token
        total = np.zeros_like(latent)
        for expert, factor in zip(chosen, weights, strict=True):
            w1, w2, w3 = (weight[f"experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
            total += factor * (w2 @ situ(w1 @ latent, w3 @ latent, beta, linear_beta))
        if config["latent_moe_use_norm"]:
            total = total / np.sqrt(np.mean(total**2) + config["rms_norm_eps"]) * weight["routed_expert_norm.weight"]
        routed = weight["routed_expert_up_proj.weight"] @ total

        gate, up = (weight[f"shared_experts.{name}_proj.weight"] @ token for name in ("gate", "up"))
        out.append(routed + weight["shared_experts.down_proj.weight"] @ situ(gate, up, beta, linear_beta))
    return np.stack(out)


def limit_groups(scores, groups, kept):
    """Scores outside of the `kept` groups whose two best sum highest become -inf."""
    if groups == 1:
        return scores
    grouped = scores.reshape(groups, -1)
    best = np.argsort(-np.sort(grouped, axis=1)[:, -2:].sum(axis=1))[:kept]
    return np.where(np.isin(np.arange(groups), best)[:, None], grouped, -np.inf).reshape(-1)
