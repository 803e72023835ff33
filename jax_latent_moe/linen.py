"""The layer as a flax.linen module: it holds the parameters and calls `latent_moe`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import ScaledArray, map_axes
from jax_latent_moe.layer import latent_moe
from jax_latent_moe.params import Params, check_params, init_param, param_axes
from jax_latent_moe.training import move_bias, warn_if_differentiated

CORRECTION_BIAS = "correction_bias"
"""The collection of the correction bias, at .../router/bias: state, so no optimiser sees it."""

LOSSES = "losses"
"""The collection into which the auxiliary losses are sown: add them all to the objective."""

CODES = "codes"
"""The collection of quantised weights, at .../experts/w_in and .../experts/w_out: frozen, so no optimiser sees them."""

_BIAS = ("router", "bias")
_LOAD = "tokens_per_expert"


class Boxed(nn.LogicallyPartitioned):
    """A variable with its logical axis names, to which nn.scan and nn.vmap may add an axis without a name."""

    def _get_partition_name(self, params) -> Any:
        return params.get(nn.PARTITION_NAME)


class LatentMoE(nn.Module):
    """A latent mixture-of-experts layer; drop it in where an MLP was.

    The parameters are those of `init_params`, in the collection "params", but for the correction bias, which is state
    in the collection "correction_bias". Quantised weights, which `from_params` puts into the collection "codes", take
    the place of those in "params". Each carries its logical axis names (`nn.LogicallyPartitioned`), but with
    axis_names=None.

    Where these collections are mutable, a call sows into "losses" the auxiliary losses "switch", "sequence" and "z"
    (not while initialising), and into "intermediates" the `LatentMoEAux` arrays "expert_ids", "weights",
    "tokens_per_expert" and "dropped_per_expert".

    Attributes:
        config: the layer.
        axis_names: other names for some logical axes, as in `param_axes`; None leaves the variables unboxed.
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
        if missing := self._not_collected():
            y = warn_if_differentiated(missing, y)
        if not self.is_initializing():  # or the variables that init returns would hold the losses of its input
            for name, loss in aux.losses.items():
                self.sow(LOSSES, name, loss)
        for name in ("expert_ids", "weights", _LOAD, "dropped_per_expert"):
            self.sow("intermediates", name, getattr(aux, name))
        return y

    def _not_collected(self) -> str | None:
        """What a training step would miss of this call, as a sentence."""
        router = self.config.router
        needed = {LOSSES: "auxiliary losses"} if router.has_losses else {}
        needed |= {"intermediates": "loads, which move the correction bias,"} if router.moves_bias else {}
        lost = [what for name, what in needed.items() if not self.is_mutable_collection(name)]
        if not lost or self.is_initializing():
            return None
        return (
            f"The {' and '.join(lost)} of {'/'.join(('LatentMoE', *self.path))} are not collected: apply the model "
            f"with mutable={list(needed)}, or set their coefficients and router.bias_update_rate to 0."
        )

    def _params(self) -> Params:
        """The functional tree out of this module's variables, drawn where they do not exist yet."""
        layer_key = self.make_rng("params") if self.has_rng("params") else None
        axes = param_axes(self.config, self.axis_names)

        def draw(own_key, part, names):
            # One key for the layer draws what init_params draws. Without one, linen asks for the shapes alone.
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
        if self.config.router.correction_bias:
            params["router"] |= self.variable(CORRECTION_BIAS, "router", draw, None, "router", ["bias"]).value
        return params


def _box(value, axes, axis_names):
    if axis_names is None:
        return value
    if isinstance(value, ScaledArray):  # each of its arrays has a box
        return jax.tree.map(
            lambda array, names: Boxed(array, tuple(names)), value, map_axes(value, axes, PartitionSpec)
        )
    return Boxed(value, axes)


