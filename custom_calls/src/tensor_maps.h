// Tensor maps: how the copy engine sees each operand. All elements are 16 bits wide, all boxes 128 bytes, swizzled.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include "instance.h"

namespace latent_moe {

// An error message, empty where all went well.
using Error = std::string;

// [depth][rows][columns] for boxes of [1][box_rows][64].
Error dense_map(CUtensorMap* map, Type type, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int box_rows);

// The same in blocks of 64 columns, [depth][columns / 64][rows][64], for boxes of [1][blocks][64][64]. One box instead of
// several: it is one thread that asks for all of them.
Error blocks_map(CUtensorMap* map, Type type, void const* data, int64_t depth, int64_t rows, int64_t columns,
                 int blocks);

// [rows][columns] for boxes that end at any row: `Window` places the box of rows first ... first + n - 1 (n <= 64), and
// what lies beyond them is read as zero. Rows begin `pitch` elements after each other.
Error window_map(CUtensorMap* map, Type type, void const* data, int64_t columns, int64_t pitch, int box_rows);
Error blocks_window_map(CUtensorMap* map, Type type, void const* data, int64_t columns, int64_t pitch, int box_rows,
                        int blocks);

}  // namespace latent_moe
