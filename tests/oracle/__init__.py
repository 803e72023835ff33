"""An independent float64 oracle in NumPy: plain loops, one token at a time, gradients by hand.

Written from the published formulas and from the docstrings of `jax_latent_moe.config`; it shares no code with the
library and imports nothing of it but that configuration.
"""

from tests.oracle.layer import Result, backward, forward, norm_sums, update_correction_bias

__all__ = ["Result", "backward", "forward", "norm_sums", "update_correction_bias"]
