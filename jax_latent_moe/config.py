"""Static configuration: frozen, hashable dataclasses, validated where they are built.

Names follow the published systems (Hugging Face NemotronH, Megatron, Kimi K3); where those systems differ
in what they compute, the difference is a field here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from jax_latent_moe import checks
from jax_latent_moe.activations import ACTIVATIONS, BoundActivation
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.grouped_matmul.cutlass_sm90.config import CutlassBackend, CutlassTile
from jax_latent_moe.grouped_matmul.pallas_sm90.config import PallasBackend, PallasMatmulTile, PallasWgradTile
from jax_latent_moe.grouped_matmul.registry import BACKENDS, BackendConfig, as_backend, name_of
from jax_latent_moe.grouped_matmul.xla.config import XlaBackend

__all__ = [
    "CutlassBackend",
    "CutlassTile",
    "InitConfig",
    "LatentMoEConfig",
    "PallasBackend",
    "PallasMatmulTile",
    "PallasWgradTile",
    "ParallelConfig",
    "RouterConfig",
    "XlaBackend",
    "as_backend",
]

ScoreFunction = Literal["softmax", "softmax_topk", "sigmoid", "sqrt_softplus"]
LatentNorm = Literal["none", "pre", "post"]
Dispatch = Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"]

SCORE_FUNCTIONS = ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus")
LATENT_NORMS = ("none", "pre", "post")
SELECTIONS = ("score", "logit", "given")
DROP_POLICIES = ("probs", "position")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")
ROUTER_DTYPES = ("float32", "bfloat16", "float64")
DISPATCHES = ("auto", "all_gather", "all_to_all", "ragged_all_to_all")

NORM_EPS = (1e-30, 1e6)
"""Range of a sum's epsilon in which its square, times 2^80, is a float32 number; 0 is none."""
LATENT_NORM_EPS = (1e-24, 1e24)
"""Range of a norm's epsilon in which its power -3/2, the slope at a zero row, is a float32 number."""


