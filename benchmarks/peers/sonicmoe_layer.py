"""SonicMoE's experts (arXiv 2512.14080) in a torch layer, with the values of our parameters.

It tunes each kernel over its own tiles on the first call of a shape, which takes minutes if none is compiled yet.
"""

import jax.numpy as jnp

from benchmarks.peers import torch_layer
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate


def candidates(config: LatentMoEConfig, params, x, dy) -> dict[str, Candidate]:
    """One candidate per pass: forward as for inference; forward_backward with gradients of x and of every parameter.

    Args:
        config: a layer without shared expert: swiglu experts behind NemotronH's router and projections, or behind
            Qwen3's router. Lowering raises ValueError for another activation.
        params: from `jax_latent_moe.init_params`, bfloat16.
        x: [T, d].
        dy: [T, d].
    """

    def make():
        if config.activation != "swiglu":
            raise ValueError(f"SonicMoE's experts run swiglu only, not {config.activation}.")
        return _qwen3(config, params) if config.latent_size is None else _nemotron_h(config, params, x.shape[0])

    return torch_layer.candidates(make, x, dy)


def expert_weights(w_in, w_out):
    """Our weights as SonicMoE reads them: the contracted axis is last, and each gate row is next to its up row.

    Args:
        w_in: [E, l, 2, m], gate first.
        w_out: [E, m, l].

    Returns:
        [E, 2 m, l] of rows gate 0, up 0, gate 1, up 1, ..; and [E, l, m].
    """
    num_experts, width, _, inner = w_in.shape
    return jnp.transpose(w_in, (0, 3, 2, 1)).reshape(num_experts, 2 * inner, width), jnp.swapaxes(w_out, 1, 2)


def _leaves(*arrays):
    """Tensors that share the memory of JAX's arrays and require gradients."""
    import torch  # pyright: ignore[reportMissingImports]

    return tuple(torch.from_dlpack(array).detach().requires_grad_() for array in arrays)


def _qwen3(config, params):
    """SonicMoE's own layer, with its router in bfloat16 as Qwen3's in transformers, and its parameters."""
    import torch  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_TC_softmax_topk_layer  # pyright: ignore[reportMissingImports]

    router, w_in, w_out = parameters = _leaves(
        params["router"]["kernel"].T, *expert_weights(params["experts"]["w_in"], params["experts"]["w_out"])
    )

    def layer(tokens):
        return moe_TC_softmax_topk_layer(
            tokens,
            router,
            w_in.permute(1, 2, 0),
            None,
            w_out.permute(1, 2, 0),
            None,
            config.top_k,
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            is_softmax_over_topk=False,
            norm_topk_probs=config.router.norm_topk_prob,
        )[0]

    return layer, parameters


def _nemotron_h(config, params, tokens_count):
    """NemotronH's router and projections around SonicMoE's experts, and the parameters."""
    import torch  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]

    class Logits(torch.autograd.Function):
        """x @ kernel in float32 from bfloat16 operands, with bfloat16 gradients: no slow float32 matmul."""

        @staticmethod
        def forward(ctx, x, kernel):  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx.save_for_backward(x, kernel)
            return torch.mm(x, kernel, out_dtype=torch.float32)

        @staticmethod
        def backward(ctx, dlogits):  # pyright: ignore[reportIncompatibleMethodOverride]
            x, kernel = ctx.saved_tensors
            dlogits = dlogits.to(x.dtype)
            return dlogits @ kernel.T, x.T @ dlogits

    router, down, up, w_in, w_out = parameters = _leaves(
        *(params[name]["kernel"] for name in ("router", "down_proj", "up_proj")),
        *expert_weights(params["experts"]["w_in"], params["experts"]["w_out"]),
    )
    bias = torch.from_dlpack(params["router"]["bias"])
    token_ids = torch.arange(tokens_count, dtype=torch.int32, device=bias.device).repeat_interleave(config.top_k)

    def layer(tokens):
        scores = Logits.apply(tokens, router).sigmoid()
        expert_ids = (scores.detach() + bias).topk(config.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, expert_ids)
        if config.router.norm_topk_prob:
            weights = weights / (weights.sum(dim=1, keepdim=True) + config.router.norm_topk_eps)
        combined, _ = moe_general_routing_inputs(
            tokens @ down,
            (weights * config.router.routed_scaling_factor).reshape(-1),
            token_ids,
            expert_ids.reshape(-1).to(torch.int32),
            w_in.permute(1, 2, 0),
            None,
            w_out.permute(1, 2, 0),
            None,
            config.num_experts,
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
        )
        return combined @ up

    return layer, parameters
