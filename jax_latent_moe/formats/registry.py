"""The registry of weight formats."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from jax_latent_moe.errors import ConfigError

DENSE = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store matrices [..., N, K], with the contracted axis last.

    K comes last in codes and scales too, for three reasons. Published checkpoints hold [out, in], so loading transposes
    nothing. Hopper's FP8 matrix units read both operands along K. Codes that share a word or a scale lie side by side.

    Attributes:
        name: the name in the registry, in problems, tables and errors.
        encode: values [..., N, K] in float32 -> (codes [..., N, K / packing], scales). Codes should be integers: JAX
            gives them no gradient. Each scale has as many axes as the codes. The last two count the blocks along N and
            K, or are 1.
        decode: (codes, scales, dtype) -> values [..., N, K] in dtype.
        block: (K, N) elements that share one scale; None stands for the whole axis.
        packing: number of values along K in one stored code.
        partial_blocks: whether the last block along K or N may be smaller.
        row_multiple: an expert's rows must begin at a multiple of it, for formats whose blocks run along rows.
        encode_rows: the format of tokens' rows beside such weights: values [R, K] in float32 -> (codes [R, K], scales
            [R, blocks along K]). None for a format of weights only.
        decode_rows: (codes, scales, dtype) -> rows [R, K] in dtype.
        group: number of values along K whose codes are stored in an order of the format's own. A device's part of K
            must begin at a multiple of it.
        pack: codes [..., N, K], one in a byte -> codes [..., N, K / packing] as they are stored. `formats.pack` calls
            it, and refuses a format without it.
        unpack: the inverse of pack.
    """

    name: str
    encode: Callable[[Float[Array, "*e n k"]], tuple[Array, Any]]
    decode: Callable[[Array, Any, Any], Float[Array, "*e n k"]]
    block: tuple[int | None, int | None] = (1, 1)
    packing: int = 1
    partial_blocks: bool = False
    row_multiple: int = 1
    encode_rows: Callable[[Float[Array, "r k"]], tuple[Array, Any]] | None = None
    decode_rows: Callable[[Array, Any, Any], Float[Array, "r k"]] | None = None
    group: int = 1
    pack: Callable[[Array], Array] | None = None
    unpack: Callable[[Array], Array] | None = None

    def __post_init__(self):
        numbers = {"packing": self.packing, "group": self.group, "row_multiple": self.row_multiple}
        numbers |= {f"block[{axis}]": size for axis, size in enumerate(self.block) if size is not None}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} of format {self.name!r} must be an integer of at least 1.")

    def blocks(self, k: int, n: int) -> tuple[int, int]:
        """How many blocks a matrix of N x K has along K and along N."""
        k_block, n_block = self.block
        return (1 if k_block is None else -(-k // k_block)), (1 if n_block is None else -(-n // n_block))

    def multiples(self) -> tuple[int, int]:
        """The numbers of which K and N of a weight must be multiples."""
        k, n = (1, 1) if self.partial_blocks else (block or 1 for block in self.block)
        return math.lcm(k, self.packing), n


FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Adds a format to the registry.

    Raises:
        ConfigError: the name is taken.
    """
    if format.name in FORMATS or format.name in DENSE:
        raise ConfigError(f"format {format.name!r} is registered already: choose another name.")
    FORMATS[format.name] = format
