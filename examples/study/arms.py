"""The arms of the study: a table of feed-forwards with equal active floating-point operations.

The base is a plain MoE of E experts of inner width m, of which a token reads k, and a shared expert of width 2 d. An
arm changes the routed part. Its shared expert is then as wide as the operations allow, so that all arms cost the same.
"""

import dataclasses
from typing import Any, Literal

from examples.train.config import MLP, ModelConfig
from examples.train.errors import TrainError

Family = Literal["dense", "moe", "latent"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A feed-forward and how its experts are balanced.

    Attributes:
        name: the arm in rows and tables.
        words: the arm in a few words.
        family: arms of a family share a learning rate.
        compression: a, the hidden size over the latent size.
        experts: the number of experts, relative to the base.
        top_k: the experts of a token, relative to the base.
        inner: the inner width of an expert, relative to the base.
        norm: place of the RMSNorm in the latent width.
        factor: fixed factor on the latent before the experts.
        balance: changes of the options that balance the experts.
    """

    name: str
    words: str
    family: Family = "latent"
    compression: int = 2
    experts: int = 1
    top_k: int = 1
    inner: int = 1
    norm: Literal["none", "pre", "post"] = "none"
    factor: float = 1.0
    balance: tuple[tuple[str, Any], ...] = ()

    @property
    def mlp(self) -> MLP:
        """The value of `--mlp`."""
        return "latent_moe" if self.family == "latent" else self.family


# The half arms follow marin's issue 6822: half the width in, twice the inner width, so that the experts keep their
# cost. "efficient" and "accurate" are the two recipes of the LatentMoE paper (arXiv 2601.18089): a times as many
# experts with the same top_k, or with a times the top_k.
ARMS = (
    Arm("dense", "dense", "dense", balance=(("switch_loss_coef", 0.0),)),
    Arm("moe", "plain MoE", "moe"),
    Arm("half", "half width, no norm", inner=2),
    Arm("half-pre", "half width, norm before the experts", inner=2, norm="pre"),
    Arm("half-post", "half width, norm after the combine", inner=2, norm="post"),
    Arm("half-x4", "half width, latent times 4", inner=2, factor=4.0),
    Arm("half-x1/4", "half width, latent times 1/4", inner=2, factor=0.25),
    Arm("efficient-2", "a = 2, 2 E experts, top k", experts=2),
    Arm("efficient-4", "a = 4, 4 E experts, top k", compression=4, experts=4),
    Arm("accurate-2", "a = 2, 2 E experts, top 2 k", experts=2, top_k=2),
    Arm("accurate-4", "a = 4, 4 E experts, top 4 k", compression=4, experts=4, top_k=4),
    Arm("accurate-8", "a = 8, 8 E experts, top 8 k", compression=8, experts=8, top_k=8),
    Arm("sign", "half-pre, bias by sign alone", inner=2, norm="pre", balance=(("switch_loss_coef", 0.0),)),
    Arm("switch", "half-pre, Switch loss alone", inner=2, norm="pre", balance=(("bias_update_rate", 0.0),)),
    Arm(
        "quantile",
        "half-pre, bias by quantiles alone",
        inner=2,
        norm="pre",
        balance=(("switch_loss_coef", 0.0), ("bias_update", "quantile"), ("bias_update_rate", 1.0)),
    ),
)
NAMES = {arm.name: arm for arm in ARMS}


def arm_named(name: str) -> Arm:
    """The arm of that name.

    Raises:
        TrainError: there is none.
    """
    if name not in NAMES:
        raise TrainError(f"There is no arm {name!r}: use some of {', '.join(NAMES)}.")
    return NAMES[name]


def model_of(arm: Arm, base: ModelConfig) -> ModelConfig:
    """The model of an arm.

    With `--mlp dense` and `--mlp moe` the trainer derives the feed-forward from a latent MoE. Its routed part is then
    the base's, and the trainer gives the operations of the projections back to the shared expert.

    A fixed factor c on the latent is `routed_scaling_factor` c^2, because the experts are homogeneous of degree 2:
    w_out relu2(w_in c z) = c^2 w_out relu2(w_in z). Values and gradients are equal for equal parameters.

    Args:
        arm: the arm.
        base: the model with the plain MoE: its experts, top_k and inner width. Its latent size and shared expert are
            not read.

    Raises:
        TrainError: the sizes do not divide, or the routed part alone costs more than the base.
    """
    d, experts, top_k = base.hidden_size, base.num_experts * arm.experts, base.top_k * arm.top_k
    inner = base.expert_intermediate_size * arm.inner
    if arm.family != "latent":
        experts, top_k = 2 * base.num_experts, 2 * base.top_k  # at half width: the trainer halves both again
    latent = d // arm.compression
    # The unit of cost is 4 d operations a token, which is what one unit of the shared expert's width costs.
    cost = 2 * d + base.num_experts / 2 + base.top_k * base.expert_intermediate_size
    shared = cost - experts / 2 - latent - latent * top_k * inner / d
    if shared != int(shared) or shared < 0 or d % arm.compression:
        raise TrainError(
            f"The arm {arm.name} at hidden size {d} would need a shared expert of width {shared:g}: choose sizes of "
            "the base that make it a whole number of at least 0."
        )
    return dataclasses.replace(
        base,
        latent_size=latent,
        num_experts=experts,
        top_k=top_k,
        expert_intermediate_size=inner,
        shared_expert_intermediate_size=int(shared),
        latent_norm=arm.norm,
        routed_scaling_factor=arm.factor**2,
    )