def _keep(config, prefix, check, names, *limits):
    """Puts what a check makes of each field, a number or name of Python's own, in its place."""
    for name in names:
        object.__setattr__(config, name, check(prefix + name, getattr(config, name), *limits))


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts and how the chosen are weighted.

    Attributes:
        score_function: "softmax" over all experts before the choice (Qwen3), "softmax_topk" over the chosen logits
            (Mixtral), "sigmoid" (DeepSeek-V3, NemotronH, Kimi K3) or "sqrt_softplus" (Megatron).
        norm_topk_prob: divide the chosen scores by their sum; refused where top_k is 1, whose weight would be 1.
        norm_topk_eps: added to that sum (1e-20 in most systems, 0 in Qwen3, 1e-9 in marin); 0, or 1e-30 to 1e6.
        routed_scaling_factor: multiplies the weights, or the routed output: see
            `LatentMoEConfig.apply_routed_scale_to_output`.
        correction_bias: add a float32 bias [E] to the scores for the choice alone (auxiliary-loss-free balancing).
        selection: choose by "score" plus bias, or by "logit" plus bias as marin does. With "given" the caller always
            passes `expert_ids`, such as DeepSeek-V4's table of token ids (arXiv 2106.04426 calls it hash routing).
        logit_bias: add a learned bias [E] to the logits (gpt-oss).
        per_expert_scale: multiply the weights by a learned factor per expert (FastDeploy, MaxText).
        num_groups: experts form this many equal groups; 1 turns group limits off.
        topk_groups: groups that a token may choose from.
        group_score_topk: a group's score is the sum of this many of its best experts (2 in Hugging Face and K3,
            top_k // topk_groups in Megatron).
        dtype: operand type of the router matmul; scores are float32, or float64 with "float64".
        switch_loss_coef: coefficient of the Switch load-balancing loss over the whole batch.
        sequence_loss_coef: coefficient of the same loss for each sequence (second to last axis of x), averaged over
            sequences.
        z_loss_coef: coefficient of mean logsumexp(logits)^2.
        bias_update_rate: step of `update_correction_bias`.
        capacity_factor: an expert keeps at most ceil(capacity_factor * T * k / E) rows; None keeps all.
        min_capacity: the least that this limit can be, in rows.
        drop_policy: over capacity, drop the rows of lowest weight ("probs") or the last ones ("position").
        round_to_tile: round each expert's number of tokens to the nearest multiple of this, as SonicMoE does
            (arXiv 2512.14080); None rounds nothing. For training: it drops the choices of experts with few tokens.
    """

    score_function: ScoreFunction = "sigmoid"
    norm_topk_prob: bool = True
    norm_topk_eps: float = 1e-20
    routed_scaling_factor: float = 1.0
    correction_bias: bool = True
    selection: Literal["score", "logit", "given"] = "score"
    logit_bias: bool = False
    per_expert_scale: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score_topk: int = 2
    dtype: str = "float32"
    switch_loss_coef: float = 0.0
    sequence_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    bias_update_rate: float = 1e-3
    capacity_factor: float | None = None
    min_capacity: int = 0
    drop_policy: Literal["probs", "position"] = "probs"
    round_to_tile: int | None = None

    def __post_init__(self):
        _keep(self, "router.", checks.dtype_name, ("dtype",), ROUTER_DTYPES)
        checks.one_of("router.score_function", self.score_function, SCORE_FUNCTIONS)
        checks.one_of("router.selection", self.selection, SELECTIONS)
        checks.one_of("router.drop_policy", self.drop_policy, DROP_POLICIES)
        _keep(self, "router.", checks.boolean, ("norm_topk_prob", "correction_bias", "logit_bias", "per_expert_scale"))
        _keep(self, "router.", checks.positive_int, ("num_groups", "topk_groups", "group_score_topk"))
        _keep(self, "router.", checks.integer, ("min_capacity",))
        losses = ("switch_loss_coef", "sequence_loss_coef", "z_loss_coef")
        _keep(self, "router.", checks.non_negative, ("norm_topk_eps", "bias_update_rate", *losses))
        if self.norm_topk_eps:
            checks.between("router.norm_topk_eps", self.norm_topk_eps, *NORM_EPS)
        _keep(self, "router.", checks.finite, ("routed_scaling_factor",))
        if self.capacity_factor is not None:
            _keep(self, "router.", checks.non_negative, ("capacity_factor",))
        if self.round_to_tile is not None:
            _keep(self, "router.", checks.positive_int, ("round_to_tile",))
            if self.capacity_factor is not None:
                raise ConfigError(
                    f"router.round_to_tile={self.round_to_tile} and router.capacity_factor={self.capacity_factor} both "
                    "say how many tokens an expert takes: set one of them to None."
                )
        if self.topk_groups > self.num_groups:
            raise ConfigError(
                f"router.topk_groups={self.topk_groups} is more than router.num_groups={self.num_groups}: "
                "a token cannot keep more groups than there are."
            )
        if self.selection == "given" and (self.correction_bias or self.num_groups > 1):
            name = "correction_bias=True" if self.correction_bias else f"num_groups={self.num_groups}"
            raise ConfigError(
                f"router.{name} has no effect with router.selection='given', which chooses no expert: set "
                f"{'correction_bias=False' if self.correction_bias else 'num_groups=1'}."
            )
        for fields, used, needs in (
            (("norm_topk_eps",), self.norm_topk_prob, "norm_topk_prob=True"),
            (("bias_update_rate",), self.correction_bias, "correction_bias=True"),
            (("group_score_topk",), self.num_groups > 1, "num_groups > 1"),
            (("min_capacity", "drop_policy"), self.capacity_factor is not None, "capacity_factor"),
        ):
            checks.refuse_unused(self, "router.", fields, used, needs)

    @property
    def has_losses(self) -> bool:
        """Whether an auxiliary loss has a coefficient."""
        return any((self.switch_loss_coef, self.sequence_loss_coef, self.z_loss_coef))

    @property
    def moves_bias(self) -> bool:
        """Whether the loads of a step move a correction bias."""
        return self.correction_bias and self.bias_update_rate > 0


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """How `init_params` draws kernels: truncated normals.

    Attributes:
        std: standard deviation of every kernel; None uses 1 / sqrt(fan_in).
        output_scale: factor on the kernels that write to the residual stream (up_proj and the shared w_out), such as
            1 / sqrt(2 * layers).
        scale_expert_output: apply output_scale to the experts' w_out as well, as Megatron does.
    """

    std: float | None = None
    output_scale: float = 1.0
    scale_expert_output: bool = True

    def __post_init__(self):
        if self.std is not None:
            _keep(self, "init.", checks.non_negative, ("std",))
        _keep(self, "init.", checks.non_negative, ("output_scale",))
        _keep(self, "init.", checks.boolean, ("scale_expert_output",))


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a layer is spread over the axes of the mesh that `jax.set_mesh` sets; an axis that it lacks has size 1.

    Attributes:
        data_axis: mesh axis that splits tokens.
        fsdp_axis: mesh axis that splits tokens and every kernel, which is gathered before use.
        expert_axis: mesh axis that splits tokens and experts; the latents travel over it.
        tensor_axis: mesh axis that splits the inner width of the experts and of the shared expert.
        dispatch: how latents reach their experts. "all_gather" sends every latent to every device, and a
            reduce-scatter brings the sums back. "all_to_all" sends buffers of equal size. "ragged_all_to_all" sends
            the routed rows alone, and does not run on CPUs. "auto" takes the faster of the first two by bytes and
            measured rates.
        capacity_factor: a device sends at most ceil(capacity_factor * T * k / n) of its T tokens' rows to each of the
            n devices of expert_axis, rounded up to a multiple of 8. The rows of least weight beyond that are dropped
            and counted in `LatentMoEAux.dropped_per_expert`. None drops nothing, and buffers hold the worst case.
        physical_to_logical: the expert that each physical expert is a copy of, from `parallel.replicate_experts`. The
            experts' parameters are then those of `parallel.expand`. None is one copy of each.
    """

    data_axis: str = "data"
    fsdp_axis: str = "fsdp"
    expert_axis: str = "expert"
    tensor_axis: str = "tensor"
    dispatch: Dispatch = "auto"
    capacity_factor: float | None = None
    physical_to_logical: tuple[int, ...] | None = None

    def __post_init__(self):
        for name, axis in zip(("data_axis", "fsdp_axis", "expert_axis", "tensor_axis"), self.axes, strict=True):
            if not isinstance(axis, str) or not axis:
                raise ConfigError(f"parallel.{name}={axis!r} must be the name of a mesh axis.")
        if len(set(self.axes)) < len(self.axes):
            raise ConfigError(f"parallel axes {self.axes} must differ: each splits the layer in its own way.")
        checks.one_of("parallel.dispatch", self.dispatch, DISPATCHES)
        if self.capacity_factor is not None:
            _keep(self, "parallel.", checks.positive, ("capacity_factor",))
        if self.physical_to_logical is not None:
            _keep(self, "parallel.", checks.integers, ("physical_to_logical",))

    @property
    def axes(self) -> tuple[str, str, str, str]:
        """The names of the data, fsdp, expert and tensor axes."""
        return self.data_axis, self.fsdp_axis, self.expert_axis, self.tensor_axis


