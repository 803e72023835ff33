// A warp finds the k largest scores of a row. XLA sorts whole rows if k is above 16.
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

template <int Each>
struct Scratch {
  uint32_t keys[Each][kWarp + 1];  // one more, so that a lane's columns are in different banks
  uint16_t columns[Each * kWarp];
  int32_t chosen[kWarp];
};

// The choice of rank `lane`, for k <= 32. At least k keys are no less than the k-th largest of the lanes' best keys, so no
// others are chosen. They are few: about 1.6 k of 512. Each counts the better ones among them.
template <int Each>
__device__ int choose_few(uint32_t const (&keys)[Each], uint32_t best, Scratch<Each>& scratch, int k) {
  const int lane = threadIdx.x % kWarp;
  int better = 0;
#pragma unroll
  for (int other = 0; other < kWarp; ++other) {
    const uint32_t theirs = __shfl_sync(~0u, best, other);
    better += other < lane ? theirs >= best : theirs > best;
  }
  const uint32_t least = __reduce_min_sync(~0u, better < k ? best : ~0u);
  uint32_t* const kept = &scratch.keys[0][0];
  int count = 0;
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    const uint32_t mask = __ballot_sync(~0u, keys[i] >= least);
    if (keys[i] >= least) {
      const int at = count + __popc(mask & ((1u << lane) - 1));
      kept[at] = keys[i], scratch.columns[at] = i * kWarp + lane;
    }
    count += __popc(mask);
  }
  __syncwarp();
  for (int at = lane; at < count; at += kWarp) {
    const uint32_t key = kept[at];
    int rank = 0;
#pragma unroll 8
    for (int other = 0; other < count; ++other) rank += other < at ? kept[other] >= key : kept[other] > key;
    if (rank < k) scratch.chosen[rank] = scratch.columns[at];
  }
  __syncwarp();
  return lane < k ? scratch.chosen[lane] : 0;
}

// Stores the choices of a row, for any k. Each round takes the best of all lanes. The whole warp then finds that lane's next
// best in shared memory.
template <int Each>
__device__ void choose_in_turn(uint32_t const (&own)[Each], uint32_t best, Scratch<Each>& scratch, int k, int32_t* ids) {
  const int lane = threadIdx.x % kWarp;
  auto& keys = scratch.keys;
  int at = 0;
#pragma unroll
  for (int i = Each - 1; i >= 0; --i) {
    keys[i][lane] = own[i];
    if (own[i] == best) at = i;
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
      if (first + lane < k) ids[first + lane] = chosen;
    }
  }
}

// A warp takes a row, and lane l the columns l, l + 32, ...
template <int Each>
__global__ void __launch_bounds__(kWarp* kWarps)
    choose(float const* scores, int32_t* ids, int rows, int columns, int k, Weighing weighing) {
  __shared__ Scratch<Each> shared[kWarps];
  const int row = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  uint32_t keys[Each], best = kNone;
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    const int column = i * kWarp + lane;
    keys[i] = kNone;
    if (column < columns) {
      float score = scores[int64_t{row} * columns + column];
      if (weighing.bias != nullptr) score = 1.0f / (1.0f + expf(-score)) + weighing.bias[column];
      keys[i] = ordered(score);
    }
    best = max(best, keys[i]);
  }
  ids += int64_t{row} * k;
  auto& scratch = shared[threadIdx.x / kWarp];
  if (k > kWarp) return choose_in_turn(keys, best, scratch, k, ids);
  const int chosen = choose_few(keys, best, scratch, k);
  if (lane < k) ids[lane] = chosen;
  if (weighing.logits == nullptr) return;
  const float logit = lane < k ? weighing.logits[int64_t{row} * columns + chosen] : 0.0f;
  const float weight = weight_of(logit, lane < k, weighing);
  if (lane < k) weighing.weights[int64_t{row} * k + lane] = weight;
}

}  // namespace latent_moe::routing
