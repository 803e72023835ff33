"""The static plan of the experts' products: the decision for each product, and the residual of the activation.

Both passes read the same plan, so the backward pass reads the residual that the forward pass keeps.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from jax_latent_moe.activations import BoundActivation, Residual
from jax_latent_moe.config import CutlassBackend, LatentMoEConfig, as_backend
from jax_latent_moe.decode import Decode
from jax_latent_moe.device import Device, current_device
from jax_latent_moe.errors import UnsupportedError
from jax_latent_moe.grouped_matmul.problem import Contraction, Epilogue, Operand, problem
from jax_latent_moe.grouped_matmul.registry import Bound, fused, gradient_backend, name_of, select
from jax_latent_moe.grouped_matmul.xla.config import XlaBackend
from jax_latent_moe.precision import Precision
from jax_latent_moe.row_encoders import GradientEncoder, RowEncoder, gradient_encoder, row_encoder

PORTABLE: tuple[Residual, ...] = ("hidden", "pre")
"""The residuals that XLA can compute and differentiate without a fused kernel."""


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """The six products and the residual. If a product's problem has no epilogue, XLA computes the activation.

    Attributes:
        activation: the experts' activation.
        residual: what the forward pass keeps for the activation's gradient.
        precision: the formats of the products that are not in the dtype of the rows.
        up: the first product (fwd) when there is a backward pass.
        up_without_gradient: the first product (fwd) when there is none.
        down: the second product (fwd).
        down_dgrad: the gradient of the hidden rows, or of the pre-activation if it is fused.
        down_wgrad: the gradient of w_out; None if w_out is a `ScaledArray`, which is frozen.
        up_dgrad: the gradient of the rows.
        up_wgrad: the gradient of w_in; None if w_in is a `ScaledArray`.
        b_in_grad: the gradient of b_in, a wgrad with one column, of ones or of the rows' weights; None without biases.
        b_out_grad: the gradient of b_out, a wgrad with the column of the rows' weights; None without biases.
        unweighted: None if down_dgrad reads the rows that down_wgrad gathered, which are rows of dcombined times their
            weights. Such rows give the gradients of the weights' logarithms. Otherwise the reason why it reads rows
            without weights, as a sentence.
        weighted_hidden: whether down_wgrad reads hidden rows times their weights, and rows of dcombined without.
            Otherwise it reads hidden rows without, and rows of dcombined times their weights.
        weighted_tokens: whether up_wgrad reads tokens times their weights, and the sums of the tokens' gradients
            multiply by weights. The gradient of the pre-activation is then without them.
        decode: how few tokens run if nothing is differentiated, in place of up_without_gradient and down; or the reason
            against it; or None if the rows do not belong to whole tokens.
        projections: what multiplies the router's logits and the projections of the tokens, as `projections.explain`
            says it; None if the rows do not belong to whole tokens.
        keeps_rows: whether the forward pass keeps its gathered rows for up_wgrad, which else gathers them again.
        encode_tokens: what encodes the tokens for the first product; None if it is not in codes. The next ones are
            alike.
        encode_hidden: what encodes the hidden rows for the second product; None if the first product does, as its
            epilogue says.
        encode_dout: what encodes the gradient of the combined tokens for down_dgrad.
        encode_dpre: what encodes the gradient of the pre-activation for up_dgrad, if `gradient` does not; None if
            down_dgrad does, as its epilogue says.
        gradient: whether a kernel of its own computes that gradient and encodes it; None if down_dgrad does.
    """

    activation: BoundActivation
    residual: Residual
    precision: Precision
    up: Bound
    up_without_gradient: Bound
    down: Bound
    down_dgrad: Bound
    down_wgrad: Bound | None
    up_dgrad: Bound
    up_wgrad: Bound | None
    b_in_grad: Bound | None = None
    b_out_grad: Bound | None = None
    unweighted: str | None = None
    weighted_hidden: bool = False
    weighted_tokens: bool = False
    decode: Decode | str | None = None
    projections: str | None = None
    keeps_rows: bool = False
    encode_tokens: RowEncoder | None = None
    encode_hidden: RowEncoder | None = None
    encode_dout: RowEncoder | None = None
    encode_dpre: RowEncoder | None = None
    gradient: GradientEncoder | None = None

    @property
    def weighted_dgrad(self) -> bool:
        """Whether down_dgrad reads rows times their weights, and gives the gradients of the weights' logarithms."""
        return self.unweighted is None

    def summary(self) -> list[str]:
        """What is decided beside the products, in lines."""
        rows = " and the gathered rows" if self.keeps_rows else ""
        lines = [f"experts with {self.activation}; the forward pass keeps {self.residual!r}{rows}"]
        if isinstance(self.decode, Decode):
            kernels = "four" if self.decode.rows else "two"
            lines.append(f"without a gradient, {kernels} kernels for few tokens: {self.decode}")
        elif self.decode:
            lines.append(f"no kernels for few tokens: {self.decode}")
        if self.projections:
            lines.append(f"without a gradient, {self.projections}")
        lines.append(
            "down_dgrad reads rows times their weights, which down_wgrad gathered"
            if self.weighted_dgrad
            else f"down_dgrad reads rows without their weights: {self.unweighted}"
        )
        return lines

    def __str__(self) -> str:
        lines = self.summary()
        for field in dataclasses.fields(self)[3:]:
            bound = getattr(self, field.name)
            if isinstance(bound, Bound):
                lines += [f"{field.name}: {bound.problem}", *(f"  {line}" for line in str(bound).splitlines())]
            elif isinstance(bound, RowEncoder | GradientEncoder):
                lines.append(f"{field.name}: {bound}")
        return "\n".join(lines)


