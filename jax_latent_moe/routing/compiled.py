"""Whether the compiled kernels other than products run: choice of experts, sort by expert, encoder of weights."""

from jax_latent_moe import native
from jax_latent_moe.config import CutlassBackend, as_backend
from jax_latent_moe.device import current_device


def compiled_runs(backend) -> bool:
    """Whether they run on the default device. The backend must be "auto" or a `CutlassBackend`."""
    if backend != "auto" and not isinstance(as_backend(backend), CutlassBackend):
        return False
    return current_device().architecture == "sm90" and not native.library().missing
