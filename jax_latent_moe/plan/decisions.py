"""The decisions that a layer makes on a GPU that need not be present, by `plan_experts` and `plan_decode`."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jax_latent_moe import cost
from jax_latent_moe.config import LatentMoEConfig, ParallelConfig
from jax_latent_moe.decode import plan_decode
from jax_latent_moe.expert_plan import ExpertPlan, plan_experts
from jax_latent_moe.grouped_matmul import Operand
from jax_latent_moe.parallel import axis_sizes
from jax_latent_moe.params import param_shapes
from jax_latent_moe.plan.gpus import GPU
from jax_latent_moe.plan.rows import Rows
from jax_latent_moe.projections import explain
from jax_latent_moe.quantization import quantize
from jax_latent_moe.routing.router import gives_log_weights, weighs_in_kernel


def experts_of(
    config: LatentMoEConfig, mesh: AbstractMesh, tokens: int, rows: Rows, gpu: GPU, format: str | None = None
) -> ExpertPlan:
    """What the layer decides about the experts' products of one device.

    Args:
        config: the layer, as it is given to `latent_moe`.
        mesh: axes and sizes.
        tokens: tokens of one device.
        rows: rows of the experts' products, for weights in this format.
        gpu: the device, with its kernels.
        format: the format of the experts' weights, which are then frozen; None for dense weights.

    Raises:
        UnsupportedError: the named backend cannot run one of the products on this GPU.
    """
    # Products know neither the mesh nor its axes: a device has a part of the experts and of their inner widths.
    parallel = config.parallel or ParallelConfig()
    sizes = axis_sizes(parallel, mesh)
    experts, tensor = config.num_physical_experts // sizes[parallel.expert_axis], sizes[parallel.tensor_axis]
    inner, latent = config.expert_intermediate_size // tensor, config.latent_width
    codes = None if format is None else Operand(format)
    one_device, router = sizes[parallel.expert_axis] == 1, config.router
    plain = one_device and not router.pad_to_capacity and router.round_to_tile is None
    by_log = plain and not config.apply_probs_on_input and gives_log_weights(router)
    if weighs_in_kernel(router, tokens, config.num_experts, config.top_k, config.backend, gpu.device):
        by_log = by_log and router.selection == "given"
    return plan_experts(
        config,
        rows.allocated,
        (experts, latent, inner * (2 if config.gated else 1)),
        (experts, inner, latent),
        config.dtype,
        w_in=codes,
        w_out=codes,
        device=gpu.device,
        by_log=by_log,
        **_few_tokens(config, tokens, gpu, format) if rows.whole_tokens else {},
    )


def shapes_of(config: LatentMoEConfig, format: str | None) -> Any:
    """The shapes of the layer's parameters, with experts in a format; None for dense ones."""
    shapes = param_shapes(config)
    return shapes if format is None else jax.eval_shape(lambda params: quantize(params, config, format), shapes)


def _few_tokens(config, tokens, gpu, format):
    shapes = shapes_of(config, format)
    w_in, w_out = shapes["experts"]["w_in"], shapes["experts"]["w_out"]
    if format is None:
        w_in = jax.ShapeDtypeStruct((*w_in.shape[:2], math.prod(w_in.shape[2:])), w_in.dtype)
    return {
        "decode": plan_decode(config, tokens, cost.choices(config), config.dtype, w_in, w_out, device=gpu.device),
        "projections": explain(config, tokens, device=gpu.device),
    }