def to_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The functional parameter tree out of linen variables: boxes taken off, biases and codes back in their places.

    Args:
        variables: of one layer, as `latent_moe` then takes them; or of a model, each layer then a subtree.
    """
    collections = (flatten_dict(nn.unbox(variables.get(name, {}))) for name in ("params", CORRECTION_BIAS, CODES))
    return unflatten_dict({path: leaf for collection in collections for path, leaf in collection.items()})


def from_params(
    params: Params, config: LatentMoEConfig, axis_names: Mapping[str, str | None] | None = FrozenDict()
) -> dict[str, Any]:
    """The linen variables of one layer, boxed as `LatentMoE(config, axis_names).init` makes them.

    `ScaledArray` leaves go to the collection "codes", which gradients with respect to "params" leave alone.

    Args:
        params: its functional tree.
        config: the layer.
        axis_names: as the module's.

    Raises:
        InputError: the parameters do not fit the config.
    """
    check_params(params, config)
    variables: dict[str, Any] = {}
    for part, leaves in param_axes(config, axis_names).items():
        for name, axes in leaves.items():
            leaf = params[part][name]
            collection = CORRECTION_BIAS if (part, name) == _BIAS else "params"
            collection = CODES if isinstance(leaf, ScaledArray) else collection
            variables.setdefault(collection, {}).setdefault(part, {})[name] = _box(leaf, axes, axis_names)
    return variables


def total_loss(sown: Mapping[str, Any]) -> Float[Array, ""]:
    """All auxiliary losses of all layers, coefficients applied: add it to the objective, whatever the config.

    Args:
        sown: what `apply(..., mutable=["losses", "intermediates"])` returned beside y; layers may be stacked.

    Raises:
        InputError: it has no collection "losses".
    """
    if LOSSES not in sown:
        raise InputError(f"collections {sorted(sown)} lack '{LOSSES}': apply the model with mutable=['{LOSSES}', ...].")
    return sum(map(jnp.sum, jax.tree.leaves(nn.unbox(sown[LOSSES]))), start=jnp.zeros(()))


def loads(sown: Mapping[str, Any]) -> dict[str, Any]:
    """The counts "tokens_per_expert" of every layer: a tree to add up over microbatches and to give `after_step`.

    Args:
        sown: as for `total_loss`.
    """
    counts = {path: leaf for path, leaf in flatten_dict(sown.get("intermediates", {})).items() if path[-1] == _LOAD}
    return {"intermediates": unflatten_dict(counts)}


def after_step(
    variables: Mapping[str, Any],
    sown: Mapping[str, Any],
    rate: float | Float[Array, ""],
    *,
    recentre: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """The variables with every correction bias moved by the step's loads; as they are where the model has none.

    Call it once after the optimiser's step. Leading axes of the counts that a bias does not have, such as those of a
    scan over microbatches, are added up.

    Args:
        variables: of the model.
        sown: what `apply(..., mutable=["losses", "intermediates"])` returned beside y, or `loads` of it.
        rate: `RouterConfig.bias_update_rate`, or a schedule's value; 0 where no step was made.
        recentre: as in `jax_latent_moe.update_correction_bias`.
        axis_name: mapped axes of a `shard_map` or `vmap` of your own, whose devices have other tokens.

    Raises:
        InputError: a layer with a bias has no counts in `sown`.
    """
    if CORRECTION_BIAS not in variables:
        return dict(variables)
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
    """`jax_latent_moe.update_correction_bias` on every layer of a model, by its collections: see `after_step`.

    Args:
        bias: the collection "correction_bias", boxed or not; layers may be stacked by nn.scan.
        intermediates: the collection "intermediates". Counts of several calls of one layer are added.
        rate: the step, `RouterConfig.bias_update_rate`.
        recentre: as in `after_step`.
        axis_name: as in `after_step`.

    Returns:
        The collection "correction_bias", boxed as it came.

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
        moved = move_bias(before, of_calls, rate, recentre=recentre, axis_name=axis_name)
        leaves[path] = nn.meta.replace_boxed(leaf, moved)
    return unflatten_dict(leaves)
