"""Estimates the memory, traffic and time of a layer on GPUs that need not be present, and names the bottleneck.

`python -m jax_latent_moe.plan --preset nemotron_3_super --mesh data=8,expert=8` prints a plan.
"""

from jax_latent_moe.plan.gpus import B200, GPU, H100, H200
from jax_latent_moe.plan.report import CostPlan, make_cost_plan, render
from jax_latent_moe.plan.timing import Part

__all__ = ["GPU", "GPUS", "CostPlan", "Part", "make_cost_plan", "render"]

GPUS = {"h100": H100, "h200": H200, "b200": B200}
"""The known GPUs, by name."""
