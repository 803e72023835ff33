"""Compares a layer on several GPUs of one host with a layer on one GPU: `python -m benchmarks.parallel`.

Each of the several GPUs holds its share of the experts and its own tokens. The single GPU has the tokens and experts of
one device's share. Scaling is devices * ms of one / ms of all.
"""

import argparse
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.measure import RESULTS, Row, Run, device_name, show
from jax_latent_moe import LatentMoEConfig, ParallelConfig, init_params, latent_moe, presets
from jax_latent_moe.cost import exchange_bytes, matmul_flops_per_token
from jax_latent_moe.grouped_matmul.tuning.timing import Call, jax_candidate, prepare, time_in_turn
from jax_latent_moe.parallel import choose_dispatch, explain, param_specs, token_spec
from jax_latent_moe.piped import piped
from jax_latent_moe.plan import GPUS, make_cost_plan

SHAPES = {
    "super_t8192": (8192, dataclasses.replace(presets.NEMOTRON_3_SUPER, param_dtype="bfloat16")),
    "toy_t64": (64, presets.TOY),
}
CHANGES: dict[str, dict] = {
    "all_gather": {"dispatch": "all_gather"},
    "all_gather_rounds": {"dispatch": "all_gather", "capacity_factor": None},
    "all_gather_fp8": {"dispatch": "all_gather", "dispatch_format": "fp8_block"},
    "all_to_all": {"dispatch": "all_to_all"},
    "all_to_all_fp8": {"dispatch": "all_to_all", "dispatch_format": "fp8_block"},
    "ragged_all_to_all": {"dispatch": "ragged_all_to_all"},
}
"""The measured variants, as changes of a `ParallelConfig` with a capacity factor."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="super_t8192")
    parser.add_argument("--capacity-factor", type=float, default=1.25, help="see ParallelConfig")
    parser.add_argument("--rounds", type=int, default=7, help="batches whose median is taken")
    parser.add_argument("--without", choices=CHANGES, action="append", default=[], help="not this variant")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="FOLDER", help="where the rows go")
    return parser.parse_args()


def forward_backward(config: LatentMoEConfig, params, x, dy):
    """The layer's output and its gradients, and the number of dropped rows."""

    def layer(params, x):
        y, aux = latent_moe(params, x, config)
        return y, jnp.sum(aux.dropped_per_expert)

    y, pullback, dropped = jax.vjp(layer, params, x, has_aux=True)
    y, dy = lax.optimization_barrier((y, dy))  # as in training, where a loss separates them
    return (y, *pullback(dy)), dropped


def one_device(config: LatentMoEConfig, tokens: int, devices: int, rounds: int) -> tuple[float, int | None]:
    """Milliseconds and temporary bytes of the layer with one device's share of the experts, on one device."""
    alone = dataclasses.replace(config, num_experts=config.num_experts // devices, parallel=None)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), alone)
    x, dy = (jax.random.normal(jax.random.key(i), (tokens, config.hidden_size), jnp.bfloat16) for i in (1, 2))
    calls = prepare({"one": jax_candidate(functools.partial(forward_backward, alone), params, x, dy)})
    return time_in_turn(calls, 3, rounds)["one"], calls["one"].temp_bytes


def all_devices(config: LatentMoEConfig, tokens: int, mesh, changes: dict[str, dict]) -> dict[str, Call]:
    """The layer over the mesh with each variant."""
    specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(config, mesh))
    params = jax.jit(init_params, static_argnums=1, out_shardings=specs)(jax.random.key(0), config)
    assert config.parallel is not None
    split = NamedSharding(mesh, token_spec(config.parallel, mesh))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=split)
    x, dy = (draw(jax.random.key(i), (mesh.size * tokens, config.hidden_size), jnp.bfloat16) for i in (1, 2))
    candidates = {}
    for name, changed in changes.items():
        parallel = dataclasses.replace(config.parallel, **changed)
        layer = functools.partial(forward_backward, dataclasses.replace(config, parallel=parallel))
        candidates[name] = jax_candidate(layer, params, x, dy)
    return prepare(candidates)


def link_rates(mesh, rounds: int, elements: int = 2**27) -> dict[str, float]:
    """Bytes per second that one device sends in each collective of bfloat16 buffers."""
    split, n = NamedSharding(mesh, PartitionSpec("expert")), mesh.size
    buffer = jax.device_put(jnp.zeros((n * elements,), jnp.bfloat16), split)
    collectives = {
        "all_gather": lambda part: lax.all_gather(part, "expert", tiled=True),
        "reduce_scatter": lambda part: lax.psum_scatter(part, "expert", tiled=True),
        "all_to_all": lambda part: lax.all_to_all(part, "expert", 0, 0, tiled=True),
    }
    spec = PartitionSpec("expert")
    calls = prepare({
        name: jax_candidate(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), buffer)
        for name, f in collectives.items()
    })  # fmt: skip
    sent = {"all_gather": n - 1, "reduce_scatter": (n - 1) / n, "all_to_all": (n - 1) / n}
    times = time_in_turn(calls, 3, rounds)
    return {name: 2 * elements * sent[name] / ms * 1e3 for name, ms in times.items()}


def main() -> None:
    """Measures, prints and records."""
    options = parse_options()
    devices = len(jax.devices())
    if devices < 2:
        raise SystemExit(
            f"this benchmark needs at least two devices, not {devices}: run it on a host with several GPUs."
        )
    tokens, config = SHAPES[options.shape]
    config = dataclasses.replace(config, parallel=ParallelConfig(capacity_factor=options.capacity_factor))
    kind = device_name()
    run, shape = Run(f"{kind}-x{devices}", options.out), f"{options.shape}_x{devices}"
    base = config.parallel
    assert base is not None
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,))
    for name, rate in link_rates(mesh, options.rounds).items():
        print(f"{name:>18}: {rate / 1e9:7.1f} GB/s sent by each device")
    print(explain(config, devices, tokens))

    flops = 3 * tokens * matmul_flops_per_token(config)
    alone, temp = one_device(config, tokens, devices, options.rounds)
    rows = [Row("parallel", shape, "forward_backward", "one", alone, flops / alone / 1e9, 0.0, None, temp)]
    with jax.set_mesh(mesh):
        wanted = {name: changed for name, changed in CHANGES.items() if name not in options.without}
        calls = all_devices(config, tokens, mesh, wanted)
        dropped = {name: int(call.run()[1]) for name, call in calls.items()}
        times = time_in_turn(calls, 3, options.rounds)
    for name, ms in times.items():
        parallel = dataclasses.replace(base, **CHANGES[name])
        bytes_of = exchange_bytes(
            dataclasses.replace(config, parallel=parallel), devices, tokens, parallel.capacity_factor
        )
        sent = 2 * sum(bytes_of[parallel.dispatch]) / 2**20
        rows.append(
            Row("parallel", shape, "forward_backward", name, ms, flops / ms / 1e9, 0.0, None, calls[name].temp_bytes)
        )
        print(f"{name:>18}: scaling {devices * alone / ms:.2f}, {sent:.0f} MiB sent, {dropped[name]} rows dropped")
    if kind in GPUS:
        planned = make_cost_plan(config, {"expert": devices}, tokens, GPUS[kind])
        print(f"plan: {planned.compute_ms:.2f} ms of kernels and {planned.communication_ms:.2f} ms of collectives")
    print(f"auto takes {choose_dispatch(config, devices, tokens)}; the fastest is {min(times, key=lambda n: times[n])}")
    for row in rows:
        run.add(row)
        show(row)
    print(f"recorded in {run.path}")


if __name__ == "__main__":
    with piped():
        main()
