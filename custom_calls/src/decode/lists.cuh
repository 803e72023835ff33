// What is before and behind the products of listed rows: the lists, and the sums of tokens.
#pragma once

#include "common/device.cuh"
#include "decode/listed.h"

namespace latent_moe::decode {

// Each warp lists the assignments of an expert. It finds their place in the list by counting those of lower experts, so it waits
// for no other warp. One more warp counts all. A lane loads 32 of 1024 ids at once and keeps one bit for each: whether it is the
// expert.
__global__ void __launch_bounds__(kThreads) list_assignments(Listed listed) {
  constexpr int kAtOnce = 32;  // ids of a lane
  Product const& product = listed.product;
  const int lane = threadIdx.x % 32, expert = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  cudaTriggerProgrammaticLaunchCompletion();
  if (expert > product.experts) return;
  // Counts lower ids. Bit i of `own` says whether id i of this lane is the expert. As an unsigned number, an id that is no expert is
  // above all experts.
  auto const compare = [&](int first, uint32_t& own) {
    int lower = 0;
    own = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + 32 * i + lane;
      const uint32_t id = at < product.assignments ? static_cast<uint32_t>(product.ids[at]) : ~0u;
      lower += id < uint32_t(expert), own |= uint32_t{id == uint32_t(expert)} << i;
    }
    return lower;
  };
  int lower = 0;
  uint32_t own;
  for (int first = 0; first < product.assignments; first += 32 * kAtOnce) lower += compare(first, own);
  int place = __reduce_add_sync(~0u, lower);
  if (lane == 0) listed.starts[expert] = place;
  if (expert == product.experts) return;
  for (int first = 0; first < product.assignments; first += 32 * kAtOnce) {
    if (product.assignments > 32 * kAtOnce) compare(first, own);
    for (uint32_t left = __reduce_or_sync(~0u, own); left != 0; left &= left - 1) {
      const int i = __ffs(left) - 1;
      const uint32_t mask = __ballot_sync(~0u, own >> i & 1);
      if (own >> i & 1) listed.list[place + __popc(mask & ((1u << lane) - 1))] = first + 32 * i + lane;
      place += __popc(mask);
    }
  }
}

constexpr int kCombined = 128;  // columns of a block

// A block adds a tile of a token's weighted parts. Each warp adds every eighth choice with its pieces, and the sums of warps are
// added in order. A choice that is no expert adds nothing.
__global__ void __launch_bounds__(kThreads) combine_choices(Product product) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float sums[kWarps][kCombined];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = product.weight.n;
  const int64_t token = blockIdx.y, first = token * product.choices;
  const int feature = blockIdx.x * kCombined + lane * 4;
  cudaGridDependencySynchronize();
  float total[4] = {};
#pragma unroll 4
  for (int choice = warp; choice < product.choices; choice += kWarps) {
    const bool exists = static_cast<uint32_t>(product.ids[first + choice]) < uint32_t(product.experts);
    if (!exists || feature >= n) continue;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int64_t at = ((first + choice) * kPieces + piece) * n + feature;
      const float4 part = __ldcg(reinterpret_cast<float4 const*>(product.partial + at));
      total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
    }
  }
  for (int i = 0; i < 4; ++i) sums[warp][lane * 4 + i] = total[i];
  __syncthreads();
  const int column = threadIdx.x, at = blockIdx.x * kCombined + column;
  if (column >= kCombined || at >= n) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += sums[w][column];
  static_cast<__nv_bfloat16*>(product.out)[token * n + at] = static_cast<__nv_bfloat16>(sum);
}

}  // namespace latent_moe::decode