def plan_experts(
    config: LatentMoEConfig,
    num_rows: int,
    w_in_shape: tuple[int, ...],
    w_out_shape: tuple[int, ...],
    dtype,
    *,
    w_in: Operand | None = None,
    w_out: Operand | None = None,
    device: Device | None = None,
    by_log: bool = False,
    decode: Decode | str | None = None,
    projections: str | None = None,
) -> ExpertPlan:
    """Decides all products of a layer's experts.

    Args:
        config: gives the activation and the backend.
        num_rows: R.
        w_in_shape: (E, l, m), or (E, l, 2 m) if gated.
        w_out_shape: (E, m, l).
        dtype: dtype of the rows.
        w_in: format of w_in; None for an array of dtype.
        w_out: format of w_out; None for an array of dtype.
        device: the device that runs them; None is JAX's default device.
        by_log: whether the caller can use the gradients of the weights' logarithms in place of the weights' own.
        decode: the result of `plan_decode` for these weights; None if the rows do not belong to whole tokens.
        projections: the result of `projections.explain` for these tokens; None in the same way.

    Raises:
        UnsupportedError: the named backend cannot run one of the products, or insists on fusing where experts have
            biases.
        ConfigError: the user's table of tiles cannot be read.
    """
    device, activation = device or current_device(), config.bound_activation
    precision = config.precision or Precision()
    dense = problem("fwd", num_rows, w_in_shape, dtype, device=device).lhs
    table = dataclasses.replace(dense, layout="gathered")
    frozen_in, frozen_out = (w is not None and w != dense for w in (w_in, w_out))

    def bind(contraction: Contraction, shape, lhs, rhs=None, backend=config.backend) -> Bound:
        asked = problem(contraction, num_rows, shape, dtype, lhs=lhs, rhs=rhs, device=device)
        return select(asked, backend)

    def forward(shape, lhs, w) -> Bound:
        if precision.fwd is not None:
            return bind("fwd", shape, Operand(precision.fwd, lhs.layout), Operand(precision.fwd))
        try:
            return bind("fwd", shape, lhs, w)
        except UnsupportedError as error:
            if not (isinstance(as_backend(config.backend), CutlassBackend) and decode):
                raise
            if isinstance(decode, Decode) and w not in (None, dense):
                return bind("fwd", shape, lhs, w, "auto")  # the kernels for few tokens run the forward pass
            reason = f"{error.reason} Its kernels for few tokens do not run either: {decode}"
            raise UnsupportedError(error.backend, reason, error.remedy) from None

    def input_gradient(shape, lhs, w) -> Bound:
        if precision.dgrad is None:
            if w in (None, dense):
                return bind("dgrad", shape, lhs, w)
            asked = problem("dgrad", num_rows, shape, dtype, lhs=lhs, rhs=w, device=device)
            return select(asked, gradient_backend(asked, config.backend))
        # The weight's codes are those of the transposed weight.
        experts, inputs, outputs = shape
        transposed = experts, outputs, inputs
        return bind("fwd", transposed, Operand(precision.dgrad, lhs.layout), Operand(precision.dgrad))

    def encoded_gradient(epilogue: Epilogue) -> Bound | None:
        """down_dgrad with the activation's gradient and its encoder. Without them, the kernels have it as a fwd."""
        if config.expert_bias:
            return None
        lhs, rhs = down_dgrad.problem.lhs, down_dgrad.problem.rhs
        asked = problem("dgrad", num_rows, w_out_shape, dtype, lhs=lhs, rhs=rhs, device=device)
        encodes = dataclasses.replace(epilogue, encodes=precision.dgrad)
        return fused(dataclasses.replace(down_dgrad, problem=asked), encodes)

    def fuse(product: Bound, epilogue: Epilogue) -> Bound | None:
        if product is down_dgrad and precision.dgrad is not None:
            return encoded_gradient(epilogue)
        if not config.expert_bias:
            return fused(product, epilogue)
        if product.backend.insists(dataclasses.replace(epilogue, bias=True)):
            raise UnsupportedError(
                name_of(product.backend.config),
                "its epilogues add no bias of an expert, which comes before the activation.",
                "Leave the activation out of fuse, or set expert_bias=False.",
            )
        return None

    def value(residual: Residual | None) -> Bound | None:
        """The first product with the activation, and with the encoder of hidden rows if the kernel has that too."""
        plain = Epilogue(activation, residual)
        encoded = None if precision.fwd is None else fuse(up, dataclasses.replace(plain, encodes=precision.fwd))
        return encoded or fuse(up, plain)

    def bias_gradient(width: int) -> Bound | None:
        if not config.expert_bias:
            return None
        return select(problem("wgrad", num_rows, (w_in_shape[0], 1, width), dtype, device=device), XlaBackend())

    up, down_dgrad = forward(w_in_shape, table, w_in), input_gradient(w_out_shape, table, w_out)
    residual = choose_residual(
        activation,
        lambda residual: value(residual) is not None,
        lambda residual: fuse(down_dgrad, Epilogue(activation, residual)) is not None,
    )
    kept, up_with_gradient, up_alone = Epilogue(activation, residual), value(residual) or up, value(None) or up
    unweighted = _unweighted(by_log, residual, precision, frozen_out, dtype)
    if unweighted is None:
        down_dgrad = input_gradient(w_out_shape, dense, w_out)
    down_gradient = fuse(down_dgrad, kept) or down_dgrad
    latent, inner = w_in_shape[1], w_in_shape[2]

    def encoder(format: str | None, width: int) -> RowEncoder | None:
        return row_encoder(format, config.backend, width, dtype, device)

    hidden = dataclasses.replace(dense, layout="columns") if residual == "gate_hidden" else dense
    weighted_hidden = residual == "pre" or _few_exponents(dtype)
    # A fused gradient gives the gathered rows back. A weight gradient does not read codes.
    dout = dense if residual == "pre" and precision.dgrad is None else table
    return ExpertPlan(
        activation,
        residual,
        precision,
        up=up_with_gradient,
        up_without_gradient=up_alone,
        down=forward(w_out_shape, dense if precision.fwd else hidden, w_out),
        down_dgrad=down_gradient,
        down_wgrad=None if frozen_out else bind("wgrad", w_out_shape, dense if weighted_hidden else hidden, dout),
        up_dgrad=input_gradient(w_in_shape, dense, w_in),
        up_wgrad=None if frozen_in else bind("wgrad", w_in_shape, dense if config.keep_gathered_rows else table),
        b_in_grad=bias_gradient(w_in_shape[2]),
        b_out_grad=bias_gradient(w_out_shape[2]),
        unweighted=unweighted,
        weighted_hidden=weighted_hidden,
        weighted_tokens=_few_exponents(dtype),
        decode=decode,
        projections=projections,
        keeps_rows=config.keep_gathered_rows and not frozen_in,
        encode_tokens=encoder(precision.fwd, latent),
        encode_hidden=None
        if _encodes(up_with_gradient) and _encodes(up_alone)
        else encoder(precision.fwd, w_out_shape[1]),
        encode_dout=encoder(precision.dgrad, latent),
        encode_dpre=None if _encodes(down_gradient) else encoder(precision.dgrad, inner),
        gradient=None
        if _encodes(down_gradient)
        else gradient_encoder(
            precision.dgrad, config.backend, inner, dtype, device, activation=activation, residual=residual
        ),
    )


