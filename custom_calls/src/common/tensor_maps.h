// Tensor maps: how TMA sees each operand. A box is 128 bytes wide, and swizzled.
//
// A block is as many columns as a box has: 64 of 16 bits.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include "common/kernel.h"

namespace latent_moe {

// An error message, empty where all went well.
using Error = std::string;

constexpr int kBoxBytes = 128;
constexpr int block_columns(Format format) { return kBoxBytes / element_bytes(format); }

// [depth][rows][columns] for boxes of [1][box_rows][a block].
Error dense_map(CUtensorMap* map, Format format, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int box_rows);

// The same cut into blocks, [depth][blocks][rows][a block], for boxes of [1][box_blocks][box_rows][a block]. One thread asks
// for all boxes, so it asks for one in place of several.
Error blocks_map(CUtensorMap* map, Format format, void const* data, int64_t depth, int64_t rows, int64_t columns,
                 int box_rows, int box_blocks);

// [rows][columns] for boxes that end at any row: `Window` (args.h) places the box of n <= box_rows rows, and what lies beyond
// them is read as zero. Rows begin `pitch` elements apart.
Error window_map(CUtensorMap* map, Format format, void const* data, int64_t columns, int64_t pitch, int box_rows);
Error blocks_window_map(CUtensorMap* map, Format format, void const* data, int64_t columns, int64_t pitch, int box_rows,
                        int box_blocks);

}  // namespace latent_moe
