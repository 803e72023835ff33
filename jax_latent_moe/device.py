"""The device that JAX computes on by default, for which backends, tiles and block sizes are chosen."""

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""Words of which one stands in the device kind of a Hopper GPU."""
HOPPER_SMS = 132


def is_hopper(device_kind: str) -> bool:
    """Whether a device of that kind is a Hopper GPU."""
    return not set(HOPPER).isdisjoint(device_kind.split())


def default_device() -> tuple[str, str]:
    """Its platform ("cpu", "gpu", "tpu") and its kind, such as "NVIDIA H100 80GB HBM3"."""
    device = _device()
    return device.platform, device.device_kind


def num_sms() -> int:
    """Multiprocessors of the default GPU; those of an H100 SXM or H200 where there is no GPU to ask."""
    device = _device()
    return device.core_count if device.platform == "gpu" else HOPPER_SMS


def _device():
    device = jax.config.jax_default_device
    return jax.local_devices(backend=device)[0] if device is None or isinstance(device, str) else device
