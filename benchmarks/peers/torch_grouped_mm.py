"""torch's grouped matmul (CUTLASS) on the memory of JAX's arrays."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from jax_latent_moe.grouped_matmul.tuning.queue import SIZE, Queue, timed_queue
from jax_latent_moe.grouped_matmul.tuning.timing import Call, Candidate


def candidate(pass_: str, x, w, dout, sizes) -> Candidate:
    """One pass of a grouped matmul: x [R, K], w [E, K, N], dout [R, N], sizes [E]."""

    def lower():
        import torch  # pyright: ignore[reportMissingImports]

        offsets = torch.from_dlpack(jnp.cumsum(sizes).astype(jnp.int32))
        rows, weights, cotangents = (torch.from_dlpack(array) for array in (x, w, dout))
        grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        run = {
            "forward": lambda: grouped_mm(rows, weights, offs=offsets),
            "dgrad": lambda: grouped_mm(cotangents, weights.transpose(1, 2), offs=offsets),
            "wgrad": lambda: grouped_mm(rows.t(), cotangents, offs=offsets),
        }[pass_]
        call = torch_call(run)
        return lambda: call

    return lower


def scaled_candidate(x, w, sizes) -> Candidate:
    """The product x[R, K] x w[E, K, N] of E4M3 codes, with one scale for each row of x and each column of w."""

    def lower():
        import torch  # pyright: ignore[reportMissingImports]

        offsets = torch.from_dlpack(jnp.cumsum(sizes).astype(jnp.int32))
        rows, weights = (torch.from_dlpack(array) for array in (x, w))

        def encode(values):
            scales = values.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 448
            return (values.float() / scales).to(torch.float8_e4m3fn), scales.squeeze(-1)

        row_codes, row_scales = encode(rows)
        parts = [encode(expert.t()) for expert in weights]  # one at a time: float32 of all would not fit
        codes, scales = (torch.stack(part) for part in zip(*parts, strict=True))
        call = torch_call(
            lambda: torch._scaled_grouped_mm(
                row_codes, codes.transpose(1, 2), row_scales, scales, offs=offsets, out_dtype=torch.bfloat16
            )
        )
        return lambda: call

    return lower


def torch_call(run: Callable) -> Call:
    """A call of torch, with the peak memory of its allocator besides the results, on a GPU.

    Make it when a candidate is lowered: later, the compilers of other candidates may be timing matmuls on the GPU.
    """
    import torch  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        return Call(run, lambda _: None)
    run()  # kernels that tune themselves do so now, and use extra memory
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    results = out if isinstance(out, tuple) else (out,)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in results if tensor is not None)
    temp = max(0, torch.cuda.max_memory_allocated() - before - kept)
    return Call(run, lambda _: torch.cuda.synchronize(), temp, torch_queue)


@functools.cache
def torch_queue() -> Queue:
    """The stream on which torch computes, which is another one than JAX's. Its blocks are the same matmul as there."""
    import torch  # pyright: ignore[reportMissingImports]

    zeros = torch.zeros(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    product = zeros @ zeros
    torch.cuda.synchronize()

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(first, second):
        second.synchronize()
        return first.elapsed_time(second)

    return timed_queue(lambda: torch.mm(zeros, zeros, out=product), mark, ms_between)
