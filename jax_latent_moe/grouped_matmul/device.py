"""The device that JAX computes on by default, for which backends and block sizes are chosen."""

import jax


def default_device() -> tuple[str, str]:
    """Its platform ("cpu", "gpu", "tpu") and its kind, such as "NVIDIA H100 80GB HBM3"."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.platform, device.device_kind
