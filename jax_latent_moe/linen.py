"""The layer as a flax.linen module: it holds the parameters and calls `latent_moe`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import Bool, Float, Int

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError
from jax_latent_moe.layer import latent_moe
from jax_latent_moe.params import Params, check_params, init_param, param_axes
from jax_latent_moe.routing import router

CORRECTION_BIAS = "correction_bias"
"""The collection of the correction bias, at .../router/bias: state, so no optimiser sees it."""

LOSSES = "losses"
"""The collection into which the auxiliary losses are sown: add them all to the objective."""

_BIAS = ("router", "bias")
_LOAD = "tokens_per_expert"


class LatentMoE(nn.Module):
    """A latent mixture-of-experts layer; drop it in where an MLP was.

    The parameters are those of `init_params`, in the collection "params", but for the correction bias, which is state
    in the collection "correction_bias". Each carries its logical axis names (`nn.LogicallyPartitioned`).

    Where these collections are mutable, a call sows into "losses" the auxiliary losses "switch", "sequence" and "z"
    (not while initialising), and into "intermediates" the `LatentMoEAux` arrays "expert_ids", "weights",
    "tokens_per_expert" and "dropped_per_expert".

    Attributes:
        config: the layer.
    """

    config: LatentMoEConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch d"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
        expert_ids: Int[Array, "*batch k"] | None = None,
    ) -> Float[Array, "*batch d"]:
        """Applies the layer; the arguments, the result and the errors are those of `latent_moe`.

        Args:
            x: [..., d], floating.
            token_mask: [...]; tokens that are False reach no expert.
            expert_ids: [..., k], a routing to replay.

        Returns:
            [..., d] in config.dtype.
        """
        y, aux = latent_moe(self._params(), x, self.config, token_mask=token_mask, expert_ids=expert_ids)
        if not self.is_initializing():  # or the variables that init returns would hold the losses of its input
            for name, loss in aux.losses.items():
                self.sow(LOSSES, name, loss)
        for name in ("expert_ids", "weights", _LOAD, "dropped_per_expert"):
            self.sow("intermediates", name, getattr(aux, name))
        return y

    def _params(self) -> Params:
        """The functional tree out of this module's variables, drawn where they do not exist yet."""
        layer_key = self.make_rng("params") if self.has_rng("params") else None
        axes = param_axes(self.config)

        def draw(own_key, part, names):
            # One key for the layer draws what init_params draws. Without one, linen asks for the shapes alone.
            key = own_key if layer_key is None else layer_key
            return {
                name: nn.LogicallyPartitioned(init_param(key, self.config, part, name), axes[part][name])
                for name in names
            }

        params: Any = {
            part: dict(self.param(part, draw, part, [name for name in leaves if (part, name) != _BIAS]))
            for part, leaves in axes.items()
        }
        if self.config.router.correction_bias:
            params["router"] |= self.variable(CORRECTION_BIAS, "router", draw, None, "router", ["bias"]).value
        return params


def to_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The functional parameter tree out of linen variables: boxes taken off, the correction bias back in its place.

    Args:
        variables: of one layer, as `latent_moe` then takes them; or of a model, each layer then a subtree.
    """
    params, bias = (flatten_dict(nn.unbox(variables.get(name, {}))) for name in ("params", CORRECTION_BIAS))
    return unflatten_dict({**params, **bias})


def from_params(params: Params, config: LatentMoEConfig) -> dict[str, Any]:
    """The linen variables of one layer, boxed as `LatentMoE(config).init` makes them, out of its functional tree.

    Raises:
        InputError: the parameters do not fit the config.
    """
    check_params(params, config)
    variables: dict[str, Any] = {}
    for part, leaves in param_axes(config).items():
        for name, axes in leaves.items():
            collection = CORRECTION_BIAS if (part, name) == _BIAS else "params"
            boxed = nn.LogicallyPartitioned(params[part][name], axes)
            variables.setdefault(collection, {}).setdefault(part, {})[name] = boxed
    return variables


def update_correction_bias(bias: Mapping[str, Any], intermediates: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """`jax_latent_moe.update_correction_bias` on every layer of a model.

    Call it after the optimiser's step with what the step's `apply(..., mutable=["intermediates", ...])` returned.

    Args:
        bias: the collection "correction_bias", boxed or not; layers may be stacked by nn.scan.
        intermediates: the collection "intermediates". Counts of several calls of one layer are added.
        rate: the step, `RouterConfig.bias_update_rate`.

    Returns:
        The collection "correction_bias", boxed as it came.

    Raises:
        InputError: a layer with a bias has no counts in `intermediates`.
    """
    step = jnp.vectorize(partial(router.update_correction_bias, rate=rate), signature="(e),(e)->(e)")
    counts: dict[tuple[str, ...], Any] = flatten_dict(intermediates)
    leaves: dict[tuple[str, ...], Any] = flatten_dict(bias)
    for path, leaf in leaves.items():
        layer = path[: -len(_BIAS)]
        if (*layer, _LOAD) not in counts:
            raise InputError(
                f"intermediates hold no {'/'.join((*layer, _LOAD))}: apply the model with mutable=['intermediates']."
            )
        leaves[path] = nn.meta.replace_boxed(leaf, step(nn.unbox(leaf), sum(counts[*layer, _LOAD])))
    return unflatten_dict(leaves)