def _encodes(product: Bound) -> bool:
    return product.problem.epilogue is not None and product.problem.epilogue.encodes is not None


def _unweighted(by_log: bool, residual: Residual, precision: Precision, frozen_out: bool, dtype) -> str | None:
    """`ExpertPlan.unweighted`."""
    if not by_log:
        # They would be quotients of the logarithms' gradients by the weights, which may be 0.
        return "the gradients of the weights themselves are asked for, not those of their logarithms."
    if residual == "pre":
        return "down_wgrad follows it, for hidden rows that the pre-activation gives."
    if precision.dgrad is not None:
        return f"it reads codes in {precision.dgrad}, and codes have no weights."
    if frozen_out:
        return "w_out is frozen, so no down_wgrad gathers rows."
    if _few_exponents(dtype):
        return f"small weights would lose their rows' bits in {jnp.dtype(dtype).name}, which has few exponents."
    return None


def _few_exponents(dtype) -> bool:
    """Whether gradients times weights leave the dtype's normal numbers. Tokens and hidden rows are larger."""
    return jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp


def choose_residual(
    activation: BoundActivation,
    fuses_value: Callable[[Residual], bool],
    fuses_gradient: Callable[[Residual], bool],
) -> Residual:
    """The first residual of the activation that both passes support. Every backend supports the pre-activation.

    Args:
        activation: the experts' activation.
        fuses_value: whether the kernel of the first product can store a residual.
        fuses_gradient: whether the kernel of the second product's dgrad can read it.
    """
    for residual in activation.definition.residuals:
        if residual in PORTABLE or (fuses_value(residual) and fuses_gradient(residual)):
            return residual
    raise AssertionError("every activation has the residual 'pre'")
