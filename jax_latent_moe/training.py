"""What a training step does beside the layer: state kept from the optimiser, the total loss, the biases' own step."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, Float, Int, PyTree

from jax_latent_moe.errors import InputError, NotCollectedWarning
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.layer import LatentMoEAux
from jax_latent_moe.routing.router import update_correction_bias

_BIAS = "router/bias"


def split_state(params: PyTree) -> tuple[PyTree, PyTree]:
    """Parameters without what no optimiser may move, for the optimiser; and the rest: correction biases and codes.

    Gradients, optimisers and weight decay given the first cannot move the second; `merge_state` puts both together.

    Args:
        params: of one layer, as `init_params` makes them, or of a model: layers in nested dicts, lists and tuples,
            beside whatever else. Every leaf "bias" of a dict "router" is a correction bias, and every `ScaledArray` in
            a dict is frozen.

    Returns:
        trainable: params without the biases and the `ScaledArray`s.
        state: these at their paths, and no other leaf; {} where there are none.
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
    """The parameters that `split_state` took apart, as `latent_moe` takes them."""
    if isinstance(state, Mapping):
        if not state:
            return trainable
        merged = {key: merge_state(value, state.get(key, {})) for key, value in trainable.items()}
        return merged | {key: value for key, value in state.items() if key not in trainable}
    return type(trainable)(map(merge_state, trainable, state))


def trainable_mask(params: PyTree) -> PyTree:
    """True for each leaf that an optimiser may move, False for correction biases, codes and scales.

    A correction bias is every path that ends "router/bias"; codes and scales are those of a `ScaledArray`.

    For trees that cannot be split: `optax.masked(optimiser, trainable_mask)` and Equinox's
    `eqx.partition(model, trainable_mask(model))`. Haiku's names read as paths too.
    """

    def may_move(path, leaf):
        if isinstance(leaf, ScaledArray):
            return jax.tree.map(lambda _: False, leaf)
        return not ("/" + keystr(path, simple=True, separator="/")).endswith("/" + _BIAS)

    return tree_map_with_path(may_move, params, is_leaf=lambda node: isinstance(node, ScaledArray))


def total_loss(aux: PyTree[LatentMoEAux]) -> Float[Array, ""]:
    """All auxiliary losses of all layers, coefficients applied: add it to the objective, whatever the config.

    Args:
        aux: what a layer returned, or a pytree of it over layers; arrays that scan or vmap stacked are added up.

    Raises:
        InputError: there is no `LatentMoEAux` in it.
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
    """Moves the correction biases of a model by the loads of one step: call it once after the optimiser's step.

    Args:
        state: of `split_state`; {} is given back, and so are parts without a correction bias, such as codes.
        aux: what the layers returned, in the places that they have in state: of a single layer its `LatentMoEAux`, of
            a model a dict or list of them. In the place of each may stand its `tokens_per_expert` alone, or a list or
            tuple of several microbatches; leading axes that the bias does not have, such as those of a scan over
            microbatches, are added up.
        rate: `RouterConfig.bias_update_rate`, or a schedule's value; 0 where no step was made.
        recentre: subtract each bias's mean, as in `update_correction_bias`.
        axis_name: mapped axes of a `shard_map` or `vmap` of your own, whose devices have other tokens.

    Raises:
        InputError: a layer with a bias has no loads.
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
    return {**state, "router": {"bias": step(bias, counts)}}


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
            f"aux has nothing at {where}, where a layer has a correction bias: give its LatentMoEAux."
        ) from None


def move_bias(
    bias: Float[Array, "*layers e"], counts: Sequence[Int[Array, "..."]], rate, *, recentre, axis_name
) -> Float[Array, "*layers e"]:
    """`update_correction_bias` by the sum of several counts, each with any leading axes before those of the bias."""
    shape = jnp.shape(bias)
    parts = [jnp.sum(jnp.reshape(count, (-1, *shape)), axis=0, dtype=jnp.asarray(count).dtype) for count in counts]
    return update_correction_bias(bias, sum(parts[1:], start=parts[0]), rate, recentre=recentre, axis_name=axis_name)


def _auxes(tree) -> list[LatentMoEAux]:
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, LatentMoEAux))
    if not found or not all(isinstance(one, LatentMoEAux) for one in found):
        raise InputError("aux holds no LatentMoEAux, or something else: give what latent_moe returned beside y.")
    return found


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def warn_if_differentiated(message: str, y: Any) -> Any:
    """y, with a `NotCollectedWarning` when a program that differentiates it is traced."""
    del message
    return y


@warn_if_differentiated.defjvp
def _warn(message, primals, tangents):
    warnings.warn(message, NotCollectedWarning, stacklevel=2)
    return primals[0], tangents[0]
