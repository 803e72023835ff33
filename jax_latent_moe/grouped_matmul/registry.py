"""The registered backends, and the decision for one problem: its backend, its tile, and where rows are gathered."""

import dataclasses
from typing import Any, Literal

from jax_latent_moe.errors import ConfigError, UnsupportedError
from jax_latent_moe.grouped_matmul.backend import Backend
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.cutlass_sm90.config import CutlassBackend
from jax_latent_moe.grouped_matmul.cutlass_sm90.widened import FEWEST_ROWS, has_few_rows
from jax_latent_moe.grouped_matmul.operands import Operands, Outputs, gathered
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasBackend
from jax_latent_moe.grouped_matmul.problem import Epilogue, Problem
from jax_latent_moe.grouped_matmul.tuning.table import measured_tile
from jax_latent_moe.grouped_matmul.xla.backend import Xla
from jax_latent_moe.grouped_matmul.xla.config import XlaBackend

BackendConfig = Any
"""The settings of a registered backend: one of the dataclasses in `BACKENDS`."""

# One row per backend: its name, its settings, and the class that runs it.
BACKENDS: dict[str, tuple[type, type[Backend]]] = {
    "xla": (XlaBackend, Xla),
    "pallas": (PallasBackend, Pallas),
    "cutlass": (CutlassBackend, Cutlass),
}

