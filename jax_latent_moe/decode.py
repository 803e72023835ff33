"""The experts of few tokens in two or four kernels, without a separate sort, gather or combine.

For few tokens, reading the experts' weights takes most of the time. The compiled kernels (custom_calls/src/decode) find
the rows of an expert in the choice itself, and read the weights of each chosen expert once, in the layer's dtype or in
codes that they widen. With more assignments and weights in codes, a kernel lists the rows of each expert, and another
one combines. They have no gradient: `routed_experts` runs them where nothing is differentiated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_latent_moe import native
from jax_latent_moe.config import CutlassBackend, LatentMoEConfig, as_backend
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES, READ_BYTES, stored, wrong_scales
from jax_latent_moe.grouped_matmul.registry import AUTO, BackendConfig
from jax_latent_moe.grouped_matmul.sm90 import DTYPES, KERNEL_ACTIVATIONS, KernelActivation, kernel_activation, library

MOST_ASSIGNMENTS = 256
"""The most assignments of a call without lists (custom_calls/src/decode/experts.h, kThreads)."""
MOST_TOKENS = 1
"""The most tokens that decode="measured" takes if the experts' weights are dense."""
MOST_TOKENS_OF_CODES = 64
"""The same if both weights are codes. At 64 tokens, Super's experts took less time on an H200 than the two Pallas
products alone. More tokens were not timed beside grouped matmuls, so only decode="always" takes them."""
MOST_TOKENS_UNLISTED = {1: 8, 2: 7}
"""The most tokens without lists if both weights are codes, by the codes in a byte.

With 8 tokens, a step of Super's layer took 0.244 ms without lists and 0.259 with them in `fp8_block` on an H200, and
0.186 and 0.177 in `mxfp4` (benchmarks/results/profiles/h200-2026-11-30.md). Lists in `mxfp4` take 0.167 since then.
Those in `fp8_block` were not timed again.
"""
MOST_LISTED = 8192
"""The most assignments of a call with lists. Weighted parts of the output take 8 bytes an element of each."""
MOST_LISTED_OF_AN_EXPERT = 16
"""The same for each expert, on average. So many rows are multiplied by codes that are read and widened once. More rows
are multiplied by codes that are widened again, and that takes some three quarters of the time to read 4-bit codes."""
TILE, LEAST_TILE, DEPTH = 128, 64, 128
"""The most and the fewest columns of a block, and the unit in which the inner width is cut (kLeastTile and kDepth)."""
PIECES = 2
"""The most pieces of a tile of listed rows along the inner width (custom_calls/src/decode/listed.h, kPieces)."""
BLOCKS_OF_AN_SM = 4
"""How many blocks of TILE columns of the second product each SM should have, so that it keeps reading."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """The decision to run the experts of few tokens in two kernels, or with lists in four.

    Attributes:
        tokens: T.
        choices: k.
        activation: as the kernels take it.
        in_code: the kernels' name of the codes of w_in, or "dense".
        out_code: the same for w_out.
        splits: parts of the inner width in the second product. A block multiplies one part, and the last block adds
            them up.
        rows: if a kernel lists the rows of each expert, how many of them are multiplied at once; 0 without lists.
        num_sms: the device's SMs, which share the listed rows.
    """

    tokens: int
    choices: int
    activation: KernelActivation
    in_code: str
    out_code: str
    splits: int
    rows: int = 0
    num_sms: int = 0

    def __str__(self) -> str:
        work = f"{self.rows} listed rows at once" if self.rows else f"the inner width in {self.splits} parts"
        return (
            f"{self.tokens} tokens with {self.choices} choices each, w_in {self.in_code}, w_out {self.out_code}, {work}"
        )


def refusal(
    backend: str | BackendConfig,
    tokens: Any,
    choices: int,
    device: Device | None = None,
    most_tokens: int = MOST_TOKENS,
    most_assignments: int = MOST_ASSIGNMENTS,
) -> str | None:
    """None, or the reason why the kernels for few tokens do not run on a device, as a sentence.

    Args:
        backend: the experts' backend.
        tokens: T, an integer unless it is a symbolic size of `jax.export`.
        choices: k.
        device: the device that runs them; None is JAX's default device.
        most_tokens: the most that decode="measured" takes.
        most_assignments: the most that any of these kernels takes.
    """
    device, asked = device or current_device(), as_backend(backend)
    backends = AUTO.get(device.platform, ()) if asked == "auto" else (asked,)
    compiled = [backend for backend in backends if isinstance(backend, CutlassBackend)]
    if not compiled:
        return f"backend={asked!r} has no kernels for few tokens on {device.platform}."
    if compiled[0].decode == "never":
        return "CutlassBackend.decode is 'never': set it to 'measured' or 'always'."
    if device.architecture != "sm90":
        return f"these kernels are compiled for NVIDIA Hopper GPUs (H100, H200), not {device.kind!r}."
    if not isinstance(tokens, int) or not 0 < tokens * choices <= most_assignments:
        return f"{tokens} tokens with {choices} choices each are not 1 to {most_assignments} assignments."
    if compiled[0].decode == "measured" and tokens > most_tokens:
        return f"CutlassBackend.decode='measured' leaves {tokens} tokens to the grouped matmuls: 'always' takes them."
    return library(device).missing


def plan_decode(
    config: LatentMoEConfig,
    tokens: Any,
    choices: int,
    dtype,
    w_in: Any,
    w_out: Any,
    *,
    device: Device | None = None,
) -> Decode | str:
    """The decision, or the reason why the experts run by grouped matmuls.

    Args:
        config: the layer.
        tokens: T, an integer unless it is a symbolic size of `jax.export`.
        choices: k.
        dtype: dtype of the tokens.
        w_in: [E, l, m], or [E, l, 2 m] if gated; an array, a `ScaledArray`, or only their shapes.
        w_out: [E, m, l], in the same way.
        device: the device that runs them; None is JAX's default device.
    """
    device, dtype = device or current_device(), jnp.dtype(dtype).name
    in_codes = isinstance(w_in, ScaledArray) and isinstance(w_out, ScaledArray)
    most_tokens = MOST_TOKENS_OF_CODES if in_codes else MOST_TOKENS
    most_assignments = _most_listed(w_in.shape[0]) if in_codes else MOST_ASSIGNMENTS
    if in_codes and isinstance(tokens, int) and tokens * choices > MOST_LISTED_OF_AN_EXPERT * w_in.shape[0]:
        most_tokens = _most_unlisted(w_in, w_out)  # codes would be widened more than once
    if (reason := refusal(config.backend, tokens, choices, device, most_tokens, most_assignments)) is not None:
        return reason
    if config.parallel is not None:
        return "config.parallel is set, and these kernels run on one device."
    if config.expert_bias:
        return "config.expert_bias is True, and these kernels add no bias."
    if config.precision is not None and config.precision.fwd is not None:
        return f"these kernels do not round tokens to precision.fwd={config.precision.fwd!r}."
    activation = kernel_activation(config.bound_activation)
    if activation is None:
        return f"these kernels have {', '.join(KERNEL_ACTIVATIONS)}, not {config.activation}."
    if dtype not in DTYPES:
        return f"tokens are in {dtype}, not in {' or '.join(DTYPES)}."
    codes: list[str] = []
    for name, weight, parts in (("w_in", w_in, 2 if config.gated else 1), ("w_out", w_out, 1)):
        reason = _refusal(name, weight, parts, dtype)
        if reason is not None:
            return reason
        codes.append(CODES[weight.format][0] if isinstance(weight, ScaledArray) else "dense")
    _, inner, width = w_out.shape
    in_code, out_code = codes
    assignments = tokens * choices
    if in_codes and (tokens > _most_unlisted(w_in, w_out) or assignments > MOST_ASSIGNMENTS):
        # Most experts have no more rows than a pass if it has twice the average.
        rows = 8 if 2 * assignments <= 8 * w_in.shape[0] else 16
        return Decode(tokens, choices, activation, in_code, out_code, 1, rows, device.num_sms)
    return Decode(tokens, choices, activation, in_code, out_code, _splits(assignments, inner, width, device))


def _most_unlisted(*weights) -> int:
    return max(MOST_TOKENS_UNLISTED[FORMATS[weight.format].packing] for weight in weights)


def _most_listed(experts) -> int:
    return max(MOST_ASSIGNMENTS, min(MOST_LISTED, MOST_LISTED_OF_AN_EXPERT * experts))


def _refusal(name, weight, parts, dtype) -> str | None:
    _, k, n = weight.shape
    multiples = 8, 8
    if isinstance(weight, ScaledArray):
        if weight.format not in CODES:
            return f"{name} is in {weight.format}: these kernels widen {', '.join(CODES)}."
        if dtype != "bfloat16":
            return f"{name} is in {weight.format}, whose codes these kernels widen to bfloat16, not to {dtype}."
        if weight.codes.shape[1] != parts:
            return f"the codes of {name} are {weight.codes.shape[1]} matrices side by side, not {parts}."
        if (reason := wrong_scales(name, weight)) is not None:
            return f"{reason}."
        multiples = READ_BYTES * k // weight.codes.shape[-1], 16
    for what, size, multiple in (("inputs", k, multiples[0]), ("outputs", n // parts, multiples[1])):
        if size % multiple or not size:
            return f"the {size} {what} of {name} are not a positive multiple of {multiple}."
    return None


def _splits(assignments, inner, width, device) -> int:
    """The number of parts of the inner width that gives every SM its blocks. All but the last are equally long."""
    depths, blocks = -(-inner // DEPTH), assignments * -(-width // TILE)
    splits = min(depths, -(-BLOCKS_OF_AN_SM * device.num_sms // blocks))
    return -(-depths // -(-depths // splits))


def decoded_experts(
    plan: Decode,
    tokens: Float[Array, "t l"],
    weights: Float[Array, "t k"],
    expert_ids: Int[Array, "t k"],
    w_in: Any,
    w_out: Any,
    up_proj: Float[Array, "l d"] | None = None,
    parts: int = 1,
) -> Float[Array, "t l"] | Float[Array, "t d"]:
    """sum_j weights[t, j] * expert_j(tokens[t]), in the dtype of tokens. Sums are in float32, in a fixed order.

    An id outside [0, E) is no expert: it adds exactly 0, and reads nothing. Pre-activations are not rounded.

    Args:
        plan: made for these operands.
        tokens: [T, l].
        weights: [T, k].
        expert_ids: [T, k] int32.
        w_in: as for `plan_decode`.
        w_out: as for `plan_decode`.
        up_proj: [l, d] in the dtype of tokens, which multiplies the rounded sum of one token. Its kernel starts while
            the experts' kernels end. None gives the sum.
        parts: the parts of l, as for the kernel of `jax_latent_moe.projections`.
    """
    if plan.rows:
        if up_proj is not None:
            raise InputError(f"up_proj goes with one token without lists, not with {plan}: multiply the sum by it.")
        return _listed_experts(plan, tokens, weights, expert_ids, w_in, w_out)
    up = jnp.zeros((tokens.shape[1], 0), tokens.dtype) if up_proj is None else up_proj
    results = [
        *workspace(plan, tokens.dtype, w_out.shape),
        jax.ShapeDtypeStruct((plan.tokens, up.shape[1]), tokens.dtype),
    ]
    operands = [tokens, expert_ids, weights.astype(jnp.float32), *stored_arrays(w_in), *stored_arrays(w_out), up]
    out, *_, projected = native.call("decode_experts", operands, results, parts=parts, **attributes_of(plan))
    return out if up_proj is None else projected


def workspace(plan: Decode, dtype: Any, w_out_shape: tuple[int, int, int]) -> list[jax.ShapeDtypeStruct]:
    """The first results of a call without lists: the sum, the hidden rows, the weighted parts and the counters."""
    (_, inner, width), assignments = w_out_shape, plan.tokens * plan.choices
    return [
        jax.ShapeDtypeStruct((plan.tokens, width), dtype),
        jax.ShapeDtypeStruct((assignments, inner), dtype),
        jax.ShapeDtypeStruct((assignments, plan.splits, width), jnp.float32),
        jax.ShapeDtypeStruct((plan.tokens * -(-width // LEAST_TILE),), jnp.int32),
    ]


def _listed_experts(plan, tokens, weights, expert_ids, w_in, w_out):
    """`decoded_experts` with the rows of each expert listed."""
    (_, width), (experts, inner, _) = tokens.shape, w_out.shape
    assignments = plan.tokens * plan.choices
    results = [
        jax.ShapeDtypeStruct(tokens.shape, tokens.dtype),
        jax.ShapeDtypeStruct((assignments, inner), tokens.dtype),
        jax.ShapeDtypeStruct((assignments, PIECES, width), jnp.float32),
        jax.ShapeDtypeStruct((experts + 1 + assignments,), jnp.int32),
    ]
    operands = [tokens, expert_ids, weights.astype(jnp.float32), *stored_arrays(w_in), *stored_arrays(w_out)]
    attributes = dict(rows=plan.rows, sms=plan.num_sms, **attributes_of(plan))
    return native.call("decode_listed_experts", operands, results, **attributes)[0]


def attributes_of(plan: Decode) -> dict[str, Any]:
    """The attributes that all custom calls with experts have."""
    return dict(
        in_code=plan.in_code,
        out_code=plan.out_code,
        activation=plan.activation.name,
        beta=plan.activation.beta,
        linear_beta=plan.activation.linear_beta,
    )


def stored_arrays(weight: Any) -> tuple[Array, Array, Array]:
    """A weight's arrays as the kernels take them: data, scales, and zero points or the scales of matrices."""
    nothing = jnp.zeros(0, jnp.float32)
    return stored(weight) if isinstance(weight, ScaledArray) else (weight, nothing, nothing)
