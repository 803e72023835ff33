"""The layer as a flax.linen module: it holds the parameters and calls `latent_moe`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from jax_latent_moe import codes
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError, needs_extra
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.layer import latent_moe
from jax_latent_moe.low_rank import LowRank, base_of, map_leaf_axes
from jax_latent_moe.params import Params, check_config, check_params, init_param, param_axes
from jax_latent_moe.training import move_bias, warn_if_differentiated

with needs_extra("flax"):
    from flax import linen as nn
    from flax.core import FrozenDict
    from flax.traverse_util import flatten_dict, unflatten_dict

CORRECTION_BIAS = "correction_bias"
"""The collection of the correction bias, at .../router/bias. It is state: no optimiser sees it."""

LOSSES = "losses"
"""The collection into which the auxiliary losses are sown. Add them all to the objective."""

GLOBAL_COUNTS = "global_counts"
"""The collection of the counts that router.global_loss_coef carries from one microbatch of a step to the next."""
CODES = "codes"
"""The collection of quantised weights, at .../experts/w_in and .../experts/w_out: frozen, so no optimiser sees them."""

ADAPTERS = "adapters"
"""The collection of low-rank adapters. Differentiate only with respect to it to freeze all other weights."""

EXPERT_CODES = "expert_codes"
"""The collection of the codes of dense weights that `encode_experts` makes, at .../experts."""

_BIAS = ("router", "bias")
_LOAD, _TARGET, _MICROBATCHES = "tokens_per_expert", "bias_target", "microbatches"


class Boxed(nn.LogicallyPartitioned):
    """A variable with its logical axis names. nn.scan and nn.vmap may add an axis without a name."""

    def _get_partition_name(self, params) -> Any:
        return params.get(nn.PARTITION_NAME)


class LatentMoE(nn.Module):
    """A latent mixture-of-experts layer. It takes the place of an MLP.

    The parameters are those of `init_params`, in the collection "params". The correction bias is state, in the
    collection "correction_bias". Quantised weights are frozen, in the collection "codes", and
    low-rank adapters are in the collection "adapters"; `from_params` puts them there. Each variable carries its logical
    axis names (`nn.LogicallyPartitioned`), unless axis_names is None.

    A call sows the auxiliary losses into the collection "losses", except while initialising. It sows the `LatentMoEAux`
    arrays "expert_ids", "weights", "tokens_per_expert" and "dropped_per_expert" into "intermediates". As always in
    linen, only mutable collections receive values.

    With config.precision, a call reads the codes of the collection "expert_codes", if `encode_experts` put any there.
    Without them it encodes its weights itself.

    With router.global_loss_coef, a call adds its counts to the collection "global_counts", if that is mutable. Pass the
    collection to the step's next microbatch. `after_step` resets it. With router.input_jitter, a call takes its key
    from the rng "jitter".

    Attributes:
        config: the layer.
        axis_names: other names for some logical axes, as in `param_axes`. None leaves the variables unboxed.
    """

    config: LatentMoEConfig
    axis_names: Mapping[str, str | None] | None = FrozenDict()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch d"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
        expert_ids: Int[Array, "*batch k"] | None = None,
        segment_ids: Int[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch d"]:
        """Applies the layer. The arguments, the result and the errors are those of `latent_moe`.

        Args:
            x: [..., d], floating.
            token_mask: [...]. Tokens that are False reach no expert.
            expert_ids: [..., k], a routing to replay.
            segment_ids: [...], documents of packed sequences, for the sequence loss.

        Returns:
            [..., d] in config.dtype.
        """
        check_config(self.config)
        counts, jitters = self._global_counts(), self.config.router.input_jitter and self.has_rng("jitter")
        y, aux = latent_moe(
            self._params(),
            x,
            self.config,
            token_mask=token_mask,
            expert_ids=expert_ids,
            segment_ids=segment_ids,
            global_counts=None if counts is None else counts.value,
            key=self.make_rng("jitter") if jitters else None,
            codes=self.get_variable(EXPERT_CODES, "experts"),
        )
        if counts is not None and self.is_mutable_collection(GLOBAL_COUNTS) and not self.is_initializing():
            counts.value = aux.global_counts
        if missing := self._not_collected():
            y = warn_if_differentiated(missing, y)
        if not self.is_initializing():  # otherwise init would return the losses of its input as variables
            for name, loss in aux.losses.items():
                self.sow(LOSSES, name, loss)
        for name in ("expert_ids", "weights", _LOAD, "dropped_per_expert"):
            self.sow("intermediates", name, getattr(aux, name))
        if aux.bias_target is not None:
            self.sow("intermediates", _TARGET, aux.bias_target)
            self.sow("intermediates", _MICROBATCHES, jnp.ones((), jnp.int32))
        return y

    def _global_counts(self) -> nn.Variable | None:
        """The variable of the step's counts, if the layer has one or may make one."""
        if not self.config.router.global_loss_coef:
            return None
        if not self.has_variable(GLOBAL_COUNTS, "router") and not self.is_mutable_collection(GLOBAL_COUNTS):
            return None
        return self.variable(GLOBAL_COUNTS, "router", jnp.zeros, (self.config.num_experts,), jnp.int32)

    def _not_collected(self) -> str | None:
        """A sentence that names the results of this call that a training step would miss."""
        router = self.config.router
        needed = {LOSSES: "auxiliary losses"} if router.has_losses else {}
        needed |= {"intermediates": "expert loads"} if router.moves_bias else {}
        lost = [what for name, what in needed.items() if not self.is_mutable_collection(name)]
        if not lost or self.is_initializing():
            return None
        return (
            f"The {' and '.join(lost)} of {'/'.join(('LatentMoE', *self.path))} are not collected: apply the model "
            f"with mutable={list(needed)}, or set their coefficients and router.bias_update_rate to 0."
        )

    def _params(self) -> Params:
        """The functional tree of this module's variables. Variables that do not exist yet are drawn."""
        layer_key = self.make_rng("params") if self.has_rng("params") else None
        axes = param_axes(self.config, self.axis_names)

        def draw(own_key, part, names):
            # With one key for the layer, the values are those of init_params. Without a key, linen wants only shapes.
            key = own_key if layer_key is None else layer_key
            return {
                name: _box(init_param(key, self.config, part, name), axes[part][name], self.axis_names)
                for name in names
            }

        codes = nn.unbox(self.get_variable(CODES, "experts", {}))
        params: Any = {}
        for part, leaves in axes.items():
            drawn = [name for name in leaves if (part, name) != _BIAS and not (part == "experts" and name in codes)]
            params[part] = dict(self.param(part, draw, part, drawn)) if drawn else {}
        params["experts"] |= codes
        for part in axes:
            for name, adapter in nn.unbox(self.get_variable(ADAPTERS, part, {})).items():
                params[part][name] = adapter.with_base(params[part][name])
        if self.config.router.correction_bias:
            params["router"] |= self.variable(CORRECTION_BIAS, "router", draw, None, "router", ["bias"]).value
        return params


