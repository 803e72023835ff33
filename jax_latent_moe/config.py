"""Static configuration: frozen, hashable dataclasses, validated where they are built.

Names follow the published systems (Hugging Face NemotronH, Megatron, Kimi K3). If two systems compute different values,
a field selects between them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from jax_latent_moe import checks
from jax_latent_moe.activations import ACTIVATIONS, BoundActivation
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.grouped_matmul.cutlass_sm90.config import CutlassBackend, CutlassTile
from jax_latent_moe.grouped_matmul.pallas_sm90.config import (
    PallasBackend,
    PallasFp8Tile,
    PallasMatmulTile,
    PallasWgradTile,
    PallasWidenTile,
)
from jax_latent_moe.grouped_matmul.registry import BACKENDS, BackendConfig, as_backend, name_of
from jax_latent_moe.grouped_matmul.xla.config import XlaBackend
from jax_latent_moe.precision import Precision, check_rows_format
from jax_latent_moe.router_config import SCORE_FUNCTIONS, RouterConfig

__all__ = [
    "SCORE_FUNCTIONS",
    "CutlassBackend",
    "CutlassTile",
    "InitConfig",
    "LatentMoEConfig",
    "PallasBackend",
    "PallasFp8Tile",
    "PallasMatmulTile",
    "PallasWgradTile",
    "PallasWidenTile",
    "ParallelConfig",
    "Precision",
    "RouterConfig",
    "XlaBackend",
    "as_backend",
]

LatentNorm = Literal["none", "pre", "post"]
Dispatch = Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"]

LATENT_NORMS = ("none", "pre", "post")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")
DISPATCHES = ("auto", "all_gather", "all_to_all", "ragged_all_to_all")

LATENT_NORM_EPS = (1e-24, 1e24)
"""Range of a norm's epsilon whose power -3/2, the slope at a zero row, float32 can hold."""


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """How `init_params` draws kernels, which are truncated normals.

    Attributes:
        std: standard deviation of every kernel. None is 1 / sqrt(fan_in).
        output_scale: factor on the kernels that write to the residual stream (up_proj and the shared w_out), such as
            1 / sqrt(2 * layers).
        scale_expert_output: apply output_scale to the experts' w_out too, as Megatron does.
    """

    std: float | None = None
    output_scale: float = 1.0
    scale_expert_output: bool = True

    def __post_init__(self):
        if self.std is not None:
            checks.keep(self, "init.", checks.non_negative, ("std",))
        checks.keep(self, "init.", checks.non_negative, ("output_scale",))
        checks.keep(self, "init.", checks.boolean, ("scale_expert_output",))


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a layer is spread over the axes of the mesh that `jax.set_mesh` sets. An axis that the mesh lacks has size 1.

    Attributes:
        data_axis: mesh axis that splits the first axis of x.
        fsdp_axis: mesh axis that splits the first axis of x, and every kernel, which is gathered before use.
        expert_axis: mesh axis that splits the first axis of x, and the experts. Latents travel over it.
        tensor_axis: mesh axis that splits the inner width of the experts and of the shared expert.
        dispatch: how latents reach their experts. "all_gather" sends every latent to every device, and a
            reduce-scatter returns the sums. "all_to_all" sends buffers of equal size. "ragged_all_to_all" sends only
            the routed rows, and does not run on CPUs. "auto" takes the faster of the first two, by bytes and measured
            rates.
        capacity_factor: a device sends at most ceil(capacity_factor * T * k / n) of its T tokens' rows to each of the
            n devices of expert_axis, rounded up to a multiple of 8. The rows of least weight beyond that are dropped
            and counted in `LatentMoEAux.dropped_per_expert`. None drops nothing, and buffers hold the worst case.
        sequence_axis: mesh axis that splits the sequences of x (its second to last axis) into parts.
        physical_to_logical: the logical expert of each physical expert, from `parallel.replicate_experts`. The experts'
            parameters then come from `parallel.expand`. None is one copy of each.
        dispatch_format: format of the rows that travel to the experts, "fp8_block" or "fp8_block_pow2": latents in the
            forward pass, gradients of the sums in the backward pass. They take half the bytes of 16-bit rows. The sums
            come back in config.dtype. None sends config.dtype both ways.
        round_factor: a device's experts compute at most ceil(round_factor * T * k) rows at a time, for T tokens a
            device. T * k rows are the mean, and n T k the worst case, for which arrays need not be made then. If
            experts have more rows, further rounds follow, and nothing is dropped. At least 1. None computes all rows at
            once. So does a layer in which rounds would not save memory.
    """

    data_axis: str = "data"
    fsdp_axis: str = "fsdp"
    expert_axis: str = "expert"
    tensor_axis: str = "tensor"
    dispatch: Dispatch = "auto"
    capacity_factor: float | None = None
    sequence_axis: str = "sequence"
    physical_to_logical: tuple[int, ...] | None = None
    dispatch_format: str | None = None
    round_factor: float | None = 1.25

    def __post_init__(self):
        axes = (*self.axes, self.sequence_axis)
        names = ("data_axis", "fsdp_axis", "expert_axis", "tensor_axis", "sequence_axis")
        for name, axis in zip(names, axes, strict=True):
            if not isinstance(axis, str) or not axis:
                raise ConfigError(f"parallel.{name}={axis!r} must be the name of a mesh axis.")
        if len(set(axes)) < len(axes):
            raise ConfigError(f"parallel axes {axes} must differ: each splits the layer in its own way.")
        checks.one_of("parallel.dispatch", self.dispatch, DISPATCHES)
        if self.capacity_factor is not None:
            checks.keep(self, "parallel.", checks.positive, ("capacity_factor",))
        if self.physical_to_logical is not None:
            checks.keep(self, "parallel.", checks.integers, ("physical_to_logical",))
        if self.dispatch_format is not None:
            check_rows_format("parallel.dispatch_format", self.dispatch_format)
        if self.round_factor is not None:
            checks.keep(self, "parallel.", checks.at_least_one, ("round_factor",))

    @property
    def axes(self) -> tuple[str, str, str, str]:
        """The names of the data, fsdp, expert and tensor axes, which split parameters or the first axis of x."""
        return self.data_axis, self.fsdp_axis, self.expert_axis, self.tensor_axis


@dataclasses.dataclass(frozen=True)
class LatentMoEConfig:
    """One latent mixture-of-experts layer.

    Attributes:
        hidden_size: d, width of x and y. The router and the shared expert read this width.
        latent_size: l, width of the routed experts' input and output. None is a plain MoE without projections.
        num_experts: E, routed experts.
        top_k: k, experts per token.
        expert_intermediate_size: m, inner width of one routed expert.
        shared_expert_intermediate_size: ms, inner width of the shared expert. 0 is no shared expert.
        shared_expert_gate: multiply the shared expert's output by sigmoid(x @ gate), with a learned gate [d, 1]
            (Qwen2-MoE, Qwen3-Next).
        activation: "relu2" or "gelu" (one kernel), "swiglu", "clamped_swiglu", "geglu" or "situ_glu" (gate and up), or
            one that `activations.register` added.
        gelu_approximate: True is the tanh form of gelu in "gelu" and "geglu", False the exact form.
        situ_beta: bound of the gate in "situ_glu", b (Kimi K3).
        situ_linear_beta: bound of the up half in "situ_glu", bl. None leaves the up half linear.
        swiglu_alpha: slope of the sigmoid in "clamped_swiglu" (1.702 in gpt-oss, 1 in DeepSeek-V4).
        swiglu_limit: upper bound of the gate, and bound of the magnitude of the up half, in "clamped_swiglu" (7 in
            gpt-oss, 10 in DeepSeek-V4).
        swiglu_shift: added to the bounded up half in "clamped_swiglu" (1 in gpt-oss, 0 in DeepSeek-V4).
        expert_bias: add a learned bias to both products of each routed expert, b_in and b_out (gpt-oss). XLA then
            computes the activation.
        latent_norm: RMSNorm over l: "pre" after down_proj (marin), "post" after the combine (Kimi K3), or "none".
        latent_norm_eps: epsilon of that norm, 1e-24 to 1e24.
        apply_probs_on_input: multiply the expert's input instead of its output by the weight (Megatron). It needs
            top_k = 1.
        apply_routed_scale_to_output: multiply the routed output instead of the weights by routed_scaling_factor, after
            the latent norm and before up_proj (vLLM). It changes values only with latent_norm="post".
        router: how experts are chosen.
        init: how parameters are drawn.
        dtype: dtype of the computation and of y. Sums are in float32.
        param_dtype: dtype of the stored parameters. The correction bias is always float32.
        backend: "auto", a backend's name ("xla", "pallas", "cutlass") or its dataclass.
        precision: the formats in which the experts' products multiply, such as FP8. None is dtype for all.
        keep_gathered_rows: keep the experts' input rows [T k, l] for the backward pass, in dtype. Otherwise it gathers
            them again, which takes more time and less memory. Adapters always keep them, and a frozen w_in needs none.
        parallel: how the layer is spread over a mesh. None leaves that to XLA's own partitioning.
    """

    hidden_size: int
    latent_size: int | None
    num_experts: int
    top_k: int
    expert_intermediate_size: int
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    activation: str = "relu2"
    gelu_approximate: bool = False
    situ_beta: float = 4.0
    situ_linear_beta: float | None = 25.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    swiglu_shift: float = 1.0
    expert_bias: bool = False
    latent_norm: LatentNorm = "none"
    latent_norm_eps: float = 1e-5
    apply_probs_on_input: bool = False
    apply_routed_scale_to_output: bool = False
    router: RouterConfig = RouterConfig()  # noqa: RUF009 (it is frozen)
    init: InitConfig = InitConfig()
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    backend: str | BackendConfig = "auto"
    precision: Precision | None = None
    keep_gathered_rows: bool = False
    parallel: ParallelConfig | None = None

    def __post_init__(self):
        checks.keep(self, "", checks.positive_int, ("hidden_size", "num_experts", "top_k", "expert_intermediate_size"))
        if self.latent_size is not None:
            checks.keep(self, "", checks.positive_int, ("latent_size",))
        checks.keep(self, "", checks.integer, ("shared_expert_intermediate_size",))
        checks.one_of("activation", self.activation, tuple(ACTIVATIONS))
        checks.one_of("latent_norm", self.latent_norm, LATENT_NORMS)
        checks.keep(self, "", checks.boolean, ("shared_expert_gate", "gelu_approximate", "expert_bias"))
        checks.keep(self, "", checks.boolean, ("keep_gathered_rows",))
        checks.keep(self, "", checks.boolean, ("apply_probs_on_input", "apply_routed_scale_to_output"))
        checks.keep(self, "", checks.positive, ("situ_beta", "latent_norm_eps", "swiglu_alpha", "swiglu_limit"))
        checks.keep(self, "", checks.finite, ("swiglu_shift",))
        if self.situ_linear_beta is not None:
            checks.keep(self, "", checks.positive, ("situ_linear_beta",))
        checks.between("latent_norm_eps", self.latent_norm_eps, *LATENT_NORM_EPS)
        checks.instance("router", self.router, RouterConfig)
        checks.instance("init", self.init, InitConfig)
        if self.precision is not None:
            checks.instance("precision", self.precision, Precision)
            if self.keep_gathered_rows and self.precision.fwd is not None:
                raise ConfigError(
                    f"keep_gathered_rows=True needs precision.fwd=None, got {self.precision.fwd!r}: it gathers codes, "
                    "and the backward pass reads rows in dtype."
                )
        if self.parallel is not None:
            checks.instance("parallel", self.parallel, ParallelConfig)
        checks.keep(self, "", checks.dtype_name, ("dtype", "param_dtype"), COMPUTE_DTYPES)
        object.__setattr__(self, "backend", as_backend(self.backend))
        self._check_activation()
        gate_used = self.shared_expert_intermediate_size > 0
        checks.refuse_unused(self, "", ("shared_expert_gate",), gate_used, "shared_expert_intermediate_size")
        checks.refuse_unused(self, "", ("latent_norm_eps",), self.latent_norm != "none", "latent_norm='pre' or 'post'")
        self._check_routing()
        copies = () if self.parallel is None else self.parallel.physical_to_logical or ()
        if copies and set(copies) != set(range(self.num_experts)):
            raise ConfigError(
                f"parallel.physical_to_logical names {len(set(copies))} experts from {min(copies)} to {max(copies)}: "
                f"name each of num_experts={self.num_experts} experts at least once, and no others."
            )

    def _check_activation(self):
        parameters = ACTIVATIONS[self.activation].parameters
        for name in parameters:
            if name not in {field.name for field in dataclasses.fields(self)}:
                raise ConfigError(
                    f"activation={self.activation!r} reads {name}, which is not a field of LatentMoEConfig: register "
                    "it with parameters that are fields."
                )
        swiglu = ("swiglu_alpha", "swiglu_limit", "swiglu_shift")
        for name in ("gelu_approximate", "situ_beta", "situ_linear_beta", *swiglu):
            readers = " or ".join(repr(other.name) for other in ACTIVATIONS.values() if name in other.parameters)
            checks.refuse_unused(self, "", (name,), name in parameters, f"activation={readers}")

    def _check_routing(self):
        experts, k, router = self.num_experts, self.top_k, self.router
        if k > experts:
            raise ConfigError(f"top_k={k} is more than num_experts={experts}: a token chooses distinct experts.")
        if k == 1 and (router.norm_topk_prob or router.score_function == "softmax_topk"):
            what = "norm_topk_prob=True" if router.norm_topk_prob else "score_function='softmax_topk'"
            raise ConfigError(
                f"top_k=1 with router.{what} gives every weight 1 and the router no gradient: set "
                "router.norm_topk_prob=False, and a score_function other than 'softmax_topk', as Megatron does."
            )
        if router.bias_update == "quantile" and k == experts:
            raise ConfigError(
                f"router.bias_update='quantile' needs top_k={k} to be less than num_experts={experts}: otherwise all "
                "loads are equal."
            )
        if self.apply_probs_on_input and router.round_to_tile is not None:
            raise ConfigError(
                "apply_probs_on_input=True multiplies a token by one weight, and router.round_to_tile="
                f"{router.round_to_tile} may give it two experts: set only one of these fields."
            )
        if self.apply_probs_on_input and k != 1:
            raise ConfigError(f"apply_probs_on_input needs top_k=1, got top_k={k}: weights differ between experts.")
        if router.pad_to_capacity and self.parallel is not None:
            raise ConfigError(
                "router.pad_to_capacity=True needs parallel=None: over a mesh, parallel.capacity_factor bounds the "
                "rows that travel, and each device sees its own part of an expert's tokens."
            )
        if experts % router.num_groups:
            raise ConfigError(
                f"num_experts={experts} must be a multiple of router.num_groups={router.num_groups}, since groups are "
                "equal."
            )
        if router.num_groups == 1:
            return
        group = experts // router.num_groups
        if router.group_score_topk > group:
            raise ConfigError(
                f"router.group_score_topk={router.group_score_topk} is more than the {group} experts of a group "
                f"(num_experts={experts} / num_groups={router.num_groups})."
            )
        if k > router.topk_groups * group:
            raise ConfigError(
                f"top_k={k} is more than the {router.topk_groups * group} experts in router.topk_groups="
                f"{router.topk_groups} groups of {group}: keep more groups or choose fewer experts."
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as dicts, lists, strings and numbers, for JSON. A backend becomes its name and its fields."""
        fields = dataclasses.asdict(self)
        if self.backend != "auto":
            fields["backend"] = {"name": name_of(self.backend), **fields["backend"]}
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LatentMoEConfig":
        """The config that `to_dict` wrote. A field that is left out has its default.

        Raises:
            ConfigError: a field is unknown or missing, or its value is refused.
        """
        return _from_dict(cls, "", fields)

    @property
    def latent_width(self) -> int:
        """Width that the routed experts read and write: latent_size, or hidden_size in a plain MoE."""
        return self.hidden_size if self.latent_size is None else self.latent_size

    @property
    def num_physical_experts(self) -> int:
        """Experts whose parameters the layer holds: num_experts, or more with copies."""
        copies = None if self.parallel is None else self.parallel.physical_to_logical
        return self.num_experts if copies is None else len(copies)

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate kernel besides the up kernel."""
        return ACTIVATIONS[self.activation].gated

    @property
    def bound_activation(self) -> BoundActivation:
        """The activation with the fields that it reads."""
        names = ACTIVATIONS[self.activation].parameters
        return BoundActivation(self.activation, tuple((name, getattr(self, name)) for name in names))


def _from_dict(cls, prefix, fields):
    """The dataclass of these fields. A dict becomes the dataclass that the field's type names."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{prefix.removesuffix('.') or cls.__name__}={fields!r} must be a dict of fields.")
    types = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(map(str, fields)) - set(known)):
        raise ConfigError(f"{prefix}{unknown[0]} is not a field of {cls.__name__}: use {', '.join(known)}.")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in fields]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing: {cls.__name__} has no default for it.")
    return cls(**{name: _value(types[name], f"{prefix}{name}", value) for name, value in fields.items()})


def _value(kind, name, value):
    if not isinstance(value, Mapping):
        return value
    choices = [choice for choice in (kind, *get_args(kind)) if dataclasses.is_dataclass(choice)]
    if name == "backend":
        checks.one_of("backend.name", value.get("name"), tuple(BACKENDS))
        choices = [BACKENDS[value["name"]][0]]
        value = {key: part for key, part in value.items() if key != "name"}
    if not choices:
        raise ConfigError(f"{name}={value!r} must not be a dict.")
    return _from_dict(choices[0], f"{name}.", value)
