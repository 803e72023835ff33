"""The parts of a training step outside of the layer: the split into parameters and state, the loss, the bias update."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, Float, Int, PyTree

from jax_latent_moe.arrays import as_numbers, check_fits_int32, given_numbers
from jax_latent_moe.errors import InputError, NotCollectedWarning
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.layer import LatentMoEAux
from jax_latent_moe.low_rank import LowRank
from jax_latent_moe.routing.bias import update_correction_bias
from jax_latent_moe.routing.quantile import move_to_target

_BIAS = "router/bias"


def split_state(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits parameters into those that an optimiser trains and the rest, which are correction biases and codes.

    An optimiser that gets only the first tree cannot move a bias, and neither can its weight decay. `merge_state` puts
    the two trees together again.

    Args:
        params: the parameters of one layer, as `init_params` makes them, or those of a model. A model may nest dicts,
            lists and tuples, and may hold other leaves. Every leaf "bias" of a dict "router" is a correction bias.
            Every `ScaledArray` in a dict is frozen, and so is the base of every `LowRank`.

    Returns:
        trainable: the parameters without biases and frozen leaves.
        state: only these leaves, at their paths; {} if there are none.
    """
    if isinstance(params, Mapping):
        trainable, state = {}, {}
        for key, value in params.items():
            if key == "router" and isinstance(value, Mapping) and "bias" in value:
                trainable[key] = {name: leaf for name, leaf in value.items() if name != "bias"}
                state[key] = {"bias": value["bias"]}
                continue
            if isinstance(value, ScaledArray):
                state[key] = value
                continue
            if isinstance(value, LowRank):
                trainable[key], state[key] = value.adapter, value.frozen
                continue
            trainable[key], rest = split_state(value)
            if jax.tree.leaves(rest):
                state[key] = rest
        return trainable, state
    if isinstance(params, list | tuple) and not hasattr(params, "_fields"):
        parts = [split_state(value) for value in params]
        trainable, state = (type(params)(part) for part in zip(*parts, strict=True)) if parts else (params, {})
        return trainable, state if jax.tree.leaves(state) else {}
    return params, {}


def merge_state(trainable: PyTree, state: PyTree) -> PyTree:
    """Joins the two trees of `split_state` into the parameters that `latent_moe` takes.

    Raises:
        InputError: the two trees do not come from one `split_state`.
    """
    if isinstance(state, LowRank):
        return state if not isinstance(trainable, LowRank) else trainable.with_base(state.base)
    if isinstance(state, Mapping):
        if not state or not isinstance(trainable, Mapping):
            return trainable
        merged = {key: merge_state(value, state.get(key, {})) for key, value in trainable.items()}
        return merged | {key: value for key, value in state.items() if key not in trainable}
    if not isinstance(state, list | tuple) or not isinstance(trainable, list | tuple) or len(state) != len(trainable):
        raise InputError(
            f"state of type {type(state).__name__} does not go with parameters of type {type(trainable).__name__}: "
            "give the two trees that split_state returned."
        )
    return type(trainable)(map(merge_state, trainable, state))


def trainable_mask(params: PyTree) -> PyTree:
    """A tree of True for each leaf that an optimiser may move and False for correction biases, codes and scales.

    A correction bias is a leaf whose path ends in "router/bias"; Haiku's names count as paths. The mask is for trees
    that cannot be split: `optax.masked(optimiser, trainable_mask)`, or Equinox's
    `eqx.partition(model, trainable_mask(model))`.
    """

    def may_move(path, leaf):
        if isinstance(leaf, ScaledArray):
            return jax.tree.map(lambda _: False, leaf)
        if isinstance(leaf, LowRank):
            frozen = jax.tree.map(lambda _: False, leaf.frozen)
            return dataclasses.replace(jax.tree.map(lambda _: True, leaf.adapter), base=frozen.base)
        return not ("/" + keystr(path, simple=True, separator="/")).endswith("/" + _BIAS)

    return tree_map_with_path(may_move, params, is_leaf=lambda node: isinstance(node, ScaledArray | LowRank))


def total_loss(aux: PyTree[LatentMoEAux]) -> Float[Array, ""]:
    """The sum of all auxiliary losses of all layers, with their coefficients. Add it to the objective.

    It is 0 for a config without losses.

    Args:
        aux: the `LatentMoEAux` of a layer, or a pytree of them over layers. Arrays that scan or vmap stacked are
            summed.

    Raises:
        InputError: `aux` holds no `LatentMoEAux`, or something else beside it.
    """
    losses = [loss for one in _auxes(aux) for loss in one.losses.values()]
    return sum(map(jnp.sum, losses), start=jnp.zeros(()))


