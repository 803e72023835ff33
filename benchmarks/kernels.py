"""Grouped matmuls and the layer on a Hopper GPU: `python -m benchmarks.kernels [suite ...]`.

Every backend that supports a shape runs beside the dense matmul of equal FLOPs, torch's grouped matmul where torch is
installed, and JAX's own Pallas kernel for the weight gradient; all in turn, in one run. Suites: kernel, decode, layer.
"""

import dataclasses
import functools
import importlib.util
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, record
from jax_latent_moe import PallasBackend, XlaBackend, init_params, latent_moe, presets
from jax_latent_moe.cost import matmul_flops_per_token
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_outer, problem, select

# Rows, experts and [in, out] of the up-projection of one layer; `down` swaps the last two.
SHAPES = {
    "super_up_t8192": (180224, 512, 1024, 2688),
    "super_down_t8192": (180224, 512, 2688, 1024),
    "super_up_t2048": (45056, 512, 1024, 2688),
    "qwen3_up_t16384": (131072, 128, 2048, 1536),
    "ultra_up_t4096": (90112, 512, 2048, 5120),
}
DECODE = {f"super_up_t{tokens}": (22 * tokens, 512, 1024, 2688) for tokens in (1, 8, 64)}
PASSES = ("forward", "dgrad", "wgrad")
BACKENDS = {"pallas": PallasBackend(), "xla": XlaBackend()}
OURS = {
    "forward": lambda backend, x, w, dout, sizes: grouped_matmul(x, w, sizes, backend=backend),
    "dgrad": lambda backend, x, w, dout, sizes: grouped_matmul(dout, w, sizes, transpose_w=True, backend=backend),
    "wgrad": lambda backend, x, w, dout, sizes: grouped_outer(x, dout, sizes, backend=backend),
}
RNG = np.random.default_rng(0)


