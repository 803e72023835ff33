"""The time of each part of a layer at the rates of a GPU, and the resource that bounds it."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jax_latent_moe import cost
from jax_latent_moe.config import LatentMoEConfig, XlaBackend
from jax_latent_moe.decode import Decode
from jax_latent_moe.expert_plan import ExpertPlan
from jax_latent_moe.parallel import axis_sizes, choose_dispatch
from jax_latent_moe.plan.gpus import GPU
from jax_latent_moe.plan.memory import gathered_dtype, gathered_parameters, parameters_per_device
from jax_latent_moe.plan.rows import Rows

OVERLAP = 0.3
"""The fraction of the shorter of arithmetic and memory time that adds to the longer; fitted to measured kernels."""

GROUPED_MS = 0.095
"""Time of a grouped matmul of very few rows. Between 0.066 and 0.120 were measured, most of it on the host."""

XLA_FLOPS, XLA_BANDWIDTH = {"forward": 0.19, "dgrad": 0.19, "wgrad": 0.08}, 0.21
"""The fractions of the kernels' rates that XLA's grouped matmuls reach; fitted to those of 2026-11-24 on an H200."""

COLLECTIVE_MS = 0.07
"""Time of a collective that moves no data, measured on two GPUs."""


class Part(NamedTuple):
    """One part of a layer on one device.

    Attributes:
        name: name of the part.
        ms: expected time in milliseconds.
        bound: the resource it waits for: "arithmetic", "memory", "link" (within a host) or "network" (between hosts).
        flops: floating-point operations.
        bytes: bytes moved through memory, or over the link or network.
    """

    name: str
    ms: float
    bound: str
    flops: float
    bytes: float


def kernel(name: str, gpu: GPU, flops: float, moved: float, rate: float) -> Part:
    """A kernel that computes `flops` operations at `rate` and moves `moved` bytes through memory."""
    arithmetic, traffic = 1e3 * flops / rate, 1e3 * moved / gpu.bandwidth
    shorter, longer = sorted((arithmetic, traffic))
    return Part(name, longer + OVERLAP * shorter, "arithmetic" if arithmetic > traffic else "memory", flops, moved)


def collective(name: str, gpu: GPU, sent: float, span: int, calls: int = 1) -> Part:
    """Collectives in which one device sends `sent` bytes, among devices that are spread over `span` neighbours."""
    bound, rate = ("link", gpu.link) if span <= gpu.host else ("network", gpu.network)
    return Part(name, calls * COLLECTIVE_MS + 1e3 * sent / rate, bound, 0.0, sent)


def grouped_matmuls(
    config: LatentMoEConfig, gpu: GPU, rows: int, experts: int, tensor: int, plan: ExpertPlan
) -> dict[str, Part]:
    """The expert products of one device: "forward", "dgrad" and "wgrad" of "up" and of "down", by name ("up dgrad").

    Args:
        config: the layer.
        gpu: the device.
        rows: rows that belong to experts.
        experts: experts of the device.
        tensor: devices that share an expert's inner width.
        plan: says what runs each product, for dense weights.
    """
    inner, width = config.expert_intermediate_size // tensor, config.latent_width
    item, gate = jnp.dtype(config.dtype).itemsize, 2 if config.gated else 1
    runs = {
        "up": {"forward": plan.up, "dgrad": plan.up_dgrad, "wgrad": plan.up_wgrad},
        "down": {"forward": plan.down, "dgrad": plan.down_dgrad, "wgrad": plan.down_wgrad},
    }
    found = {}
    for name, k, n in (("up", width, inner * gate), ("down", inner, width)):
        # Each contraction reads or writes rows of both widths, and the weight of every expert that has rows.
        moved = item * (rows * (k + n) + min(experts, max(rows, 1)) * k * n)
        for contraction, bound in runs[name].items():
            assert bound is not None, "dense weights have gradients"
            flops, bandwidth = gpu.grouped_flops, gpu.bandwidth
            if isinstance(bound.backend.config, XlaBackend):
                flops, bandwidth = flops * XLA_FLOPS[contraction], bandwidth * XLA_BANDWIDTH
            at_rates = dataclasses.replace(gpu, bandwidth=bandwidth)
            part = kernel(f"{name} {contraction}", at_rates, 2.0 * rows * k * n, moved, flops)
            found[part.name] = part._replace(ms=max(part.ms, GROUPED_MS))
    return found


def few_token_products(config: LatentMoEConfig, gpu: GPU, rows: int) -> dict[str, Part]:
    """The two products by the kernels for few tokens, which read the weights of each chosen expert once."""
    gate, item = 2 if config.gated else 1, jnp.dtype(config.dtype).itemsize
    elements = config.latent_width * config.expert_intermediate_size
    found = {}
    for name, size in (("up", gate * elements), ("down", elements)):
        moved = item * min(config.num_physical_experts, rows) * size
        found[f"{name} forward"] = kernel(f"{name} forward", gpu, 2.0 * rows * size, moved, gpu.grouped_flops)
    return found


def layer_parts(
    config: LatentMoEConfig,
    mesh: AbstractMesh,
    tokens: int,
    gpu: GPU,
    rows: Rows,
    experts: ExpertPlan,
    *,
    training: bool,
    remat: bool,
) -> list[Part]:
    """The parts of one layer on one device, if all experts get equally many rows.

    Args:
        config: the layer, with `parallel` set.
        mesh: axes and sizes.
        tokens: tokens of one device.
        gpu: the device.
        rows: rows of the experts' products, for dense weights.
        experts: the decisions about the experts' products, for dense weights.
        training: whether to count the backward pass.
        remat: whether to count the forward pass twice.
    """
    return [
        *_kernels(config, mesh, tokens, gpu, rows, experts, training, remat),
        *_collectives(config, mesh, tokens, gpu, training),
    ]


def _kernels(config, mesh, tokens, gpu, rows, plan, training, remat) -> Iterator[Part]:
    sizes = axis_sizes(config.parallel, mesh)
    _, _, expert, tensor = (sizes[axis] for axis in config.parallel.axes)
    item, d, width = jnp.dtype(config.dtype).itemsize, config.hidden_size, config.latent_width
    inner, gate = config.expert_intermediate_size // tensor, 2 if config.gated else 1
    forward = 1 + (training and remat)
    passes = forward + 2 * training

    router = 2.0 * tokens * d * config.num_experts
    yield kernel("router", gpu, passes * router, passes * tokens * (4 * d + 8 * config.num_experts), gpu.router_flops)
    if config.latent_size is not None:
        flops, moved = 4.0 * tokens * d * width, 2 * item * (tokens * (d + width) + d * width)
        yield kernel("projections", gpu, passes * flops, passes * moved, gpu.dense_flops)
    if config.shared_expert_intermediate_size:
        shared = config.shared_expert_intermediate_size // tensor
        flops = 2.0 * tokens * d * shared * (gate + 1)
        moved = item * (shared * (gate + 1) * (d + 2 * tokens) + 2 * tokens * d)
        yield kernel("shared expert", gpu, passes * flops, passes * moved, gpu.dense_flops)
    few = isinstance(plan.decode, Decode) and not training
    if few:
        products = few_token_products(config, gpu, rows.multiplied)
    else:
        products = grouped_matmuls(config, gpu, rows.multiplied, config.num_physical_experts // expert, tensor, plan)
    counted = {"forward": forward, "dgrad": int(training), "wgrad": int(training)}
    parts = [(part, counted[name.split()[1]]) for name, part in products.items()]
    longest = max((part for part, _ in parts), key=lambda part: part.ms)
    yield Part(
        "experts",
        sum(part.ms * count for part, count in parts),
        longest.bound,
        sum(part.flops * count for part, count in parts),
        sum(part.bytes * count for part, count in parts),
    )
    if few:
        return  # both kernels find their rows in the choice, and compute the activation and the weighted sums
    hidden_passes = _activation_passes(config, plan, forward, training)
    yield kernel("activation", gpu, 0.0, item * rows.allocated * inner * hidden_passes, gpu.dense_flops)
    # Forward writes and reads rows, and reads them for the sums. Backward has a sum and two gathers, or one.
    gathers = 3 * forward + (3 if plan.keeps_rows else 5) * training
    yield kernel("gather and combine", gpu, 0.0, item * rows.allocated * width * gathers, gpu.dense_flops)


def _activation_passes(config, plan, forward, training) -> int:
    """Passes over hidden rows, beyond those of plain products.

    A gated pre-activation counts as two passes. If a kernel does not fuse the activation, XLA reads and writes once
    more.
    """
    residual, parts = plan.residual, 2 if config.gated else 1
    up = plan.up if training else plan.up_without_gradient
    value, gradient = (product.problem.epilogue is not None for product in (up, plan.down_dgrad))
    passes = 0 if value else forward * parts
    if not training:
        return passes if value else passes + forward
    if not gradient:
        passes += 2
    if residual != "pre":
        # A kernel reads the hidden rows and overwrites them with the gradient. If gated, it also reads the gate and
        # writes both halves.
        return passes + (3 if config.gated else 1)
    # The forward pass writes hidden rows besides the pre-activation. The gradient reads the pre-activation, is as wide,
    # and writes the hidden rows once more.
    return passes + forward + 2 * parts


def _collectives(config, mesh, tokens, gpu, training) -> Iterator[Part]:
    sizes = axis_sizes(config.parallel, mesh)
    data, fsdp, expert, tensor = (sizes[axis] for axis in config.parallel.axes)
    passes, item = 1 + training, jnp.dtype(config.dtype).itemsize
    # Devices are assigned to hosts with tensor as the innermost axis, then expert, fsdp and data.
    if expert > 1:
        dispatch = choose_dispatch(config, expert, tokens, device=gpu.device)
        sent = sum(cost.exchange_bytes(config, expert, tokens, config.parallel.capacity_factor)[dispatch])
        yield collective(f"exchange by {dispatch}", gpu, passes * sent, expert * tensor, 2 * passes)
    if tensor > 1:
        late = config.shared_expert_intermediate_size and config.latent_norm != "post"
        width = config.hidden_size if late else config.latent_width
        sent = 2 * tokens * width * item * (tensor - 1) / tensor
        yield collective("sum over tensor", gpu, passes * sent, tensor, passes)
    stored, param_item = parameters_per_device(config, mesh), jnp.dtype(config.param_dtype).itemsize
    if fsdp > 1:
        bytes_each = gathered_dtype(config).itemsize + training * param_item
        sent = (gathered_parameters(config, mesh) - stored) * bytes_each
        yield collective("fsdp gather and scatter", gpu, sent, fsdp * expert * tensor, 6 * passes)
    if training and data > 1:
        span = data * fsdp * expert * tensor
        yield collective("gradients over data", gpu, 2 * stored * param_item * (data - 1) / data, span)
