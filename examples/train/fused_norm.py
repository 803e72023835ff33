"""Norms of the model by the kernels of `row_kernels`, with their gradients, on the devices of a mesh."""

import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from examples.train import row_kernels
from examples.train.config import ModelConfig
from examples.train.errors import TrainError
from examples.train.hardware import why_no_nvidia_gpu
from examples.train.placing import PARALLEL
from jax_latent_moe.parallel import token_spec

Norms = Literal["xla", "pallas"]
HOPPER, AFTER_HOPPER = 9.0, 10.0
INTERPRET = None
"""Parameters of Pallas' GPU interpreter, for tests on a CPU."""


def choose_norms(name: str, model: ModelConfig) -> Norms:
    """The implementation of norms and rotations that `--norms` selects on this machine.

    Args:
        name: xla, pallas or auto. auto selects pallas if the kernels can run this model here, else xla.
        model: gives the width.

    Raises:
        TrainError: `name` is pallas, and the kernels cannot run this model here.
    """
    reason = why_no_nvidia_gpu(HOPPER, AFTER_HOPPER)
    if reason is None and model.hidden_size > row_kernels.LARGEST_WIDTH:
        reason = f"model.hidden_size is {model.hidden_size}, more than {row_kernels.LARGEST_WIDTH}"
    if name == "auto":
        return "xla" if reason else "pallas"
    if name == "pallas" and reason:
        raise TrainError(f"--norms pallas cannot run: {reason}. Use --norms auto.")
    return cast(Norms, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def add_norm(
    x: Float[Array, "batch time d"], delta: Float[Array, "batch time d"] | None, scale: Float[Array, " d"], keep: bool
) -> tuple[Float[Array, "batch time d"] | None, Float[Array, "batch time d"]]:
    """The sum of x and delta, and its `rms_norm`. Without delta, the sum is x. Without keep, it is None."""
    total, normed = _add_norm(x, delta, scale)
    return total if keep else None, normed


def _add_norm(x, delta, scale):
    split = (x,) if delta is None else (x, delta)

    def kernel(*arrays):
        *split, scale = arrays
        return row_kernels.add_norm(*split, scale, interpret=INTERPRET)

    *total, normed = _on_devices(kernel, split, (scale,))
    return total[0] if total else x, normed


def _add_norm_forward(x, delta, scale, keep):
    total, normed = _add_norm(x, delta, scale)
    return (total if keep else None, normed), (total, scale, None if delta is None else ())


def _add_norm_backward(keep, residuals, gradients):
    (total, scale, added), (dtotal, dnormed) = residuals, gradients
    split = (total, dnormed, dtotal) if keep else (total, dnormed)

    def kernel(*arrays):
        *split, scale = arrays
        return row_kernels.add_norm_grad(*split, scale, interpret=INTERPRET)

    dx, dscale = _on_devices(kernel, split, (scale,))
    return dx, None if added is None else dx, jnp.sum(dscale, axis=0)


add_norm.defvjp(_add_norm_forward, _add_norm_backward)


@jax.custom_vjp
def norm_rotate(
    x: Float[Array, "batch time heads width"],
    scale: Float[Array, " width"],
    cos: Float[Array, "time half"],
    sin: Float[Array, "time half"],
) -> Float[Array, "batch time heads width"]:
    """`rms_norm` of each head, rotated: pairs of features of its two halves turn by the table's angles."""
    kernel = functools.partial(row_kernels.norm_rotate, interpret=INTERPRET)
    return _on_devices(kernel, (x,), (scale, cos, sin))


def _norm_rotate_forward(x, scale, cos, sin):
    return norm_rotate(x, scale, cos, sin), (x, scale, cos, sin)


def _norm_rotate_backward(residuals, gradient):
    x, *whole = residuals
    kernel = functools.partial(row_kernels.norm_rotate_grad, interpret=INTERPRET)
    dx, dscale = _on_devices(kernel, (x, gradient), whole)
    return dx, jnp.sum(dscale, axis=range(dscale.ndim - 1)), None, None


norm_rotate.defvjp(_norm_rotate_forward, _norm_rotate_backward)


def _on_devices(kernel, split, whole):
    """kernel(*split, *whole) on each device. XLA cannot split a kernel itself.

    Args:
        kernel: its results have a first axis that is split.
        split: arrays whose first axis is the batch.
        whole: arrays that all devices have.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(*split, *whole)
    spec = token_spec(PARALLEL, mesh)
    specs = (spec,) * len(split) + (PartitionSpec(),) * len(whole)
    return jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)(*split, *whole)
