"""Settings of the `xla` backend."""

import dataclasses
from typing import Literal

from jax_latent_moe import checks
from jax_latent_moe.errors import ConfigError

METHODS = ("blocked", "ragged_dot")


@dataclasses.dataclass(frozen=True)
class XlaBackend:
    """Expert matmuls in plain XLA, for any device.

    Attributes:
        method: "blocked" multiplies blocks of rows by slices of the weight. "ragged_dot" calls `jax.lax.ragged_dot`,
            which is fast on TPUs and expands to a dense matmul elsewhere.
        block_rows: rows per block of "blocked"; None picks a power of two from the mean rows per expert.
    """

    method: Literal["blocked", "ragged_dot"] = "blocked"
    block_rows: int | None = None

    def __post_init__(self):
        checks.one_of("XlaBackend.method", self.method, METHODS)
        if self.block_rows is not None:
            checks.positive_int("XlaBackend.block_rows", self.block_rows)
            if self.method != "blocked":
                raise ConfigError(
                    f"XlaBackend.block_rows={self.block_rows} needs method='blocked', got method={self.method!r}: "
                    "leave block_rows out."
                )
