// Rows times a tile of columns of a dense weight, whose columns lie side by side.
#pragma once

#include "common/device.cuh"
#include "decode/experts.h"
#include "decode/instructions.cuh"

namespace latent_moe::decode {

// The feature of a column of a tile with so many, counted through the parts. A tile has equally many columns of each part.
__device__ inline int feature_of(Weight const& weight, int tile, int column, int columns) {
  const int width = columns / weight.parts, feature = tile * width + column % width;
  return feature < weight.n ? column / width * weight.n + feature : -1;
}

// A thread has 8 columns, and every 16th run of 8 elements of the contracted axis. Its loads are independent.
template <class T, int Rows>
struct Dense {
  static constexpr int kThreads = decode::kThreads, kTile = 128;
  static constexpr int kRows = Rows, kBlocks = Rows == 1 ? 4 : 2;  // blocks of an SM
  static constexpr int kEach = 8, kGroups = kTile / kEach, kRuns = kThreads / kGroups;

  struct Shared {
    float parts[kRuns][Rows][kTile];
  };

  // Asks for the tile's first rows.
  static __device__ void prefetch_start(Weight const& weight, int expert, int tile, int first, int last) {
    static_assert(kStart == kTile * sizeof(T));
    const int width = kTile / weight.parts, k = first + int(threadIdx.x) / weight.parts, part = threadIdx.x % weight.parts;
    const int columns = min(width, weight.n - tile * width);
    if (int(threadIdx.x) >= kTile * weight.parts || k >= last) return;
    const int64_t row = int64_t{expert} * weight.k + k;
    prefetch(static_cast<T const*>(weight.data) + (row * weight.parts + part) * weight.n + tile * width, columns * sizeof(T));
  }

  // sums[r][column] of the rows list[0 ... rows - 1] and the elements first ... last - 1 of the contracted axis.
  static __device__ void multiply(Product const& product, Shared& shared, int expert, int tile, int first, int last,
                                  uint8_t const* list, int rows, float (&sums)[Rows][kTile]) {
    Weight const& weight = product.weight;
    const int group = threadIdx.x % kGroups, run = threadIdx.x / kGroups;
    const int64_t width = int64_t{weight.parts} * weight.n;
    const int feature = feature_of(weight, tile, group * kEach, kTile);
    float totals[Rows][kEach] = {};
    cudaGridDependencySynchronize();  // the rows of the second product are there
    if (feature >= 0) {
      T const* w = static_cast<T const*>(weight.data) + int64_t{expert} * weight.k * width + feature;
      T const* x[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const int row = list[r < rows ? r : 0] / product.row_divisor;
        x[r] = static_cast<T const*>(product.rows) + int64_t{row} * weight.k;
      }
      for (int k = first + run * kEach; k < last; k += kRuns * kEach) {
        uint4 loaded[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) loaded[i] = load_once(w + (k + i) * width);
        uint4 elements[Rows];
#pragma unroll
        for (int r = 0; r < Rows; ++r) elements[r] = *reinterpret_cast<uint4 const*>(x[r] + k);
#pragma unroll
        for (int i = 0; i < kEach; i += 2) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint4 const& row = loaded[i + half];
            const float2 columns[4] = {unpack<T>(row.x), unpack<T>(row.y), unpack<T>(row.z), unpack<T>(row.w)};
#pragma unroll
            for (int r = 0; r < Rows; ++r) {
              const float2 pair = unpack<T>((&elements[r].x)[i / 2]);
              const float element = half == 0 ? pair.x : pair.y;
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                totals[r][2 * c] = fmaf(element, columns[c].x, totals[r][2 * c]);
                totals[r][2 * c + 1] = fmaf(element, columns[c].y, totals[r][2 * c + 1]);
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) shared.parts[run][r][group * kEach + c] = totals[r][c];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Rows * kTile; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kRuns; ++part) sum += shared.parts[part][i / kTile][i % kTile];
      sums[i / kTile][i % kTile] = sum;
    }
  }
};

}  // namespace latent_moe::decode