def _box(value, axes, axis_names, *, stacked=False):
    """The value with a box around each of its arrays."""
    if axis_names is None:
        return value
    names = map_leaf_axes(value, axes, PartitionSpec, stacked=stacked)
    return jax.tree.map(lambda array, names: Boxed(array, tuple(names)), value, names)


def _check_collections(name, given):
    if not isinstance(given, Mapping):
        raise InputError(
            f"{name} of type {type(given).__name__} must be a mapping of collections, as the model's init and apply "
            "return them."
        )


def to_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Converts linen variables to the functional parameter tree: without boxes, with biases and codes in their places.

    Args:
        variables: the variables of one layer give the tree that `latent_moe` takes, a model's give a subtree for each
            layer.

    Raises:
        InputError: they are not a mapping of collections.
    """
    _check_collections("variables", variables)
    collections = (flatten_dict(nn.unbox(variables.get(name, {}))) for name in ("params", CORRECTION_BIAS, CODES))
    leaves: dict[Any, Any] = {path: leaf for collection in collections for path, leaf in collection.items()}
    adapters: dict[Any, Any] = flatten_dict(nn.unbox(variables.get(ADAPTERS, {})))
    for path, adapter in adapters.items():
        leaves[path] = adapter.with_base(leaves[path])
    return unflatten_dict(leaves)


def from_params(
    params: Params, config: LatentMoEConfig, axis_names: Mapping[str, str | None] | None = FrozenDict()
) -> dict[str, Any]:
    """Makes the linen variables of one layer, boxed as `LatentMoE(config, axis_names).init` boxes them.

    `ScaledArray` leaves go to the collection "codes", and the adapters of `LowRank` leaves to "adapters". Gradients
    with respect to "params" leave both alone.

    Args:
        params: the functional tree.
        config: the layer.
        axis_names: the module's.

    Raises:
        InputError: the parameters do not fit the config.
    """
    check_params(params, config)
    variables: dict[str, Any] = {}
    for part, leaves in param_axes(config, axis_names).items():
        for name, axes in leaves.items():
            leaf, stacked = params[part][name], part == "experts"
            if isinstance(leaf, LowRank):
                adapter = _box(leaf.adapter, axes, axis_names, stacked=stacked)
                variables.setdefault(ADAPTERS, {}).setdefault(part, {})[name] = adapter
            base = base_of(leaf)
            collection = CORRECTION_BIAS if (part, name) == _BIAS else "params"
            collection = CODES if isinstance(base, ScaledArray) else collection
            boxed = _box(base, axes, axis_names, stacked=stacked)
            variables.setdefault(collection, {}).setdefault(part, {})[name] = boxed
    if config.router.global_loss_coef:
        variables[GLOBAL_COUNTS] = {"router": jnp.zeros(config.num_experts, jnp.int32)}
    return variables


def encode_experts(variables: Mapping[str, Any], config: LatentMoEConfig) -> dict[str, Any]:
    """The variables with the codes of every layer's experts in the collection "expert_codes", for config.precision.

    A training step calls it once, before its first microbatch, and applies the model to the result. Differentiate only
    with respect to "params". See `jax_latent_moe.encode_experts`. nn.scan must list the collection among its
    variable_axes; a layer that does not see it encodes its weights itself.

    Args:
        variables: of a layer or of a model, boxed or not, stacked by nn.scan or not.
        config: the config of all layers. With config.precision=None nothing is added.

    Raises:
        InputError: no layer has experts, or a layer's do not fit the config, are quantised, or have adapters.
        ConfigError: an axis of the mesh does not divide what it splits.
    """
    leaves: dict[Any, Any] = flatten_dict(to_params(variables))
    made = {
        (*layer, part): codes.encode_experts({part: {"w_in": w_in, "w_out": leaves[*layer, part, "w_out"]}}, config)
        for (*layer, part, name), w_in in leaves.items()
        if (part, name) == ("experts", "w_in")
    }
    if not made:
        raise InputError(
            f"variables with the collections {', '.join(variables)} have no experts: give what model.init returns."
        )
    found = {path: of_layer for path, of_layer in made.items() if of_layer is not None}
    return {**variables, EXPERT_CODES: unflatten_dict(found)} if found else dict(variables)


def total_loss(sown: Mapping[str, Any]) -> Float[Array, ""]:
    """The sum of all auxiliary losses of all layers, with their coefficients. Add it to the objective.

    It is 0 for a config without losses.

    Args:
        sown: the collections that `apply(..., mutable=["losses", "intermediates"])` returned with y. Layers may be
            stacked.

    Raises:
        InputError: `sown` has no collection "losses".
    """
    _check_collections("sown", sown)
    if LOSSES not in sown:
        raise InputError(f"collections {sorted(sown)} lack '{LOSSES}': apply the model with mutable=['{LOSSES}', ...].")
    return sum(map(jnp.sum, jax.tree.leaves(nn.unbox(sown[LOSSES]))), start=jnp.zeros(()))


def loads(sown: Mapping[str, Any]) -> dict[str, Any]:
    """The counts "tokens_per_expert" of every layer, for `after_step`. Sum them over microbatches.

    For router.bias_update="quantile", "bias_target" and the number of "microbatches" are summed in the same way.

    Args:
        sown: as for `total_loss`.

    Raises:
        InputError: `sown` is not a mapping of collections.
    """
    _check_collections("sown", sown)
    counts = {
        path: leaf
        for path, leaf in flatten_dict(sown.get("intermediates", {})).items()
        if path[-1] in (_LOAD, _TARGET, _MICROBATCHES)
    }
    return {"intermediates": unflatten_dict(counts)}


def after_step(
    variables: Mapping[str, Any],
    sown: Mapping[str, Any],
    rate: float | Float[Array, ""],
    *,
    recentre: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Moves every correction bias of a model by the loads of one step, and resets the collection "global_counts".

    Call it once after the optimiser's step.

    Counts may have leading axes that a bias does not have, such as the axis of a scan over microbatches. They are
    summed. Variables without a correction bias are returned as they are.

    Args:
        variables: the model's variables.
        sown: the collections that `apply(..., mutable=["losses", "intermediates"])` returned with y, or their `loads`.
        rate: `RouterConfig.bias_update_rate`, or the value of a schedule. Give 0 for a skipped step.
        recentre: as in `jax_latent_moe.update_correction_bias`.
        axis_name: axes of your own `shard_map` or `vmap` over which the tokens are split. The counts are summed over
            them.

    Raises:
        InputError: a layer with a bias has no counts in `sown`.
    """
    _check_collections("variables", variables)
    _check_collections("sown", sown)
    variables = dict(variables)
    if GLOBAL_COUNTS in variables:
        variables[GLOBAL_COUNTS] = jax.tree.map(jnp.zeros_like, variables[GLOBAL_COUNTS])
    if CORRECTION_BIAS not in variables:
        return variables
    bias, intermediates = variables[CORRECTION_BIAS], sown.get("intermediates", {})
    moved = update_correction_bias(bias, intermediates, rate, recentre=recentre, axis_name=axis_name)
    return {**variables, CORRECTION_BIAS: moved}


