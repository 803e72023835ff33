"""A model of the barriers of a kernel that widens codes (custom_calls/src/sm90/widened_kernel.cuh).

The threads of a block run in random order. A case fails if they all wait, or if a product reads a stage that another
step has overwritten. The model has the kernel's order of waits and arrivals, and has to change with it.
"""

import random
from typing import NamedTuple

import pytest

ENTRIES = 4
STEP_STAGES = 2
"""Stages of rows that a step takes."""


class Tile(NamedTuple):
    """What a tile has: stages of rows and of codes, warps that multiply, and parts of a stage of rows."""

    stages: int
    code_stages: int
    warps: int
    parts: int


TILES = {"two warpgroups": Tile(4, 4, 8, 1), "three warpgroups": Tile(5, 3, 12, 2)}


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
    def __init__(self, tile):
        self.full = [Barrier(1) for _ in range(tile.stages)]
        self.empty = [Barrier(tile.warps) for _ in range(tile.stages)]
        self.full_codes = [Barrier(1) for _ in range(tile.code_stages)]
        self.empty_codes = [Barrier(tile.warps) for _ in range(tile.code_stages)]
        self.works: list[int | None] = [None] * ENTRIES
        self.queued = [Barrier(1) for _ in range(ENTRIES)]
        for barrier in self.queued:
            barrier.arrive(expected=1)
        self.rows: list[int | None] = [None] * tile.stages  # which rows a stage holds, in the order of their loads
        self.codes: list[int | None] = [None] * tile.code_stages


class Model:
    """A block whose stages of codes hold so many steps."""

    def __init__(self, rng, tile, tiles, held):
        self.rng, self.tile, self.tiles, self.held = rng, tile, tiles, held
        self.block = Block(tile)
        self.taken = [Barrier(tile.warps + 2) for _ in range(ENTRIES)]
        self.copies = []  # that have begun

    def run(self):
        """Runs the threads to their ends. If they take far more turns than any case needs, they wait for each other."""
        threads = [self.server(), self.row_loader(self.block), self.code_loader(self.block)]
        threads += [self.consumer(self.block) for _ in range(self.tile.warps)]
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

            def send(at=place.at, steps=steps):
                self.block.works[at] = steps
                self.block.queued[at].complete()

            self.copies.append(send)
            place.next()

    def take(self, block, place, arms=False):
        yield from block.queued[place.at].wait(place.parity)
        if arms:
            block.queued[place.at].arrive(expected=1)
        steps = block.works[place.at]
        self.taken[place.at].arrive()
        place.next()
        return steps

    def row_loader(self, block):
        entry, place, number = Place(ENTRIES), Place(self.tile.stages), 0
        while (steps := (yield from self.take(block, entry, arms=True))) is not None:
            for _ in range(STEP_STAGES * steps):
                yield from block.empty[place.at].wait(place.parity ^ 1)
                block.full[place.at].arrive(expected=1)

                def load(at=place.at, number=number):
                    block.rows[at] = number
                    block.full[at].complete()

                self.copies.append(load)
                place.next()
                number += 1
                yield

    def code_loader(self, block):
        entry, place, number = Place(ENTRIES), Place(self.tile.code_stages), 0
        while (steps := (yield from self.take(block, entry))) is not None:
            for _ in range(-(-steps // self.held)):
                yield from block.empty_codes[place.at].wait(place.parity ^ 1)
                block.full_codes[place.at].arrive(expected=1)

                def load(at=place.at, number=number):
                    block.codes[at] = number
                    block.full_codes[at].complete()

                self.copies.append(load)
                place.next()
                number += 1
                yield

    def consumer(self, block):
        """One warp. It reads the codes of the next part, issues the products of this one, and widens while they run.

        The codes of a tile's first part are read and widened before the epilogue of the tile before.
        """
        parts = STEP_STAGES * self.tile.parts
        entry, place, codes = Place(ENTRIES), Place(self.tile.stages), Place(self.tile.code_stages)
        number, stage = 0, 0

        def release(at, number):
            assert block.rows[at] == number, "a stage was overwritten"
            block.empty[at].arrive()

        def begin():
            steps = yield from self.take(block, entry)
            if steps:
                yield from block.full_codes[codes.at].wait(codes.parity)
                assert block.codes[codes.at] == stage, "a stage of codes was overwritten"
            return steps

        steps = yield from begin()
        while steps is not None:
            previous = None
            for step in range(steps):
                ends = step + 1 == steps
                ends_stage = ends or (step + 1) % self.held == 0
                for part in range(parts):
                    last, last_stage = codes.at, stage
                    if part + 1 == parts and ends_stage:
                        codes.next()
                        stage += 1
                        if not ends:
                            yield from block.full_codes[codes.at].wait(codes.parity)
                    if part + 1 < parts or not ends:
                        assert block.codes[codes.at] == stage, "a stage of codes was overwritten"
                    if part % self.tile.parts == 0:
                        yield from block.full[place.at].wait(place.parity)
                    assert block.rows[place.at] == number, "a stage was overwritten"
                    yield
                    if part + 1 == parts and ends_stage:
                        assert block.codes[last] == last_stage, "a stage of codes was overwritten"
                        block.empty_codes[last].arrive()
                    yield
                    if part % self.tile.parts == 0:
                        if previous is not None:
                            release(previous, number - 1)
                        previous = place.at
                    if (part + 1) % self.tile.parts == 0:
                        number += 1
                        place.next()
            yield
            if previous is not None:
                release(previous, number - 1)
            steps = yield from begin()
            for _ in range(self.rng.randrange(12)):  # the epilogue
                yield


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "steps", [[1], [8], [0, 1, 2, 3, 6, 8], [0, 1, 2], [0, 0, 0, 3]], ids=lambda steps: "-".join(map(str, steps))
)
def test_no_thread_waits_for_ever_and_no_stage_is_overwritten(steps, tile):
    """With tiles of few or no steps, of which any number may follow at the end (padding rows)."""
    for seed in range(4):
        rng = random.Random(seed)
        tiles = [rng.choice(steps) for _ in range(rng.randrange(1, 14))] + rng.choice([[], [0] * 25])
        Model(rng, TILES[tile], tiles, held=rng.choice([1, 2])).run()
