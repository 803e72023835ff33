// Reading the weights bounds the time. A cluster has a tile of columns, and each of its blocks a part of the contracted axis.
// The first block adds the sums of all, which the others store to its shared memory. All sums have a fixed order.
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

template <int Rows>
struct ProjectionShared {
  static constexpr int kDepth = 2048 / Rows;  // elements of the contracted axis
  float x[kDepth][Rows];
  float warps[kProjectionWarps][Rows][kMostColumns];
  float parts[kMostParts][Rows][kMostColumns];
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
template <class T, class W, class Out, int Rows>
__device__ void project(Projections const& given, ProjectionShared<Rows>& shared, int tile, W const* weight, int n, Out* out) {
  constexpr int kEach = 16 / sizeof(W), kColumns = kAcross * kEach;
  constexpr int kAhead = Rows == kMostRows ? 4 : 8, kStep = kAhead * kRuns;  // rows that a thread, and a block, loads ahead
  constexpr int kDepth = ProjectionShared<Rows>::kDepth;
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
  float sums[Rows][kEach] = {};
  load(first);
  for (int from = first; from < last; from += kStep) {
    const int staged = (from - first) % kDepth;
    if (staged == 0) {
      const int count = min(ceil_div(last - from, kStep) * kStep, kDepth);
      __syncthreads();
      for (int i = threadIdx.x; i < Rows * count; i += kProjectionThreads) {
        const int row = i % Rows, k = from + i / Rows;
        const bool exists = row < given.rows && k < last;
        shared.x[i / Rows][row] = exists ? float(static_cast<T const*>(given.x)[int64_t{row} * given.k + k]) : 0.0f;
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
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const float element = shared.x[staged + i * kRuns + run][r];
#pragma unroll
        for (int c = 0; c < kEach; ++c) sums[r][c] = fmaf(element, columns[c], sums[r][c]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      float sum = sums[r][c];
      for (int lanes = kAcross; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (lane < kAcross) shared.warps[warp][r][across + c] = sum;
    }
  }
  __syncthreads();
  wait_in_cluster();  // the first block has begun
  for (int i = threadIdx.x; i < Rows * kColumns; i += kProjectionThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kProjectionWarps; ++w) sum += shared.warps[w][i / kColumns][i % kColumns];
    store_in_first_block(&shared.parts[blockIdx.x][i / kColumns][i % kColumns], sum);
  }
  arrive_in_cluster();
  wait_in_cluster();
  if (blockIdx.x != 0) return;
  for (int i = threadIdx.x; i < given.rows * kColumns; i += kProjectionThreads) {
    const int row = i / kColumns, at = tile * kColumns + i % kColumns;
    if (at >= n) continue;
    float sum = 0.0f;
    for (int part = 0; part < int(gridDim.x); ++part) sum += shared.parts[part][row][i % kColumns];
    out[int64_t{row} * n + at] = static_cast<Out>(sum);
  }
}

constexpr int tiles_of(int columns, int bytes) { return ceil_div(columns * bytes, kTileBytes); }

template <class T, class Kernel, int Rows>
__global__ void __launch_bounds__(kProjectionThreads, 2) multiply_projections(Projections given) {
  __shared__ ProjectionShared<Rows> shared;
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
cudaError_t launch_of_rows(Projections const& given, Launch launch) {
  const dim3 grid(given.parts, tiles_of(given.experts, sizeof(Kernel)) + tiles_of(given.width, sizeof(T)));
  if (given.rows == 1) return launch(multiply_projections<T, Kernel, 1>, grid);
  if (given.rows <= 4) return launch(multiply_projections<T, Kernel, 4>, grid);
  return launch(multiply_projections<T, Kernel, kMostRows>, grid);
}

// Calls launch(kernel, grid). A cluster is a row of the grid.
template <class Launch>
cudaError_t launch_projections(Projections const& given, Launch launch) {
  const bool is_half = given.format == Format::kF16;
  if (given.is_kernel_float32) {
    return is_half ? launch_of_rows<__half, float>(given, launch) : launch_of_rows<__nv_bfloat16, float>(given, launch);
  }
  return is_half ? launch_of_rows<__half, __half>(given, launch) : launch_of_rows<__nv_bfloat16, __nv_bfloat16>(given, launch);
}

}  // namespace latent_moe::decode