# The backends that "auto" tries, in order, by platform. The first that supports the problem runs it. The order follows
# the times in docs/performance.md. A weight in codes and few rows have an order of their own: see `_auto`.
AUTO: dict[str, tuple[BackendConfig, ...]] = {
    "cpu": (XlaBackend(),),
    "gpu": (CutlassBackend(), PallasBackend(), XlaBackend()),
    "tpu": (XlaBackend(method="ragged_dot"),),
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """A problem with all decisions about it. Calling it runs the problem.

    Attributes:
        backend: the backend that runs the problem.
        problem: the problem.
        tile: the tile of its kernel; None if there is no choice.
        source: where the tile comes from: the config, a table or a heuristic.
        in_place: the operands that the kernel itself gathers or reads out of wider rows.
    """

    backend: Backend
    problem: Problem
    tile: Any
    source: str
    in_place: tuple[str, ...]

    def __call__(self, operands: Operands) -> Outputs:
        """Runs the problem on operands whose shapes fit it."""
        device = self.problem.device
        if "lhs" not in self.in_place:
            operands = operands._replace(lhs=gathered(operands.lhs, device))
        if self.problem.contraction == "wgrad" and "rhs" not in self.in_place:
            operands = operands._replace(rhs=gathered(operands.rhs, device))
        outputs = self.backend.run(self.problem, self.tile, operands)
        lhs, rhs = (
            given if made is None else made
            for made, given in ((outputs.lhs, operands.lhs), (outputs.rhs, operands.rhs))
        )
        return dataclasses.replace(outputs, lhs=lhs, rhs=rhs)

    def __str__(self) -> str:
        lines = [f"{self.backend.config!r} runs it"]
        if self.tile is not None:
            lines.append(f"tile: {self.tile!r}, from {self.source}")
        for name in ("lhs", "rhs"):
            operand = getattr(self.problem, name)
            if operand.layout != "dense":
                how = "in the kernel" if name in self.in_place else "before the kernel"
                done = "gathered" if operand.layout == "gathered" else "cut out of wider rows"
                lines.append(f"{name}: {done} {how}")
        return "\n".join(lines)


def select(problem: Problem, backend: str | BackendConfig = "auto") -> Bound:
    """Decides everything about a problem before it runs.

    Args:
        problem: the grouped matmul.
        backend: "auto", a name, or a backend's dataclass.

    Raises:
        UnsupportedError: the named backend cannot run the problem.
        ConfigError: `problem` is not a `Problem`, the backend's name is unknown, or the user's table of tiles cannot be
            read.
    """
    _check_problem(problem)
    refusal = None
    for candidate in _candidates(problem, backend):
        reason = candidate.supports(problem)
        if reason is None:
            return bind(candidate, problem)
        remedy = "Use backend='auto' or XlaBackend(), which runs everywhere."
        if problem.epilogue is not None and candidate.supports(problem.plain()) is None:
            remedy = "Ask for the product without its epilogue: XLA then computes the activation."
        refusal = UnsupportedError(name_of(candidate.config), reason, remedy)
    assert refusal is not None
    raise refusal


def gradient_backend(problem: Problem, backend: str | BackendConfig) -> str | BackendConfig:
    """The backend for dgrad with a weight in codes: the given one, or "auto" if that has no kernel for it.

    A backend can then serve frozen codes without a kernel for gradients through them.
    """
    if any(candidate.supports(problem) is None for candidate in _candidates(problem, backend)):
        return backend
    return "auto"


def bind(backend: Backend, problem: Problem) -> Bound:
    """Decides the tile of a problem that the backend supports: the config's, else a measured one, else a heuristic's.

    Raises:
        ConfigError: the user's table of tiles cannot be read.
    """
    tile, source = backend.given_tile(problem), "the config"
    if tile is None:
        tile, source = _tile(backend, problem)
    return Bound(backend, problem, tile, source, backend.in_place(problem, tile))


def fused(bound: Bound, epilogue: Epilogue) -> Bound | None:
    """The same problem with the epilogue in its kernel. None if the backend does not fuse it: then XLA computes it.

    Raises:
        UnsupportedError: the backend's config insists on the epilogue, and its kernels do not have the activation.
        ConfigError: the user's table of tiles cannot be read.
    """
    asked = dataclasses.replace(bound.problem, epilogue=epilogue)
    reason = bound.backend.supports(asked)
    if reason is None:
        return bind(bound.backend, asked)
    if bound.backend.insists(epilogue):
        raise UnsupportedError(name_of(bound.backend.config), reason, "Use backend='auto' or XlaBackend().")
    return None


def explain(problem: Problem, backend: str | BackendConfig = "auto") -> str:
    """Which backends are asked to run the problem, in order, what each says, and the decision.

    Raises:
        ConfigError: `problem` is not a `Problem`, the name is unknown, or the user's table of tiles cannot be read.
    """
    _check_problem(problem)
    lines = [f"{problem} on {problem.device.platform} ({problem.device.kind}), backend={backend!r}:"]
    if backend == "auto" and problem.device.platform == "gpu" and has_few_rows(problem):
        lines.append(f"  a weight in codes and fewer than {FEWEST_ROWS} rows an expert: PallasBackend() is asked first")
    for candidate in _candidates(problem, backend):
        reason = candidate.supports(problem)
        if reason is None:
            lines += [f"  {line}" for line in str(bind(candidate, problem)).splitlines()]
            break
        lines.append(f"  {candidate.config!r} refuses: {reason}")
    return "\n".join(lines)


def as_backend(backend: str | BackendConfig) -> "Literal['auto'] | BackendConfig":
    """A backend given by name or dataclass, as "auto" or a dataclass.

    Raises:
        ConfigError: the name or type is unknown.
    """
    if isinstance(backend, str) and backend in BACKENDS:
        return BACKENDS[backend][0]()
    if backend == "auto" or isinstance(backend, tuple(config for config, _ in BACKENDS.values())):
        return backend
    names = ", ".join(f"'{name}'" for name in ("auto", *BACKENDS))
    types = ", ".join(f"{config.__name__}(...)" for config, _ in BACKENDS.values())
    raise ConfigError(f"backend={backend!r} is unknown: use one of {names}, or {types}.")


def register(name: str, config_type: type, backend_type: type[Backend]) -> None:
    """Adds a backend.

    Args:
        name: its name, which stands for `config_type()`.
        config_type: the frozen dataclass of its settings, all with defaults.
        backend_type: the class that runs it.

    Raises:
        ConfigError: the name or the type of its settings is taken, or an argument is of another kind.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the backend's name {name!r} must be a string that is not empty.")
    # Settings are static arguments of jitted functions, so they must be hashable.
    parameters = getattr(config_type, "__dataclass_params__", None)
    if not isinstance(config_type, type) or parameters is None or not parameters.frozen:
        raise ConfigError(f"{config_type!r} must be a frozen dataclass: it holds the settings of backend {name!r}.")
    if not isinstance(backend_type, type) or not issubclass(backend_type, Backend):
        raise ConfigError(f"{backend_type!r} must be a subclass of Backend: it runs backend {name!r}.")
    if name in BACKENDS or name == "auto":
        raise ConfigError(f"backend {name!r} is registered already: choose another name.")
    if config_type in [taken for taken, _ in BACKENDS.values()]:
        raise ConfigError(
            f"{config_type.__name__} belongs to another backend already: give {name!r} settings of its own."
        )
    BACKENDS[name] = config_type, backend_type


def name_of(config: BackendConfig) -> str:
    """The name of a backend's settings."""
    return next(name for name, (config_type, _) in BACKENDS.items() if isinstance(config, config_type))


def _check_problem(given):
    if not isinstance(given, Problem):
        raise ConfigError(f"problem={given!r} must be a Problem: grouped_matmul.problem(...) makes one.")


def _candidates(problem, backend) -> list[Backend]:
    backend = as_backend(backend)
    configs = _auto(problem) if backend == "auto" else (backend,)
    return [BACKENDS[name_of(config)][1](config) for config in configs]


def _auto(problem) -> tuple[BackendConfig, ...]:
    """The backends that "auto" tries for a problem, in order."""
    configs = AUTO.get(problem.device.platform, (XlaBackend(),))
    if not has_few_rows(problem):
        return configs
    return tuple(sorted(configs, key=lambda config: not isinstance(config, PallasBackend)))


def _tile(backend, problem):
    tiles = backend.tiles(problem)
    if not tiles:
        return None, "no choice"
    found = measured_tile(backend.tile_type(problem), name_of(backend.config), problem)
    if found is None:
        return tiles[0], "a heuristic: no table has this problem"
    tile, source = found
    if not backend.has_tile(problem, tile):
        return tiles[0], f"a heuristic: no kernel has {tile!r} of {source}"
    return tile, source
