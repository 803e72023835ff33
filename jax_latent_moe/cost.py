"""Parameters, floating-point operations and exchanged bytes of a layer, computed from its configuration."""

import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.formats import encode_rows
from jax_latent_moe.params import param_shapes


def parameters(config: LatentMoEConfig) -> int:
    """Parameters of one layer, including the correction bias."""
    return sum(math.prod(leaf.shape) for part in param_shapes(config).values() for leaf in part.values())


def active_parameters(config: LatentMoEConfig) -> int:
    """Parameters that one token uses: all but the parameters of experts that it does not choose."""
    experts = sum(math.prod(leaf.shape) for leaf in param_shapes(config)["experts"].values())
    return parameters(config) - experts + experts * config.top_k // config.num_physical_experts


def matmul_flops_per_token(config: LatentMoEConfig) -> int:
    """Floating-point operations of the forward matmuls for one token: 2 per active kernel element.

    The backward pass needs twice as many.
    """
    kernels = {"kernel", "w_in", "w_out", "gate"}
    total = 0
    for part, leaves in param_shapes(config).items():
        for name, leaf in leaves.items():
            if name in kernels:
                chosen, of = (config.top_k, config.num_physical_experts) if part == "experts" else (1, 1)
                total += 2 * math.prod(leaf.shape) * chosen // of
    return total


def choices(config: LatentMoEConfig) -> int:
    """Assignments of a token: its k experts and, with router.round_to_tile, as many more to which it may be added."""
    k = config.top_k
    return k if config.router.round_to_tile is None else k + min(k, config.num_experts - k)


def exchange_capacity(config: LatentMoEConfig, devices: int, tokens: int, capacity_factor: float | None) -> int:
    """The most rows of latents that a device may send to each device that holds experts.

    Args:
        config: the layer.
        devices: n, the number of devices that share the experts.
        tokens: T, tokens of one device.
        capacity_factor: as in `ParallelConfig`.

    Returns:
        T * min(`choices`, E / n), which is always enough; or ceil(capacity_factor * T * k / n), rounded up to a
        multiple of 8 for the kernels, if that is less.
    """
    enough = tokens * min(choices(config), config.num_physical_experts // devices)
    if capacity_factor is None:
        return enough
    return min(enough, -(-share_of_rows(capacity_factor, tokens * config.top_k, devices) // 8) * 8)


LEAST_ROUND_BYTES = 2**27
"""Rounds must save at least so many bytes, because the host waits for the number of rounds. The bound is a guess: steps
were timed only where rounds save 0.4 GB."""


def least_round_saving(config: LatentMoEConfig, devices: int) -> int:
    """The bytes that rounds must save: `LEAST_ROUND_BYTES`, and what the weights' gradients of a further round take."""
    matrices = 3 if config.gated else 2
    weights = matrices * config.latent_width * config.expert_intermediate_size * config.num_physical_experts // devices
    return max(LEAST_ROUND_BYTES, weights * jnp.dtype(config.dtype).itemsize)


def rows_of_round(config: LatentMoEConfig, devices: int, tokens: int, most_rows: int, row_multiple: int = 1) -> int:
    """The rows that a device's experts compute at a time: most_rows, or fewer by `ParallelConfig.round_factor`.

    Args:
        config: the layer, with `parallel` set.
        devices: n, the number of devices that share the experts.
        tokens: T, tokens of one device.
        most_rows: the most rows that the device's experts can have.
        row_multiple: the multiple at which each expert's rows begin.
    """
    assert config.parallel is not None
    factor = config.parallel.round_factor
    if factor is None or jax.export.is_symbolic_dim(tokens):
        return most_rows
    padding = config.num_physical_experts // devices * (row_multiple - 1)
    multiple = math.lcm(8, row_multiple)
    at_once = -(-(share_of_rows(factor, tokens * config.top_k, 1) + padding) // multiple) * multiple
    inner = config.expert_intermediate_size * (2 if config.gated else 1)
    row_bytes = (2 * config.latent_width + inner) * jnp.dtype(config.dtype).itemsize
    saves_enough = (most_rows - at_once) * row_bytes >= least_round_saving(config, devices)
    return at_once if at_once < most_rows and saves_enough else most_rows


def share_of_rows(factor: float, rows: int, parts: int) -> int:
    """ceil(factor * rows / parts), with the factor as a decimal number: 1.1 * 50 is 55, and not 56 as with floats."""
    exact = Fraction(str(factor))
    return -(-exact.numerator * rows // (exact.denominator * parts))


def exchange_bytes(
    config: LatentMoEConfig, devices: int, tokens: int, capacity_factor: float | None = None
) -> dict[str, tuple[int, int]]:
    """Bytes that one device sends to others in a forward pass, for each dispatch: (latents to experts, results back).

    A backward pass sends as many each way. The rows' ids and weights are counted, 4 bytes each.

    Args:
        config: the layer. Rows are latent_width wide, in its dtype or, on the way to the experts, in
            parallel.dispatch_format.
        devices: n, the number of devices that share the experts.
        tokens: T, tokens of one device.
        capacity_factor: as in `ParallelConfig`; it bounds "all_to_all". "ragged_all_to_all" is counted as if all
            experts got equally many rows.
    """
    others, row = devices - 1, config.latent_width * jnp.dtype(config.dtype).itemsize
    format = None if config.parallel is None else config.parallel.dispatch_format
    sent = row if format is None else row_bytes(format, config.latent_width)
    capacity = exchange_capacity(config, devices, tokens, capacity_factor)
    routed = min(tokens * config.top_k // devices, capacity)
    return {
        "all_gather": (others * tokens * (sent + 8 * choices(config)), others * tokens * row),
        "all_to_all": (others * capacity * (sent + 8), others * capacity * row),
        "ragged_all_to_all": (others * routed * (sent + 8), others * routed * row),
    }


def row_bytes(format: str, width: int) -> int:
    """Bytes of one row's codes and scales."""
    row = jax.ShapeDtypeStruct((1, width), jnp.float32)
    codes = jax.eval_shape(partial(encode_rows, name=format), row)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
