// Rows as E4M3 codes with a scale for each block of 1 x 128, alone or with the gradient of relu2.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "formats/encode_blocks.h"

namespace latent_moe::formats {

// A tile has this many rows and one block of columns.
constexpr int kTileRows = 64;

// The results of both kernels for rows [rows][k]: codes [rows][k], and scales [ceil(k / 128)][rows].
// 8 divides k, and ceil(rows / kTileRows) * ceil(k / 128) is below 2^31. All arrays are aligned to 16 bytes.
struct RowCodes {
  uint8_t* codes;
  float* scales;
  int64_t rows;
  int k;
  bool power_of_two;  // whether scales are rounded up to powers of two
};

struct EncodeRows {
  Source source;
  void const* values;  // [rows][k]
  RowCodes to;
};

cudaError_t encode_rows(EncodeRows const& call, cudaStream_t stream);

// The pre-activation's gradient from the gradient of the hidden rows relu(u)^2, and its codes. It may overwrite dhidden.
struct Relu2Gradient {
  Source source;  // kBf16 or kF16
  void const *dhidden, *hidden;  // [rows][k]
  float const* row_weights;      // [rows]
  void* dpre;                    // [rows][k]: row weight * dhidden * 2 sqrt(hidden), rounded
  float* row_weight_sums;        // [ceil(k / 128)][rows]: dhidden * hidden, summed over each block of columns
  RowCodes to;                   // codes of the rounded dpre
};

cudaError_t relu2_gradient(Relu2Gradient const& call, cudaStream_t stream);

}  // namespace latent_moe::formats
