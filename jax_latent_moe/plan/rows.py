"""The rows of one device's experts, as the layer makes them for a number of tokens."""

from typing import NamedTuple

from jax.sharding import AbstractMesh

from jax_latent_moe import cost, limits
from jax_latent_moe.config import LatentMoEConfig, ParallelConfig
from jax_latent_moe.device import Device
from jax_latent_moe.formats import FORMATS
from jax_latent_moe.parallel import axis_sizes, choose_dispatch
from jax_latent_moe.routing.permute import ROW_MULTIPLE, kept_rows, padded_rows


class Rows(NamedTuple):
    """Numbers of rows.

    Attributes:
        allocated: R, the rows of the products' arrays.
        multiplied: the rows among them that belong to experts, if all experts are chosen equally often.
        whole_tokens: whether the rows are all assignments of the device's own tokens, as kernels for few tokens need.
        in_rounds: whether further rounds of as many rows may follow.
    """

    allocated: int
    multiplied: int
    whole_tokens: bool
    in_rounds: bool = False


def expert_rows(
    config: LatentMoEConfig, mesh: AbstractMesh, tokens: int, device: Device, format: str | None = None
) -> Rows:
    """The rows of one device.

    Args:
        config: the layer, as it is given to `latent_moe`.
        mesh: axes and sizes.
        tokens: tokens of one device.
        device: the device.
        format: the format of the experts' weights; None for dense weights.

    Raises:
        UnsupportedError: the named dispatch does not run on this device.
    """
    parallel = config.parallel or ParallelConfig()
    devices = axis_sizes(parallel, mesh)[parallel.expert_axis]
    experts, choices = config.num_physical_experts // devices, cost.choices(config)
    multiple = 1 if format is None else FORMATS[format].row_multiple
    chosen = tokens * config.top_k
    if config.router.pad_to_capacity:
        filled = experts * (-(-limits.expert_capacity(config, chosen) // multiple) * multiple)
        return Rows(filled + ROW_MULTIPLE, filled, whole_tokens=False)
    if devices == 1:
        assignments, most = tokens * choices, limits.most_rounded_rows(config, tokens)
    else:
        capacity = cost.exchange_capacity(config, devices, tokens, parallel.capacity_factor)
        most = devices * capacity
        gathers = choose_dispatch(config, devices, tokens, device=device) == "all_gather"
        at_once = cost.rows_of_round(config, devices, tokens, most, multiple)
        if at_once < most:
            return Rows(at_once + ROW_MULTIPLE, chosen, whole_tokens=False, in_rounds=True)
        assignments = devices * tokens * choices if gathers else most
    allocated = padded_rows(assignments, experts, multiple)
    if most < assignments:
        allocated = kept_rows(most, assignments, allocated)
    return Rows(allocated, chosen, whole_tokens=devices == 1 and multiple == 1 and most >= assignments)
