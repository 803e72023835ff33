// A warp takes the k largest scores of a row one by one. XLA sorts whole rows if k is above 16.
#include "routing/top_k.h"

namespace latent_moe::routing {
namespace {

constexpr int kWarp = 32, kWarps = 4;  // a block has kWarps, and each takes a row
constexpr uint32_t kNone = 0;          // below every score

// An integer above kNone, in the order of IEEE 754's total order of floats.
__device__ __forceinline__ uint32_t ordered(float score) {
  uint32_t const bits = __float_as_uint(score);
  return max(bits & 0x80000000 ? ~bits : bits | 0x80000000, kNone + 1);
}

// Lane l has the columns l, l + 32, ... in shared memory, and the best of them in a register. Each round takes the best of
// all lanes. The whole warp then finds that lane's next best.
template <int Each>
__global__ void __launch_bounds__(kWarp* kWarps) choose(float const* scores, int32_t* ids, int rows, int columns, int k) {
  __shared__ uint32_t shared[kWarps][Each][kWarp + 1];  // one more, so that a lane's columns are in different banks
  const int row = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  auto& keys = shared[threadIdx.x / kWarp];
  uint32_t best = kNone;
  int at = 0;
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    const int column = i * kWarp + lane;
    const uint32_t key = column < columns ? ordered(scores[int64_t{row} * columns + column]) : kNone;
    keys[i][lane] = key;
    if (key > best) best = key, at = i;
  }
  __syncwarp();
  int chosen = 0;
  for (int rank = 0; rank < k; ++rank) {
    const uint32_t most = __reduce_max_sync(~0u, best);
    const int column = __reduce_min_sync(~0u, best == most ? unsigned(at * kWarp + lane) : ~0u);
    const int owner = column % kWarp;
    uint32_t key = kNone;
    if (lane == column / kWarp) {
      keys[lane][owner] = kNone;
    } else if (lane < Each) {
      key = keys[lane][owner];
    }
    const uint32_t next = __reduce_max_sync(~0u, key);
    const int next_at = __reduce_min_sync(~0u, key == next ? unsigned(lane) : ~0u);
    if (lane == owner) best = next, at = next_at;
    if (rank % kWarp == lane) chosen = column;
    if ((rank + 1) % kWarp == 0 || rank + 1 == k) {
      const int first = rank / kWarp * kWarp;
      if (first + lane < k) ids[int64_t{row} * k + first + lane] = chosen;
    }
  }
}

template <int Each>
cudaError_t launch(float const* scores, int32_t* ids, int rows, int columns, int k, cudaStream_t stream) {
  if (columns <= Each * kWarp) {
    choose<Each><<<(rows + kWarps - 1) / kWarps, kWarp * kWarps, 0, stream>>>(scores, ids, rows, columns, k);
    return cudaGetLastError();
  }
  if constexpr (Each * kWarp < kMostScores) {
    return launch<2 * Each>(scores, ids, rows, columns, k, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t top_k(float const* scores, int32_t* ids, int rows, int columns, int k, cudaStream_t stream) {
  return launch<2>(scores, ids, rows, columns, k, stream);
}

}  // namespace latent_moe::routing
