"""What a grouped-matmul backend is, which ones there are, and how one is chosen."""

import dataclasses
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jax_latent_moe.config import BackendConfig, CutlassBackend, PallasBackend, XlaBackend, as_backend
from jax_latent_moe.errors import UnsupportedError
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.operands import GatheredRows, LastColumns
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.problem import Problem
from jax_latent_moe.grouped_matmul.tuning.table import Choice
from jax_latent_moe.grouped_matmul.xla.backend import Xla


@runtime_checkable
class Backend(Protocol):
    """Computes the three contractions. Rows are sorted by expert; group_sizes counts the rows of each.

    Negative sizes, and sums above the rows, which nobody can refuse under jit, are cut to the rows there are.
    Rows beyond sum(group_sizes) give zero rows and leak nowhere, whatever they hold; an expert without rows gets an
    exactly zero outer product. Accumulation is in float32 (float64 for float64 operands).
    """

    def supports(self, problem: Problem) -> str | None:
        """None when this backend runs the problem, else the reason, as a sentence."""
        ...

    def tile(self, problem: Problem) -> Choice | None:
        """The tile that would run the problem and where it comes from; None where there is none to choose."""
        ...

    def candidates(self, problem: Problem) -> tuple[BackendConfig, ...]:
        """Configurations that differ in the tile of the problem's contraction, for `tune` to time; empty for none."""
        ...

    def matmul(
        self,
        rows: Float[Array, "r a"] | GatheredRows | LastColumns,
        w: Float[Array, "e k n"],
        group_sizes: Int[Array, " e"],
        *,
        transpose_w: bool,
    ) -> Float[Array, "r b"]:
        """rows[R,K] x w -> [R,N]; with transpose_w rows[R,N] x w^T -> [R,K]."""
        ...

    def outer(
        self,
        rows: Float[Array, "r k"] | GatheredRows | LastColumns,
        dout: Float[Array, "r n"] | GatheredRows,
        group_sizes: Int[Array, " e"],
    ) -> tuple[Float[Array, "e k n"], Float[Array, "r k"] | LastColumns, Float[Array, "r n"]]:
        """rows^T x dout over the rows of each expert; and rows and dout, gathered."""
        ...


@runtime_checkable
class FusingBackend(Backend, Protocol):
    """A backend that may also run problems with an activation; `supports` says which."""

    def keeps_gate(self, activation) -> bool:
        """Whether its gradient of that activation is made of gate and hidden rows rather than of the pre-activation."""
        ...

    def matmul_activation(
        self,
        rows: Float[Array, "r k"] | GatheredRows,
        w: Float[Array, "e k n"],
        group_sizes: Int[Array, " e"],
        *,
        activation,
        keep_pre: bool,
    ) -> tuple[Float[Array, "r n"] | None, Float[Array, "r m"] | None]:
        """The pre-activation rows x w, None unless it is to be kept, and the activation of it; zero beyond the sum.

        Where `keeps_gate` and it is to be kept, the first is gate and hidden rows side by side and the second None.
        """
        ...

    def matmul_activation_grad(
        self,
        dout: Float[Array, "r n"] | GatheredRows,
        w: Float[Array, "e m n"],
        group_sizes: Int[Array, " e"],
        kept: Float[Array, "r p"],
        row_weights: Float[Array, " r"],
        *,
        activation,
    ) -> tuple[Float[Array, "r p"], Float[Array, "r m"] | None, Float[Array, " r"], Float[Array, "r n"]]:
        """With dhidden = dout x w^T: the gradient of the pre-activation, the hidden rows, and <dhidden, hidden>; dout.

        The first two are times row_weights, of which the third is the gradient.
        `kept` holds hidden rows where `FusedActivation.keeps_hidden`, or these behind the gate where `keeps_gate`, and
        the second result is None; else it holds the pre-activation. The gradient may take its place. The third result
        is in float32. All are zero beyond the sum. The last is dout itself, gathered.
        """
        ...


_BACKENDS = {
    XlaBackend: Xla,
    PallasBackend: Pallas,
    CutlassBackend: Cutlass,
}

# What "auto" asks, in order, by platform: the first that supports the problem runs (measured: docs/performance.md).
AUTO: dict[str, tuple[BackendConfig, ...]] = {
    "cpu": (XlaBackend(),),
    "gpu": (CutlassBackend(), PallasBackend(), XlaBackend()),
    "tpu": (XlaBackend(method="ragged_dot"),),
}


def select(problem: Problem, backend: str | BackendConfig = "auto") -> Backend:
    """The backend that runs the problem.

    Args:
        problem: the grouped matmul.
        backend: "auto", a name, or a backend's dataclass.

    Raises:
        UnsupportedError: the named backend cannot run the problem.
        ConfigError: the name is unknown.
    """
    refusal = None
    for config in _candidates(problem, backend):
        chosen = _BACKENDS[type(config)](config)
        reason = chosen.supports(problem)
        if reason is None:
            return chosen
        refusal = UnsupportedError(_name(config), reason, "Use backend='auto' or XlaBackend(), which runs everywhere.")
    assert refusal is not None
    raise refusal


def select_fusing(problem: Problem, backend: str | BackendConfig = "auto") -> FusingBackend | None:
    """The backend that runs the problem without its activation, if it also runs it with; else None: compose the two.

    Raises:
        UnsupportedError: the named backend cannot even run the plain problem.
        ConfigError: the name is unknown.
    """
    chosen = select(dataclasses.replace(problem, activation=None), backend)
    return chosen if isinstance(chosen, FusingBackend) and chosen.supports(problem) is None else None


def explain(problem: Problem, backend: str | BackendConfig = "auto") -> str:
    """Who is asked to run the problem, in order, and what each says: one line a backend, and one for the tile."""
    lines = [f"{problem.contraction} on {problem.platform} ({problem.device_kind}), backend={backend!r}:"]
    for config in _candidates(problem, backend):
        chosen = _BACKENDS[type(config)](config)
        reason = chosen.supports(problem)
        if reason is None:
            lines.append(f"  {config!r}: runs it")
            if choice := chosen.tile(problem):
                lines.append(f"    {choice.tile!r}, from {choice.source}")
            break
        lines.append(f"  {config!r}: refuses: {reason}")
    return "\n".join(lines)


def _candidates(problem, backend):
    backend = as_backend(backend)
    return AUTO.get(problem.platform, (XlaBackend(),)) if backend == "auto" else (backend,)


def _name(config):
    return type(config).__name__.removesuffix("Backend").lower()
