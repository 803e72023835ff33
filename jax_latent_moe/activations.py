"""The activations of experts: a registry of their values, gradients and residuals.

An activation maps pre-activations to hidden rows, elementwise, in float32 (float64 for float64). A new one is one
`register` call: the layer, the Flax modules and the cost plan read everything from here.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.errors import ConfigError

Residual = Literal["pre", "hidden", "gate_hidden"]
"""The array that a forward pass keeps for the activation's gradient, [R, m] or [R, 2 m].

"pre" is the pre-activation. "hidden" is the hidden rows, for activations whose slope follows from them. "gate_hidden"
is the gate and the hidden rows side by side, from which the up half follows; only fused kernels read it.
"""


@dataclasses.dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: the name in `LatentMoEConfig.activation`.
        value: computes the hidden rows from u, or from gate and up if gated. The parameters are keywords.
        gradient: computes the gradients of the parts, a tuple, from the parts and the hidden rows' gradient. The
            parameters are keywords. None lets JAX differentiate value.
        gated: whether the experts have a gate besides the up kernel.
        parameters: fields of `LatentMoEConfig` that value and gradient take as keywords.
        slope_of_hidden: hidden -> slope, if the activation is not gated and its slope follows from the hidden rows.
            They are then kept instead of the pre-activation.
        gate_times_up: whether hidden is up times a function of the gate. A kernel may then keep "gate_hidden".
    """

    name: str
    value: Callable[..., Array]
    gradient: Callable[..., tuple[Array, ...]] | None = None
    gated: bool = False
    parameters: tuple[str, ...] = ()
    slope_of_hidden: Callable[[Array], Array] | None = None
    gate_times_up: bool = False

    def __post_init__(self):
        if self.gated and self.slope_of_hidden is not None:
            raise ConfigError(f"activation {self.name!r} is gated: slope_of_hidden needs gated=False.")
        if self.gate_times_up and not self.gated:
            raise ConfigError(f"activation {self.name!r} has gate_times_up but is not gated: set gated=True.")

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """The residuals from which the gradient can be computed, the smallest first."""
        if self.slope_of_hidden is not None:
            return "hidden", "pre"
        return ("gate_hidden", "pre") if self.gate_times_up else ("pre",)


@dataclasses.dataclass(frozen=True)
class BoundActivation:
    """A registered activation with its parameters. It is hashable, because it is part of static problems.

    Attributes:
        name: the name in the registry.
        parameters: (name, value) of each parameter.
    """

    name: str
    parameters: tuple[tuple[str, float | bool | None], ...] = ()

    @property
    def definition(self) -> Activation:
        """The activation's row in the registry."""
        return ACTIVATIONS[self.name]

    @property
    def gated(self) -> bool:
        """Whether the pre-activation holds a gate half and an up half."""
        return self.definition.gated

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value}" for name, value in self.parameters)
        return f"{self.name}({listed})" if listed else self.name


ACTIVATIONS: dict[str, Activation] = {}


def register(activation: Activation) -> None:
    """Adds an activation to the registry.

    Raises:
        ConfigError: the name is taken.
    """
    if activation.name in ACTIVATIONS:
        raise ConfigError(f"activation {activation.name!r} is registered already: choose another name.")
    ACTIVATIONS[activation.name] = activation


def activate(pre: Float[Array, "*rows p"], activation: BoundActivation) -> Float[Array, "*rows m"]:
    """Applies an activation. If gated, the first half of the last axis is the gate, and the second half is up.

    Args:
        pre: [..., m], or [..., 2 m] if gated.
        activation: the activation.

    Returns:
        [..., m] in float32, or float64 for float64 input. The caller casts it to the compute dtype.
    """
    wide = pre.astype(at_least_float32(pre.dtype))
    parts = jnp.split(wide, 2, axis=-1) if activation.gated else (wide,)
    return activation.definition.value(*parts, **dict(activation.parameters))