@dataclasses.dataclass(frozen=True)
class LatentMoEConfig:
    """One latent mixture-of-experts layer.

    Attributes:
        hidden_size: d, width of x and y; the router and the shared expert read it.
        latent_size: l, width in which the routed experts work; None is a plain MoE without projections.
        num_experts: E, routed experts.
        top_k: k, experts per token.
        expert_intermediate_size: m, inner width of one routed expert.
        shared_expert_intermediate_size: ms, inner width of the shared expert; 0 is none.
        shared_expert_gate: multiply the shared expert's output by sigmoid(x @ gate), with a learned gate [d, 1]
            (Qwen2-MoE, Qwen3-Next).
        activation: "relu2" or "gelu" (one kernel), "swiglu", "clamped_swiglu", "geglu" or "situ_glu" (gate and up), or
            one that `activations.register` added.
        gelu_approximate: True takes the tanh form of gelu in "gelu" and "geglu", False the exact form.
        situ_beta: bound of the gate in "situ_glu", b (Kimi K3).
        situ_linear_beta: bound of the up half in "situ_glu", bl; None leaves the up half linear.
        swiglu_alpha: slope of the sigmoid in "clamped_swiglu" (1.702 in gpt-oss, 1 in DeepSeek-V4).
        swiglu_limit: upper bound of the gate and bound of the magnitude of the up half in "clamped_swiglu" (7 in
            gpt-oss, 10 in DeepSeek-V4).
        swiglu_shift: added to the up half after the bound in "clamped_swiglu" (1 in gpt-oss, 0 in DeepSeek-V4).
        expert_bias: add a learned bias to both products of each routed expert, b_in and b_out (gpt-oss). XLA then
            computes the activation.
        latent_norm: RMSNorm over l: "pre" after down_proj (marin), "post" after the combine (Kimi K3), or "none".
        latent_norm_eps: epsilon of that norm, 1e-24 to 1e24.
        apply_probs_on_input: multiply the expert's input by the weight instead of its output (Megatron). It needs
            top_k = 1.
        apply_routed_scale_to_output: multiply the routed output by routed_scaling_factor, after the latent norm and
            before up_proj, instead of the weights (vLLM). It changes values only with latent_norm="post".
        router: how experts are chosen.
        init: how parameters are drawn.
        dtype: type of the computation and of y; sums are in float32.
        param_dtype: type of the stored parameters (the correction bias is always float32).
        backend: "auto", a backend's name ("xla", "pallas", "cutlass") or its dataclass.
        parallel: how the layer is spread over a mesh; None leaves that to XLA's own partitioning.
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
    router: RouterConfig = RouterConfig()
    init: InitConfig = InitConfig()
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    backend: str | BackendConfig = "auto"
    parallel: ParallelConfig | None = None

    def __post_init__(self):
        _keep(self, "", checks.positive_int, ("hidden_size", "num_experts", "top_k", "expert_intermediate_size"))
        if self.latent_size is not None:
            _keep(self, "", checks.positive_int, ("latent_size",))
        _keep(self, "", checks.integer, ("shared_expert_intermediate_size",))
        checks.one_of("activation", self.activation, tuple(ACTIVATIONS))
        checks.one_of("latent_norm", self.latent_norm, LATENT_NORMS)
        _keep(self, "", checks.boolean, ("shared_expert_gate", "gelu_approximate", "expert_bias"))
        _keep(self, "", checks.boolean, ("apply_probs_on_input", "apply_routed_scale_to_output"))
        _keep(self, "", checks.positive, ("situ_beta", "latent_norm_eps", "swiglu_alpha", "swiglu_limit"))
        _keep(self, "", checks.finite, ("swiglu_shift",))
        if self.situ_linear_beta is not None:
            _keep(self, "", checks.positive, ("situ_linear_beta",))
        checks.between("latent_norm_eps", self.latent_norm_eps, *LATENT_NORM_EPS)
        checks.instance("router", self.router, RouterConfig)
        checks.instance("init", self.init, InitConfig)
        if self.parallel is not None:
            checks.instance("parallel", self.parallel, ParallelConfig)
        _keep(self, "", checks.dtype_name, ("dtype", "param_dtype"), COMPUTE_DTYPES)
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
                f"each of num_experts={self.num_experts} needs a copy, and no other."
            )

    def _check_activation(self):
        parameters = ACTIVATIONS[self.activation].parameters
        for name in parameters:
            if name not in {field.name for field in dataclasses.fields(self)}:
                raise ConfigError(
                    f"activation={self.activation!r} reads {name}, which is no field of LatentMoEConfig: register it "
                    "with parameters that are."
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
        if self.apply_probs_on_input and router.round_to_tile is not None:
            raise ConfigError(
                "apply_probs_on_input=True multiplies a token by one weight, and router.round_to_tile="
                f"{router.round_to_tile} may give it two experts: set one of them only."
            )
        if self.apply_probs_on_input and k != 1:
            raise ConfigError(f"apply_probs_on_input needs top_k=1, got top_k={k}: weights differ between experts.")
        if experts % router.num_groups:
            raise ConfigError(
                f"num_experts={experts} must be a multiple of router.num_groups={router.num_groups}: groups are equal."
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
        """The config as JSON takes it: dicts, lists, strings and numbers. A backend is its name and its fields."""
        fields = dataclasses.asdict(self)
        if self.backend != "auto":
            fields["backend"] = {"name": name_of(self.backend), **fields["backend"]}
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LatentMoEConfig":
        """The config of `to_dict`; fields that are left out have their defaults.

        Raises:
            ConfigError: a field is unknown, is missing, or its value is refused.
        """
        return _from_dict(cls, "", fields)

    @property
    def latent_width(self) -> int:
        """Width that the routed experts read and write, which is latent_size, or hidden_size in a plain MoE."""
        return self.hidden_size if self.latent_size is None else self.latent_size

    @property
    def num_physical_experts(self) -> int:
        """Experts whose parameters the layer holds: num_experts, or more with copies."""
        copies = None if self.parallel is None else self.parallel.physical_to_logical
        return self.num_experts if copies is None else len(copies)

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate beside the up kernel."""
        return ACTIVATIONS[self.activation].gated

    @property
    def bound_activation(self) -> BoundActivation:
        """The activation with those of these fields that it reads."""
        names = ACTIVATIONS[self.activation].parameters
        return BoundActivation(self.activation, tuple((name, getattr(self, name)) for name in names))


def _from_dict(cls, prefix, fields):
    """The dataclass of these fields, of which dicts become the dataclass that the field's type names."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{prefix.removesuffix('.') or cls.__name__}={fields!r} must be a dict of fields.")
    types = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(map(str, fields)) - set(known)):
        raise ConfigError(f"{prefix}{unknown[0]} is no field of {cls.__name__}: use {', '.join(known)}.")
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
