"""The xla backend on the CPU: `python -m benchmarks.cpu`.

It times one grouped matmul with its gradients at R 4096, K 256, N 512 in float32, blocked against jax.lax.ragged_dot,
for 8, 64 and 512 experts. It also times the layer with the same experts against the layer's matmuls.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, record, time_interleaved
from jax_latent_moe import LatentMoEConfig, XlaBackend, init_params, latent_moe
from jax_latent_moe.grouped_matmul import grouped_matmul, reference
from jax_latent_moe.piped import piped

ROWS, IN, OUT = 4096, 256, 512
RNG = np.random.default_rng()


def normal(*shape) -> jax.Array:
    """Fresh float32 normals."""
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def uneven_groups(num_experts: int) -> jax.Array:
    """Group sizes that add up to ROWS, as uneven as a router's early in training."""
    shares = RNG.dirichlet(np.ones(num_experts))
    return jnp.asarray(RNG.multinomial(ROWS, shares), jnp.int32)


def ceilings() -> tuple[float, float]:
    """Measured matmul rate (FLOP/s) and copy bandwidth (bytes/s, read plus written) of this machine."""
    a, big = normal(2048, 2048), normal(64 * 2**20)
    timed = time_interleaved({"matmul": (jnp.matmul, (a, a)), "copy": (lambda x: x + 1, (big,))}, 5)
    return 2 * 2048**3 / timed["matmul"][0] * 1e3, 2 * big.nbytes / timed["copy"][0] * 1e3


def with_gradients(f):
    """The call that runs f and its reverse pass with a given cotangent, the last argument."""

    def call(*args):
        out, vjp = jax.vjp(f, *args[:-1])
        return out, vjp(args[-1])

    return call


def grouped(rate: float, bandwidth: float) -> list[Row]:
    """Grouped matmul, forward and both gradients."""
    rows_out = []
    for num_experts in (8, 64, 512):
        group_sizes = uneven_groups(num_experts)
        rows, w, dout = normal(ROWS, IN), normal(num_experts, IN, OUT), normal(ROWS, OUT)
        calls = {
            f"xla_{method}": with_gradients(
                functools.partial(grouped_matmul, group_sizes=group_sizes, backend=XlaBackend(method=method))
            )
            for method in ("blocked", "ragged_dot")
            # At 512 experts ragged_dot expands to 12.8 GB of temporaries.
            if method == "blocked" or num_experts <= 64
        }
        timed = time_interleaved(
            {name: (call, (rows, w, dout)) for name, call in calls.items()}
            | {"dense": (with_gradients(jnp.matmul), (rows, w[0], dout))},
            5,
        )
        flops = 3 * 2 * ROWS * IN * OUT
        # Rows and outputs are moved twice (values and gradients), used weights three times (two reads and one write).
        touched = int((group_sizes > 0).sum())
        traffic = 4 * (4 * ROWS * (IN + OUT) + (2 * touched + num_experts) * IN * OUT)
        for name, (ms, temp_bytes) in timed.items():
            out = jax.jit(calls[name])(rows, w, dout) if name in calls else None
            error = out and max_error(out, rows, w, dout, group_sizes)
            shape = f"r{ROWS}_k{IN}_n{OUT}_e{num_experts}"
            floor = 1e3 * max(flops / rate, traffic / bandwidth)
            rows_out.append(
                Row("kernel", shape, "forward_backward", name, ms, flops / ms / 1e9, floor, error, temp_bytes)
            )
    return rows_out


def max_error(result, rows, w, dout, group_sizes) -> float:
    """The largest relative error among the output and both gradients, against float64."""
    out, (drows, dw) = result
    expected = (
        (out, reference.grouped_matmul(rows, w, group_sizes)),
        (drows, reference.grouped_matmul(dout, w, group_sizes, transpose_w=True)),
        (dw, reference.grouped_wgrad(rows, dout, group_sizes)),
    )
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in expected)


def layer(rate: float) -> list[Row]:
    """The whole layer against its necessary matmuls, with the same group sizes."""
    config = LatentMoEConfig(1024, IN, 64, 4, OUT, dtype="float32", backend=XlaBackend())
    tokens = ROWS // config.top_k
    params, x = init_params(jax.random.key(int(RNG.integers(2**31))), config), normal(tokens, config.hidden_size)
    group_sizes = latent_moe(params, x, config)[1].tokens_per_expert
    matmul = functools.partial(grouped_matmul, group_sizes=group_sizes, backend=config.backend)
    router, down, up = (params[part]["kernel"] for part in ("router", "down_proj", "up_proj"))
    kernels = (router, down, up, params["experts"]["w_in"], params["experts"]["w_out"])
    latent, latent_rows, hidden_rows = normal(tokens, IN), normal(ROWS, IN), normal(ROWS, OUT)

    def matmuls(kernels, x, latent, latent_rows, hidden_rows):
        router, down, up, w_in, w_out = kernels
        return x @ router, x @ down, matmul(latent_rows, w_in), matmul(hidden_rows, w_out), latent @ up

    def whole(params, x):
        return latent_moe(params, x, config)[0]

    parts = (kernels, x, latent, latent_rows, hidden_rows)
    cotangents = jax.tree.map(lambda leaf: normal(*leaf.shape), jax.eval_shape(matmuls, *parts))
    timed = time_interleaved(
        {
            "xla_blocked": (with_gradients(whole), (params, x, normal(*x.shape))),
            "matmuls_alone": (with_gradients(matmuls), (*parts, cotangents)),
        },
        15,
    )
    flops = 3 * 2 * (tokens * sum(a.size for a in (router, down, up)) + 2 * ROWS * IN * OUT)
    return [
        Row("layer", f"t{tokens}_e64", "forward_backward", name, ms, flops / ms / 1e9, 1e3 * flops / rate, None, temp)
        for name, (ms, temp) in timed.items()
    ]


def main():
    """Measures, prints a table and records the rows."""
    rate, bandwidth = ceilings()
    print(f"this machine: matmul {rate / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s, {os.cpu_count()} cores")
    rows = grouped(rate, bandwidth) + layer(rate)
    for row in rows:
        print(
            f"{row.shape:>24} {row.impl:>15} {row.ms:9.1f} ms  floor {row.floor_ms:7.1f} ms  {row.tflops * 1e3:6.1f} "
            f"GFLOP/s  temp {(row.temp_bytes or 0) / 2**20:8.1f} MiB  error {row.max_error}"
        )
    print(f"recorded in {record(rows, 'cpu')}")


if __name__ == "__main__":
    with piped():
        main()
