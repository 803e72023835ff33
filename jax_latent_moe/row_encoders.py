"""Encoders of rows in FP8: a compiled kernel in one pass over memory, or XLA, which reads the rows twice.

A second kernel computes the gradient of relu2 and encodes it in the same pass (custom_calls/src/formats). Both give the
codes of the formats' definition to the bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe import native
from jax_latent_moe.activations import BoundActivation, Residual
from jax_latent_moe.config import CutlassBackend, as_backend
from jax_latent_moe.device import Device
from jax_latent_moe.formats import ScaledRows, encode_rows
from jax_latent_moe.formats.both_layouts import POWER_OF_TWO, WIDE
from jax_latent_moe.formats.fp8 import BLOCK
from jax_latent_moe.grouped_matmul.registry import BackendConfig
from jax_latent_moe.grouped_matmul.sm90 import DTYPES, FP8, library

FEATURE_MULTIPLE = 8
"""A lane of the kernels has this many features."""


@dataclasses.dataclass(frozen=True)
class RowEncoder:
    """The decision about one operand: what encodes its rows.

    Attributes:
        format: the format of the codes.
        refusal: None, or the reason why XLA encodes them, as a sentence.
    """

    format: str
    refusal: str | None

    def __str__(self) -> str:
        if self.refusal is None:
            return f"the compiled kernel encodes rows in {self.format}"
        return f"XLA encodes rows in {self.format}: {self.refusal}"

    def __call__(self, rows: Float[Array, "r k"]) -> ScaledRows:
        """The codes of rows [R, K], as `encode_rows` defines them."""
        if self.refusal is not None:
            return encode_rows(rows, self.format)
        codes, scales = native.call("encode_rows", [rows], _codes_of(rows), power_of_two=POWER_OF_TWO[self.format])
        return _scaled(codes, scales, self.format, rows.dtype)


@dataclasses.dataclass(frozen=True)
class GradientEncoder:
    """The decision about the pre-activation's gradient: whether one kernel computes and encodes it.

    Attributes:
        format: the format of the codes.
        refusal: None, or the reason why XLA computes the gradient and a `RowEncoder` encodes it, as a sentence.
    """

    format: str
    refusal: str | None

    def __str__(self) -> str:
        if self.refusal is None:
            return f"the compiled kernel computes relu2's gradient and encodes it in {self.format}"
        return f"XLA computes the activation's gradient: {self.refusal}"

    def __call__(
        self, dhidden: Float[Array, "r m"], hidden: Float[Array, "r m"], row_weights: Float[Array, " r"]
    ) -> tuple[Float[Array, "r m"], ScaledRows, Float[Array, " r"]]:
        """The gradient, its codes, and the gradient of the rows' weights.

        Args:
            dhidden: [R, m], the gradient of the hidden rows, in bfloat16 or float16. Its memory is reused.
            hidden: [R, m], relu(u)^2, in the same dtype.
            row_weights: [R].

        Returns:
            row_weights * dhidden * 2 relu(u) [R, m] in the dtype of dhidden; its codes; and the sum of dhidden * hidden
            over each row [R] in float32.
        """
        assert self.refusal is None, "the plan says what computes the gradient"
        like = jax.ShapeDtypeStruct(dhidden.shape, dhidden.dtype)
        codes, scales = _codes_of(dhidden)
        given = [dhidden, hidden, row_weights.astype(jnp.float32)]
        power_of_two = POWER_OF_TWO[self.format]
        dpre, codes, scales, sums = native.call(
            "relu2_gradient",
            given,
            [like, codes, scales, scales],
            input_output_aliases={0: 0},
            power_of_two=power_of_two,
        )
        return dpre, _scaled(codes, scales, self.format, dpre.dtype), jnp.sum(sums, axis=0)


def row_encoder(
    format: str | None, backend: str | BackendConfig, width: int, dtype, device: Device
) -> RowEncoder | None:
    """The decision for rows [R, width] of a dtype; None if they are not encoded.

    Args:
        format: the format of the codes, or None.
        backend: the experts' backend.
        width: K.
        dtype: dtype of the rows.
        device: the device that runs it.
    """
    return None if format is None else RowEncoder(format, _refusal(format, backend, width, dtype, device))


def gradient_encoder(
    format: str | None,
    backend: str | BackendConfig,
    width: int,
    dtype,
    device: Device,
    *,
    activation: BoundActivation,
    residual: Residual,
) -> GradientEncoder | None:
    """The decision for the gradient of pre-activations [R, width]; None if it is not encoded.

    Args:
        format: the format of the codes, or None.
        backend: the experts' backend.
        width: m.
        dtype: dtype of the rows.
        device: the device that runs it.
        activation: the experts' activation.
        residual: what the forward pass keeps.
    """
    if format is None:
        return None
    asked, reason = as_backend(backend), _refusal(format, backend, width, dtype, device)
    if reason is None and (activation.name, residual) != ("relu2", "hidden"):
        reason = f"the compiled kernel has the gradient of relu2, not of {activation}."
    if reason is None and jnp.dtype(dtype).name not in DTYPES:
        reason = f"the compiled kernel needs {' or '.join(DTYPES)}, not {jnp.dtype(dtype).name}."
    if reason is None and isinstance(asked, CutlassBackend) and asked.fuse == "never":
        reason = "fuse='never' leaves activations to XLA."
    return GradientEncoder(format, reason)


def _refusal(format, backend, width, dtype, device) -> str | None:
    asked = as_backend(backend)
    if asked != "auto" and not isinstance(asked, CutlassBackend):
        return f"backend={asked!r} has no kernel that encodes rows."
    if device.architecture != "sm90":
        return f"the compiled kernel is for NVIDIA Hopper GPUs (H100, H200), not {device.kind!r}."
    if format not in FP8:
        return f"the compiled kernel encodes rows in {' or '.join(FP8)}, not {format}."
    if jnp.dtype(dtype) not in WIDE:
        return f"the compiled kernel encodes {', '.join(each.name for each in WIDE)}, not {jnp.dtype(dtype).name}."
    if width % FEATURE_MULTIPLE or not width:
        return f"the compiled kernel needs rows of a positive multiple of {FEATURE_MULTIPLE} features, not {width}."
    return library(device).missing


def _codes_of(rows):
    """The shapes of the codes and the scales. The scales of one block lie side by side, as products read them."""
    num_rows, k = rows.shape
    scales = jax.ShapeDtypeStruct((-(-k // BLOCK), num_rows), jnp.float32)
    return [jax.ShapeDtypeStruct((num_rows, k), jnp.uint8), scales]


def _scaled(codes, scales, format, dtype) -> ScaledRows:
    return ScaledRows(codes, {"block": scales.T}, format, dtype)
