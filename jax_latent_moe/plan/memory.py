"""Memory of one device: parameters and optimiser, residuals for the backward pass, and scratch memory of one layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jax_latent_moe import cost
from jax_latent_moe.config import LatentMoEConfig, ParallelConfig
from jax_latent_moe.decode import PIECES, Decode
from jax_latent_moe.device import Device
from jax_latent_moe.expert_plan import ExpertPlan
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.parallel import axis_sizes, choose_dispatch, param_specs
from jax_latent_moe.params import param_shapes
from jax_latent_moe.plan.rows import Rows
from jax_latent_moe.quantization import quantize

ADAM_BYTES = 8
"""Bytes of Adam's two float32 moments per parameter."""


def parameters_per_device(config: LatentMoEConfig, mesh: AbstractMesh, format: str | None = None) -> int:
    """Dense parameters of one layer that one device stores. One that no axis splits is stored on every device.

    Args:
        config: the layer.
        mesh: axes and sizes.
        format: the format of the experts' weights, which are then not counted; None for dense weights.
    """
    return _stored(config, mesh, format)[0]


def code_bytes_per_device(config: LatentMoEConfig, mesh: AbstractMesh, format: str | None) -> int:
    """Bytes of codes and scales of one layer that one device stores."""
    return _stored(config, mesh, format)[1]


def _stored(config, mesh, format, parts=None) -> tuple[int, int]:
    """(dense parameters, bytes of codes and scales) of one device, of all parts or of the named ones."""
    shapes: Any = param_shapes(config)
    if format is not None:
        shapes = jax.eval_shape(lambda params: quantize(params, config, format), shapes)
    specs, dense, codes = param_specs(config, mesh, shapes), 0, 0
    for part in shapes if parts is None else parts:
        leaves = shapes[part]
        for name, leaf in leaves.items():
            for array, spec in zip(jax.tree.leaves(leaf), jax.tree.leaves(specs[part][name]), strict=True):
                own = math.prod(array.shape) // math.prod(mesh.shape[axis] for axis in spec if axis is not None)
                if isinstance(leaf, ScaledArray):
                    codes += own * array.dtype.itemsize
                else:
                    dense += own
    return dense, codes


def gathered_parameters(config: LatentMoEConfig, mesh: AbstractMesh, format: str | None = None) -> int:
    """Dense parameters of one layer that one device computes with, after fsdp has gathered them."""
    return parameters_per_device(config, _without_fsdp(config, mesh), format)


def gathered_dtype(config: LatentMoEConfig) -> jnp.dtype:
    """The dtype in which fsdp gathers the kernels: the narrower one of computation and parameters.

    A router's kernel, and experts that FP8 encodes, are gathered in the dtype of the parameters. The former is small.
    """
    stored, read = jnp.dtype(config.param_dtype), jnp.dtype(config.dtype)
    return read if config.precision is None and read.itemsize < stored.itemsize else stored


def _without_fsdp(config, mesh) -> AbstractMesh:
    fsdp = _parallel(config).fsdp_axis
    return AbstractMesh(tuple(1 if name == fsdp else size for name, size in mesh.shape.items()), tuple(mesh.shape))