def hidden_and_pullback(
    kept: Float[Array, "*rows p"], residual: Residual, activation: BoundActivation
) -> tuple[Float[Array, "*rows m"], Callable[[Float[Array, "*rows m"]], Float[Array, "*rows p"]]]:
    """The hidden rows, and the function that maps their gradient to the pre-activation's gradient.

    Args:
        kept: the residual from the forward pass.
        residual: the kind of `kept`, "pre" or "hidden".
        activation: the activation.

    Returns:
        Both in float32, or float64 for float64 input.
    """
    wide = kept.astype(at_least_float32(kept.dtype))
    definition, parameters = activation.definition, dict(activation.parameters)
    if residual == "hidden":
        assert definition.slope_of_hidden is not None, "the plan keeps hidden rows only if the slope follows from them"
        slope = definition.slope_of_hidden(wide)
        return wide, lambda dhidden: slope * dhidden
    if definition.gradient is None:
        hidden, vjp = jax.vjp(lambda pre: activate(pre, activation), wide)
        return hidden, lambda dhidden: vjp(dhidden)[0]
    gradient, parts = definition.gradient, tuple(jnp.split(wide, 2, axis=-1)) if activation.gated else (wide,)
    return activate(wide, activation), lambda dhidden: jnp.concatenate(gradient(parts, dhidden, **parameters), axis=-1)


def _relu2(u):
    return jnp.square(jax.nn.relu(u))


def _relu2_slope(hidden):
    """2 relu(u) = 2 sqrt(h). Its relative error is half of h's rounding error.

    In float16, hidden values below 2^-24 become zero, and so does the slope of pre-activations below 2^-12.
    """
    # The root of 1 is taken at 0, because the derivative of the root at 0 is infinite.
    return 2 * jnp.where(hidden > 0, jnp.sqrt(jnp.where(hidden > 0, hidden, 1)), 0)


def _gelu(u, *, gelu_approximate):
    return jax.nn.gelu(u, approximate=gelu_approximate)


def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


def _clamped_swiglu(gate, up, *, swiglu_alpha, swiglu_limit, swiglu_shift):
    # A value at the limit has a gradient, as in torch.clamp.
    gate = jnp.where(gate > swiglu_limit, swiglu_limit, gate)
    up = jnp.where(up > swiglu_limit, swiglu_limit, jnp.where(up < -swiglu_limit, -swiglu_limit, up))
    return gate * jax.nn.sigmoid(swiglu_alpha * gate) * (up + swiglu_shift)


def _geglu(gate, up, *, gelu_approximate):
    return _gelu(gate, gelu_approximate=gelu_approximate) * up


def _situ_glu(gate, up, *, situ_beta, situ_linear_beta):
    if situ_linear_beta is not None:
        up = situ_linear_beta * jnp.tanh(up / situ_linear_beta)
    return situ_beta * jnp.tanh(gate / situ_beta) * jax.nn.sigmoid(gate) * up


# relu2: relu(u)^2 (NemotronH).
register(Activation("relu2", _relu2, slope_of_hidden=_relu2_slope))
register(Activation("gelu", _gelu, parameters=("gelu_approximate",)))
# swiglu: silu(g) * u (DeepSeek-V3, Qwen3).
register(Activation("swiglu", _swiglu, gated=True, gate_times_up=True))
# clamped_swiglu: g sigmoid(alpha g) (u + shift), g up to limit, u within +-limit (gpt-oss, DeepSeek-V4).
register(
    Activation(
        "clamped_swiglu", _clamped_swiglu, gated=True, parameters=("swiglu_alpha", "swiglu_limit", "swiglu_shift")
    )
)
register(Activation("geglu", _geglu, gated=True, gate_times_up=True, parameters=("gelu_approximate",)))
# situ_glu: b tanh(g / b) sigmoid(g) * bl tanh(u / bl), or * u if bl is None (Kimi K3).
register(Activation("situ_glu", _situ_glu, gated=True, parameters=("situ_beta", "situ_linear_beta")))
