// Tensor maps, which describe each operand to TMA. A box is a block of columns wide: 128 bytes, which TMA swizzles.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include "common/kernel.h"

namespace latent_moe {

// An error message, empty if all went well.
using Error = std::string;

constexpr int kBoxBytes = 128;  // of a box's row
constexpr int block_columns(Format format) { return kBoxBytes / element_bytes(format); }

// [depth][rows][columns] for boxes of [1][box_rows][a block].
Error dense_map(CUtensorMap* map, Format format, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int box_rows);

// The same, cut into blocks: [depth][blocks][rows][a block], for boxes of [1][box_blocks][box_rows][a block]. One such box
// replaces several, because a single thread issues all loads.
Error blocks_map(CUtensorMap* map, Format format, void const* data, int64_t depth, int64_t rows, int64_t columns,
                 int box_rows, int box_blocks);

// [rows][columns] for boxes that end at any row, beyond which zeros are read. `Window` (args.h) gives their coordinates.
// Rows are `pitch` elements apart.
Error window_map(CUtensorMap* map, Format format, void const* data, int64_t columns, int64_t pitch, int box_rows);
Error blocks_window_map(CUtensorMap* map, Format format, void const* data, int64_t columns, int64_t pitch, int box_rows,
                        int box_blocks);

}  // namespace latent_moe
