"""The rates of GPUs, by which a plan computes times."""

import dataclasses

from jax_latent_moe.device import Device
from jax_latent_moe.plan.kernels import KERNELS

H200_DEVICE = Device("gpu", "NVIDIA H200", kernels=KERNELS)


@dataclasses.dataclass(frozen=True)
class GPU:
    """One GPU and its links. If `measured`, rates are what programs reach, not the datasheet's peak.

    Attributes:
        memory: bytes of memory.
        dense_flops: bfloat16 operations per second of a large dense matmul.
        grouped_flops: bfloat16 operations per second of the experts' grouped matmuls, not counting reads of weights.
        router_flops: operations per second of the router's matmul. Each is made of several bfloat16 operations.
        bandwidth: bytes per second from and to memory.
        link: bytes per second sent to GPUs of the same host.
        network: bytes per second sent to other hosts. It was never measured.
        host: number of GPUs in a host.
        measured: whether all rates except `network` were measured on this kind of GPU.
        device: what backends, kernels and tiles are chosen by. Your own GPU has the kernels of an H200, unless you say
            otherwise.
    """

    memory: float
    dense_flops: float
    grouped_flops: float
    router_flops: float
    bandwidth: float
    link: float
    network: float
    host: int = 8
    measured: bool = True
    device: Device = H200_DEVICE


H200 = GPU(141e9, 7.2e14, 6.6e14, 3.0e14, 4.2e12, 2.77e11, 5.0e10)
"""H200 SXM. Rates are from benchmarks/results/h200-2026-11-23.jsonl, those of the experts' and the router's matmuls
from a fit to 2026-11-27. The link was measured between two GPUs of one host. The network is 400 Gb/s per GPU, from the
datasheet of the usual server."""

H100 = GPU(
    80e9,
    7.3e14,
    7.0e14,
    3.0e14,
    3.0e12,
    2.77e11,
    5.0e10,
    device=Device("gpu", "NVIDIA H100 80GB HBM3", kernels=KERNELS),
)
"""H100 SXM. Rates of dense matmuls and memory were measured. The rate of grouped matmuls is a fit to 2026-11-27 (Super
only). The others are the H200's.
"""

B200 = GPU(
    180e9,
    1.6e15,
    1.3e15,
    6.6e14,
    6.8e12,
    5.5e11,
    5.0e10,
    measured=False,
    device=Device("gpu", "NVIDIA B200", num_sms=148),
)
"""B200. Rates are the datasheet's, times the fraction that the H200 reached. No kernel of this library runs on it, so
XLA multiplies the experts."""
