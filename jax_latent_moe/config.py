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
Selection = Literal["score", "logit", "sinkhorn"]
LatentNorm = Literal["none", "pre", "post"]
Dispatch = Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"]

SCORE_FUNCTIONS = ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus")
LATENT_NORMS = ("none", "pre", "post")
SELECTIONS = ("score", "logit", "sinkhorn")
DROP_POLICIES = ("probs", "position")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")
ROUTER_DTYPES = ("float32", "bfloat16", "float64")
DISPATCHES = ("auto", "all_gather", "all_to_all", "ragged_all_to_all")

NORM_EPS = (1e-30, 1e6)
"""Range of a sum's epsilon whose square, times 2^80, float32 can hold. An epsilon of 0 is allowed too."""
LATENT_NORM_EPS = (1e-24, 1e24)
"""Range of a norm's epsilon whose power -3/2, the slope at a zero row, float32 can hold."""


def _keep(config, prefix, check, names, *limits):
    """Replaces each field by what the check returns for it, which is a number or a string of Python's own types."""
    for name in names:
        object.__setattr__(config, name, check(prefix + name, getattr(config, name), *limits))


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts, how the chosen experts are weighted, and the losses that balance them.

    Attributes:
        score_function: "softmax" over all experts before the choice (Qwen3), "softmax_topk" over the chosen logits
            (Mixtral), "sigmoid" (DeepSeek-V3, NemotronH, Kimi K3) or "sqrt_softplus" (Megatron).
        norm_topk_prob: divide the chosen scores by their sum. It is refused for top_k = 1, where every weight is 1.
        norm_topk_eps: added to that sum (1e-20 in most systems, 0 in Qwen3, 1e-9 in marin). 0, or 1e-30 to 1e6.
        routed_scaling_factor: multiplies the weights, or the routed output: see
            `LatentMoEConfig.apply_routed_scale_to_output`.
        correction_bias: add a float32 bias [E] to the scores for the choice alone (auxiliary-loss-free balancing).
        selection: choose by "score" plus bias, by "logit" plus bias as marin does, or by "sinkhorn", Megatron's
            balanced assignment of all tokens of the call. "sinkhorn" takes neither a bias nor groups. It makes a
            token's experts depend on the other tokens, so evaluate with another selection.
        input_jitter: multiply the router's input by random factors in [1 - input_jitter, 1 + input_jitter) (Switch
            Transformers, Megatron). 0 is off. It must be less than 1. See the argument `key` of `latent_moe`.
        per_expert_scale: multiply the weights by a learned factor per expert (FastDeploy, MaxText).
        num_groups: experts form this many equal groups. 1 turns group limits off.
        topk_groups: groups that a token may choose from.
        group_score_topk: a group's score is the sum of this many of its best experts (2 in Hugging Face and K3,
            top_k // topk_groups in Megatron).
        dtype: operand type of the router matmul. Scores are float32, or float64 with "float64".
        switch_loss_coef: coefficient of the Switch load-balancing loss over the whole batch.
        sequence_loss_coef: coefficient of the same loss for each sequence (second to last axis of x) or document
            (`segment_ids`), averaged over those with real tokens.
        global_loss_coef: coefficient of the same loss with the experts' loads over all microbatches of the step so far,
            as Megatron's global_aux_loss.
        z_loss_coef: coefficient of mean logsumexp(logits)^2.
        bias_update_rate: step of `update_correction_bias`.
        capacity_factor: an expert keeps at most ceil(capacity_factor * T * k / E) rows. None keeps all.
        min_capacity: lower bound of that limit, in rows.
        drop_policy: over capacity, drop the rows of lowest weight ("probs") or the last rows ("position").
        pad_to_capacity: give every expert exactly as many rows as its capacity (Megatron's
            moe_pad_expert_input_to_capacity). Values do not change. It needs parallel=None.
    """

    score_function: ScoreFunction = "sigmoid"
    norm_topk_prob: bool = True
    norm_topk_eps: float = 1e-20
    routed_scaling_factor: float = 1.0
    correction_bias: bool = True
    selection: Selection = "score"
    input_jitter: float = 0.0
    per_expert_scale: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score_topk: int = 2
    dtype: str = "float32"
    switch_loss_coef: float = 0.0
    sequence_loss_coef: float = 0.0
    global_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    bias_update_rate: float = 1e-3
    capacity_factor: float | None = None
    min_capacity: int = 0
    drop_policy: Literal["probs", "position"] = "probs"
    pad_to_capacity: bool = False

    def __post_init__(self):
        _keep(self, "router.", checks.dtype_name, ("dtype",), ROUTER_DTYPES)
        checks.one_of("router.score_function", self.score_function, SCORE_FUNCTIONS)
        checks.one_of("router.selection", self.selection, SELECTIONS)
        checks.one_of("router.drop_policy", self.drop_policy, DROP_POLICIES)
        _keep(
            self,
            "router.",
            checks.boolean,
            ("norm_topk_prob", "correction_bias", "per_expert_scale", "pad_to_capacity"),
        )
        _keep(self, "router.", checks.positive_int, ("num_groups", "topk_groups", "group_score_topk"))
        _keep(self, "router.", checks.integer, ("min_capacity",))
        losses = ("switch_loss_coef", "sequence_loss_coef", "global_loss_coef", "z_loss_coef")
        _keep(self, "router.", checks.non_negative, ("norm_topk_eps", "bias_update_rate", "input_jitter", *losses))
        if self.input_jitter >= 1:
            raise ConfigError(
                f"router.input_jitter={self.input_jitter!r} must be less than 1: the factors must be positive."
            )
        if self.norm_topk_eps:
            checks.between("router.norm_topk_eps", self.norm_topk_eps, *NORM_EPS)
        _keep(self, "router.", checks.finite, ("routed_scaling_factor",))
        if self.capacity_factor is not None:
            _keep(self, "router.", checks.non_negative, ("capacity_factor",))
        if self.topk_groups > self.num_groups:
            raise ConfigError(
                f"router.topk_groups={self.topk_groups} is more than router.num_groups={self.num_groups}: "
                "a token cannot keep more groups than there are."
            )
        for fields, used, needs in (
            (("norm_topk_eps",), self.norm_topk_prob, "norm_topk_prob=True"),
            (("bias_update_rate",), self.correction_bias, "correction_bias=True"),
            (("group_score_topk",), self.num_groups > 1, "num_groups > 1"),
            (("min_capacity", "drop_policy", "pad_to_capacity"), self.capacity_factor is not None, "capacity_factor"),
        ):
            checks.refuse_unused(self, "router.", fields, used, needs)

        if self.selection == "sinkhorn":
            for name, value, needed in (
                ("correction_bias", self.correction_bias, False),
                ("num_groups", self.num_groups, 1),
            ):
                if value != needed:
                    raise ConfigError(
                        f"router.{name}={value!r} has no part in selection='sinkhorn': set it to {needed!r}, or choose "
                        "by 'score' or 'logit'."
                    )

    @property
    def has_losses(self) -> bool:
        """Whether an auxiliary loss has a coefficient."""
        return any((self.switch_loss_coef, self.sequence_loss_coef, self.global_loss_coef, self.z_loss_coef))

    @property
    def moves_bias(self) -> bool:
        """Whether a step moves the correction bias by its loads."""
        return self.correction_bias and self.bias_update_rate > 0


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
            _keep(self, "init.", checks.non_negative, ("std",))
        _keep(self, "init.", checks.non_negative, ("output_scale",))
        _keep(self, "init.", checks.boolean, ("scale_expert_output",))


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
    """

    data_axis: str = "data"
    fsdp_axis: str = "fsdp"
    expert_axis: str = "expert"
    tensor_axis: str = "tensor"
    dispatch: Dispatch = "auto"
    capacity_factor: float | None = None
    sequence_axis: str = "sequence"

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
            _keep(self, "parallel.", checks.positive, ("capacity_factor",))

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
        activation: "relu2" or "gelu" (one kernel), "swiglu", "geglu" or "situ_glu" (gate and up), or one that
            `activations.register` added.
        gelu_approximate: True is the tanh form of gelu in "gelu" and "geglu", False the exact form.
        situ_beta: bound of the gate in "situ_glu", b (Kimi K3).
        situ_linear_beta: bound of the up half in "situ_glu", bl. None leaves the up half linear.
        latent_norm: RMSNorm over l: "pre" after down_proj (marin), "post" after the combine (Kimi K3), or "none".
        latent_norm_eps: epsilon of that norm, 1e-24 to 1e24.
        apply_probs_on_input: multiply the expert's input by the weight, and not its output (Megatron). It needs
            top_k = 1.
        apply_routed_scale_to_output: multiply the routed output by routed_scaling_factor, after the latent norm and
            before up_proj, and not the weights (vLLM). It changes values only with latent_norm="post".
        router: how experts are chosen.
        init: how parameters are drawn.
        dtype: dtype of the computation and of y. Sums are in float32.
        param_dtype: dtype of the stored parameters. The correction bias is always float32.
        backend: "auto", a backend's name ("xla", "pallas", "cutlass") or its dataclass.
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
        _keep(
            self,
            "",
            checks.boolean,
            ("shared_expert_gate", "gelu_approximate", "apply_probs_on_input", "apply_routed_scale_to_output"),
        )
        _keep(self, "", checks.positive, ("situ_beta", "latent_norm_eps"))
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

    def _check_activation(self):
        parameters = ACTIVATIONS[self.activation].parameters
        for name in parameters:
            if name not in {field.name for field in dataclasses.fields(self)}:
                raise ConfigError(
                    f"activation={self.activation!r} reads {name}, which is not a field of LatentMoEConfig: register "
                    "it with parameters that are fields."
                )
        for name in ("gelu_approximate", "situ_beta", "situ_linear_beta"):
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
