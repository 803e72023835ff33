"""Times calls on a device. They are lowered one by one, compiled in parallel, run once, then timed in turn.

A candidate is a function that lowers something. It returns a function that compiles it and returns a `Call`. If any
step fails, the candidate is left out and the first line of its error is printed: one tile that a compiler refuses must
not end a run.

There are two clocks, `host_ms` and `device_ms`. Kernels of microseconds need the second: the host takes 70 us or more
to dispatch a jitted call, and by the first clock all such kernels take as long. The second needs the compiled library.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax

from jax_latent_moe import native
from jax_latent_moe.grouped_matmul.tuning.queue import Queue, jax_queue

LONG_BATCH_MS = 200
"""A batch that would take longer than this is made smaller."""
BLOCKS = (1, 2, 4, 8, 8, 8)
"""Blocks of other work before a batch: of the first attempt, and of those after the host was late."""
MOST_CALLS = 32 - max(BLOCKS) - 2
"""The most calls of a batch behind them, between two marks. XLA lets the host queue 32 calls before it must wait."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
        run: enqueues the work and returns its result.
        wait: blocks until the result is ready.
        temp_bytes: peak memory besides arguments and results; None if it is not known.
        queue: returns the stream that runs the work; None where there is none, or more than one.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    temp_bytes: int | None = None
    queue: Callable[[], Queue] | None = None


Candidate = Callable[[], Callable[[], Call]]


def jax_candidate(function: Callable, *args) -> Candidate:
    """A candidate that jits a function; its temporary memory is the amount that XLA plans."""

    def lower():
        lowered = jax.jit(function).lower(*args)

        def compile_():
            compiled = lowered.compile()
            analysis = compiled.memory_analysis()
            assert analysis is not None, "XLA plans memory on CPUs and GPUs"
            return Call(lambda: compiled(*args), temp_bytes=analysis.temp_size_in_bytes, queue=_queue(args))

        return compile_

    return lower


def _queue(args):
    """The stream of the one GPU that holds the arguments. Other devices have no queue, and several have several.

    None without the compiled library, whose kernel reads the device's clock.
    """
    if native.library().missing is not None:
        return None
    arrays = (leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array))
    devices = {device for array in arrays for device in array.devices()}
    if len(devices) == 1 and (device := devices.pop()).platform == "gpu":
        return functools.partial(jax_queue, device)
    return None


def prepare(candidates: dict[str, Candidate]) -> dict[str, Call]:
    """The calls of the candidates that lower, compile and run. Prints a line for each that fails."""
    with ThreadPoolExecutor() as pool:
        return run_once(start_compiling(candidates, pool))


def start_compiling(candidates: dict[str, Candidate], pool: Executor) -> dict[str, Future]:
    """Lowers the candidates one by one, and lets the pool compile them. Prints a line for each that fails."""
    lowered = {name: _attempt(name, lower) for name, lower in candidates.items()}
    return {name: pool.submit(_attempt, name, compile_) for name, compile_ in lowered.items() if compile_ is not None}


def run_once(compiling: dict[str, Future]) -> dict[str, Call]:
    """Waits for each compilation and runs the call once. Prints a line for each that fails."""
    calls = {}
    for name, future in compiling.items():
        call = future.result()
        if call is not None and _attempt(name, lambda call=call: (call.wait(call.run()),)):
            calls[name] = call
    return calls


def _attempt(name, step):
    try:
        return step()
    except Exception as error:  # any failure leaves out only this candidate
        _print_left_out(name, error)
        return None


def _print_left_out(name, error):
    first = next(iter(str(error).strip().splitlines()), "")
    print(f"{'left out':>10} {name}: {type(error).__name__}: {first[:300]}", flush=True)


class HostIsLate(RuntimeError):
    """The host did not queue a batch before the device was ready for it."""


def host_ms(call: Call, batch: int) -> float:
    """Milliseconds of each call of a batch that is enqueued back to back: the host's time, if it is the longer one."""
    start, out = time.perf_counter(), None
    for _ in range(batch):
        out = call.run()
    call.wait(out)
    return 1e3 * (time.perf_counter() - start) / batch


def device_ms(call: Call, batch: int) -> float:
    """Milliseconds of each call of a batch on the device, without the host's time to dispatch it.

    The batch is queued behind other work, between two marks, which the device stamps with its time. If queueing takes
    the host longer than that work takes the device, the device may have waited, and the batch is repeated behind more
    work. A call without a queue is timed by `host_ms`.

    Raises:
        HostIsLate: the device may have waited each time.
    """
    if call.queue is None:
        return host_ms(call, batch)
    queue = call.queue()
    for blocks in BLOCKS:
        began = time.perf_counter()
        for _ in range(blocks):
            queue.block()
        start = queue.mark()
        for _ in range(batch):
            call.run()
        end = queue.mark()
        queueing = 1e3 * (time.perf_counter() - began)
        ms = queue.ms_between(start, end)
        if queueing < blocks * queue.block_ms:
            return ms / batch
    raise HostIsLate(
        f"a batch of {batch} was not queued before the device had done {BLOCKS[-1]} blocks of other work, so its time "
        f"would be the host's: queue at most {MOST_CALLS} calls, none of which waits for the device, or use `host_ms`."
    )


def time_in_turn(
    calls: dict[str, Call],
    batch: int,
    rounds: int = 7,
    clock: Callable[[Call, int], float] = host_ms,
    long_batch_ms: float = LONG_BATCH_MS,
) -> dict[str, float]:
    """Median milliseconds of each call, in batches of up to `batch`. The calls take turns, so a drift hits all.

    A slow call gets a smaller batch, because the gap between two calls does not matter to it. A call that fails, for
    example because memory has run out, is left out, and a line is printed. So is a call for which the host is late each
    time; if it is late only sometimes, the other times count.
    """
    batches = {name: 1 for name in calls}
    times, late = {name: [] for name in calls}, {}

    def timed(name):
        try:
            return clock(calls[name], batches[name])
        except HostIsLate as error:
            late[name] = error
            return math.nan

    for turn in range(rounds + 1):
        for name in tuple(times):
            ms = _attempt(name, functools.partial(timed, name))
            if ms is None:
                del times[name]
            elif math.isnan(ms):
                continue
            elif turn == 0:
                batches[name] = max(1, min(batch, math.floor(long_batch_ms / max(ms, 1e-3))))
            else:
                times[name].append(ms)
    for name in [name for name, samples in times.items() if not samples]:
        _print_left_out(name, late[name])
        del times[name]
    return {name: statistics.median(samples) for name, samples in times.items()}


def fastest(calls: dict[str, Call], batch: int = 2, rounds: int = 3) -> str | None:
    """The name of the fastest call; None if every call failed."""
    times = time_in_turn(calls, batch, rounds)
    return min(times, key=lambda name: times[name], default=None)
