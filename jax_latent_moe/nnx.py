"""The layer as a flax.nnx module: it holds the parameters and calls `latent_moe`."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError
from jax_latent_moe.layer import latent_moe
from jax_latent_moe.params import Params, check_params, init_params, param_axes
from jax_latent_moe.routing import router

_LOAD = "tokens_per_expert"


class CorrectionBias(nnx.Variable):
    """The type of the correction bias: state, so `wrt=nnx.Param` keeps gradients and optimisers off it."""


class AuxiliaryLoss(nnx.Variable):
    """The type as which the auxiliary losses are sown: add them all to the objective."""


class LatentMoE(nnx.Module):
    """A latent mixture-of-experts layer; drop it in where an MLP was.

    The parameters are `nnx.Param`s at the paths of `init_params`, with its values for the key `rngs.params()`; the
    correction bias is a `CorrectionBias`. Each carries its logical axis names as `out_sharding`; they are applied where
    a mesh and `nnx.logical_axis_rules` are set, and are no more than names elsewhere.

    Under `nnx.capture` a call sows the auxiliary losses "switch", "sequence" and "z" as `AuxiliaryLoss`, and the
    `LatentMoEAux` arrays "expert_ids", "weights", "tokens_per_expert" and "dropped_per_expert" as `nnx.Intermediate`.

    Attributes:
        config: the layer.
    """

    router: nnx.Dict
    experts: nnx.Dict

    def __init__(self, config: LatentMoEConfig, *, rngs: nnx.Rngs):
        """Draws the parameters.

        Args:
            config: the layer.
            rngs: its stream "params" gives one key for the layer.
        """
        self.config = config
        params = init_params(rngs.params(), config)
        for part, leaves in param_axes(config).items():
            setattr(self, part, nnx.Dict({name: _variable(name, params[part][name], leaves[name]) for name in leaves}))

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
        y, aux = latent_moe(to_params(self), x, self.config, token_mask=token_mask, expert_ids=expert_ids)
        if hasattr(self, "__captures__"):  # sowing outside of nnx.capture is deprecated, and would grow at every call
            for name, loss in aux.losses.items():
                self.sow(AuxiliaryLoss, name, loss)
            for name in ("expert_ids", "weights", _LOAD, "dropped_per_expert"):
                self.sow(nnx.Intermediate, name, getattr(aux, name))
        return y


def _variable(name, value, axes):
    # Flax shards a named variable at once, and refuses where no mesh says what the names mean.
    meaningful = bool(get_logical_axis_rules()) and not jax.sharding.get_abstract_mesh().empty
    kind = CorrectionBias if name == "bias" else nnx.Param
    return kind(value, out_sharding=axes, eager_sharding=meaningful and nnx.using_eager_sharding())


def to_params(module: LatentMoE) -> Params:
    """The functional parameter tree of a layer, as `latent_moe` takes it; the arrays are shared, not copied."""
    return {
        part: {name: getattr(module, part)[name][...] for name in leaves}
        for part, leaves in param_axes(module.config).items()
    }


def from_params(params: Params, config: LatentMoEConfig) -> LatentMoE:
    """The module that holds these parameters; the arrays are shared, not copied.

    Raises:
        InputError: the parameters do not fit the config.
    """
    check_params(params, config)
    module = nnx.eval_shape(lambda: LatentMoE(config, rngs=nnx.Rngs(0)))
    nnx.update(module, params)
    return module


def update_correction_bias(model: nnx.Module, intermediates: nnx.State) -> None:
    """`jax_latent_moe.update_correction_bias` in place on every `LatentMoE` of a model, at the rate of its config.

    Call it after the optimiser's step with what `nnx.capture` of the step's forward pass returned.

    Args:
        model: the model, or one layer; layers may be stacked by nnx.vmap.
        intermediates: the `nnx.Intermediate`s. Counts of several calls of one layer are added.

    Raises:
        InputError: a layer with a bias has no counts in `intermediates`.
    """
    counts = dict(nnx.to_flat_state(intermediates))
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, LatentMoE) or not module.config.router.correction_bias:
            continue
        if (*path, _LOAD) not in counts:
            names = "/".join(map(str, (*path, _LOAD)))
            raise InputError(f"intermediates hold no {names}: call the model by nnx.capture(model, nnx.Intermediate).")
        step = partial(router.update_correction_bias, rate=module.config.router.bias_update_rate)
        bias = module.router["bias"]
        bias[...] = jnp.vectorize(step, signature="(e),(e)->(e)")(bias[...], sum(counts[*path, _LOAD].get_value()))
