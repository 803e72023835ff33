"""What the first device of this process is."""

import jax


def why_no_nvidia_gpu(lowest: float, below: float = float("inf")) -> str | None:
    """Why JAX computes on no NVIDIA GPU of compute capability at least `lowest` and under `below`. None if it does."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and JAX computes on {device.device_kind}"
    capability = getattr(device, "compute_capability", "0")  # "gfx942" on AMD
    if capability.replace(".", "").isdigit() and lowest <= float(capability) < below:
        return None
    wanted = f"{lowest} or higher" if below == float("inf") else f"{lowest} to under {below}"
    return f"it needs compute capability {wanted}, and {device.device_kind} has {capability}"
