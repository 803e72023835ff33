"""One optimiser step of the example trainer on a GPU, by backend: the suite "step" of `benchmarks.gpu`.

The preset "gpu" learns from the sources of the standard library. The error is the largest distance of the losses of the
first steps from the xla backend's, with the same parameters and batches.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, Session
from benchmarks.problems import BACKENDS
from jax_latent_moe.grouped_matmul.tuning.timing import Call, Candidate, prepare, time_in_turn

CHECKED_STEPS = 200
Losses = Callable[[], np.ndarray]


def measure(session: Session, suite: str, steps: dict[str, dict]) -> None:
    """One row per preset (changed in some fields) and backend. A quick session does not check the losses."""
    for name, changes in steps.items():
        first_losses: dict[str, Losses] = {}
        found = {backend: candidate(changes, backend, first_losses) for backend in BACKENDS}
        calls = prepare(session.wanted(found))
        losses = {} if session.quick else {backend: first_losses[backend]() for backend in calls}
        for backend, ms in time_in_turn(calls, 5, session.rounds).items():
            flops = operations(changes)
            error = float(np.max(np.abs(losses[backend] / losses["xla"] - 1))) if "xla" in losses else None
            floor, temp = session.floor_ms(flops, 0), calls[backend].temp_bytes
            session.record(Row(suite, name, "forward_backward", backend, ms, flops / ms / 1e9, floor, error, temp))


def configuration(changes: dict, backend: str):
    """The trainer's options: the preset with some fields changed, and the backend."""
    from examples.train import presets

    config = dataclasses.replace(presets.GPU, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backend=backend))


def candidate(changes: dict, backend: str, first_losses: dict[str, Losses]) -> Candidate:
    """The step with a backend. Compiling it puts a function into `first_losses` that runs it from the start."""

    def lower():
        from examples.train import corpus, data, model, optimizer, placing, step

        config = configuration(changes, backend)
        network = model.language_model(config)
        optimiser = optimizer.make_optimizer(config.optimizer, config.steps)
        text = corpus.load_corpus("stdlib").train
        batches = data.train_batches(text, config.model.context, config.batch_size, config.seed)
        batches = list(itertools.islice(batches, CHECKED_STEPS))
        mesh = placing.make_mesh(config.mesh, config.batch_size)
        start = step.init_state_on(network, optimiser, config.seed, mesh)
        train_step = cast(jax.stages.Wrapped, step.make_train_step(network, optimiser, mesh))
        lowered = train_step.lower(start, batches[0])

        def compile_():
            compiled = lowered.compile()
            analysis = compiled.memory_analysis()
            assert analysis is not None, "XLA plans memory on CPUs and GPUs"

            def losses():
                state, values = jax.tree.map(jnp.copy, start), []  # a step reuses its state's memory
                for batch in batches:
                    state, metrics = compiled(state, batch)
                    values.append(metrics.loss)
                return np.asarray(jnp.stack(values))

            held = [jax.tree.map(jnp.copy, start)]

            def run():
                held[0], metrics = compiled(held[0], batches[0])
                return metrics

            first_losses[backend] = losses
            return Call(run, temp_bytes=analysis.temp_size_in_bytes)

        return compile_

    return lower


def operations(changes: dict) -> float:
    """Floating-point operations of a step's matmuls: 6 per active parameter and token, and attention's scores."""
    from examples.train import mlp
    from jax_latent_moe.cost import matmul_flops_per_token

    config = configuration(changes, "xla")
    layer, sizes = mlp.moe_config(config), config.model
    assert layer is not None, "the preset's feed-forward is a latent MoE"
    attention = 8 * sizes.hidden_size**2 + 4 * sizes.context * sizes.hidden_size
    head = 2 * 256 * sizes.hidden_size
    token = sizes.layers * (attention + matmul_flops_per_token(layer)) + head
    return 3.0 * token * sizes.context * config.batch_size
