"""The two clocks of calls: on a simulated host and GPU, whose times are known, and on the CPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import native
from jax_latent_moe.grouped_matmul.tuning import queue, timing, tune
from jax_latent_moe.grouped_matmul.tuning.queue import Queue, jax_queue
from jax_latent_moe.grouped_matmul.tuning.timing import (
    Call,
    HostIsLate,
    device_ms,
    host_ms,
    jax_candidate,
    prepare,
    time_in_turn,
)

DISPATCH = 80e-6
"""Seconds that the host takes for each call and each block."""


@dataclasses.dataclass
class Machine:
    """A host that dispatches, and a GPU that runs what is queued in its order.

    Attributes:
        block: seconds of a block of other work.
        in_flight: calls and blocks that the host may queue before it must wait.
        now: the host's clock.
        ends: when the GPU is done with each call and block.
        hiccups: seconds by which the next dispatches take longer.
        late: seconds after which the host learns that the GPU has reached what it waits for.
    """

    block: float = 1e-3
    in_flight: int = 32
    now: float = 0.0
    ends: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    hiccups: list[float] = dataclasses.field(default_factory=list)
    late: float = 0.0

    def launch(self, seconds: float) -> float:
        """Queues work; returns when it ends."""
        if len(self.ends) > self.in_flight:
            self.wait(self.ends[-self.in_flight])
        self.now += DISPATCH + (self.hiccups.pop(0) if self.hiccups else 0)
        self.ends.append(max(self.ends[-1], self.now) + seconds)
        return self.ends[-1]

    def wait(self, end: float) -> None:
        self.now = max(self.now, end + self.late)

    def ms_between(self, first: float, second: float) -> float:
        self.wait(second)
        return 1e3 * (second - first)

    def call(self, seconds: float, **changes: Any) -> Call:
        """A call whose kernel takes so long."""
        stream = Queue(lambda: self.launch(self.block), 1e3 * self.block, lambda: self.launch(0.0), self.ms_between)
        return dataclasses.replace(Call(lambda: self.launch(seconds), self.wait, queue=lambda: stream), **changes)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A device of JAX, as far as `timing` looks at it."""

    number: int
    platform: str = "gpu"


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize("block", [0.4e-3, 1e-3, 20e-3])
@pytest.mark.parametrize("kernel", [1e-6, 12e-6, 79e-6, 3e-3])
def test_the_device_clock_finds_the_kernel_whatever_the_host_takes(machine, block, kernel):
    """Blocks that are shorter than the dispatch of the batch are repeated."""
    machine.block = block
    assert device_ms(machine.call(kernel), 20) == pytest.approx(1e3 * kernel, rel=1e-9)
    assert host_ms(machine.call(kernel), 20) >= 1e3 * max(kernel, DISPATCH)


@pytest.mark.parametrize("kernel", [1e-6, 79e-6])
def test_the_device_clock_does_not_depend_on_when_the_host_wakes(machine, kernel):
    """A host that learns late of the first mark would find a batch that is nearly over."""
    machine.late = 5e-3
    assert device_ms(machine.call(kernel), 20) == pytest.approx(1e3 * kernel, rel=1e-9)


def test_tiles_that_the_host_hides_are_told_apart(machine):
    kernels = {"slow": 30e-6, "fast": 10e-6, "middle": 20e-6, "long": 5e-3}
    calls = {name: machine.call(seconds) for name, seconds in kernels.items()}
    times = time_in_turn(calls, 24, 3, device_ms)
    assert times == pytest.approx({name: 1e3 * seconds for name, seconds in kernels.items()}, rel=1e-9)
    hidden = time_in_turn(calls, 24, 3)
    assert hidden["slow"] == pytest.approx(hidden["fast"], rel=0.02)


def test_a_batch_that_the_host_was_late_for_is_repeated(machine):
    """One dispatch takes 2 ms, while the block before it takes 1 ms."""
    call = machine.call(10e-6)
    machine.hiccups = [0, 0, 2e-3]
    before = len(machine.ends)
    assert device_ms(call, 4) == pytest.approx(0.01, rel=1e-9)
    marks = 2
    assert len(machine.ends) - before == (1 + marks + 4) + (2 + marks + 4)


