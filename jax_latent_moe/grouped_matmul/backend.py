"""What a grouped-matmul backend is, which ones there are, and how one is chosen."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jax_latent_moe.config import BackendConfig, CutlassBackend, PallasBackend, XlaBackend, as_backend
from jax_latent_moe.errors import UnsupportedError
from jax_latent_moe.grouped_matmul import pallas_hopper, xla
from jax_latent_moe.grouped_matmul.tuning import Choice

Contraction = Literal["rows_w", "rows_wt", "outer"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One grouped matmul, as far as it is known before it runs.

    Attributes:
        contraction: "rows_w" is rows x w, "rows_wt" is rows x w^T, "outer" is rows^T x rows, each per expert.
        num_rows: R, rows in all.
        num_experts: E, experts with rows or without.
        in_features: K of the weight [E, K, N].
        out_features: N of the weight [E, K, N].
        dtype: type of rows and weights.
        platform: "cpu", "gpu" or "tpu".
        device_kind: the device's own name, such as "NVIDIA H100 80GB HBM3".
    """

    contraction: Contraction
    num_rows: int
    num_experts: int
    in_features: int
    out_features: int
    dtype: str
    platform: str
    device_kind: str


@runtime_checkable
class Backend(Protocol):
    """Computes the three contractions. Rows are sorted by expert; group_sizes counts the rows of each.

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
        self, rows: Float[Array, "r a"], w: Float[Array, "e k n"], group_sizes: Int[Array, " e"], *, transpose_w: bool
    ) -> Float[Array, "r b"]:
        """rows[R,K] x w -> [R,N]; with transpose_w rows[R,N] x w^T -> [R,K]."""
        ...

    def outer(
        self, rows: Float[Array, "r k"], dout: Float[Array, "r n"], group_sizes: Int[Array, " e"]
    ) -> Float[Array, "e k n"]:
        """rows^T x dout over the rows of each expert."""
        ...


class _NotBuiltIn:
    """A name that configurations accept and this version cannot run."""

    def __init__(self, name: str):
        self.name = name

    def supports(self, problem: Problem) -> str:
        del problem
        return f"the {self.name} kernels are not built into this version of jax_latent_moe."


_BACKENDS = {
    XlaBackend: xla.Xla,
    PallasBackend: pallas_hopper.Pallas,
    CutlassBackend: lambda config: _NotBuiltIn("CUTLASS"),
}

# What "auto" asks, in order, by platform: the first that supports the problem runs.
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
