"""The parameter tree of a layer: its shapes, its logical axes, its first values, its check."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import InputError

Params = dict[str, dict[str, Array]]
LOGICAL_AXES = ("hidden", "latent", "expert", "expert_latent", "expert_intermediate", "shared_intermediate")
Layout = dict[str, dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]]


def param_shapes(config: LatentMoEConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The parameter tree as shapes and dtypes; parts that the config does not have are left out.

    Kernels are [in, out] and experts are stacked; a gated expert's gate and up kernels are one array [E, l, 2, m],
    gate first. The correction bias is float32 whatever param_dtype says: bfloat16 would destroy the routing of
    released checkpoints, whose biases differ by less than 0.25 near 64.
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
    """The parameter tree as logical axis names, one a dimension: what sharding rules map to mesh axes.

    Args:
        config: the layer.
        axis_names: other names for some of "hidden", "latent", "expert", "expert_latent", "expert_intermediate" and
            "shared_intermediate", such as {"hidden": "embed"}; None leaves an axis without a name.

    Raises:
        InputError: axis_names renames an axis that no layer has.
    """
    renamed = dict(axis_names or {})
    if unknown := sorted(renamed.keys() - set(LOGICAL_AXES)):
        raise InputError(f"axis_names rename {unknown[0]!r}, which is none of {', '.join(map(repr, LOGICAL_AXES))}.")
    return {
        part: {name: tuple(axis and renamed.get(axis, axis) for axis in axes) for name, (_, axes) in leaves.items()}
        for part, leaves in _layout(config).items()
    }


def init_params(key: Key[Array, ""], config: LatentMoEConfig) -> Params:
    """Draws the parameters of one layer: kernels as `config.init` says, scales 1, the correction bias 0.

    Args:
        key: a JAX random key.
        config: the layer.
    """
    return {
        part: {name: init_param(key, config, part, name) for name in leaves}
        for part, leaves in param_shapes(config).items()
    }


def init_param(key: Key[Array, ""], config: LatentMoEConfig, part: str, name: str) -> Array:
    """One leaf of `init_params`: the same value for the same key, part and name."""
    leaf = param_shapes(config)[part][name]
    if len(leaf.shape) == 1:
        return jnp.full(leaf.shape, 0.0 if name == "bias" else 1.0, leaf.dtype)
    fan_in = leaf.shape[1] if part == "experts" else leaf.shape[0]
    std = 1 / math.sqrt(fan_in) if config.init.std is None else config.init.std
    if (part, name) in (("up_proj", "kernel"), ("shared", "w_out")) or (
        (part, name) == ("experts", "w_out") and config.init.scale_expert_output
    ):
        std *= config.init.output_scale
    index = sorted((p, n) for p, leaves in _EVERY_LEAF.items() for n in leaves).index((part, name))
    # A normal cut at two standard deviations has this standard deviation: divide it out.
    drawn = jax.random.truncated_normal(jax.random.fold_in(key, index), -2, 2, leaf.shape, jnp.float32)
    return (drawn * (std / 0.87962566103423978)).astype(leaf.dtype)


def as_array(name: str, value) -> Array | np.ndarray | None:
    """The value as an array; None as itself, and arrays of JAX and NumPy too.

    Raises:
        InputError: NumPy makes no array of numbers of it.
    """
    if value is None or isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} of type {type(value).__name__} must be an array of numbers.") from None


def check_params(params: Params, config: LatentMoEConfig) -> Params:
    """The tree with JAX's arrays as its leaves.

    Raises:
        InputError: it has not exactly the parts, shapes and kinds of dtype that the config asks for.
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
            "merge_state(trainable, state) puts it back"
            if missing == [("router", "bias")]
            else "init_params makes them"
        )
        raise InputError(f"params do not fit the config: {', '.join(listed)}. {makes}.")
    none = [path for path, leaf in given.items() if leaf is None]
    if none:
        raise InputError(f"params {'/'.join(none[0])}=None must be an array.")
    given: dict[tuple[str, str], Any] = {
        path: as_array(f"params {'/'.join(path)}", leaf) for path, leaf in given.items()
    }
    for path, leaf in given.items():
        if leaf.shape != wanted[path].shape:
            raise InputError(f"params {'/'.join(path)} of shape {leaf.shape} must be of shape {wanted[path].shape}.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"params {'/'.join(path)} of dtype {leaf.dtype} must be floating.")
    bias = given.get(("router", "bias"))
    if bias is not None and bias.dtype not in (jnp.float32, jnp.float64):
        raise InputError(
            f"params router/bias of dtype {bias.dtype} must be float32: a narrower one cannot hold "
            "the small differences that balance the experts."
        )
    return {part: {name: jnp.asarray(given[part, name]) for name in leaves} for part, leaves in params.items()}


_EVERY_LEAF = {
    "router": ("kernel", "bias", "scale"),
    "down_proj": ("kernel",),
    "experts": ("w_in", "w_out"),
    "latent_norm": ("scale",),
    "up_proj": ("kernel",),
    "shared": ("w_in", "w_out"),
}


def _layout(config) -> Layout:
    """Every leaf that the config has, as (shape, logical axes)."""
    d, width, experts = config.hidden_size, config.latent_width, config.num_experts
    m, ms = config.expert_intermediate_size, config.shared_expert_intermediate_size
    gate, gate_axis = ((2,), (None,)) if config.gated else ((), ())
    latent = "hidden" if config.latent_size is None else "latent"
    layout: Layout = {"router": {"kernel": ((d, experts), ("hidden", "expert"))}}
    if config.router.correction_bias:
        layout["router"]["bias"] = ((experts,), ("expert",))
    if config.router.per_expert_scale:
        layout["router"]["scale"] = ((experts,), ("expert",))
    layout["experts"] = {
        "w_in": ((experts, width, *gate, m), ("expert", "expert_latent", *gate_axis, "expert_intermediate")),
        "w_out": ((experts, m, width), ("expert", "expert_intermediate", "expert_latent")),
    }
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
    return layout
