// The k best of each row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe {

constexpr int kMostScores = 1024;  // of a row: a lane looks at its 32nd part

// ids[row][0 ... k - 1]: columns of the k largest scores, best first, of equal ones the lower first; k <= columns <=
// kMostScores.
cudaError_t top_k(float const* scores, int32_t* ids, int rows, int columns, int k, cudaStream_t stream);

}  // namespace latent_moe
