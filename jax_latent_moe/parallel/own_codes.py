"""Codes of dense experts' weights on a mesh: each device encodes its own part of the weights."""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.parallel.mesh import axis_sizes, code_specs, cuts_blocks, param_specs
from jax_latent_moe.precision import Codes


def on_own_experts(run: Callable[..., Codes], config: LatentMoEConfig, leading: int, w_in, w_out, *codes) -> Codes:
    """Calls run(w_in, w_out, *codes), which gives codes, on each device's part of the experts.

    Args:
        run: computes on one device.
        config: the layer. Without `parallel`, this is one plain call.
        leading: number of axes before the experts' axis.
        w_in: [..., E, l, m], or [..., E, l, 2, m] if gated.
        w_out: [..., E, m, l].
        codes: nothing, or the codes of these weights, if run reads them.
    """
    kind = jax.typeof(w_in).sharding
    mesh = kind.mesh if kind.mesh.explicit_axes else jax.sharding.get_abstract_mesh()
    if explicit := tuple(mesh.explicit_axes):
        own: Callable = jax.sharding.auto_axes(
            lambda *arrays: _on_own_experts(run, config, leading, *arrays),
            axes=explicit,
            out_sharding=PartitionSpec(*kind.spec[: leading + 1])
            if config.parallel is None
            else code_specs(config, mesh, leading),
        )
        return own(w_in, w_out, *codes)
    return _on_own_experts(run, config, leading, w_in, w_out, *codes)


def whole_latents(config: LatentMoEConfig, w_in, w_out):
    """This device's weights, gathered over fsdp if it `cuts_blocks`. Call it inside of `on_own_experts`."""
    if config.parallel is None or not cuts_blocks(config, jax.sharding.get_abstract_mesh()):
        return w_in, w_out
    gather = functools.partial(jax.lax.all_gather, axis_name=config.parallel.fsdp_axis, tiled=True)
    return gather(w_in, axis=w_out.ndim - 2), gather(w_out, axis=w_out.ndim - 1)


def _on_own_experts(run, config, leading, *arrays):
    mesh = jax.sharding.get_abstract_mesh()
    if config.parallel is None or math.prod(axis_sizes(config.parallel, mesh).values()) == 1:
        return run(*arrays)
    specs, lead = param_specs(config, mesh)["experts"], (None,) * leading
    weights = [PartitionSpec(*lead, *specs[name]) for name in ("w_in", "w_out")]
    codes = code_specs(config, mesh, leading)
    mapped = jax.shard_map(
        run,
        in_specs=(*weights, *[codes for _ in arrays[2:]]),
        out_specs=codes,
        axis_names=set(axis_sizes(config.parallel, mesh)) & set(mesh.shape),
        check_vma=False,
    )
    return mapped(*arrays)
