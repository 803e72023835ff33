// Assignments of tokens to experts, sorted by expert.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe::routing {

constexpr int kSortChunk = 512;     // assignments that a warp takes
constexpr int kMostExperts = 2048;  // a warp's counters of experts are in shared memory

// Sorts `count` assignments by expert. Assignments to one expert keep their order. Assignments with an id outside
// [0, experts) have no expert and come last.
//   sizes[e]: the number of assignments to expert e;
//   assignment_of_row[r]: the assignment in row r;
//   row_of_assignment: the reverse;
//   counts: workspace of (experts + 1) numbers for each chunk.
cudaError_t sort_by_expert(int32_t const* ids, int count, int experts, int32_t* sizes, int32_t* assignment_of_row,
                           int32_t* row_of_assignment, int32_t* counts, cudaStream_t stream);

}  // namespace latent_moe::routing
