"""Configuration of the router: a frozen, hashable dataclass, validated where it is built."""

import dataclasses
from typing import Literal

from jax_latent_moe import checks
from jax_latent_moe.errors import ConfigError

ScoreFunction = Literal["softmax", "softmax_topk", "sigmoid", "sqrt_softplus"]
Selection = Literal["score", "logit", "sinkhorn", "given"]

SCORE_FUNCTIONS = ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus")
SELECTIONS = ("score", "logit", "sinkhorn", "given")
BIAS_UPDATES = ("sign", "quantile")
DROP_POLICIES = ("probs", "position")
ROUTER_DTYPES = ("float32", "bfloat16", "float64")

NORM_EPS = (1e-30, 1e6)
"""Range of a sum's epsilon whose square, times 2^80, float32 can hold. An epsilon of 0 is allowed too."""


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
        correction_bias: add a float32 bias [E] to the scores, only for the choice (auxiliary-loss-free balancing).
        selection: choose by "score" plus bias, by "logit" plus bias as marin does, or by "sinkhorn", Megatron's
            balanced assignment of all tokens of the call. "sinkhorn" takes neither a bias nor groups. It makes a
            token's experts depend on the other tokens, so evaluate with another selection. With "given" the caller
            always passes `expert_ids`, such as DeepSeek-V4's table of token ids (arXiv 2106.04426 calls it hash
            routing).
        input_jitter: multiply the router's input by random factors in [1 - input_jitter, 1 + input_jitter) (Switch
            Transformers, Megatron). 0 is off. It must be less than 1. See the argument `key` of `latent_moe`.
        logit_bias: add a learned bias [E] to the logits (gpt-oss).
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
        bias_update_rate: step of `update_correction_bias`; with "quantile", the share of the way to the target, at
            most 1.
        bias_update: what moves the correction bias after a step: the "sign" of each expert's missing load
            (DeepSeek-V3), or the "quantile" of the scores that would balance the loads (Megatron, marin).
        capacity_factor: an expert keeps at most ceil(capacity_factor * T * k / E) rows. None keeps all.
        min_capacity: lower bound of that limit, in rows.
        drop_policy: over capacity, drop the rows of lowest weight ("probs") or the last rows ("position").
        pad_to_capacity: give every expert exactly as many rows as its capacity (Megatron's
            moe_pad_expert_input_to_capacity). Values do not change. It needs parallel=None.
        round_to_tile: round each expert's number of tokens to the nearest multiple of this, as SonicMoE does
            (arXiv 2512.14080). None rounds nothing. It is for training, because it drops the choices of experts with
            few tokens. It does not go with selection="sinkhorn", which already balances the experts.
    """

    score_function: ScoreFunction = "sigmoid"
    norm_topk_prob: bool = True
    norm_topk_eps: float = 1e-20
    routed_scaling_factor: float = 1.0
    correction_bias: bool = True
    selection: Selection = "score"
    input_jitter: float = 0.0
    logit_bias: bool = False
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
    bias_update: Literal["sign", "quantile"] = "sign"
    capacity_factor: float | None = None
    min_capacity: int = 0
    drop_policy: Literal["probs", "position"] = "probs"
    pad_to_capacity: bool = False
    round_to_tile: int | None = None

    def __post_init__(self):
        checks.keep(self, "router.", checks.dtype_name, ("dtype",), ROUTER_DTYPES)
        checks.one_of("router.score_function", self.score_function, SCORE_FUNCTIONS)
        checks.one_of("router.selection", self.selection, SELECTIONS)
        checks.one_of("router.bias_update", self.bias_update, BIAS_UPDATES)
        checks.one_of("router.drop_policy", self.drop_policy, DROP_POLICIES)
        booleans = ("norm_topk_prob", "correction_bias", "logit_bias", "per_expert_scale", "pad_to_capacity")
        checks.keep(self, "router.", checks.boolean, booleans)
        checks.keep(self, "router.", checks.positive_int, ("num_groups", "topk_groups", "group_score_topk"))
        checks.keep(self, "router.", checks.integer, ("min_capacity",))
        losses = ("switch_loss_coef", "sequence_loss_coef", "global_loss_coef", "z_loss_coef")
        checks.keep(
            self, "router.", checks.non_negative, ("norm_topk_eps", "bias_update_rate", "input_jitter", *losses)
        )
        if self.input_jitter >= 1:
            raise ConfigError(
                f"router.input_jitter={self.input_jitter!r} must be less than 1: the factors must be positive."
            )
        if self.norm_topk_eps:
            checks.between("router.norm_topk_eps", self.norm_topk_eps, *NORM_EPS)
        checks.keep(self, "router.", checks.finite, ("routed_scaling_factor",))
        if self.capacity_factor is not None:
            checks.keep(self, "router.", checks.non_negative, ("capacity_factor",))
        if self.round_to_tile is not None:
            checks.keep(self, "router.", checks.positive_int, ("round_to_tile",))
            both = f"router.round_to_tile={self.round_to_tile} and router."
            if self.capacity_factor is not None:
                raise ConfigError(
                    f"{both}capacity_factor={self.capacity_factor} both limit an expert's tokens: set one to None."
                )
            if self.selection == "sinkhorn":
                raise ConfigError(
                    f"{both}selection='sinkhorn' both balance the experts: set round_to_tile to None, or choose by "
                    "'score' or 'logit'."
                )
        if self.topk_groups > self.num_groups:
            raise ConfigError(
                f"router.topk_groups={self.topk_groups} is more than router.num_groups={self.num_groups}: "
                "a token cannot keep more groups than there are."
            )
        for fields, used, needs in (
            (("norm_topk_eps",), self.norm_topk_prob, "norm_topk_prob=True"),
            (("bias_update_rate", "bias_update"), self.correction_bias, "correction_bias=True"),
            (("group_score_topk",), self.num_groups > 1, "num_groups > 1"),
            (("min_capacity", "drop_policy", "pad_to_capacity"), self.capacity_factor is not None, "capacity_factor"),
        ):
            checks.refuse_unused(self, "router.", fields, used, needs)

        if self.bias_update == "quantile" and (self.num_groups > 1 or self.bias_update_rate > 1):
            what = (
                f"num_groups={self.num_groups}" if self.num_groups > 1 else f"bias_update_rate={self.bias_update_rate}"
            )
            raise ConfigError(
                f"router.bias_update='quantile' with router.{what}: it needs num_groups=1 and a bias_update_rate of at "
                "most 1, as in Megatron."
            )
        if self.selection in ("sinkhorn", "given"):
            for name, value, needed in (
                ("correction_bias", self.correction_bias, False),
                ("num_groups", self.num_groups, 1),
            ):
                if value != needed:
                    raise ConfigError(
                        f"router.{name}={value!r} has no effect with router.selection={self.selection!r}: set it to "
                        f"{needed!r}, or choose by 'score' or 'logit'."
                    )

    @property
    def has_losses(self) -> bool:
        """Whether an auxiliary loss has a coefficient."""
        return any((self.switch_loss_coef, self.sequence_loss_coef, self.global_loss_coef, self.z_loss_coef))

    @property
    def moves_bias(self) -> bool:
        """Whether a step moves the correction bias by its loads."""
        return self.correction_bias and self.bias_update_rate > 0