def group_sizes(rows: int, experts: int) -> np.ndarray:
    """Uneven groups, 3 % of the experts empty."""
    share = RNG.lognormal(0, 0.42, experts)
    share[RNG.choice(experts, 15 * experts // 512, replace=False)] = 0
    return RNG.multinomial(rows, share / share.sum()).astype(np.int32)


def time_in_turn(calls: dict, batch: int, rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of a call, in batches enqueued back to back; the calls take turns, so a drift hits all."""
    for call, wait in calls.values():
        wait(call())
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, wait) in calls.items():
            start, out = time.perf_counter(), None
            for _ in range(batch):
                out = call()
            wait(out)
            times[name].append(1e3 * (time.perf_counter() - start) / batch)
            del out
    return {name: statistics.median(samples) for name, samples in times.items()}


def jax_call(function, *args):
    """A compiled call, how to wait for it, and the temporary bytes XLA plans."""
    compiled = jax.jit(function).lower(*args).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, "XLA plans memory on GPUs"
    return (lambda: compiled(*args), jax.block_until_ready), analysis.temp_size_in_bytes


def torch_calls(x, w, dout, sizes):
    """The grouped matmul of torch on the same memory, for each pass."""
    import torch  # pyright: ignore[reportMissingImports]

    offsets = torch.from_dlpack(jnp.cumsum(sizes).astype(jnp.int32))
    x, w, dout = (torch.from_dlpack(a) for a in (x, w, dout))
    mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def wait(_):
        torch.cuda.synchronize()

    return {
        "forward": (lambda: mm(x, w, offs=offsets), wait),
        "dgrad": (lambda: mm(dout, w.transpose(1, 2), offs=offsets), wait),
        "wgrad": (lambda: mm(x.t(), dout, offs=offsets), wait),
    }


def jax_transposed_ragged_dot(x, dout, sizes):
    """JAX's own Pallas kernel for the weight gradient, at one tile that was not swept."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    return transposed_ragged_dot(
        x, dout, group_sizes=sizes, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4
    )


def max_error(pass_, out, x, w, dout, sizes) -> float:
    """The largest relative error over five experts against float32; infinite where an empty expert is not zero."""
    starts = np.cumsum(sizes) - sizes
    worst = 0.0
    for expert in {int(sizes.argmax()), 0, len(sizes) // 2, len(sizes) - 1, int(np.flatnonzero(sizes)[0])}:
        group = slice(int(starts[expert]), int(starts[expert] + sizes[expert]))
        a, b, kernel = (np.asarray(v, np.float32) for v in (x[group], dout[group], w[expert]))
        ref = {"forward": lambda: a @ kernel, "dgrad": lambda: b @ kernel.T, "wgrad": lambda: a.T @ b}[pass_]()  # noqa: B023
        got = np.asarray(out[expert] if pass_ == "wgrad" else out[group], np.float32)
        size = np.linalg.norm(ref)
        worst = max(worst, float(np.linalg.norm(got - ref) / size) if size else float("inf") * bool(got.any()) or 0.0)
    return worst


def kernels(suite, shapes, rate, bandwidth, batch) -> list[Row]:
    """One row a shape, pass and implementation."""
    result = []
    for shape, (rows, experts, in_features, out_features) in shapes.items():
        sizes = group_sizes(rows, experts)
        keys = jax.random.split(jax.random.key(0), 3)
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        x = draw(keys[0], (rows, in_features), jnp.bfloat16)
        w = draw(keys[1], (experts, in_features, out_features), jnp.bfloat16)
        dout = draw(keys[2], (rows, out_features), jnp.bfloat16)
        groups, kernel = jnp.asarray(sizes), w[0]
        dense = {
            "forward": (lambda x, k, d: x @ k),
            "dgrad": (lambda x, k, d: d @ k.T),
            "wgrad": (lambda x, k, d: x.T @ d),
        }
        flops = 2 * rows * in_features * out_features
        traffic = 2 * (rows * (in_features + out_features) + int((sizes > 0).sum()) * in_features * out_features)
        for pass_ in PASSES if suite == "kernel" else PASSES[:1]:
            calls, temp, errors = {}, {}, {}
            for name, backend in BACKENDS.items():
                calls[name], temp[name] = jax_call(functools.partial(OURS[pass_], backend), x, w, dout, groups)
                errors[name] = max_error(pass_, calls[name][0](), x, w, dout, sizes)
            if suite == "kernel":
                calls["dense"], temp["dense"] = jax_call(dense[pass_], x, kernel, dout)
            if importlib.util.find_spec("torch"):
                calls["torch_grouped_mm"] = torch_calls(x, w, dout, groups)[pass_]
            if pass_ == "wgrad" and in_features % 128 == 0 and out_features % 128 == 0:
                name = "jax_transposed_ragged_dot_mgpu"
                calls[name], temp[name] = jax_call(jax_transposed_ragged_dot, x, dout, groups)
            floor = 1e3 * max(flops / rate, traffic / bandwidth)
            for name, ms in time_in_turn(calls, batch).items():
                row = Row(suite, shape, pass_, name, ms, flops / ms / 1e9, floor, errors.get(name), temp.get(name, 0))
                result.append(row)
                show(row)
        del x, w, dout, kernel
    return result


def layer(rate: float) -> list[Row]:
    """Nemotron-3 Super's routed part at 8192 tokens, forward and with gradients."""
    tokens, result = 8192, []
    config = dataclasses.replace(
        presets.NEMOTRON_3_SUPER,
        shared_expert_intermediate_size=0,
        dtype="bfloat16",
        param_dtype="bfloat16",
        backend=BACKENDS["pallas"],
    )
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    x, dy = (jax.random.normal(jax.random.key(i), (tokens, config.hidden_size), jnp.bfloat16) for i in (1, 2))

    def forward(params, x):
        return latent_moe(params, x, config)[0]

    def forward_backward(params, x, dy):
        y, vjp = jax.vjp(forward, params, x)
        return y, vjp(dy)

    for pass_, function, args in (
        ("forward", forward, (params, x)),
        ("forward_backward", forward_backward, (params, x, dy)),
    ):
        start = time.perf_counter()
        call, temp = jax_call(function, *args)
        print(f"compiled {pass_} of the layer in {time.perf_counter() - start:.1f} s", flush=True)
        flops = tokens * matmul_flops_per_token(config) * (1 if pass_ == "forward" else 3)
        (ms,) = time_in_turn({"pallas": call}, 3).values()
        row = Row("layer", "super_t8192", pass_, "pallas", ms, flops / ms / 1e9, 1e3 * flops / rate, None, temp)
        result.append(row)
        show(row)
    return result


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large bfloat16 matmul and bytes/s of a large copy."""
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in (0, 1))
    buffer = jnp.zeros((2**30,), jnp.bfloat16)
    calls = {"matmul": jax_call(jnp.matmul, a, b)[0], "copy": jax_call(lambda v: v + 1, buffer)[0]}
    times = time_in_turn(calls, 8)
    return 2 * 8192**3 / times["matmul"] * 1e3, 2 * buffer.nbytes / times["copy"] * 1e3


def show(row: Row):
    """One line of the table."""
    error = "" if row.max_error is None else f"error {row.max_error:.1e}"
    print(
        f"{row.suite:>7} {row.shape:>16} {row.pass_:>16} {row.impl:>30} {row.ms:8.3f} ms {row.tflops:6.0f} TFLOP/s "
        f"floor {row.floor_ms:6.3f} ms {error} temp {row.temp_bytes / 2**20:.0f} MiB",
        flush=True,
    )


def main(suites):
    """Measures, prints a table and records the rows."""
    device = jax.devices()[0].device_kind
    check = select(problem("rows_w", 8, (1, 64, 64), jnp.bfloat16), BACKENDS["pallas"])
    rate, bandwidth = ceilings()
    print(f"{device}: {type(check).__name__}, matmul {rate / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for suite in suites or ("kernel", "decode", "layer"):
        if suite == "kernel":
            rows += kernels(suite, SHAPES, rate, bandwidth, 5)
        elif suite == "decode":
            rows += kernels(suite, DECODE, rate, bandwidth, 20)
        else:
            rows += layer(rate)
    print(f"recorded in {record(rows, device.lower().removeprefix('nvidia ').replace(' ', '-'))}")


if __name__ == "__main__":
    main(sys.argv[1:])
