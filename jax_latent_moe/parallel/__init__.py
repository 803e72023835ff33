"""A layer over many devices: tokens, experts and inner widths are split over the axes of a mesh.

`latent_moe` runs on the mesh of `jax.set_mesh` if its config has `parallel`. This package places parameters and inputs
on the mesh, says which dispatch runs and why, and balances busy experts by copies.
"""

from jax_latent_moe.parallel.choice import DispatchCost, choose_dispatch, dispatch_costs, explain
from jax_latent_moe.parallel.copies import collapse, expand, replicate_experts
from jax_latent_moe.parallel.mesh import axis_sizes, logical_axis_rules, mesh_sizes, param_specs, token_spec

MAXTEXT_AXES: dict[str, str | None] = {
    "hidden": "embed",
    "latent": None,
    "expert": "exp",
    "expert_latent": "embed_no_exp",
    "expert_intermediate": "mlp",
    "shared_intermediate": "mlp",
}
"""MaxText's names of the logical axes, for `axis_names` of the Flax modules and of `logical_axis_rules`."""

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