def memory(
    config: LatentMoEConfig,
    mesh: AbstractMesh,
    tokens: int,
    layers: int,
    rows: Rows,
    device: Device,
    experts: ExpertPlan,
    *,
    training: bool,
    remat: bool,
    format: str | None = None,
) -> dict[str, int]:
    """Bytes of one device by use, for the MoE layers only.

    Args:
        config: the layer, with `parallel` set.
        mesh: axes and sizes.
        tokens: tokens of one device.
        layers: MoE layers that the device holds.
        rows: rows of the experts' products.
        device: the kind of device.
        experts: the decisions about the experts' products.
        training: whether to count gradients, Adam's moments and the residuals for the backward pass.
        remat: whether the layers keep only their input and are computed twice.
        format: the format of the experts' weights, which are then frozen; None for dense weights.
    """
    stored, param_bytes = layers * parameters_per_device(config, mesh, format), jnp.dtype(config.param_dtype).itemsize
    codes = code_bytes_per_device(config, mesh, format)
    item, d, latent = jnp.dtype(config.dtype).itemsize, config.hidden_size, config.latent_width
    tensor = axis_sizes(_parallel(config), mesh)[_parallel(config).tensor_axis]
    inner = config.expert_intermediate_size // tensor
    pre = rows.allocated * inner * (2 if config.gated else 1) * item
    narrow = rows.allocated * latent * item
    kept_rows = pre + narrow * experts.keeps_rows
    # Without a latent space, the tokens themselves go to the experts.
    widths = d if config.latent_size is None else d + latent
    per_token = tokens * d * item
    # `working` is the scratch memory of one layer. The kernels that fsdp gathers are added below.
    if training:
        working = _beside_kept_rows(experts, narrow, pre, rows.allocated * inner * item) + per_token
        if rows.in_rounds:  # XLA allocates the gradients of a further round, which are added to those of the first one
            working += _stored(config, _without_fsdp(config, mesh), format, ("experts",))[0] * item
    else:
        working = _forward_rows(config, experts, narrow, pre, rows.allocated * inner * item)
    working += _exchanged(config, mesh, tokens, device)
    used = {"parameters": stored * param_bytes}
    if format is not None:
        used["codes and scales"] = layers * codes
    if training:
        shared = tokens * config.shared_expert_intermediate_size // tensor * (2 if config.gated else 1) * item
        kept = tokens * d * item if remat else tokens * widths * item + kept_rows + shared
        used |= {"gradients": stored * param_bytes, "optimiser": stored * ADAM_BYTES}
        used |= {"kept for the backward pass": kept * layers + (kept_rows if remat else 0)}
    cast = gathered_parameters(config, mesh, format)
    gathered = cast > parameters_per_device(config, mesh, format)
    found = gathered_dtype(config) if gathered else jnp.dtype(config.param_dtype)
    copies = found.itemsize * gathered + item * (found != jnp.dtype(config.dtype))
    whole_codes = code_bytes_per_device(config, _without_fsdp(config, mesh), format)
    return used | {"working memory of a layer": working + cast * copies + (whole_codes if whole_codes > codes else 0)}


def _forward_rows(config, experts: ExpertPlan, narrow: int, pre: int, hidden: int) -> int:
    """Bytes of the rows of a forward pass: tokens gathered, pre-activations, hidden rows and outputs.

    Gathered rows and outputs use the same memory at different times. A kernel for few tokens has no rows but the hidden
    ones. With lists it also has the weighted outputs in float32, in `PIECES` pieces each. XLA reuses the memory of a
    pre-activation for hidden rows of the same size. A gated pre-activation is beside them, and XLA places the widest
    rows first.
    """
    if isinstance(experts.decode, Decode):
        return hidden + (2 * PIECES * narrow if experts.decode.rows else 0)
    if experts.up_without_gradient.problem.epilogue is not None or not config.gated:
        return narrow + hidden
    return narrow + pre + hidden if narrow >= pre else pre + max(narrow, hidden)


def _beside_kept_rows(experts: ExpertPlan, narrow: int, kept: int, hidden: int) -> int:
    """Bytes of rows that a backward pass needs besides the kept ones: gathered rows and the experts' outputs.

    Gathered rows and outputs use the same memory at different times. If hidden rows are not kept, they and narrower
    rows use the memory of results that are not written yet, such as a weight's gradient. A gradient that XLA computes
    is beside the pre-activation, and if it reads hidden rows, the rows of both its products are there at once. Kept
    hidden rows may be multiplied by weights, which makes a copy.
    """
    copied = narrow + hidden if experts.weighted_hidden and experts.residual != "pre" else 0
    if experts.down_dgrad.problem.epilogue is None:
        return max(narrow, kept) if experts.residual == "pre" else max(2 * narrow, copied)
    return max(narrow, copied) if experts.residual != "pre" or narrow >= kept else 0


def _exchanged(config, mesh, tokens, device) -> int:
    """Bytes that devices exchange: all latents and their sums in float32, or the rows that arrive."""
    devices, item = axis_sizes(_parallel(config), mesh)[_parallel(config).expert_axis], jnp.dtype(config.dtype).itemsize
    if devices == 1:
        return 0
    if choose_dispatch(config, devices, tokens, device=device) != "all_gather":
        received = devices * cost.exchange_capacity(config, devices, tokens, _parallel(config).capacity_factor)
        return received * config.latent_width * item
    return devices * tokens * config.latent_width * (item + 4)


def _parallel(config) -> ParallelConfig:
    assert config.parallel is not None
    return config.parallel
