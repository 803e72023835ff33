"""Which dispatch runs, and why: the time of each follows from the bytes it moves and a measured rate."""

from typing import Any, NamedTuple

import jax

from jax_latent_moe import checks, cost
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.errors import ConfigError, UnsupportedError
from jax_latent_moe.params import check_config

LATENCY_MS = 0.07
"""The time of a collective that moves nothing."""

GIGABYTES_PER_SECOND = {"all_gather": 277, "all_to_all": 298, "ragged_all_to_all": 2.6}
"""The rate at which one device sends. Both constants are medians on two H200 of one host (NVLink, NCCL, jax 0.11.2).

No rate was measured between hosts. The choice depends only on the ratios. ragged_all_to_all ran a hundred times slower
than all_to_all."""


class DispatchCost(NamedTuple):
    """The cost of a dispatch for one device in a forward pass.

    Attributes:
        bytes_out: bytes that it sends to the experts.
        bytes_back: bytes that it sends back.
        ms: the expected time of both at the measured rates.
    """

    bytes_out: int
    bytes_back: int
    ms: float


def dispatch_costs(config: LatentMoEConfig, devices: int, tokens: Any) -> dict[str, DispatchCost]:
    """The bytes and the expected time of each dispatch.

    Args:
        config: the layer, with `parallel` set.
        devices: devices along the expert axis.
        tokens: tokens of one device, an integer unless it is a symbolic size of `jax.export`.

    Raises:
        ConfigError: config.parallel is None, devices or tokens is not a valid number, or devices do not divide the
            experts.
        InputError: config is of another type.
    """
    check_config(config)
    if config.parallel is None:
        raise ConfigError("parallel=None has no dispatch: set parallel=ParallelConfig() in the layer's config.")
    devices = checks.positive_int("devices", devices)
    symbolic: bool = jax.export.is_symbolic_dim(tokens)
    if not symbolic:
        checks.integer("tokens", tokens)
    if config.num_physical_experts % devices:
        raise ConfigError(f"devices={devices} must divide the {config.num_physical_experts} experts that they share.")
    moved = cost.exchange_bytes(config, devices, tokens, config.parallel.capacity_factor)
    return {
        name: DispatchCost(out, back, 2 * LATENCY_MS + (out + back) / GIGABYTES_PER_SECOND[name] / 1e6)
        for name, (out, back) in moved.items()
    }


def choose_dispatch(config: LatentMoEConfig, devices: int, tokens: int, *, device: Device | None = None) -> str:
    """The dispatch that the config names. For "auto", the one of all_gather and all_to_all that should be faster.

    The decision is made before anything runs.

    Args:
        config: the layer, with `parallel` set.
        devices: devices along the expert axis.
        tokens: tokens of one device.
        device: the kind of device that they are; None is JAX's default device.

    Raises:
        ConfigError: config.parallel is None, devices or tokens is not a valid number, or devices do not divide the
            experts.
        UnsupportedError: ragged_all_to_all is named on a CPU.
    """
    costs = dispatch_costs(config, devices, tokens)
    assert config.parallel is not None
    named = config.parallel.dispatch
    if named == "ragged_all_to_all" and (device or current_device()).platform == "cpu":
        reason, remedy = "XLA has no such collective on CPUs.", "Use dispatch='all_gather' or 'auto'."
        raise UnsupportedError(named, reason, remedy, kind="dispatch")
    return min(("all_gather", "all_to_all"), key=lambda name: costs[name].ms) if named == "auto" else named


def explain(config: LatentMoEConfig, devices: int, tokens: int, *, device: Device | None = None) -> str:
    """A line for each dispatch: the bytes it would move, the time it would take, and whether it runs.

    Args:
        config: the layer, with `parallel` set.
        devices: devices along the expert axis.
        tokens: tokens of one device.
        device: the kind of device that they are; None is JAX's default device.

    Raises:
        ConfigError: config.parallel is None, devices or tokens is not a valid number, or devices do not divide the
            experts.
        UnsupportedError: ragged_all_to_all is named on a CPU.
    """
    costs = dispatch_costs(config, devices, tokens)
    if devices == 1:
        return "One device holds all experts: nothing travels."
    assert config.parallel is not None
    chosen = choose_dispatch(config, devices, tokens, device=device)
    capacity = cost.exchange_capacity(config, devices, tokens, config.parallel.capacity_factor)
    lines = [f"{tokens} tokens a device, {devices} devices share {config.num_experts} experts, {capacity} rows a pair:"]
    if config.parallel.dispatch_format is not None:
        lines.append(
            f"  rows travel in {config.parallel.dispatch_format} to the experts, and sums in {config.dtype} back"
        )
    most = devices * capacity
    if (at_once := cost.rows_of_round(config, devices, tokens, most)) < most:
        lines.append(f"  a device computes at most {at_once} rows at a time. It gets {most} rows in the worst case")
    for name, (out, back, ms) in costs.items():
        note = "  <- runs" if name == chosen else ""
        if name == "ragged_all_to_all" and config.parallel.dispatch == "auto":
            note = "  never by auto: measured far slower than its bytes"
        lines.append(f"  {name:<18} {out / 2**20:9.1f} MiB out {back / 2**20:9.1f} MiB back {ms:9.2f} ms{note}")
    return "\n".join(lines)
