"""The layer as a flax.nnx module: it holds the parameters and calls `latent_moe`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe import codes
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError, needs_extra
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.layer import latent_moe
from jax_latent_moe.low_rank import LowRank, base_of
from jax_latent_moe.params import Params, check_config, check_params, init_params, param_axes
from jax_latent_moe.training import move_bias, warn_if_differentiated

with needs_extra("flax"):
    from flax import nnx
    from flax.core import FrozenDict
    from flax.core.spmd import get_logical_axis_rules

_LOAD, _TARGET, _MICROBATCHES = "tokens_per_expert", "bias_target", "microbatches"
_ADAPTERS = "adapters"


class CorrectionBias(nnx.Variable):
    """The variable type of the correction bias. It is state: with `wrt=nnx.Param` no gradient or optimiser sees it."""


class Codes(nnx.Variable):
    """The type of quantised weights. They are frozen: with `wrt=nnx.Param` no gradient or optimiser sees them."""


class ExpertCodes(nnx.Variable):
    """The variable type of the codes of dense weights that `encode_experts` makes for one training step."""


class Adapter(nnx.Variable):
    """The variable type of low-rank adapters. With `wrt=Adapter`, gradients and optimisers see nothing else."""


class AuxiliaryLoss(nnx.Variable):
    """The variable type of the auxiliary losses that a call sows. Add them all to the objective."""


class GlobalCounts(nnx.Variable):
    """The variable type of the counts that router.global_loss_coef carries through the microbatches of a step."""


class LatentMoE(nnx.Module):
    """A latent mixture-of-experts layer. It takes the place of an MLP.

    The parameters are `nnx.Param`s at the paths of `init_params`, with its values for the key `rngs.params()`. The
    correction bias is a `CorrectionBias`. Quantised weights are `Codes` and low-rank adapters `Adapter`s, if
    `from_params` was given any. Each other variable carries its logical axis names as `out_sharding`. The names shard
    the variable only if a mesh and `nnx.logical_axis_rules` are set.

    Under `nnx.capture`, a call sows the auxiliary losses as `AuxiliaryLoss`. It sows the `LatentMoEAux` arrays
    "expert_ids", "weights", "tokens_per_expert" and "dropped_per_expert" as `nnx.Intermediate`. With
    router.global_loss_coef it adds its counts to a `GlobalCounts`, which `update_correction_bias` resets.

    Attributes:
        config: the layer.
    """

    router: nnx.Dict
    experts: nnx.Dict
    expert_codes: ExpertCodes | None = None

    def __init__(
        self, config: LatentMoEConfig, *, rngs: nnx.Rngs, axis_names: Mapping[str, str | None] | None = FrozenDict()
    ):
        """Draws the parameters.

        Args:
            config: the layer.
            rngs: the stream "params" gives one key for the layer.
            axis_names: other names for some logical axes, as in `param_axes`. None leaves the variables without names.

        Raises:
            InputError: config, rngs or axis_names are of another type.
        """
        check_config(config)
        if not callable(getattr(rngs, "params", None)):
            raise InputError(f"rngs of type {type(rngs).__name__} must be nnx.Rngs, such as nnx.Rngs(0).")
        self.config = config
        params = init_params(rngs.params(), config)
        for part, leaves in param_axes(config, axis_names).items():
            named = {name: None if axis_names is None else axes for name, axes in leaves.items()}
            setattr(self, part, nnx.Dict({name: _variable(name, params[part][name], named[name]) for name in leaves}))
        self.global_counts = _zero_counts(config)

    def __call__(
        self,
        x: Float[Array, "*batch d"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
        expert_ids: Int[Array, "*batch k"] | None = None,
        segment_ids: Int[Array, "*batch"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*batch d"]:
        """Applies the layer. The arguments, the result and the errors are those of `latent_moe`.

        Args:
            x: [..., d], floating.
            token_mask: [...]. Tokens that are False reach no expert.
            expert_ids: [..., k], a routing to replay.
            segment_ids: [...], documents of packed sequences, for the sequence loss.
            rngs: with router.input_jitter, the stream "jitter" (or the default stream) gives its key.

        Returns:
            [..., d] in config.dtype.
        """
        key = None
        if rngs is not None and self.config.router.input_jitter:
            if "jitter" not in rngs and "default" not in rngs:
                raise InputError("rngs have no stream 'jitter' for router.input_jitter: give nnx.Rngs(jitter=seed).")
            key = rngs.jitter()
        y, aux = latent_moe(
            to_params(self),
            x,
            self.config,
            token_mask=token_mask,
            expert_ids=expert_ids,
            segment_ids=segment_ids,
            global_counts=None if self.global_counts is None else self.global_counts[...],
            key=key,
            codes=None if self.expert_codes is None else self.expert_codes.get_value(),
        )
        if missing := self._not_collected():
            y = warn_if_differentiated(missing, y)
        if hasattr(self, "__captures__"):  # outside of nnx.capture, sowing is deprecated and its state grows each call
            for name, loss in aux.losses.items():
                self.sow(AuxiliaryLoss, name, loss)
            if self.global_counts is not None:
                self.global_counts[...] = aux.global_counts
            for name in ("expert_ids", "weights", _LOAD, "dropped_per_expert"):
                self.sow(nnx.Intermediate, name, getattr(aux, name))
            if aux.bias_target is not None:
                self.sow(nnx.Intermediate, _TARGET, aux.bias_target)
                self.sow(nnx.Intermediate, _MICROBATCHES, jnp.ones((), jnp.int32))
        return y

    def _not_collected(self) -> str | None:
        """A sentence that names the results of this call that a training step would miss."""
        router = self.config.router
        needed: dict[type, str] = {AuxiliaryLoss: "auxiliary losses"} if router.has_losses else {}
        needed |= {nnx.Intermediate: "expert loads"} if router.moves_bias else {}
        captured = {type(variable) for variable in getattr(self, "__captures__", ())}
        lost = [what for kind, what in needed.items() if kind not in captured]
        if not lost:
            return None
        return (
            f"The {' and '.join(lost)} of a LatentMoE are not collected: call the model by "
            "nnx.capture(model, AuxiliaryLoss, nnx.Intermediate), or set their coefficients and "
            "router.bias_update_rate to 0."
        )


def _zero_counts(config):
    return GlobalCounts(jnp.zeros(config.num_experts, jnp.int32)) if config.router.global_loss_coef else None


def _variable(name, value, axes):
    # Flax shards a named variable at once. Without a mesh and rules that give the names a meaning, it raises.
    rules, mesh = get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    meaningful = bool(rules) and not mesh.empty
    kind = CorrectionBias if name == "bias" else nnx.Param
    if axes is None:
        return kind(value)
    if meaningful:  # as in linen, a name without a rule splits nothing
        known = {alias for alias, _ in rules} | set(mesh.axis_names)
        axes = tuple(axis if axis in known else None for axis in axes)
    return kind(value, out_sharding=axes, eager_sharding=meaningful and nnx.using_eager_sharding())


def to_params(module: LatentMoE) -> Params:
    """The functional parameter tree of a layer, as `latent_moe` takes it. Arrays are shared, not copied.

    Raises:
        InputError: module is not a `LatentMoE`.
    """

    def value(variable):
        return variable.get_value() if isinstance(variable, Codes) else variable[...]

    if not isinstance(module, LatentMoE):
        raise InputError(f"module of type {type(module).__name__} must be a LatentMoE: give one layer of the model.")
    params: Any = {
        part: {name: value(getattr(module, part)[name]) for name in leaves}
        for part, leaves in param_axes(module.config).items()
    }
    for target, adapter in getattr(module, _ADAPTERS, {}).items():
        part, name = target.split("/")
        params[part][name] = adapter.get_value().with_base(params[part][name])
    return params


def from_params(
    params: Params, config: LatentMoEConfig, axis_names: Mapping[str, str | None] | None = FrozenDict()
) -> LatentMoE:
    """Makes the module that holds these parameters. Arrays are shared, not copied.

    Args:
        params: the functional tree. `ScaledArray` leaves become `Codes`, and the adapters of `LowRank` leaves
            `Adapter`s, both without axis names: place them on a mesh by `param_specs(config, mesh, params)` beforehand.
        config: the layer.
        axis_names: the module's.

    Raises:
        InputError: the parameters do not fit the config.
    """
    check_params(params, config)
    module = nnx.eval_shape(lambda: LatentMoE(config, rngs=nnx.Rngs(0), axis_names=axis_names))
    dense, adapters = {}, {}
    for part, leaves in params.items():
        for name, leaf in leaves.items():
            if isinstance(leaf, LowRank):
                adapters[f"{part}/{name}"] = Adapter(leaf.adapter)
            base = base_of(leaf)
            if isinstance(base, ScaledArray):
                getattr(module, part)[name] = Codes(base)
            else:
                dense.setdefault(part, {})[name] = base
    if adapters:
        setattr(module, _ADAPTERS, nnx.Dict(adapters))
    nnx.update(module, dense)
    module.global_counts = _zero_counts(config)
    return module


def encode_experts[M: nnx.Module](model: M) -> M:
    """A model that shares all variables with the given one, and has `ExpertCodes` in every layer with a precision.

    A training step calls it once, before its first microbatch, and takes the gradients of the result. The optimiser
    updates the given model. The result is dropped at the end of the step, with its codes. See
    `jax_latent_moe.encode_experts`.

    Args:
        model: a model, or one layer. Layers may be stacked by nnx.vmap.

    Raises:
        InputError: a layer's experts are quantised or have adapters.
        ConfigError: an axis of the mesh does not divide what it splits.
    """
    coded = nnx.clone(model, variables=False)
    for _, module in nnx.iter_modules(coded):
        if isinstance(module, LatentMoE):
            made = codes.encode_experts(to_params(module), module.config)
            module.expert_codes = None if made is None else ExpertCodes(made)
    return coded


def total_loss(losses: nnx.State) -> Float[Array, ""]:
    """The sum of all auxiliary losses of all layers, with their coefficients. Add it to the objective.

    It is 0 for a config without losses.

    Args:
        losses: the `AuxiliaryLoss` state that `nnx.capture` of the forward pass returned. Layers may be stacked.

    Raises:
        InputError: the state holds no loss.
    """
    leaves = jax.tree.leaves(losses)
    if not leaves:
        raise InputError("losses hold no AuxiliaryLoss: call the model through nnx.capture(model, AuxiliaryLoss, ...).")
    return sum(map(jnp.sum, leaves), start=jnp.zeros(()))


def loads(intermediates: nnx.State) -> nnx.State:
    """The counts "tokens_per_expert" of every layer, for `update_correction_bias`. Sum them over microbatches.

    For router.bias_update="quantile", "bias_target" and the number of "microbatches" are summed in the same way.

    Args:
        intermediates: the `nnx.Intermediate` state that `nnx.capture` returned.

    Raises:
        InputError: they are not an `nnx.State`.
    """
    _check_state(intermediates)
    return nnx.from_flat_state(
        (path, leaf) for path, leaf in nnx.to_flat_state(intermediates) if path[-1] in (_LOAD, _TARGET, _MICROBATCHES)
    )


def _check_state(intermediates):
    if not isinstance(intermediates, nnx.State):
        raise InputError(
            f"intermediates of type {type(intermediates).__name__} must be the nnx.State that "
            "nnx.capture(model, nnx.Intermediate) returns with the output."
        )


def update_correction_bias(
    model: nnx.Module,
    intermediates: nnx.State,
    rate: float | Float[Array, ""] | None = None,
    *,
    recentre: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> None:
    """Moves the correction bias of every `LatentMoE` in a model by the loads of one step, in place.

    Call it once after the optimiser's step. Counts may have leading axes that a bias does not have, such as the axis
    of a scan over microbatches. They are summed. The `GlobalCounts` of every layer are reset.

    Args:
        model: the model, or one layer. Layers may be stacked by nnx.vmap.
        intermediates: the `nnx.Intermediate` state that `nnx.capture` of the step's forward pass returned, or `loads`
            of it. The counts of several calls of one layer are summed.
        rate: the value of a schedule, 0 for a skipped step. None takes the rate of each layer's config.
        recentre: as in `jax_latent_moe.update_correction_bias`.
        axis_name: axes of your own `shard_map` or `vmap` over which the tokens are split. The counts are summed over
            them.

    Raises:
        InputError: a layer with a bias has no counts in `intermediates`.
    """
    _check_state(intermediates)
    counts = dict(nnx.to_flat_state(intermediates))
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, LatentMoE):
            continue
        if module.global_counts is not None:
            module.global_counts[...] = jnp.zeros_like(module.global_counts[...])
        if not module.config.router.correction_bias:
            continue
        if (*path, _LOAD) not in counts:
            names = "/".join(map(str, (*path, _LOAD)))
            raise InputError(f"intermediates hold no {names}: call nnx.capture(model, nnx.Intermediate)(x).")
        bias, own_rate = module.router["bias"], module.config.router.bias_update_rate
        of_calls = counts[*path, _LOAD].get_value()
        own_rate = own_rate if rate is None else rate
        quantile = module.config.router.bias_update == "quantile"
        targets, microbatches = (
            counts[*path, name].get_value() if quantile else () for name in (_TARGET, _MICROBATCHES)
        )
        bias[...] = move_bias(
            bias[...], of_calls, targets, microbatches, own_rate, recentre=recentre, axis_name=axis_name
        )
