// The experts of more tokens than experts.h takes, with weights in codes. A kernel lists each expert's assignments, two more
// multiply, and a last one combines. Reading the experts' weights takes most of the time.
#pragma once

#include "decode/experts.h"

namespace latent_moe::decode {

// Rows that a block multiplies at once. An expert with more rows is read several times.
constexpr bool is_pass(int rows) { return rows == 8 || rows == 16; }

// One of the two products. The first reads tokens by the list, and hidden rows are in the order of the list. `partial` is
// [assignments][n], in the order of assignments. Counters, and splits of the contracted axis, are not used.
struct Listed {
  Product product;
  int32_t* starts;  // [experts + 1], where each expert's part of the list starts
  int32_t* list;    // [assignments], sorted by expert; the sort is stable
  int pass;         // rows at once
  int num_sms;
  int64_t codes_apart, scales_apart;  // bytes between a lane's two features, set by the launch
};

// Starts and list, both products, and the sum of each token's choices. `second` differs in its product alone.
cudaError_t multiply_listed(Listed const& first, Listed const& second, cudaStream_t stream);

}  // namespace latent_moe::decode
