"""The device that JAX computes on by default: backends, tiles and block sizes are chosen for it."""

import dataclasses

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""Words that stand in the device kind of a Hopper GPU."""
HOPPER_SMS = 132
"""SMs of an H100 SXM and an H200."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What backends are asked about.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: the device's own name, such as "NVIDIA H100 80GB HBM3".
        num_sms: SMs of a GPU. Kernels that are interpreted on a CPU take those of an H100.
    """

    platform: str
    kind: str
    num_sms: int = HOPPER_SMS

    @property
    def architecture(self) -> str:
        """Kernels are chosen by it: "sm90" for a Hopper GPU, else the platform."""
        hopper = self.platform == "gpu" and not set(HOPPER).isdisjoint(self.kind.split())
        return "sm90" if hopper else self.platform


def current_device() -> Device:
    """The default device. A trace reads it where it poses a problem, and hands it on from there."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    sms = device.core_count if device.platform == "gpu" else HOPPER_SMS
    return Device(device.platform, device.device_kind, sms)
