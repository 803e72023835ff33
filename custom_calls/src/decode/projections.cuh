// Reading the weights takes most of the time. A cluster computes a tile of columns, and each of its blocks a part of the
// contracted axis. The other blocks store their sums to the first block's shared memory. It adds them in a fixed order.
#pragma once

#include "common/device.cuh"
#include "decode/cluster.cuh"
#include "decode/instructions.cuh"
#include "decode/projections.h"

namespace latent_moe::decode {

constexpr int kProjectionThreads = 256, kProjectionWarps = kProjectionThreads / 32;
constexpr int kAcross = kTileBytes / 16;                // threads along a row of the tile, each with 16 bytes
constexpr int kRuns = kProjectionThreads / kAcross;     // rows of the weight that a block reads at once
constexpr int kMostColumns = kTileBytes / 2;

struct ProjectionShared {
  static constexpr int kDepth = 2048;  // elements of the contracted axis
  float x[kDepth];
  float warps[kProjectionWarps][kMostColumns];
  float parts[kMostParts][kMostColumns];
};

// The elements of 16 bytes, as floats.
template <class W>
__device__ __forceinline__ void widen(uint4 loaded, float (&to)[16 / sizeof(W)]) {
  const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<W, float>) {
      to[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack<W>(words[i]);
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
  }
}

// One tile of x times a weight [k][n] in W, stored in Out.
template <class T, class W, class Out>
__device__ void project(Projections const& given, ProjectionShared& shared, int tile, W const* weight, int n, Out* out) {
  constexpr int kEach = 16 / sizeof(W), kColumns = kAcross * kEach;
  constexpr int kAhead = 8, kStep = kAhead * kRuns;  // rows of the weight that a thread, and a block, loads ahead
  constexpr int kDepth = ProjectionShared::kDepth;
  static_assert(kDepth % kStep == 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, run = threadIdx.x / kAcross;
  const int across = threadIdx.x % kAcross * kEach, column = tile * kColumns + across;
  const int depth = ceil_div(given.k, gridDim.x), first = blockIdx.x * depth, last = min(first + depth, given.k);

  uint4 next[kAhead];
  auto const load = [&](int from) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = from + i * kRuns + run;
      next[i] = column < n && k < last ? load_once(weight + int64_t{k} * n + column) : uint4{};
    }
  };
  float sums[kEach] = {};
  load(first);
  for (int from = first; from < last; from += kStep) {
    const int staged = (from - first) % kDepth;
    if (staged == 0) {
      const int count = min(ceil_div(last - from, kStep) * kStep, kDepth);
      cudaGridDependencySynchronize();  // x is there; the weights above are read before
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kProjectionThreads) {
        shared.x[i] = from + i < last ? float(static_cast<T const*>(given.x)[from + i]) : 0.0f;
      }
      __syncthreads();
    }
    uint4 loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) loaded[i] = next[i];
    load(from + kStep);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float columns[kEach];
      widen<W>(loaded[i], columns);
      const float element = shared.x[staged + i * kRuns + run];
#pragma unroll
      for (int c = 0; c < kEach; ++c) sums[c] = fmaf(element, columns[c], sums[c]);
    }
  }

#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    float sum = sums[c];
    for (int lanes = kAcross; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane < kAcross) shared.warps[warp][across + c] = sum;
  }
  __syncthreads();
  wait_in_cluster();  // the first block has begun
  if (threadIdx.x < kColumns) {
    float sum = 0.0f;
    for (int w = 0; w < kProjectionWarps; ++w) sum += shared.warps[w][threadIdx.x];
    store_in_first_block(&shared.parts[blockIdx.x][threadIdx.x], sum);
  }
  arrive_in_cluster();
  wait_in_cluster();
  const int at = tile * kColumns + threadIdx.x;
  if (blockIdx.x != 0 || threadIdx.x >= kColumns || at >= n) return;
  float sum = 0.0f;
  for (int part = 0; part < int(gridDim.x); ++part) sum += shared.parts[part][threadIdx.x];
  out[at] = static_cast<Out>(sum);
}

constexpr int tiles_of(int columns, int bytes) { return ceil_div(columns * bytes, kTileBytes); }

template <class T, class Kernel>
__global__ void __launch_bounds__(kProjectionThreads, 2) multiply_projections(Projections given) {
  __shared__ ProjectionShared shared;
  cudaTriggerProgrammaticLaunchCompletion();
  begin_in_cluster();
  const int of_logits = tiles_of(given.experts, sizeof(Kernel)), tile = blockIdx.y;
  if (tile < of_logits) {
    project<T>(given, shared, tile, static_cast<Kernel const*>(given.kernel), given.experts, given.logits);
  } else {
    T const* weight = static_cast<T const*>(given.projection);
    project<T>(given, shared, tile - of_logits, weight, given.width, static_cast<T*>(given.out));
  }
}

template <class T, class Kernel, class Launch>
cudaError_t launch_of_types(Projections const& given, Launch launch) {
  const dim3 grid(given.parts, tiles_of(given.experts, sizeof(Kernel)) + tiles_of(given.width, sizeof(T)));
  return launch(multiply_projections<T, Kernel>, grid);
}

// Calls launch(kernel, grid). A cluster is a row of the grid.
template <class Launch>
cudaError_t launch_projections(Projections const& given, Launch launch) {
  const bool is_half = given.format == Format::kF16;
  if (given.is_kernel_float32) {
    return is_half ? launch_of_types<__half, float>(given, launch) : launch_of_types<__nv_bfloat16, float>(given, launch);
  }
  return is_half ? launch_of_types<__half, __half>(given, launch) : launch_of_types<__nv_bfloat16, __nv_bfloat16>(given, launch);
}

}  // namespace latent_moe::decode
