// Choices sorted by expert.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe {

constexpr int kSortChunk = 512;      // choices that a warp takes
constexpr int kMostBuckets = 2048;   // experts: a warp's counters of them lie in shared memory

// Where each of `count` choices stands among all, sorted by expert, in their own order within one. An id outside
// [0, experts) is no expert, and stands behind all.
//   sizes[e]: how many chose expert e; slot_of_row[r]: the choice that stands in row r; row_of_slot: the reverse;
//   counts: room for (experts + 1) numbers a chunk.
cudaError_t sort_by_expert(int32_t const* ids, int count, int experts, int32_t* sizes, int32_t* slot_of_row,
                           int32_t* row_of_slot, int32_t* counts, cudaStream_t stream);

}  // namespace latent_moe
