"""What a layer costs: parameters and floating-point operations, from its configuration alone."""

import math

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.params import param_shapes


def parameters(config: LatentMoEConfig) -> int:
    """Parameters of one layer, the correction bias included."""
    return sum(math.prod(leaf.shape) for part in param_shapes(config).values() for leaf in part.values())


def active_parameters(config: LatentMoEConfig) -> int:
    """Parameters that one token uses: all but the experts it does not choose."""
    experts = sum(math.prod(leaf.shape) for leaf in param_shapes(config)["experts"].values())
    return parameters(config) - experts + experts * config.top_k // config.num_experts


def matmul_flops_per_token(config: LatentMoEConfig) -> int:
    """Floating-point operations of the forward matmuls for one token: 2 per active kernel element.

    A backward pass takes twice as many.
    """
    kernels = {"kernel", "w_in", "w_out"}
    total = 0
    for part, leaves in param_shapes(config).items():
        for name, leaf in leaves.items():
            if name in kernels:
                share = config.top_k / config.num_experts if part == "experts" else 1
                total += round(2 * math.prod(leaf.shape) * share)
    return total
