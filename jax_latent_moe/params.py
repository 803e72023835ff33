"""The parameter tree of a layer: shapes, logical axes, initial values and checks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jax_latent_moe.arrays import typed_key
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import FORMATS, ScaledArray
from jax_latent_moe.low_rank import LowRank

Params = dict[str, dict[str, Array]]
LOGICAL_AXES = ("hidden", "latent", "expert", "expert_latent", "expert_intermediate", "shared_intermediate")
Layout = dict[str, dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]]


def param_shapes(config: LatentMoEConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The parameter tree as shapes and dtypes. It has only the parts that the config has.

    Kernels are [in, out] and experts are stacked. The gate and up kernels of gated experts are one array [E, l, 2, m],
    gate first. The correction bias is always float32, whatever param_dtype is. bfloat16 would destroy the routing of
    released checkpoints, whose biases are near 64 and differ by less than 0.25.
    """
    return {
        part: {
            name: jax.ShapeDtypeStruct(shape, jnp.float32 if (part, name) == ("router", "bias") else config.param_dtype)
            for name, (shape, _) in leaves.items()
        }
        for part, leaves in _layout(config).items()
    }


def param_axes(
    config: LatentMoEConfig, axis_names: Mapping[str, str | None] | None = None
) -> dict[str, dict[str, tuple[str | None, ...]]]:
    """The parameter tree as logical axis names, one for each dimension. Sharding rules map them to mesh axes.

    Args:
        config: the layer.
        axis_names: other names for some of "hidden", "latent", "expert", "expert_latent", "expert_intermediate" and
            "shared_intermediate", such as {"hidden": "embed"}; None leaves an axis without a name.

    Raises:
        InputError: axis_names renames an axis that no layer has.
    """
    return {
        part: {name: tuple(axis and renamed(axis, axis_names) for axis in axes) for name, (_, axes) in leaves.items()}
        for part, leaves in _layout(config).items()
    }


def renamed(axis: str, axis_names: Mapping[str, str | None] | None) -> str | None:
    """The name of a logical axis after `axis_names`.

    Raises:
        InputError: axis_names renames an axis that no layer has, or does not map names to names.
    """
    if not isinstance(axis_names, Mapping | None) or not all(
        isinstance(name, str | None) for name in (axis_names or {}).values()
    ):
        raise InputError(
            f'axis_names={axis_names!r} must map names to names, such as {{"hidden": "embed"}}, or to None.'
        )
    if unknown := sorted(map(str, (axis_names or {}).keys() - set(LOGICAL_AXES))):
        raise InputError(f"axis_names rename {unknown[0]!r}, which is not one of {', '.join(map(repr, LOGICAL_AXES))}.")
    return (axis_names or {}).get(axis, axis)


def init_params(key: Key[Array, ""], config: LatentMoEConfig) -> Params:
    """Draws the parameters of one layer. Kernels follow `config.init`, scales are 1, biases are 0.

    Args:
        key: a JAX random key.
        config: the layer.

    Raises:
        InputError: key is not one key, or config is of another type.
    """
    check_config(config)
    key = typed_key(key)
    return {
        part: {name: init_param(key, config, part, name) for name in leaves}
        for part, leaves in param_shapes(config).items()
    }


def init_param(key: Key[Array, ""], config: LatentMoEConfig, part: str, name: str) -> Array:
    """One leaf of `init_params`: the same value for the same key, part and name."""
    copies = None if config.parallel is None else config.parallel.physical_to_logical
    if part == "experts" and copies is not None:
        return init_param(key, dataclasses.replace(config, parallel=None), part, name)[np.asarray(copies)]
    leaf = param_shapes(config)[part][name]
    if name in _BIASES:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if len(leaf.shape) == 1:
        return jnp.ones(leaf.shape, leaf.dtype)
    fan_in = leaf.shape[1] if part == "experts" else leaf.shape[0]
    std = 1 / math.sqrt(fan_in) if config.init.std is None else config.init.std
    if (part, name) in (("up_proj", "kernel"), ("shared", "w_out")) or (
        (part, name) == ("experts", "w_out") and config.init.scale_expert_output
    ):
        std *= config.init.output_scale
    index = _DRAWN.index((part, name))
    # 0.8796 is the standard deviation of a standard normal that is cut at two standard deviations.
    drawn = jax.random.truncated_normal(jax.random.fold_in(key, index), -2, 2, leaf.shape, jnp.float32)
    return (drawn * (std / 0.87962566103423978)).astype(leaf.dtype)


