"""Epilogues of the Pallas matmul kernel: they store an accumulated tile, or fuse an activation with it.

Each consumer warpgroup makes its own epilogue in the kernel. It stores a tile in blocks of 64 columns, through buffers
in shared memory. Stores are asynchronous: a consumer waits for one only when it needs the buffer again, and the other
consumer multiplies meanwhile. Within a block it computes 64 rows at a time, because the accumulator leaves few
registers to an activation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jax_latent_moe.grouped_matmul.pallas_sm90 import mgpu as mgpu_code
from jax_latent_moe.grouped_matmul.pallas_sm90.activations import value_and_slopes, value_and_slopes_of_residual
from jax_latent_moe.grouped_matmul.pallas_sm90.mgpu import COLUMN_BLOCK, CONSUMERS
from jax_latent_moe.grouped_matmul.pallas_sm90.schedule import ROW_ALIGNMENT

ROW_BLOCK = 64


class Place(NamedTuple):
    """The place of a tile in the output.

    Attributes:
        row: first row, a multiple of 8.
        column: first column.
        begin: first of the tile's own rows, counted from `row`.
        end: end of the tile's own rows, counted from `row`.
        height: rows that are computed.
    """

    row: int | Array
    column: int | Array
    begin: int | Array
    end: int | Array
    height: int

    def block(self, index):
        """First column of a block of 64 columns of the tile."""
        return self.column + index * COLUMN_BLOCK

    def row_blocks(self) -> list[slice]:
        """The rows computed, 64 at a time."""
        return [slice(first, first + ROW_BLOCK) for first in range(0, self.height, ROW_BLOCK)]


class StoreBuffers:
    """The buffers of one consumer, smem [buffers, rows, 64]. A tile has `blocks` blocks, the output `width` columns."""

    def __init__(self, smem, blocks: int, width: int, *, native: bool):
        self.smem, self.blocks, self.width, self.native = smem, blocks, width, native
        self.count = smem.shape[0]

    def at(self, buffer, place):
        """The part of a buffer that holds the rows a tile computes."""
        return self.smem.at[buffer, pl.ds(0, place.height)]

    def inside(self, place, block):
        """Whether the block lies within the output's columns."""
        return place.block(block) < self.width

    def send(self, buffer, place, block, out, column):
        """Starts storing a block, from the tile's own rows of a buffer, at a column of out."""
        end = jnp.where(self.inside(place, block), place.end, place.begin)
        mgpu_code.store_rows(self.at(buffer, place), out, place.row, column, place.begin, end, native=self.native)

    def store(self, place, block, values_of_rows, targets):
        """Stores the values of one block, each to its (out, column), through the buffers in turn.

        Args:
            place: the tile's place.
            block: index of the block among the tile's columns.
            values_of_rows: maps 64 rows of the tile to a value [64, 64] for each target.
            targets: (out, column) for each value.
        """
        sets = self.count // len(targets)
        first = block % sets * len(targets)
        plgpu.wait_smem_to_gmem(min(block, sets - 1) * len(targets), wait_read_only=True)
        for rows in place.row_blocks():
            for i, value in enumerate(values_of_rows(rows)):
                self.smem[first + i, rows] = value
        plgpu.commit_smem()
        for i, (out, column) in enumerate(targets):
            self.send(first + i, place, block, out, column)


class Product:
    """Stores the product; `operands` and `scratch` are empty."""

    def __init__(self, activation, buffers: StoreBuffers, operands, outs, scratch, warpgroup):
        del activation, operands, scratch, warpgroup
        self.buffers, (self.out,) = buffers, outs

    def start(self, place):
        """Called before the tile is multiplied."""

    def targets(self, place, block):
        """The (out, column) at which each value of a block is stored."""
        return [(self.out, place.block(block))]

    def finish(self, place, accumulated):
        """Called after the tile was multiplied, with the product in float32, [height, columns]."""
        value = accumulated.astype(self.out.dtype)
        for block in range(self.buffers.blocks):
            self.buffers.store(
                place, block, lambda rows, block=block: [_tile(value, rows, block)], self.targets(place, block)
            )


class Activation:
    """Stores the activation of the rounded pre-activation, and the pre-activation itself if there is an output for it.

    A gated tile holds 64 gate columns, then the 64 up columns that belong to the same hidden columns.
    """

    def __init__(self, activation, buffers: StoreBuffers, operands, outs, scratch, warpgroup):
        del operands, scratch, warpgroup
        self.activation, self.buffers, (*self.pre, self.hidden) = activation, buffers, outs

    def start(self, place):
        """See `Product.start`."""

    def targets(self, place, block):
        """See `Product.targets`."""
        column = place.block(block)
        kept = [part for pre in self.pre for part in _parts_of(pre, column, self.activation, self.buffers)]
        return [*kept, (self.hidden, column)]

    def finish(self, place, accumulated):
        """See `Product.finish`."""
        pre = accumulated.astype(self.hidden.dtype)
        num_parts = _num_parts(self.activation)
        for block in range(self.buffers.blocks):

            def values(rows, block=block):
                parts = [_tile(pre, rows, block * num_parts + part) for part in range(num_parts)]
                hidden, _ = value_and_slopes(self.activation, [part.astype(jnp.float32) for part in parts])
                return [*(parts if self.pre else []), hidden.astype(self.hidden.dtype)]

            self.buffers.store(place, block, values, self.targets(place, block))


