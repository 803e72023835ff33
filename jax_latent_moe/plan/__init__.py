"""A layer on GPUs one does not have yet: memory, traffic and time on paper, and what binds.

`python -m jax_latent_moe.plan --preset nemotron_3_super --mesh data=8,expert=8` prints a plan.
"""

from jax_latent_moe.plan.gpus import GPU, GPUS
from jax_latent_moe.plan.report import Plan, make_plan, render
from jax_latent_moe.plan.timing import Part

__all__ = ["GPU", "GPUS", "Part", "Plan", "make_plan", "render"]
