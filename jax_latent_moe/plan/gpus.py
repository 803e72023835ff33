"""What GPUs can do: rates that a plan divides by."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GPU:
    """One GPU and its links; rates are what programs reach, not the datasheet's peak, where `measured` says so.

    Attributes:
        memory: bytes.
        dense_flops: bfloat16 operations a second of a large dense matmul.
        grouped_flops: the same of the experts' grouped matmuls while weights cost nothing.
        router_flops: operations a second of the router's matmul, each of several bfloat16 ones.
        bandwidth: bytes of memory a second.
        link: bytes a second that it sends to GPUs of its host.
        network: bytes a second that it sends to other hosts.
        host: GPUs of one host.
        measured: whether the first five rates were, on this kind; the network's never was.
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


H200 = GPU(141e9, 7.2e14, 6.6e14, 3.0e14, 4.2e12, 2.77e11, 5.0e10)
"""H200 SXM: benchmarks/results/h200-2026-11-23.jsonl, the experts' and the router's matmuls fitted to those of
2026-11-27; links as measured between two of one host; 400 Gb/s a GPU between hosts by the datasheet of the usual
server."""

H100 = GPU(80e9, 7.3e14, 7.0e14, 3.0e14, 3.0e12, 2.77e11, 5.0e10)
"""H100 SXM: its matmul and copy rates were measured, grouped matmuls fitted to those of 2026-11-27 (Super alone); the
others are the H200's."""

B200 = GPU(180e9, 1.6e15, 1.3e15, 6.6e14, 6.8e12, 5.5e11, 5.0e10, measured=False)
"""B200: the datasheet's rates times fractions that the H200 reached; no kernel of this library was tried on it."""
