"""The device that JAX computes on by default, for which backends, tiles and block sizes are chosen."""

import dataclasses
import re

import jax

HOPPER = re.compile(r"\bG?H(20|100|200|800)(?!\d)")
"""Matches the kind of a Hopper GPU, in forms such as "NVIDIA H100 PCIe", "H100-PCIE-80GB" and "H100L-94C"."""
HOPPER_SMS = 132
"""SMs of an H100 SXM and of an H200."""


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of a device that decide which backend and tile run on it.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: the device's name, such as "NVIDIA H100 80GB HBM3".
        num_sms: the SMs of a GPU. Other devices have the number of an H100, for kernels that are interpreted.
        kernels: (name, most experts) of the compiled kernels on a device that is not present. None for those of the
            library that is loaded here.
    """

    platform: str
    kind: str
    num_sms: int = HOPPER_SMS
    kernels: tuple[tuple[str, int], ...] | None = dataclasses.field(default=None, repr=False)

    @property
    def architecture(self) -> str:
        """The architecture that kernels are chosen by: "sm90" for a Hopper GPU, else the platform."""
        return "sm90" if self.platform == "gpu" and HOPPER.search(self.kind) else self.platform


def current_device() -> Device:
    """The default device. A problem reads it once, when it is made, and carries it from there on."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    sms = device.core_count if device.platform == "gpu" else HOPPER_SMS
    return Device(device.platform, device.device_kind, sms)
