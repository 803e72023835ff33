"""A layer over many devices: tokens, experts and inner widths split over the axes of a mesh.

`latent_moe` does it by itself where its config has `parallel` and `jax.set_mesh` set a mesh. Here is how to place
parameters and inputs there, and how to ask which dispatch runs.
"""

from jax_latent_moe.parallel.choice import DispatchCost, choose_dispatch, dispatch_costs, explain
from jax_latent_moe.parallel.copies import collapse, expand, replicate_experts
from jax_latent_moe.parallel.mesh import (
    MAXTEXT_AXES,
    axis_sizes,
    logical_axis_rules,
    mesh_sizes,
    param_specs,
    token_spec,
)

__all__ = [
    "MAXTEXT_AXES",
    "DispatchCost",
    "axis_sizes",
    "choose_dispatch",
    "collapse",
    "dispatch_costs",
    "expand",
    "explain",
    "logical_axis_rules",
    "mesh_sizes",
    "param_specs",
    "replicate_experts",
    "token_spec",
]
