// A warp takes the k largest scores of a row one by one. With few rows, a block sorts each of them. XLA sorts whole rows if k is
// above 16.
#pragma once

#include "routing/top_k.h"

namespace latent_moe::routing {

constexpr int kWarp = 32, kWarps = 4;  // a block has kWarps, and each takes a row
constexpr uint32_t kNone = 0;          // below every score

// An integer above kNone, in the order of IEEE 754's total order of floats.
__device__ __forceinline__ uint32_t ordered(float score) {
  uint32_t const bits = __float_as_uint(score);
  return max(bits & 0x80000000 ? ~bits : bits | 0x80000000, kNone + 1);
}

template <class F>
__device__ __forceinline__ float over_warp(float value, F f) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = f(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// The weight of each lane's choice, by its logit. Lanes from k on have none.
__device__ inline float weight_of(float logit, bool chosen, Weighing const& weighing) {
  auto const plus = [](float a, float b) { return a + b; };
  float part, sum;
  if (weighing.eps > 0.0f) {
    // As in over_sum of scores.py: float32 cannot hold the square of a small sum, and the power of two is exact.
    part = chosen ? 0x1p40f / (1.0f + expf(-logit)) : 0.0f;
    sum = over_warp(part, plus) + weighing.eps * 0x1p40f;
  } else {
    const float log_score = weighing.sigmoid ? fminf(logit, 0.0f) - log1pf(expf(-fabsf(logit))) : logit;
    auto const most = [](float a, float b) { return fmaxf(a, b); };
    const float largest = over_warp(chosen ? log_score : -INFINITY, most);
    part = chosen ? expf(log_score - largest) : 0.0f;
    sum = over_warp(part, plus);
  }
  return part / sum * weighing.factor;
}

// Lane l has the columns l, l + 32, ... and the best of them in a register. Each round takes the best of all lanes. If a lane
// has few columns, it keeps them in registers and finds its next best alone. Otherwise the whole warp finds it, in shared
// memory.
template <int Each>
__global__ void __launch_bounds__(kWarp* kWarps)
    choose(float const* scores, int32_t* ids, int rows, int columns, int k, Weighing weighing) {
  constexpr bool kFew = Each <= 4;
  __shared__ uint32_t shared[kWarps][kFew ? 1 : Each][kWarp + 1];  // one more, so that a lane's columns are in different banks
  const int row = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  auto& keys = shared[threadIdx.x / kWarp];
  uint32_t own[Each], best = kNone;
  int at = 0;
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    const int column = i * kWarp + lane;
    own[i] = column < columns ? ordered(scores[int64_t{row} * columns + column]) : kNone;
    if constexpr (!kFew) keys[i][lane] = own[i];
    if (own[i] > best) best = own[i], at = i;
  }
  __syncwarp();
  int chosen = 0;
  for (int rank = 0; rank < k; ++rank) {
    const uint32_t most = __reduce_max_sync(~0u, best), lanes = __ballot_sync(~0u, best == most);
    int column = __shfl_sync(~0u, at * kWarp + lane, __ffs(lanes) - 1);
    if ((lanes & (lanes - 1)) != 0) {  // several lanes have it: the lowest column is taken
      column = __reduce_min_sync(~0u, best == most ? unsigned(at * kWarp + lane) : ~0u);
    }
    const int owner = column % kWarp;
    if constexpr (kFew) {
      if (lane == owner) {
        best = kNone;
#pragma unroll
        for (int i = 0; i < Each; ++i) {
          if (i == column / kWarp) own[i] = kNone;
          if (own[i] > best) best = own[i], at = i;
        }
      }
    } else {
      uint32_t key = kNone;
      if (lane == column / kWarp) {
        keys[lane][owner] = kNone;
      } else if (lane < Each) {
        key = keys[lane][owner];
      }
      const uint32_t next = __reduce_max_sync(~0u, key);
      const int next_at = __ffs(__ballot_sync(~0u, key == next)) - 1;
      if (lane == owner) best = next, at = next_at;
    }
    if (rank % kWarp == lane) chosen = column;
    if ((rank + 1) % kWarp == 0 || rank + 1 == k) {
      const int first = rank / kWarp * kWarp;
      if (first + lane < k) ids[int64_t{row} * k + first + lane] = chosen;
    }
  }
  if (weighing.logits == nullptr) return;
  const float logit = lane < k ? weighing.logits[int64_t{row} * columns + chosen] : 0.0f;
  const float weight = weight_of(logit, lane < k, weighing);
  if (lane < k) weighing.weights[int64_t{row} * k + lane] = weight;
}

// A score and its column as one number: higher for a better score, and for the lower column of equal scores.
__device__ inline uint64_t key_of(Scores const& scores, int row, int columns, int column) {
  if (column >= columns) return kNone;
  float score = scores.values[int64_t{row} * columns + column];
  if (scores.sigmoid) score = 1.0f / (1.0f + expf(-score));
  if (scores.bias != nullptr) score += scores.bias[column];
  return uint64_t{ordered(score)} << 32 | ~uint32_t(column);
}

// The larger or the smaller one of this lane's key and another's, for a sort from the best lane on.
__device__ __forceinline__ uint64_t exchanged(uint64_t key, int apart, bool best_first) {
  const uint64_t other = __shfl_xor_sync(~0u, key, apart);
  const bool is_first = (threadIdx.x & apart) == 0;
  return (is_first == best_first) == (key > other) ? key : other;
}

// The threads of a block: a power of two, and one for each column.
inline int threads_of(int columns) {
  int threads = kWarp;
  while (threads < columns) threads *= 2;
  return threads;
}

// A block has a row, and a warp 32 columns of it. Each warp sorts its keys (a bitonic sort, Batcher 1968). Then half of the warps
// merge two lists each and keep the best 32. This repeats until one list is left.
__global__ void __launch_bounds__(kMostScores)
    choose_in_block(Scores scores, int32_t* ids, int columns, int k, Weighing weighing) {
  __shared__ uint64_t lists[kMostScores / kWarp][kWarp];
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();  // the scores are there
  const int row = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint64_t key = key_of(scores, row, columns, threadIdx.x);
#pragma unroll
  for (int length = 2; length <= kWarp; length *= 2) {
#pragma unroll
    for (int apart = length / 2; apart > 0; apart /= 2) key = exchanged(key, apart, (lane & length) == 0);
  }
  for (int half = blockDim.x / kWarp / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) lists[warp][lane] = key;
    __syncthreads();
    if (warp >= half) continue;
    const uint64_t other = lists[warp + half][kWarp - 1 - lane];
    key = key > other ? key : other;
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) key = exchanged(key, apart, true);
  }
  if (warp > 0) return;
  const int chosen = ~uint32_t(key);
  if (lane < k) ids[int64_t{row} * k + lane] = chosen;
  if (weighing.logits == nullptr) return;
  const float logit = lane < k ? weighing.logits[int64_t{row} * columns + chosen] : 0.0f;
  const float weight = weight_of(logit, lane < k, weighing);
  if (lane < k) weighing.weights[int64_t{row} * k + lane] = weight;
}

}  // namespace latent_moe::routing
