"""Where the compiled kernels beside the products run: the choice of experts and the sort by expert."""

from jax_latent_moe import native
from jax_latent_moe.config import CutlassBackend, as_backend
from jax_latent_moe.device import current_device


def compiled_runs(backend) -> bool:
    """Whether experts of that backend ("auto" or `CutlassBackend`) have them on the default device."""
    if backend != "auto" and not isinstance(as_backend(backend), CutlassBackend):
        return False
    return current_device().architecture == "sm90" and not native.library().missing