def test_a_late_round_costs_a_sample_and_not_the_call(machine):
    """All attempts of its second turn are late."""
    call, turns = machine.call(10e-6), []

    def clock(call, batch):
        turns.append(batch)
        machine.hiccups = [1.0] * 40 if len(turns) == 2 else []
        return device_ms(call, batch)

    assert time_in_turn({"call": call}, 4, 3, clock) == pytest.approx({"call": 0.01}, rel=1e-9)
    assert len(turns) == 4


def test_calls_that_wait_for_the_device_are_left_out_and_said(machine, capsys):
    def run():
        end = machine.launch(10e-6)
        machine.wait(end)
        return end

    calls = {"waits": machine.call(0, run=run), "good": machine.call(10e-6)}
    assert time_in_turn(calls, 4, 2, device_ms).keys() == {"good"}
    printed = capsys.readouterr().out
    assert (
        f"left out waits: HostIsLate: a batch of 1 was not queued before the device had done {timing.BLOCKS[-1]}"
        in printed
    )
    assert "use `host_ms`" in printed


def test_as_many_calls_as_the_queue_holds_are_timed_behind_the_most_blocks(machine):
    machine.block = 2.1 * DISPATCH * timing.MOST_CALLS / timing.BLOCKS[-1]
    assert device_ms(machine.call(10e-6), timing.MOST_CALLS) == pytest.approx(0.01, rel=1e-9)
    with pytest.raises(HostIsLate, match=f"a batch of 40 .* queue at most {timing.MOST_CALLS} calls"):
        device_ms(machine.call(10e-6), 40)
    assert tune.BATCH <= timing.MOST_CALLS


def test_a_long_call_gets_a_small_batch(machine):
    sizes = []

    def clock(call, batch):
        sizes.append(batch)
        return device_ms(call, batch)

    time_in_turn({"long": machine.call(4e-3)}, 24, 2, clock, long_batch_ms=10)
    assert sizes == [1, 2, 2]


def test_without_a_queue_both_clocks_are_one(machine):
    call = machine.call(10e-6, queue=None)
    assert device_ms(call, 5) == host_ms(call, 5) == pytest.approx(1e3 * (DISPATCH + 10e-6 / 5), rel=1e-9)


def test_a_call_has_the_queue_of_the_one_gpu_that_holds_its_arguments(monkeypatch):
    """Arguments on the CPU, on several devices, or in NumPy have none."""
    ones = jnp.ones((4, 4))
    monkeypatch.setattr(native, "library", lambda: native.Library({"a kernel": 1}, None))
    monkeypatch.setattr(timing, "jax_queue", lambda device: device)
    assert prepare({"cpu": jax_candidate(jnp.dot, ones, ones)})["cpu"].queue is None
    assert timing._queue([]) is None
    for devices, found in (({Gpu(0)}, Gpu(0)), ({Gpu(0), Gpu(1)}, None), (ones.devices(), None)):
        monkeypatch.setattr(type(ones), "devices", lambda array, devices=devices: set(devices))
        made = timing._queue([ones, ones])
        assert (None if made is None else made()) == found


def test_the_queue_of_a_device_runs_its_blocks_and_reads_the_stamps(monkeypatch):
    monkeypatch.setattr(queue, "SIZE", 16)
    monkeypatch.setattr(queue, "_device_clock", lambda: jnp.asarray([2**32 - 1, 7], jnp.uint32))
    jax_queue.cache_clear()
    stream = jax_queue(jax.devices()[0])
    assert jax_queue(jax.devices()[0]) is stream
    assert stream.block().shape == (16, 16)
    first, second = stream.mark(), jnp.asarray([1_999_999, 8], jnp.uint32)
    assert queue.nanoseconds(first) == 8 * 2**32 - 1
    assert stream.ms_between(first, second) == 2
    assert stream.block_ms == 0
    jax_queue.cache_clear()


def test_without_the_compiled_library_there_is_no_queue(monkeypatch):
    ones = jnp.ones(4)
    monkeypatch.setattr(native, "library", lambda: native.Library({}, "not there"))
    monkeypatch.setattr(type(ones), "devices", lambda array: {Gpu(0)})
    assert prepare({"call": jax_candidate(jnp.negative, np.ones(4))})["call"].queue is None
    assert timing._queue([ones]) is None
