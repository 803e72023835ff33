"""Prints a plan: `python -m jax_latent_moe.plan --preset kimi_k3 --mesh data=8,expert=64 --gpu h200`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from jax_latent_moe import presets
from jax_latent_moe.config import DISPATCHES, LatentMoEConfig, ParallelConfig
from jax_latent_moe.errors import LatentMoEError
from jax_latent_moe.formats import FORMATS
from jax_latent_moe.parallel import mesh_sizes
from jax_latent_moe.piped import piped
from jax_latent_moe.plan import GPUS, make_cost_plan, render

PRESETS = {name.lower(): value for name, value in vars(presets).items() if isinstance(value, LatentMoEConfig)}


def main(arguments: Sequence[str] | None = None):
    """Parses the command line and prints the plan."""
    parser = argparse.ArgumentParser(prog="python -m jax_latent_moe.plan", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="nemotron_3_super", help="the layer")
    parser.add_argument("--mesh", default="", help="devices along each axis: data=2,fsdp=2,expert=4,tensor=2")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of one device")
    parser.add_argument("--layers", type=int, default=1, help="number of MoE layers, for memory")
    parser.add_argument("--dispatch", choices=DISPATCHES, default="auto")
    parser.add_argument("--dispatch-format", help="format of rows on their way to the experts, such as fp8_block")
    parser.add_argument("--capacity-factor", type=float, default=None, help="see ParallelConfig")
    parser.add_argument("--param-dtype", default="bfloat16", help="dtype of stored parameters and gradients")
    parser.add_argument("--format", choices=sorted(FORMATS), help="of the experts' weights, which are then frozen")
    parser.add_argument("--forward", action="store_true", help="leave out the backward pass and the optimiser")
    parser.add_argument("--remat", action="store_true", help="layers keep only their input and are computed again")
    options = parser.parse_args(arguments)
    try:
        sizes = mesh_sizes(options.mesh)
        # On a mesh, also of one device, a layer does not run the kernels for few tokens.
        parallel = ParallelConfig(
            dispatch=options.dispatch,
            capacity_factor=options.capacity_factor,
            dispatch_format=options.dispatch_format,
        )
        config = dataclasses.replace(
            PRESETS[options.preset], parallel=parallel if sizes else None, param_dtype=options.param_dtype
        )
        plan = make_cost_plan(
            config,
            sizes,
            options.tokens,
            GPUS[options.gpu],
            layers=options.layers,
            training=not options.forward,
            remat=options.remat,
            format=options.format,
        )
    except LatentMoEError as error:
        sys.exit(f"error: {error}")
    print(render(plan))


if __name__ == "__main__":
    with piped():
        main()
