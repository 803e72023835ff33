// A counting sort: each warp counts the experts of a chunk of assignments, the counts are summed over chunks, and each warp
// places its chunk. XLA's radix sort needs a dozen launches, and a scatter for the inverse order and another for the counts.
#include "routing/expert_sort.h"

namespace latent_moe::routing {
namespace {

constexpr int kWarp = 32, kWarps = 4;  // a block has kWarps, and each takes a chunk
constexpr int kEach = kSortChunk / kWarp;

__device__ __forceinline__ int bucket(int id, int experts) { return id >= 0 && id < experts ? id : experts; }

__global__ void __launch_bounds__(kWarp* kWarps)
    count_chunks(int32_t const* ids, int count, int experts, int chunks, int32_t* counts) {
  extern __shared__ int shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, chunk = blockIdx.x * kWarps + warp;
  if (chunk >= chunks) return;
  int* own = shared + warp * (experts + 1);
  for (int e = lane; e <= experts; e += kWarp) own[e] = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = int64_t{chunk} * kSortChunk + i * kWarp + lane;
    if (at < count) atomicAdd(own + bucket(ids[at], experts), 1);
  }
  __syncwarp();
  for (int e = lane; e <= experts; e += kWarp) counts[int64_t{chunk} * (experts + 1) + e] = own[e];
}

// Replaces each count by the number of the expert's assignments in earlier chunks. Thread x is the expert, and thread y a
// share of its chunks.
__global__ void __launch_bounds__(kWarp* kWarp) sum_chunks(int32_t* counts, int chunks, int experts, int32_t* sizes) {
  __shared__ int sums[kWarp][kWarp];
  const int expert = blockIdx.x * kWarp + threadIdx.x, share = (chunks + kWarp - 1) / kWarp;
  const int first = min(threadIdx.y * share, chunks), last = min(first + share, chunks);
  auto const at = [&](int chunk) { return counts + int64_t{chunk} * (experts + 1) + expert; };
  int sum = 0;
  if (expert <= experts) {
    for (int chunk = first; chunk < last; ++chunk) sum += *at(chunk);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (expert > experts) return;
  int before = 0;
  for (int y = 0; y < threadIdx.y; ++y) before += sums[y][threadIdx.x];
  for (int chunk = first; chunk < last; ++chunk) {
    const int own = *at(chunk);
    *at(chunk) = before;
    before += own;
  }
  if (threadIdx.y == kWarp - 1 && expert < experts) sizes[expert] = before;
}

__global__ void __launch_bounds__(kWarp* kWarps)
    place(int32_t const* ids, int count, int experts, int chunks, int32_t const* sizes, int32_t const* counts,
          int32_t* assignment_of_row, int32_t* row_of_assignment) {
  extern __shared__ int shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, chunk = blockIdx.x * kWarps + warp;
  if (chunk >= chunks) return;
  // The row of each expert's next assignment: after those of lower experts, and after its own of earlier chunks.
  int* next = shared + warp * (experts + 1);
  int start = 0;
  for (int first = 0; first <= experts; first += kWarp) {
    const int expert = first + lane, own = expert < experts ? sizes[expert] : 0;
    int sum = own;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (expert <= experts) next[expert] = start + sum - own + counts[int64_t{chunk} * (experts + 1) + expert];
    start += __shfl_sync(~0u, sum, kWarp - 1);
  }
  __syncwarp();
  const int64_t first = int64_t{chunk} * kSortChunk + lane;
  int buckets[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    buckets[i] = first + i * kWarp < count ? bucket(ids[first + i * kWarp], experts) : -1;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t equals = __match_any_sync(~0u, buckets[i]);
    const int rank = __popc(equals & ((1u << lane) - 1));
    const int row = buckets[i] < 0 ? 0 : next[buckets[i]] + rank;
    __syncwarp();
    if (buckets[i] >= 0) {
      if (rank == 0) next[buckets[i]] += __popc(equals);
      assignment_of_row[row] = first + i * kWarp;
      row_of_assignment[first + i * kWarp] = row;
    }
    __syncwarp();
  }
}

}  // namespace

cudaError_t sort_by_expert(int32_t const* ids, int count, int experts, int32_t* sizes, int32_t* assignment_of_row,
                           int32_t* row_of_assignment, int32_t* counts, cudaStream_t stream) {
  const int chunks = (int64_t{count} + kSortChunk - 1) / kSortChunk, blocks = (chunks + kWarps - 1) / kWarps;
  const int shared_bytes = kWarps * (experts + 1) * sizeof(int);
  if (chunks > 0) count_chunks<<<blocks, kWarp * kWarps, shared_bytes, stream>>>(ids, count, experts, chunks, counts);
  sum_chunks<<<experts / kWarp + 1, dim3(kWarp, kWarp), 0, stream>>>(counts, chunks, experts, sizes);
  if (chunks > 0) {
    place<<<blocks, kWarp * kWarps, shared_bytes, stream>>>(ids, count, experts, chunks, sizes, counts, assignment_of_row,
                                                            row_of_assignment);
  }
  return cudaGetLastError();
}

}  // namespace latent_moe::routing
