// The experts of more tokens than experts.h takes, with weights in codes. A kernel lists each expert's assignments, two more
// multiply, and a last one combines. Reading the experts' weights takes most of the time.
#pragma once

#include "decode/experts.h"

namespace latent_moe::decode {

// Rows that a block multiplies at once. An expert with more rows is read several times.
constexpr bool is_pass(int rows) { return rows == 8 || rows == 16; }

// Where units' scales are in shared memory (unit_scales.cuh), in bytes.
struct UnitScales {
  int begin;      // of all of them, behind the rows
  int row;        // from a feature to the next one
  int half;       // of 8 features, without gaps
  int gap_shift;  // a gap of 16 bytes is behind each 2^gap_shift bytes
};

// The most pieces of a tile of the second product along the contracted axis. Each piece has its own sums.
constexpr int kPieces = 2;

// One of the two products. The first reads tokens by the list, and hidden rows are in the order of the list. `partial` is
// [assignments][kPieces][n], in the order of assignments. Counters, and splits of the contracted axis, are not used.
struct Listed {
  Product product;
  int32_t* starts;  // [experts + 1], where each expert's part of the list starts
  int32_t* list;    // [assignments], sorted by expert; the sort is stable
  int pass;         // rows at once
  int num_sms;
  // Set by the launch.
  int64_t codes_apart, scales_apart;  // bytes between a lane's two features
  UnitScales unit_scales;
};

// Starts and list, both products, and the sum of each token's choices. `second` differs in its product alone.
cudaError_t multiply_listed(Listed const& first, Listed const& second, cudaStream_t stream);

}  // namespace latent_moe::decode
