// The k largest scores of each row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe::routing {

constexpr int kMostScores = 1024;  // of a row; each lane of a warp takes a 32nd of them

// ids[row][0 ... k - 1] are the columns of the k largest scores, best first, the lower column first of equal scores.
// k <= columns <= kMostScores.
cudaError_t top_k(float const* scores, int32_t* ids, int rows, int columns, int k, cudaStream_t stream);

}  // namespace latent_moe::routing
