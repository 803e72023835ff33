// Tensor maps: how the copy engine sees each operand. All elements are 16 bits wide, all boxes 128 bytes, swizzled.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include "instance.h"

namespace latent_moe {

// An error message, empty where all went well.
using Error = std::string;

// [depth][rows][columns], whose rows lie `pitch` elements apart, for boxes of [1][box_rows][64].
Error dense_map(CUtensorMap* map, Type type, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int64_t pitch, int box_rows);

// [rows][columns], whose rows lie `pitch` elements apart, for boxes that end at any row: `Window` places the box of rows
// first ... first + n - 1 (n <= 64); what lies beyond them is read as zero and never written.
Error window_map(CUtensorMap* map, Type type, void const* data, int64_t columns, int64_t pitch);

}  // namespace latent_moe
