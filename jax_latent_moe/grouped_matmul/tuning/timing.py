"""Times calls on a device. They are lowered one by one, compiled in parallel, run once, then timed in turn.

A candidate is a function that lowers something. It returns a function that compiles it and returns a `Call`. If any
step fails, the candidate is left out and the first line of its error is printed: one tile that a compiler refuses must
not end a run.
"""

import concurrent.futures
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

LONG_BATCH_MS = 200
"""A batch that would take longer than this is made smaller."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
        run: enqueues the work and returns its result.
        wait: blocks until the result is ready.
        temp_bytes: peak memory besides arguments and results; None if it is not known.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    temp_bytes: int | None = None


Candidate = Callable[[], Callable[[], Call]]


def jax_candidate(function: Callable, *args) -> Candidate:
    """A candidate that jits a function; its temporary memory is the amount that XLA plans."""

    def lower():
        lowered = jax.jit(function).lower(*args)

        def compile_():
            compiled = lowered.compile()
            analysis = compiled.memory_analysis()
            assert analysis is not None, "XLA plans memory on CPUs and GPUs"
            return Call(lambda: compiled(*args), temp_bytes=analysis.temp_size_in_bytes)

        return compile_

    return lower


def prepare(candidates: dict[str, Candidate]) -> dict[str, Call]:
    """The calls of the candidates that lower, compile and run. Prints a line for each that fails."""
    calls = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lowered = {name: _attempt(name, lower) for name, lower in candidates.items()}
        compiling = {
            name: pool.submit(_attempt, name, compile_) for name, compile_ in lowered.items() if compile_ is not None
        }
        for name, future in compiling.items():
            call = future.result()
            if call is not None and _attempt(name, lambda call=call: (call.wait(call.run()),)):
                calls[name] = call
    return calls


def _attempt(name, step):
    try:
        return step()
    except Exception as error:  # any failure leaves out only this candidate
        first = next(iter(str(error).strip().splitlines()), "")
        print(f"{'left out':>10} {name}: {type(error).__name__}: {first[:300]}", flush=True)
        return None


def time_in_turn(calls: dict[str, Call], batch: int, rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each call, in batches enqueued back to back. The calls take turns, so a drift hits all.

    A slow call gets a smaller batch, because the gap between two calls does not matter to it. A call that fails, for
    example because memory has run out, is left out, and a line is printed.
    """
    batches = {name: 1 for name in calls}
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in tuple(times):
            ms = _attempt(name, lambda name=name: _time(calls[name], batches[name]))
            if ms is None:
                del times[name]
            elif turn == 0:
                batches[name] = max(1, min(batch, math.floor(LONG_BATCH_MS / max(ms, 1e-3))))
            else:
                times[name].append(ms)
    return {name: statistics.median(samples) for name, samples in times.items()}


def _time(call, batch):
    start, out = time.perf_counter(), None
    for _ in range(batch):
        out = call.run()
    call.wait(out)
    return 1e3 * (time.perf_counter() - start) / batch


def fastest(calls: dict[str, Call], batch: int = 2, rounds: int = 3) -> str | None:
    """The name of the fastest call; None if every call failed."""
    times = time_in_turn(calls, batch, rounds)
    return min(times, key=lambda name: times[name], default=None)