class ActivationGradient:
    """Turns the hidden rows' gradient into the pre-activation's, and into its inner product with hidden rows.

    Blocks of the residual are loaded before the tile is multiplied, as many as the buffers can hold. The gradient
    overwrites them there and is stored from there.
    """

    def __init__(self, residual, activation, buffers: StoreBuffers, operands, outs, scratch, warpgroup):
        self.residual, self.activation, self.buffers = residual, activation, buffers
        self.kept, self.row_weights = operands
        self.dpre, self.sums = outs
        row_smem, kept_loaded, weights_loaded = scratch
        self.weights_smem, self.sums_smem = row_smem.at[warpgroup, 0], row_smem.at[warpgroup, 1]
        self.sets = kept_loaded.shape[0] // CONSUMERS
        self.kept_loaded, self.first_barrier = kept_loaded, warpgroup * self.sets
        self.weights_loaded = weights_loaded.at[warpgroup]

    def targets(self, place, block):
        """See `Product.targets`."""
        return _parts_of(self.dpre, place.block(block), self.activation, self.buffers)

    def start(self, place):
        """See `Product.start`."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(
            self.row_weights.at[_rows(place)], self.weights_smem.at[pl.ds(0, place.height)], self.weights_loaded
        )
        for block in range(self.sets):
            self._load(place, block)

    def _load(self, place, block):
        current = block % self.sets
        parts = _parts_of(self.kept, place.block(block), self.activation, self.buffers)
        for part, (kept, column) in enumerate(parts):
            # TMA fills columns beyond the end with zeros.
            column = jnp.where(self.buffers.inside(place, block), column, kept.shape[1])
            plgpu.copy_gmem_to_smem(
                kept.at[_rows(place), pl.ds(pl.multiple_of(column, COLUMN_BLOCK), COLUMN_BLOCK)],
                self.buffers.at(current * len(parts) + part, place),
                self.kept_loaded.at[self.first_barrier + current],
            )

    def finish(self, place, accumulated):
        """See `Product.finish`."""
        num_parts, blocks = _num_parts(self.activation), self.buffers.blocks
        sums = [jnp.zeros((ROW_BLOCK,), jnp.float32) for _ in place.row_blocks()]
        plgpu.barrier_wait(self.weights_loaded)
        for block in range(blocks):
            current = block % self.sets
            plgpu.barrier_wait(self.kept_loaded.at[self.first_barrier + current])
            buffers = range(current * num_parts, (current + 1) * num_parts)
            for i, rows in enumerate(place.row_blocks()):
                dhidden = _tile(accumulated, rows, block)
                parts = [self.buffers.smem[buffer, rows].astype(jnp.float32) for buffer in buffers]
                hidden, slopes = value_and_slopes_of_residual(self.activation, self.residual, parts)
                sums[i] += jnp.sum(dhidden * hidden, axis=1)
                weights = plgpu.layout_cast(self.weights_smem[rows], plgpu.Layout.WGMMA.reduce(1))
                dhidden *= lax.broadcast_in_dim(weights, dhidden.shape, (0,))
                for buffer, slope in zip(buffers, slopes, strict=True):
                    self.buffers.smem[buffer, rows] = (dhidden * slope).astype(self.dpre.dtype)
                if block == blocks - 1:
                    self.sums_smem[rows] = sums[i]
            plgpu.commit_smem()
            for buffer, (out, column) in zip(buffers, self.targets(place, block), strict=True):
                self.buffers.send(buffer, place, block, out, column)
            if block + self.sets < blocks:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                self._load(place, block + self.sets)
        line = lax.div(place.column, accumulated.shape[1])
        mgpu_code.store_row_values(
            self.sums_smem, self.sums, line, place.row, place.begin, place.end, native=self.buffers.native
        )


def zero(epilogue, place):
    """Stores zeros in every output that is stored in blocks."""
    zeros = plgpu.layout_cast(jnp.zeros((ROW_BLOCK, COLUMN_BLOCK), epilogue.buffers.smem.dtype), plgpu.Layout.WGMMA)
    for block in range(epilogue.buffers.blocks):
        targets = epilogue.targets(place, block)
        values = [zeros] * len(targets)
        epilogue.buffers.store(place, block, lambda _, values=values: values, targets)


def _num_parts(activation) -> int:
    return 2 if activation.gated else 1


def _parts_of(pre, column, activation, buffers):
    """(ref, column) of each block of a pre-activation, or its gradient, that belongs to a block of hidden columns."""
    return [(pre, column + part * buffers.width) for part in range(_num_parts(activation))]


def _rows(place):
    return pl.ds(pl.multiple_of(place.row, ROW_ALIGNMENT), place.height)


def _tile(value, rows, block):
    return value[rows, block * COLUMN_BLOCK : (block + 1) * COLUMN_BLOCK]