def after_step(
    state: PyTree,
    aux: PyTree,
    rate: float | Float[Array, ""],
    *,
    recentre: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> PyTree:
    """Moves every correction bias of a model by the loads of one step. Call it once after the optimiser's step.

    Args:
        state: the state of `split_state`. Parts without a correction bias, such as codes, are returned as they are.
        aux: the `LatentMoEAux` of the layer; for a model, a dict or list of them with the structure of `state`. Each
            may be replaced by its `tokens_per_expert`, or by a list or tuple over microbatches. Counts may have leading
            axes that the bias does not have, such as the axis of a scan over microbatches. They are summed. A layer
            with router.bias_update="quantile" needs the whole `LatentMoEAux`, whose targets are averaged. With only
            counts, the bias would move by `rate` as with "sign".
        rate: `RouterConfig.bias_update_rate`, or the value of a schedule. Give 0 for a skipped step.
        recentre: subtract each bias's mean, as in `update_correction_bias`.
        axis_name: axes of your own `shard_map` or `vmap` over which the tokens are split. The counts are summed over
            them.

    Raises:
        InputError: a layer with a bias has no counts in `aux`, or counts of another shape.
    """
    return _walk(state, aux, partial(move_bias, rate=rate, recentre=recentre, axis_name=axis_name), ())


def _walk(state, aux, step, path):
    if not _has_bias(state):
        return state
    if not isinstance(state, Mapping):
        return type(state)(_walk(part, _part(aux, i, path), step, (*path, i)) for i, part in enumerate(state))
    if "router" not in state:
        return {key: _walk(part, _part(aux, key, path), step, (*path, key)) for key, part in state.items()}
    bias = state["router"]["bias"]
    loads = aux if isinstance(aux, list | tuple) and not isinstance(aux, LatentMoEAux) else [aux]
    counts = [load.tokens_per_expert if isinstance(load, LatentMoEAux) else load for load in loads]
    if not counts:
        where = "/".join(map(str, path)) or "the layer"
        raise InputError(f"aux of {where} is empty: give its LatentMoEAux, or one for each microbatch.")
    for count in counts:
        if np.shape(count)[-bias.ndim :] != bias.shape:
            where = "/".join(map(str, path)) or "the layer"
            raise InputError(
                f"aux of {where} has counts of type {type(count).__name__} and shape {np.shape(count)}: give its "
                f"LatentMoEAux, or tokens_per_expert of shape [..., {', '.join(map(str, bias.shape))}]."
            )
    targets = [load.bias_target for load in loads if isinstance(load, LatentMoEAux) and load.bias_target is not None]
    microbatches = [jnp.ones(jnp.shape(target)[:-1]) for target in targets]
    return {**state, "router": {"bias": step(bias, counts, targets, microbatches)}}


def _has_bias(state) -> bool:
    if isinstance(state, Mapping):
        return "router" in state or any(map(_has_bias, state.values()))
    return isinstance(state, list | tuple) and any(map(_has_bias, state))


def _part(aux, key, path):
    try:
        return aux[key]
    except (KeyError, IndexError, TypeError):
        where = "/".join(map(str, (*path, key)))
        raise InputError(
            f"aux has nothing at {where}, but the layer there has a correction bias: give its LatentMoEAux."
        ) from None


def move_bias(
    bias: Float[Array, "*layers e"],
    counts: Sequence[Int[Array, "..."]],
    targets: Sequence[Float[Array, "..."]],
    microbatches: Sequence[Array],
    rate,
    *,
    recentre,
    axis_name,
) -> Float[Array, "*layers e"]:
    """`update_correction_bias` with the sum of several counts, or `move_to_target` with the mean of targets, if any.

    Counts, targets and numbers of microbatches may have any axes before the bias's axes.
    """
    as_numbers("rate", rate)
    shape = jnp.shape(bias)
    if targets:
        total = sum(jnp.sum(jnp.reshape(target, (-1, *shape)), axis=0) for target in targets)
        number = sum(jnp.sum(jnp.reshape(count, (-1, *shape[:-1])), axis=0) for count in microbatches)
        return move_to_target(bias, total / jnp.maximum(number, 1)[..., None], rate, axis_name)
    counts = [given_numbers("tokens_per_expert", count) for count in counts]
    for count in counts:
        check_fits_int32("tokens_per_expert", count)
    parts = [jnp.sum(jnp.reshape(count, (-1, *shape)), axis=0, dtype=jnp.asarray(count).dtype) for count in counts]
    return update_correction_bias(bias, sum(parts[1:], start=parts[0]), rate, recentre=recentre, axis_name=axis_name)


def _auxes(tree) -> list[LatentMoEAux]:
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, LatentMoEAux))
    if not found or not all(isinstance(one, LatentMoEAux) for one in found):
        raise InputError("aux must hold LatentMoEAux values and nothing else: give what latent_moe returned with y.")
    return found


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def warn_if_differentiated(message: str, y: Any) -> Any:
    """Returns y. Tracing its derivative warns with a `NotCollectedWarning`."""
    del message
    return y


@warn_if_differentiated.defjvp
def _warn(message, primals, tangents):
    warnings.warn(message, NotCollectedWarning, stacklevel=2)
    return primals[0], tangents[0]
