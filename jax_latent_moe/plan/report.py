"""A cost plan of a layer on a mesh of GPUs, and its text."""

import dataclasses

from jax.sharding import AbstractMesh

from jax_latent_moe import checks, cost, one_token
from jax_latent_moe.config import LatentMoEConfig, ParallelConfig
from jax_latent_moe.expert_plan import ExpertPlan
from jax_latent_moe.parallel import explain
from jax_latent_moe.parallel.mesh import check_divides
from jax_latent_moe.params import check_config
from jax_latent_moe.plan.decisions import experts_of, shapes_of
from jax_latent_moe.plan.gpus import GPU
from jax_latent_moe.plan.memory import memory
from jax_latent_moe.plan.rows import expert_rows
from jax_latent_moe.plan.timing import Part, layer_parts

COMPUTE = ("arithmetic", "memory")


@dataclasses.dataclass(frozen=True)
class CostPlan:
    """The result of `make_cost_plan`, for one device.

    Attributes:
        config: the layer, with `parallel` set and without `pad_to_capacity`, whose rows are in `experts`.
        sizes: devices along each mesh axis.
        tokens: tokens of one device.
        gpu: the device.
        layers: number of MoE layers.
        training: whether the backward pass and the optimiser are counted.
        format: the format of the experts' weights; None for dense weights. Times are always for dense weights.
        experts: what the layer decides about the experts' products.
        one_token: the result of `one_token.explain`; None for more than one token.
        memory: bytes by use.
        parts: the parts of one layer, with their times.
    """

    config: LatentMoEConfig
    sizes: dict[str, int]
    tokens: int
    gpu: GPU
    layers: int
    training: bool
    format: str | None
    experts: ExpertPlan
    one_token: str | None
    memory: dict[str, int]
    parts: tuple[Part, ...]

    @property
    def compute_ms(self) -> float:
        """Time of one layer's kernels, run one after the other."""
        return sum(part.ms for part in self.parts if part.bound in COMPUTE)

    @property
    def communication_ms(self) -> float:
        """Time of one layer's collectives, run one after the other."""
        return sum(part.ms for part in self.parts if part.bound not in COMPUTE)

    @property
    def bytes(self) -> int:
        """Bytes of memory of one device."""
        return sum(self.memory.values())

    @property
    def binds(self) -> str:
        """The bottleneck, as a sentence."""
        if self.bytes > self.gpu.memory:
            use = max(self.memory, key=lambda name: self.memory[name])
            return f"Memory: {self.bytes / 1e9:.0f} of {self.gpu.memory / 1e9:.0f} GB, most of it {use}."
        worst = max(self.parts, key=lambda part: part.ms)
        share = worst.ms / (self.compute_ms + self.communication_ms)
        return f"{worst.name}, bound by {worst.bound}: {share:.0%} of the time."


def make_cost_plan(
    config: LatentMoEConfig,
    sizes: dict[str, int],
    tokens: int,
    gpu: GPU,
    *,
    layers: int = 1,
    training: bool = True,
    remat: bool = False,
    format: str | None = None,
) -> CostPlan:
    """Estimates the memory and time of MoE layers on a mesh, from the roofline of each part.

    Args:
        config: the layer. If it has no `parallel`, the defaults of `ParallelConfig` are used.
        sizes: devices along each mesh axis, such as {"data": 8, "expert": 8}.
        tokens: tokens of one device.
        gpu: one of `GPUS`, or your own.
        layers: number of MoE layers. Memory counts all of them, times are for one.
        training: whether to count gradients and Adam.
        remat: whether the layers keep only their input and are computed again.
        format: the experts' weights are quantised in this format and frozen. It changes the memory and `experts`
            alone: times are for dense weights.

    Raises:
        ConfigError: a number is not a positive integer, or the size of an axis does not divide what it splits.
        InputError: config is of another type.
        UnsupportedError: the named dispatch does not run on this mesh, or the named backend not on this GPU.
    """
    check_config(config)
    tokens, layers = checks.positive_int("tokens", tokens), checks.positive_int("layers", layers)
    sizes = {axis: checks.positive_int(f"sizes[{axis!r}]", size) for axis, size in sizes.items()}
    mesh, given = AbstractMesh(tuple(sizes.values()), tuple(sizes)), config
    if config.parallel is None:
        # On one device a layer may pad to capacity, and `given` then says how many rows it has.
        router = config.router if sizes else dataclasses.replace(config.router, pad_to_capacity=False)
        config = dataclasses.replace(config, router=router, parallel=ParallelConfig())
    check_divides(config, mesh)
    # A layer without a mesh may run kernels that a layer with one does not.
    given = config if sizes else given
    dense_rows = rows = expert_rows(given, mesh, tokens, gpu.device)
    dense = experts = experts_of(given, mesh, tokens, dense_rows, gpu)
    if format is not None:
        rows = expert_rows(given, mesh, tokens, gpu.device, format)
        experts = experts_of(given, mesh, tokens, rows, gpu, format)
    used = memory(
        config, mesh, tokens, layers, rows, gpu.device, experts, training=training, remat=remat, format=format
    )
    parts = layer_parts(config, mesh, tokens, gpu, dense_rows, dense, training=training, remat=remat)
    said = None
    if tokens == 1:
        said = one_token.explain(given, tokens, shapes_of(given, format), device=gpu.device)
    return CostPlan(config, sizes, tokens, gpu, layers, training, format, experts, said, used, tuple(parts))


def render(plan: CostPlan) -> str:
    """The plan as text."""
    config, layers = plan.config, plan.layers
    total, active = layers * cost.parameters(config), layers * cost.active_parameters(config)
    flops = layers * cost.matmul_flops_per_token(config) * (3 if plan.training else 1)
    axes = ", ".join(f"{axis}={size}" for axis, size in plan.sizes.items()) or "one device"
    assert config.parallel is not None
    lines = [
        f"{layers} MoE layer(s) on {axes}; {plan.tokens} tokens a device, {'training' if plan.training else 'forward'}",
        f"  parameters {total / 1e9:.2f} B, active {active / 1e9:.2f} B, {flops / 1e9:.2f} GFLOP a token",
        "Memory of a device, GB",
        *(f"  {name:<32}{size / 1e9:9.2f}" for name, size in plan.memory.items()),
        f"  {'all, of ' + format(plan.gpu.memory / 1e9, '.0f'):<32}{plan.bytes / 1e9:9.2f}",
        "Experts",
        *(f"  {line}" for line in plan.experts.summary()),
        *([] if plan.one_token is None else [f"  without a gradient, {plan.one_token}"]),
        "Dispatch, forward",
        *(f"  {line}" for line in _dispatches(plan).splitlines()),
        "Time of a layer, ms" if plan.format is None else "Time of a layer with dense experts, ms",
        *(f"  {part.name:<32}{part.ms:9.2f}  {part.bound}" for part in plan.parts),
        f"  {'kernels + collectives':<32}{plan.compute_ms:9.2f} + {plan.communication_ms:.2f}",
        f"Binds: {plan.binds}",
    ]
    return "\n".join(lines)


def _dispatches(plan: CostPlan) -> str:
    assert plan.config.parallel is not None
    devices = plan.sizes.get(plan.config.parallel.expert_axis, 1)
    return explain(plan.config, devices, plan.tokens, device=plan.gpu.device)
