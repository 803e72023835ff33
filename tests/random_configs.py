"""Random configurations: every field that a layer reads, drawn where it is read."""

from jax_latent_moe.activations import ACTIVATIONS
from jax_latent_moe.config import LATENT_NORMS, SCORE_FUNCTIONS, LatentMoEConfig, Precision, RouterConfig


def random_router(rng, k, num_experts, num_groups, topk_groups, group_score_topk, fixed) -> RouterConfig:
    def maybe(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    conditional = {}
    if norm_topk_prob := k > 1 and maybe(True, False):
        conditional |= dict(norm_topk_eps=maybe(1e-20, 0.25))
    if num_groups > 1:
        conditional |= dict(group_score_topk=group_score_topk)
    if rng.random() < 0.5:
        conditional |= dict(capacity_factor=maybe(0.75, 1.25), min_capacity=maybe(0, 2))
        conditional |= dict(drop_policy=maybe("probs", "position"))
        conditional |= dict(pad_to_capacity=fixed.get("parallel") is None and maybe(True, False))
    selection = rng.choice(["score", "logit", "sinkhorn"] if num_groups == 1 else ["score", "logit"]).item()
    if selection != "sinkhorn" and "capacity_factor" not in conditional and rng.random() < 0.4:
        conditional |= dict(round_to_tile=rng.choice([2, 2, 3, 4]).item())
    correction_bias = selection != "sinkhorn" and maybe(True, False)
    if correction_bias and num_groups == 1 and k < num_experts and rng.random() < 0.3:
        conditional |= dict(bias_update="quantile")
    jitters = fixed.get("dtype", "float32") == "float32" and rng.random() < 0.25
    # If all tokens choose all experts, balance losses are constant. Where all rows may be dropped as well, the router's
    # gradient may be exactly zero, and no relative error bounds the rounding of its terms.
    balances = k < num_experts or conditional.keys().isdisjoint(("capacity_factor", "round_to_tile"))
    return RouterConfig(
        score_function=rng.choice([name for name in SCORE_FUNCTIONS if k > 1 or name != "softmax_topk"]).item(),
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=maybe(1.0, 2.5),
        correction_bias=correction_bias,
        selection=selection,
        input_jitter=0.125 if jitters else 0.0,
        logit_bias=maybe(True, False),
        per_expert_scale=maybe(True, False),
        num_groups=num_groups,
        topk_groups=topk_groups,
        switch_loss_coef=balances * maybe(0.0, 0.3),
        sequence_loss_coef=balances * maybe(0.0, 0.2),
        global_loss_coef=balances * (0.3 if rng.random() < 0.25 else 0.0),
        z_loss_coef=maybe(0.0, 0.1),
        **conditional,
    )


def random_precision(rng) -> Precision:
    """FP8 in the forward products, in the input gradients, or in both."""
    fwd, dgrad = rng.choice(["fp8_block", "fp8_block_pow2"], size=2).tolist()
    return [Precision(fwd), Precision(None, dgrad), Precision(fwd, dgrad)][rng.integers(3)]


def random_config(rng, **fixed) -> LatentMoEConfig:
    """Any layer at all; `fixed` sets fields."""
    groups = rng.choice([1, 1, 2, 4]).item()
    group = rng.integers(2, 6).item() if groups > 1 else rng.integers(1, 17).item()
    topk_groups = rng.integers(1, groups, endpoint=True).item()
    experts = groups * group
    k = rng.integers(1, topk_groups * group, endpoint=True).item()
    router = random_router(
        rng, k, experts, groups, topk_groups, rng.integers(1, min(group, 2), endpoint=True).item(), fixed
    )
    activation, latent_norm = rng.choice(tuple(ACTIVATIONS)).item(), rng.choice(LATENT_NORMS).item()
    fields = dict(
        hidden_size=rng.integers(3, 12).item(),
        latent_size=rng.choice([None, 2, 4, 8]),
        num_experts=experts,
        top_k=k,
        expert_intermediate_size=rng.integers(1, 9).item(),
        shared_expert_intermediate_size=rng.choice([0, 5]).item(),
        activation=activation,
        latent_norm=latent_norm,
        apply_probs_on_input=k == 1 and router.round_to_tile is None and rng.random() < 0.5,
        apply_routed_scale_to_output=rng.random() < 0.5,
        router=router,
        dtype="float32",
    )
    fields["shared_expert_gate"] = bool(fields["shared_expert_intermediate_size"]) and rng.random() < 0.5
    fields["expert_bias"] = rng.random() < 0.3
    fields["keep_gathered_rows"] = fixed.get("precision") is None and rng.random() < 0.3
    if activation == "clamped_swiglu":
        fields |= dict(swiglu_alpha=1.3, swiglu_limit=rng.choice([0.5, 2.0]), swiglu_shift=rng.choice([0.0, 1.0]))
    if activation in ("gelu", "geglu"):
        fields |= dict(gelu_approximate=rng.random() < 0.5)
    if activation == "situ_glu":
        fields |= dict(situ_beta=1.5, situ_linear_beta=rng.choice([None, 2.0]))
    if latent_norm != "none":
        fields |= dict(latent_norm_eps=1e-2)
    return LatentMoEConfig(**(fields | fixed))
