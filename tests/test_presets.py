"""Published models and the cost model, against the figures that their papers and checkpoints give."""

import dataclasses

import jax
import pytest

from jax_latent_moe import LatentMoEConfig, RouterConfig, cost, latent_moe, param_shapes, presets
from tests.cases import TOY

# d, l, E, k, m, ms, expert parameters of a layer in billions
PUBLISHED = {
    "NEMOTRON_3_SUPER": (4096, 1024, 512, 22, 2688, 5376, 2.82),
    "NEMOTRON_3_ULTRA": (8192, 2048, 512, 22, 5120, 10240, 10.74),
    "NEMOTRON_3_NANO": (2688, None, 128, 6, 1856, 3712, 1.28),
    "KIMI_K3": (7168, 3584, 896, 16, 3072, 6144, 29.60),
    "DEEPSEEK_V3": (7168, None, 256, 8, 2048, 2048, 11.27),
    "QWEN3_30B_A3B": (2048, None, 128, 8, 768, 0, 0.60),
}


def expert_parameters(config) -> int:
    matrices = 3 if config.gated else 2
    return config.num_experts * matrices * config.latent_width * config.expert_intermediate_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = getattr(presets, name)
    sizes = (
        config.hidden_size, config.latent_size, config.num_experts, config.top_k,
        config.expert_intermediate_size, config.shared_expert_intermediate_size,
    )  # fmt: skip
    assert sizes == PUBLISHED[name][:6]
    assert expert_parameters(config) / 1e9 == pytest.approx(PUBLISHED[name][6], abs=0.006)


def test_published_routers_and_activations():
    noaux = RouterConfig(score_function="sigmoid", norm_topk_prob=True, correction_bias=True)
    nemotron = dataclasses.replace(noaux, routed_scaling_factor=5.0)
    assert presets.NEMOTRON_3_SUPER.router == presets.NEMOTRON_3_ULTRA.router == nemotron
    assert presets.NEMOTRON_3_NANO.router == dataclasses.replace(noaux, routed_scaling_factor=2.5)
    assert presets.KIMI_K3.router == noaux
    deepseek = dataclasses.replace(noaux, routed_scaling_factor=2.5, num_groups=8, topk_groups=4, group_score_topk=2)
    assert presets.DEEPSEEK_V3.router == deepseek
    assert presets.QWEN3_30B_A3B.router == RouterConfig(
        score_function="softmax", norm_topk_prob=True, norm_topk_eps=0.0, correction_bias=False
    )
    kimi = presets.KIMI_K3
    assert (kimi.activation, kimi.situ_beta, kimi.situ_linear_beta) == ("situ_glu", 4.0, 25.0)
    assert (kimi.latent_norm, kimi.latent_norm_eps) == ("post", 1e-5)
    for preset in (presets.NEMOTRON_3_SUPER, presets.NEMOTRON_3_ULTRA, presets.NEMOTRON_3_NANO):
        assert (preset.activation, preset.latent_norm) == ("relu2", "none")
    assert presets.DEEPSEEK_V3.activation == presets.QWEN3_30B_A3B.activation == "swiglu"


def every_preset():
    return {name: value for name, value in vars(presets).items() if isinstance(value, LatentMoEConfig)}


@pytest.mark.parametrize("name", every_preset())
def test_every_preset_traces_at_full_size(name):
    """Only shapes: nothing is allocated."""
    config = every_preset()[name]
    x = jax.ShapeDtypeStruct((2, 8, config.hidden_size), config.dtype)
    y, aux = jax.eval_shape(lambda params, x: latent_moe(params, x, config), param_shapes(config), x)
    assert (y.shape, y.dtype.name) == (x.shape, config.dtype)
    assert aux.expert_ids.shape == (2, 8, config.top_k)
    assert len(every_preset()) == len(PUBLISHED) + 1


@pytest.mark.parametrize("name", every_preset())
def test_costs_follow_the_formulas(name):
    config = every_preset()[name]
    d, width, experts, k = config.hidden_size, config.latent_width, config.num_experts, config.top_k
    matrices = 3 if config.gated else 2
    expert = matrices * width * config.expert_intermediate_size
    projections = 0 if config.latent_size is None else 2 * d * width
    shared = matrices * d * config.shared_expert_intermediate_size
    vectors = (experts if config.router.correction_bias else 0) + (width if config.latent_norm != "none" else 0)
    always = d * experts + projections + shared
    assert cost.parameters(config) == always + vectors + experts * expert
    assert cost.active_parameters(config) == always + vectors + k * expert
    assert cost.matmul_flops_per_token(config) == 2 * (always + k * expert)


def test_scales_count_as_parameters_not_as_matmuls():
    scaled = dataclasses.replace(TOY, router=RouterConfig(per_expert_scale=True))
    assert cost.parameters(scaled) == cost.parameters(TOY) + TOY.num_experts
    assert cost.matmul_flops_per_token(scaled) == cost.matmul_flops_per_token(TOY)
