"""The example trainer's step and loop on GPUs, on real text: the suite "train" of `benchmarks.gpu`.

Each size is trained as latent_moe, and as dense and moe of equal active FLOPs, in one run. A step is timed on
Shakespeare and on uniformly random bytes. The loop is timed on Shakespeare, without evaluations and checkpoints. With
several GPUs, the batch grows with their number (weak scaling), over each axis of the mesh in turn, with gradients added
up in each dtype. The passes are:

    compile: tracing and compiling the step; text, random: a compiled step on such bytes; loop: a step of the loop.
"""

import concurrent.futures
import dataclasses
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any, cast, get_args

import jax
import numpy as np

from benchmarks import kernel_table
from benchmarks.measure import Row, Session
from examples.train import corpus, data, flops, model, optimizer, placing, presets, step
from examples.train.config import MLP, Config
from examples.train.reducing import ReduceDtype

MIDDLE = dataclasses.replace(
    presets.GPU,
    model=dataclasses.replace(
        presets.GPU.model,
        layers=12,
        hidden_size=1024,
        heads=8,
        context=1024,
        num_experts=64,
        top_k=8,
        dropout=0.0,
    ),
)
SUPER = dataclasses.replace(
    presets.GPU_80GB,
    batch_size=16,
    accumulate=2,
    model=dataclasses.replace(
        presets.GPU_80GB.model,
        layers=3,
        hidden_size=4096,
        heads=32,
        latent_size=1024,
        num_experts=512,
        top_k=22,
        expert_intermediate_size=2688,
        shared_expert_intermediate_size=5376,
    ),
)
"""Two layers of Nemotron-3 Super's sizes after a dense block: 6.1 G parameters, whose step takes 113 GB."""
FOUR_PARTS = dataclasses.replace(presets.GPU_80GB, batch_size=32, accumulate=4)
SIZES = {"gpu": presets.GPU, "middle": MIDDLE, "large": presets.GPU_80GB, "large_4_parts": FOUR_PARTS, "super": SUPER}
WITH_FP8 = ("middle", "large_4_parts")
"""Sizes that are trained with `--precision fp8` too, which encodes the weights once for all parts of a step."""
AXES = ("data", "fsdp", "expert")
BATCHES, LOOP_STEPS = 8, 120


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step that is ready to run.

    Attributes:
        config: what it trains.
        model: the network.
        call: the compiled step.
        seconds: of tracing and compiling it.
    """

    config: Config
    model: model.LanguageModel
    call: Any
    seconds: float

    @property
    def flops(self) -> float:
        """Model operations of one step."""
        return flops.flops_per_token(self.model) * self.config.batch_size * self.config.model.context


def measure(session: Session, suite: str, sizes: dict[str, Config]) -> None:
    """The rows of each size. A quick session leaves out dense and moe."""
    for name, config in sizes.items():
        models = get_args(MLP) if not session.quick else ("latent_moe",)
        found = {mlp: dataclasses.replace(config, mlp=mlp, mesh="") for mlp in models}
        if name in WITH_FP8:
            found["latent_moe fp8"] = dataclasses.replace(config, precision="fp8", mesh="")
        for impl, other in session.wanted(found).items():
            _measure_step(session, suite, name, impl, other)
        if "loop" not in session.without:
            _measure_loop(session, suite, name, config)
        if jax.device_count() > 1:
            _measure_meshes(session, suite, name, config)


def compiled_step(config: Config) -> Compiled:
    """Compiles the step of a configuration, without any array."""
    start = time.perf_counter()
    network, optimiser, mesh = parts(config)
    shapes = jax.eval_shape(lambda: step.init_state(network, optimiser, config.seed))
    shardings = step.state_shardings(network, optimiser, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    tokens = jax.ShapeDtypeStruct(
        (config.batch_size, config.model.context + 1), np.uint8, sharding=placing.batch_sharding(mesh)
    )
    policy = {"accumulate": config.accumulate, "reduce_dtype": config.reduce_dtype}
    train_step = cast(jax.stages.Wrapped, step.make_train_step(network, optimiser, mesh, **policy))
    with jax.set_mesh(mesh):
        compiled = train_step.lower(state, data.Batch(cast(Any, tokens))).compile()
    return Compiled(config, network, compiled, time.perf_counter() - start)


def parts(config: Config):
    """The network, the optimiser and the mesh of a configuration."""
    network = model.language_model(config)
    mesh = placing.make_mesh(config.mesh, config.batch_size, config.accumulate)
    return network, optimizer.make_optimizer(config.optimizer, config.steps), mesh


def step_times(compiled: Compiled, rounds: int, steps: int = 6, *, kernels: bool = False) -> dict[str, float]:
    """Median milliseconds of a step on text and on random bytes, taken in turn, a new batch in each step.

    With kernels, it prints the kernels of some steps on text afterwards.
    """
    config = compiled.config
    network, optimiser, mesh = parts(config)
    text = data.train_batches(corpus.load_corpus("shakespeare").train, config.model.context, config.batch_size, 0)
    rng, found = np.random.default_rng(0), [text.at(i) for i in range(BATCHES)]
    drawn = [data.Batch(rng.integers(0, 256, batch.tokens.shape, np.uint8)) for batch in found]
    placed = {
        kind: itertools.cycle([data.Batch(placing.from_whole(batch.tokens, mesh)) for batch in batches])
        for kind, batches in (("text", found), ("random", drawn))
    }
    with jax.set_mesh(mesh):
        state = step.init_state_on(network, optimiser, config.seed, mesh)
    times = {kind: [] for kind in placed}
    for turn in range(rounds + 1):
        for kind, batches in placed.items():
            # The timer starts when a step has ended and the next one is queued, as in a training loop. From an idle GPU
            # on, the host's time to dispatch the first step would count too.
            state, before = compiled.call(state, next(batches))
            state, _ = compiled.call(state, next(batches))
            jax.block_until_ready(before)
            start = time.perf_counter()
            for _ in range(steps - 1):
                state, _ = compiled.call(state, next(batches))
            jax.block_until_ready(state.step)
            if turn:  # the first warms up
                times[kind].append(1e3 * (time.perf_counter() - start) / steps)
    if kernels:

        def run():
            after = state
            for _ in range(BATCHES):
                after, _ = compiled.call(after, next(placed["text"]))
            jax.block_until_ready(after.step)

        print(kernel_table.table(kernel_table.kernels_of(run, BATCHES)))
    return {kind: statistics.median(samples) for kind, samples in times.items()}


def _measure_step(session, suite, name, impl, config, compiled_before=None):
    try:
        compiled = compiled_before() if compiled_before else compiled_step(config)
        times = step_times(compiled, session.rounds, kernels=session.kernels)
    except Exception as error:  # such as too little memory: the others are to be measured
        print(f"{'left out':>10} {name} {impl}: {str(error).strip().splitlines()[0][:300]}", flush=True)
        return
    if compiled_before is None:
        session.record(Row(suite, name, "compile", impl, 1e3 * compiled.seconds, 0.0, 0.0, None, None))
    memory = compiled.call.memory_analysis().temp_size_in_bytes
    for kind, ms in times.items():
        _record(session, Row(suite, name, kind, impl, ms, 0.0, 0.0, None, memory), compiled.flops, config)


def _measure_meshes(session, suite, name, config):
    """Steps on every axis of all devices. They are compiled at the same time, so no row has the time of that."""
    devices, meshed = jax.device_count(), {}
    dtypes = [dtype for dtype in get_args(ReduceDtype) if dtype in ("float32", config.model.dtype)]
    for axis, dtype in itertools.product(AXES, dtypes):
        mesh = {"batch_size": config.batch_size * devices, "mesh": f"{axis}={devices}"}
        meshed[f"latent_moe {axis}={devices} {dtype}"] = dataclasses.replace(config, **mesh, reduce_dtype=dtype)
    meshed = session.wanted(meshed)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        compiling = {impl: threads.submit(compiled_step, found) for impl, found in meshed.items()}
    for impl, found in meshed.items():
        _measure_step(session, suite, name, impl, found, compiling[impl].result)


def _record(session, row, operations, config):
    devices = placing.make_mesh(config.mesh, config.batch_size).size
    rate = operations / devices / row.ms / 1e9
    session.record(dataclasses.replace(row, tflops=rate, floor_ms=session.floor_ms(operations / devices, 0)))
    peak = flops.peak_flops(jax.devices()[0])
    tokens = config.batch_size * config.model.context / row.ms * 1e3
    share = f", MFU {100 * rate * 1e12 / peak:.1f} %" if peak else ""
    print(f"{'':>8}{row.shape} {row.pass_} {row.impl}: {tokens:,.0f} tokens/s{share}", flush=True)


def _measure_loop(session, suite, name, config):
    ms, network = loop_ms(config)
    operations = flops.flops_per_token(network) * config.batch_size * config.model.context
    _record(session, Row(suite, name, "loop", "latent_moe", ms, 0.0, 0.0, None, None), operations, config)


def loop_ms(config: Config, steps: int = LOOP_STEPS) -> tuple[float, model.LanguageModel]:
    """Milliseconds of a step in the trainer's loop, lines of metrics included, past its first line; and the model.

    Raises:
        SystemExit: SIGINT or SIGTERM stopped the loop. The status is that of `StopRequest`.
    """
    from examples.train import metrics, signals, tokenizer, train  # which need packages that the step does not

    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, run=pathlib.Path(folder), steps=steps, log_every=20, eval_every=10 * steps)
        text = corpus.load_corpus("shakespeare")
        network, _, mesh = parts(config)
        saves_nothing = SimpleNamespace(newest=None, save=lambda snapshot: None)
        with signals.StopRequest() as stop, jax.set_mesh(mesh):
            last = train.run_steps(config, network, text, tokenizer.Bytes(), cast(Any, saves_nothing), stop, mesh)
        if stop.name is not None:
            print(f"{stop.name} stopped the loop at step {last.state.step} of {steps}: it was not timed.", flush=True)
            sys.exit(stop.status)
        records = [record for record in metrics.read_records(config.folder) if "loss" in record]
    speed = statistics.median(record["tokens_per_second"] for record in records[1:])
    return 1e3 * config.batch_size * config.model.context / speed, network