def as_array(name: str, value) -> Any:
    """The value as an array. None, arrays of JAX and NumPy, `ScaledArray` and `LowRank` come back as they are.

    Raises:
        InputError: NumPy makes no array of numbers of it.
    """
    if value is None or isinstance(value, jax.Array | np.ndarray | ScaledArray | LowRank):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} of type {type(value).__name__} must be an array of numbers.") from None


def check_config(config: LatentMoEConfig) -> None:
    """Refuses values that are not a `LatentMoEConfig`, such as a dict of its fields.

    Raises:
        InputError: the config is of another type.
    """
    if not isinstance(config, LatentMoEConfig):
        raise InputError(f"config of type {type(config).__name__} must be a LatentMoEConfig.")


def check_params(params: Params, config: LatentMoEConfig) -> Params:
    """The tree with JAX's arrays as its leaves.

    Raises:
        InputError: its parts, shapes or kinds of dtype are not exactly those that the config asks for.
    """
    expected = param_shapes(config)
    if not isinstance(params, Mapping) or not all(isinstance(leaves, Mapping) for leaves in params.values()):
        raise InputError("params must be a dict of dicts of arrays: init_params(key, config) makes them.")
    given = {(part, name): leaf for part, leaves in params.items() for name, leaf in leaves.items()}
    wanted = {(part, name): leaf for part, leaves in expected.items() for name, leaf in leaves.items()}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or extra:
        listed = [f"missing {'/'.join(path)}" for path in missing] + [f"not used: {'/'.join(path)}" for path in extra]
        makes = (
            "merge_state(trainable, state) restores it" if missing == [("router", "bias")] else "init_params makes them"
        )
        raise InputError(f"params do not fit the config: {', '.join(listed)}. {makes}.")
    none = [path for path, leaf in given.items() if leaf is None]
    if none:
        raise InputError(f"params {'/'.join(none[0])}=None must be an array.")
    given: dict[tuple[str, str], Any] = {
        path: as_array(f"params {'/'.join(path)}", leaf) for path, leaf in given.items()
    }
    for path, leaf in given.items():
        if isinstance(leaf, LowRank):
            check_adapter(path, leaf, wanted[path].shape)
            leaf = leaf.base
        if isinstance(leaf, ScaledArray):
            check_scaled(path, leaf, wanted[path].shape)
            continue
        if leaf.shape != wanted[path].shape:
            raise InputError(f"params {'/'.join(path)} of shape {leaf.shape} must be of shape {wanted[path].shape}.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"params {'/'.join(path)} of dtype {leaf.dtype} must be floating.")
    bias = given.get(("router", "bias"))
    if bias is not None and bias.dtype not in (jnp.float32, jnp.float64):
        raise InputError(
            f"params router/bias of dtype {bias.dtype} must be float32: a narrower type cannot hold "
            "the small differences that balance the experts."
        )
    return {part: {name: _on_device(given[part, name]) for name in leaves} for part, leaves in params.items()}


def _on_device(leaf) -> Any:
    return jax.tree.map(jnp.asarray, leaf)


def check_scaled(path: tuple[str, str], leaf: ScaledArray, shape: tuple[int, ...]) -> None:
    """Raises InputError unless the leaf is w_in [E, l, m], w_in [E, l, 2 m] of two matrices if gated, or w_out."""
    name = f"params {'/'.join(path)} in format {leaf.format}"
    if path not in (("experts", "w_in"), ("experts", "w_out")):
        raise InputError(f"{name} holds codes, but only the experts' weights can be quantised: give a dense array.")
    if leaf.format not in FORMATS:
        raise InputError(f"{name} is unknown: registered formats are {', '.join(FORMATS)}.")
    packing = FORMATS[leaf.format].packing
    matrices = (shape[0], shape[2] if len(shape) == 4 else 1, shape[-1], shape[1])
    expected = (*matrices[:-1], matrices[-1] // packing)
    if leaf.codes.shape != expected:
        raise InputError(
            f"{name} has codes of shape {leaf.codes.shape}, which must be {expected}: [experts, matrices side by side, "
            f"out, in / {packing}]. quantize(params, config, {leaf.format!r}) makes them."
        )
    along_k, along_n = FORMATS[leaf.format].blocks(matrices[3], matrices[2])
    for scale in jax.tree.leaves(leaf.scales):
        fits = scale.ndim == 4 and scale.shape[2] in (1, along_n) and scale.shape[3] in (1, along_k)
        if not fits or scale.shape[:2] != expected[:2]:
            raise InputError(
                f"{name} has codes of shape {leaf.codes.shape} and scales of shape {scale.shape}, which must be "
                f"{(*expected[:2], along_n, along_k)}, or have size 1 on axes along which they are equal."
            )


def check_adapter(path: tuple[str, str], leaf: LowRank, shape: tuple[int, ...]) -> None:
    """Raises InputError unless a is [E, in, r] and b [E, r, out], both floating; a projection's have no E."""
    name = f"params {'/'.join(path)}"
    if path not in ADAPTED:
        names = ", ".join("/".join(path) for path in ADAPTED)
        raise InputError(f"{name} cannot have an adapter: only {names} can.")
    absent = [part for part in ("base", "a", "b") if getattr(leaf, part) is None]
    if absent:
        raise InputError(f"{name} has no {absent[0]}: merge_state(adapters, rest) puts adapters and weights together.")
    stacked = path[0] == "experts"
    rank = leaf.a.shape[-1] if leaf.a.ndim else 0
    for part, expected in (
        ("a", (*shape[: stacked + 1], rank)),
        ("b", (*shape[:stacked], rank, *shape[stacked + 1 :])),
    ):
        array = getattr(leaf, part)
        if array.shape != expected or not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(
                f"{name} has {part} of shape {array.shape} and dtype {array.dtype}, which must be floating of shape "
                f"{expected}: lora.adapt makes it."
            )


ADAPTED = (("experts", "w_in"), ("experts", "w_out"), ("down_proj", "kernel"), ("up_proj", "kernel"))
"""The leaves that can have a low-rank adapter."""

_BIASES = ("bias", "logit_bias", "b_in", "b_out")

_DRAWN = (
    ("down_proj", "kernel"),
    ("experts", "w_in"),
    ("experts", "w_out"),
    ("latent_norm", "scale"),
    ("router", "bias"),
    ("router", "kernel"),
    ("router", "scale"),
    ("shared", "w_in"),
    ("shared", "w_out"),
    ("up_proj", "kernel"),
    ("shared", "gate"),
)
"""The leaves that are drawn. A leaf's position is folded into its key. Append new leaves, so that the others keep their
values. For the same reason two leaves that are not drawn stay in the list.
"""


def _layout(config) -> Layout:
    """Every leaf that the config has, as (shape, logical axes)."""
    check_config(config)
    d, width, experts = config.hidden_size, config.latent_width, config.num_experts
    m, ms = config.expert_intermediate_size, config.shared_expert_intermediate_size
    gate, gate_axis = ((2,), (None,)) if config.gated else ((), ())
    latent = "hidden" if config.latent_size is None else "latent"
    layout: Layout = {"router": {"kernel": ((d, experts), ("hidden", "expert"))}}
    if config.router.correction_bias:
        layout["router"]["bias"] = ((experts,), ("expert",))
    if config.router.logit_bias:
        layout["router"]["logit_bias"] = ((experts,), ("expert",))
    if config.router.per_expert_scale:
        layout["router"]["scale"] = ((experts,), ("expert",))
    experts = config.num_physical_experts
    layout["experts"] = {
        "w_in": ((experts, width, *gate, m), ("expert", "expert_latent", *gate_axis, "expert_intermediate")),
        "w_out": ((experts, m, width), ("expert", "expert_intermediate", "expert_latent")),
    }
    if config.expert_bias:
        layout["experts"]["b_in"] = ((experts, *gate, m), ("expert", *gate_axis, "expert_intermediate"))
        layout["experts"]["b_out"] = ((experts, width), ("expert", "expert_latent"))
    if config.latent_size is not None:
        layout["down_proj"] = {"kernel": ((d, width), ("hidden", "latent"))}
        layout["up_proj"] = {"kernel": ((width, d), ("latent", "hidden"))}
    if config.latent_norm != "none":
        layout["latent_norm"] = {"scale": ((width,), (latent,))}
    if ms:
        layout["shared"] = {
            "w_in": ((d, *gate, ms), ("hidden", *gate_axis, "shared_intermediate")),
            "w_out": ((ms, d), ("shared_intermediate", "hidden")),
        }
        if config.shared_expert_gate:
            layout["shared"]["gate"] = ((d, 1), ("hidden", None))
    return layout
