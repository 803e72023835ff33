"""A model of the barriers of a kernel that widens codes (custom_calls/src/sm90/grouped_kernel.cuh).

The threads of a cluster of two blocks run in random order. A case fails if they all wait, or if a product reads a stage
that another step has overwritten. The model has the kernel's order of waits and arrivals, and has to change with it.
"""

import random

import pytest

BLOCKS, STAGES, ENTRIES, GROUPS, WARPS, CONSUMERS = 2, 5, 10, 2, 4, 2


class Barrier:
    """An mbarrier: its phase ends when all arrivals and all bytes (here: copies) of it have come."""

    def __init__(self, count):
        self.count = self.pending = count
        self.copies = self.phase = 0

    def arrive(self, count=1, expected=0):
        self.pending -= count
        self.copies += expected
        assert self.pending >= 0, "more arrivals than the barrier counts"
        self._end()

    def complete(self):
        self.copies -= 1
        self._end()

    def _end(self):
        if self.pending == self.copies == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def wait(self, parity):
        while (self.phase - 1) % 2 != parity:
            yield


class Place:
    """A position in a ring, and the parity of its rounds."""

    def __init__(self, size):
        self.size, self.at, self.parity = size, 0, 0

    def next(self, steps=1):
        at = self.at + steps
        self.parity ^= at // self.size & 1
        self.at = at % self.size


class Block:
    def __init__(self):
        self.full = [Barrier(1 + WARPS) for _ in range(STAGES)]
        self.empty = [Barrier(BLOCKS) for _ in range(STAGES)]
        self.turns = [Barrier(1) for _ in range(CONSUMERS)]
        self.works: list[int | None] = [None] * ENTRIES
        self.queued = [Barrier(1) for _ in range(ENTRIES)]
        for barrier in self.queued:
            barrier.arrive(expected=1)
        self.rows: list[int | None] = [None] * STAGES  # the step whose rows a stage holds
        self.weights: list[list[int | None]] = [[None] * WARPS for _ in range(STAGES)]


class Cluster:
    def __init__(self, rng, tiles, ahead):
        self.rng, self.tiles, self.ahead = rng, tiles, ahead
        self.blocks = [Block() for _ in range(BLOCKS)]
        self.taken = [Barrier(BLOCKS * (CONSUMERS * 4 + 1 + GROUPS * WARPS)) for _ in range(ENTRIES)]
        self.copies = []  # that have begun

    def run(self):
        """Runs the threads to their ends. If they take far more turns than any case needs, they wait for each other."""
        threads = [self.server()]
        for block in self.blocks:
            threads.append(self.producer(block))
            threads += [self.consumer(block, i) for i in range(CONSUMERS)]
            threads += [self.widener(block, group, warp) for group in range(GROUPS) for warp in range(WARPS)]
        pace = {thread: self.rng.choice([1, 1, 0.2, 0.03]) for thread in threads}
        arrives = self.rng.choice([0.05, 0.5, 0.9])
        for _ in range(1_000_000):
            if self.copies and self.rng.random() < arrives:
                self.copies.pop(self.rng.randrange(len(self.copies)))()
            thread = self.rng.choice(threads)
            if self.rng.random() < pace[thread] and next(thread, "ends") == "ends":
                threads.remove(thread)
                if not threads:
                    return
        raise AssertionError("the threads wait for each other")

    def server(self):
        place = Place(ENTRIES)
        for steps in (*self.tiles, None):
            yield from self.taken[place.at].wait(place.parity ^ 1)
            for block in self.blocks:

                def send(block=block, at=place.at, steps=steps):
                    block.works[at] = steps
                    block.queued[at].complete()

                self.copies.append(send)
            place.next()

    def take(self, block, place, readers=1, arms=False):
        yield from block.queued[place.at].wait(place.parity)
        if arms:
            block.queued[place.at].arrive(expected=1)
        steps = block.works[place.at]
        self.taken[place.at].arrive(readers)
        place.next()
        return steps

    def producer(self, block):
        entry, place, number = Place(ENTRIES), Place(STAGES), 0
        while (steps := (yield from self.take(block, entry, arms=True))) is not None:
            for _ in range(steps):
                yield from block.empty[place.at].wait(place.parity ^ 1)
                block.full[place.at].arrive(expected=BLOCKS)
                for to in self.blocks:  # each block loads a part of the rows for both

                    def load(to=to, at=place.at, number=number):
                        to.rows[at] = number
                        to.full[at].complete()

                    self.copies.append(load)
                place.next()
                number += 1
                yield

    def widener(self, block, group, warp):
        entry, place, held, left, number = Place(ENTRIES), Place(STAGES), [], 0, 0
        more, passes = True, group == 1
        place.next(group)
        while more:
            pauses, reads = False, self.ahead
            while reads > 0 or held:
                if reads == 0:
                    at = place.at
                    for _ in range(GROUPS):
                        yield from block.empty[place.at].wait(place.parity ^ 1)
                        place.next()
                    yield
                    block.weights[at][warp] = held[0]
                    yield
                    block.full[at].arrive()
                    held.pop(0)
                    reads = 1
                reads -= 1
                while True:
                    while left == 0 and more and not pauses:
                        steps = yield from self.take(block, entry)
                        more, left = steps is not None, steps or 0
                        pauses = steps == 0 and bool(held)
                    if left == 0:
                        break
                    left, number = left - 1, number + 1
                    passes = not passes
                    if passes:
                        held.append(number - 1)
                        break

    def consumer(self, block, own):
        entry, place, turn, parity, number = Place(ENTRIES), Place(STAGES), 1, own, 0

        def check(at, number):
            assert [block.rows[at], *block.weights[at]] == [number] * (1 + WARPS), "a stage was overwritten"

        def release(at, number):
            check(at, number)
            for to in self.blocks:
                to.empty[at].arrive()

        while (steps := (yield from self.take(block, entry, readers=4))) is not None:
            turn ^= 1
            if turn != own:
                place.next(steps)
                number += steps
                continue
            parity ^= 1
            yield from block.turns[own].wait(parity)
            previous = None
            for _ in range(steps):
                yield from block.full[place.at].wait(place.parity)
                check(place.at, number)
                yield
                if previous is not None:
                    release(previous, number - 1)
                previous, number = place.at, number + 1
                place.next()
            block.turns[1 - own].arrive()
            yield
            if previous is not None:
                release(previous, number - 1)
            for _ in range(self.rng.randrange(12)):  # the epilogue
                yield


@pytest.mark.parametrize(
    "steps", [[1], [16], [0, 1, 2, 3, 6, 16], [0, 1, 2], [0, 0, 0, 3]], ids=lambda steps: "-".join(map(str, steps))
)
def test_no_thread_waits_for_ever_and_no_stage_is_overwritten(steps):
    """With tiles of few or no steps, of which any number may follow at the end (padding rows)."""
    for seed in range(8):
        rng = random.Random(seed)
        tiles = [rng.choice(steps) for _ in range(rng.randrange(1, 14))] + rng.choice([[], [0] * 25])
        Cluster(rng, tiles, ahead=rng.choice([2, 3, 4])).run()
