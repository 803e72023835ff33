"""A CPU backend that fuses what its settings say: the portable backend's products with epilogues of its own."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_latent_moe.activations import Residual, activate
from jax_latent_moe.config import XlaBackend
from jax_latent_moe.grouped_matmul import Backend, LastColumns, Operands, Outputs, register
from jax_latent_moe.grouped_matmul.groups import group_ends
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.grouped_matmul.xla.backend import Xla


@dataclasses.dataclass(frozen=True)
class FusingBackend:
    """Which epilogues it has.

    Attributes:
        value: residuals that its fwd keeps behind the activation; it also runs without keeping one.
        gradient: residuals that its dgrad makes the activation's gradient of.
        in_place: whether it reads rows where they stand, and gives them back gathered, as the compiled kernels do.
    """

    value: tuple[Residual, ...] = ()
    gradient: tuple[Residual, ...] = ()
    in_place: bool = False


class Fusing(Backend):
    """Computes epilogues in float32 only from values: it does not use the slope of an activation's row."""

    fuses_one_group = True

    def supports(self, problem):
        if problem.epilogue is None:
            return None
        residual = problem.epilogue.residual
        fused = self.config.value if problem.contraction == "fwd" else self.config.gradient
        if residual in fused or (residual is None and fused):
            return None
        return f"its {problem.contraction} has no epilogue with {residual}."

    def in_place(self, problem, tile):
        return ("lhs", "rhs") if self.config.in_place else ()

    def run(self, problem, tile, operands):
        assert self.supports(problem) is None, "only what it supports is asked for"
        lhs, rhs = gathered(operands.lhs), operands.rhs
        if problem.contraction == "wgrad":
            rhs = gathered(rhs)
        product = Xla(XlaBackend()).run(problem.plain(), None, Operands(lhs, rhs, operands.group_sizes)).out
        if problem.epilogue is None:
            outputs = Outputs(product)
        elif problem.contraction == "fwd":
            outputs = _value(problem.epilogue, product)
        else:
            owned = jnp.arange(problem.num_rows) < group_ends(operands.group_sizes, problem.num_rows)[-1]
            kept = jnp.where(owned[:, None], operands.residual, 0)
            outputs = _gradient(problem.epilogue, product, kept, jnp.where(owned, operands.row_weights, 0))
        return dataclasses.replace(outputs, lhs=lhs, rhs=rhs if problem.contraction == "wgrad" else None)


def _value(epilogue, pre):
    hidden = activate(pre, epilogue.activation).astype(pre.dtype)
    if epilogue.residual == "gate_hidden":
        kept = jnp.concatenate([pre[:, : pre.shape[1] // 2], hidden], axis=1)
        return Outputs(LastColumns(kept, hidden.shape[1]), residual=kept)
    return Outputs(hidden, residual={"pre": pre, "hidden": hidden, None: None}[epilogue.residual])


def _gradient(epilogue, dhidden, kept, row_weights):
    wide, activation, dtype = kept.astype(jnp.float32), epilogue.activation, dhidden.dtype
    dhidden, weights = dhidden.astype(jnp.float32), row_weights[:, None].astype(jnp.float32)
    match epilogue.residual:
        case "pre":
            pre = wide
        case "hidden":
            assert activation.name == "relu2"
            pre = jnp.sqrt(wide)
        case "gate_hidden":
            # A gated activation of this kind is a function of the gate times the up half.
            gate, hidden = jnp.split(wide, 2, axis=1)
            value = activate(jnp.concatenate([gate, jnp.ones_like(gate)], axis=1), activation)
            pre = jnp.concatenate([gate, jnp.where(value == 0, 0, hidden / jnp.where(value == 0, 1, value))], axis=1)
    hidden, pullback = jax.vjp(lambda pre: activate(pre, activation), pre)
    return Outputs(
        pullback(weights * dhidden)[0].astype(dtype),
        hidden=(weights * hidden).astype(dtype) if epilogue.residual == "pre" else None,
        row_weight_gradients=jnp.sum(dhidden * hidden, axis=1),
    )


register("fusing", FusingBackend, Fusing)