def update_correction_bias(
    bias: Mapping[str, Any],
    intermediates: Mapping[str, Any],
    rate: float | Float[Array, ""],
    *,
    recentre: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Applies `jax_latent_moe.update_correction_bias` to every layer of a model. `after_step` calls it.

    Args:
        bias: the collection "correction_bias", boxed or not. Layers may be stacked by nn.scan.
        intermediates: the collection "intermediates". The counts of several calls of one layer are summed.
        rate: the step size, `RouterConfig.bias_update_rate`.
        recentre: as in `after_step`.
        axis_name: as in `after_step`.

    Returns:
        The collection "correction_bias", boxed as the input was.

    Raises:
        InputError: a layer with a bias has no counts in `intermediates`.
    """
    counts: dict[tuple[str, ...], Any] = flatten_dict(intermediates)
    leaves: dict[tuple[str, ...], Any] = flatten_dict(bias)
    for path, leaf in leaves.items():
        layer = path[: -len(_BIAS)]
        if (*layer, _LOAD) not in counts:
            raise InputError(
                f"intermediates hold no {'/'.join((*layer, _LOAD))}: apply the model with mutable=['intermediates']."
            )
        before, of_calls = nn.unbox(leaf), nn.unbox(counts[*layer, _LOAD])
        targets, microbatches = (nn.unbox(counts.get((*layer, name), ())) for name in (_TARGET, _MICROBATCHES))
        moved = move_bias(before, of_calls, targets, microbatches, rate, recentre=recentre, axis_name=axis_name)
        leaves[path] = nn.meta.replace_boxed(leaf, moved)
    return unflatten_dict(leaves)
