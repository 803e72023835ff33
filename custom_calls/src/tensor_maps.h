// Tensor maps: how the copy engine sees each operand. All elements are 16 bits wide, all boxes 128 bytes, swizzled.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include "instance.h"

namespace latent_moe {

// An error message, empty where all went well.
using Error = std::string;

// [depth][rows][columns] whose boxes are [1][box_rows][64].
Error dense_map(CUtensorMap* map, Type type, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int box_rows);

// Windows of 64 rows over [rows][columns], whose rows lie `pitch` elements apart: window z begins 64 rows before row z.
// A box at (x, y, z) is the rows z + y - 64 ... z - 1, that many and no more: what lies beyond the window is read as
// zero and never written. So rows first ... first + n - 1 (n <= 64) are the box y = 64 - n, z = first + n.
// The window's address may lie before the data; no byte there is ever touched.
Error window_map(CUtensorMap* map, Type type, void const* data, int64_t rows, int64_t columns, int64_t pitch);

}  // namespace latent_moe
