// Rows times a tile of columns of a dense weight, whose columns lie side by side.
#pragma once

#include "common/device.cuh"
#include "decode/experts.h"
#include "decode/instructions.cuh"

namespace latent_moe::decode {

// Integer division by a value that is known only at launch is slow. It delayed the first load, so one token needs none.
__device__ inline int token_of(Product const& product, int assignment) {
  return product.assignments == product.choices ? 0 : assignment / product.choices;
}

// The row of an assignment.
__device__ inline int row_of(Product const& product, int assignment) {
  return product.choice_weights == nullptr ? token_of(product, assignment) : assignment;
}

// Columns of each part in a tile, which has equally many of each. Both are powers of two.
template <int Tile>
__device__ int width_of(Weight const& weight) {
  return weight.parts == 2 ? Tile / 2 : Tile;
}

// The feature of a column of a tile, counted through the parts.
template <int Tile>
__device__ int feature_of(Weight const& weight, int tile, int column) {
  const int width = width_of<Tile>(weight), feature = tile * width + (column & (width - 1));
  return feature < weight.n ? (column >= width ? weight.n : 0) + feature : -1;
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

  // A thread's first feature, counted through the parts, or -1.
  using Place = int;

  static __device__ Place place_of(Weight const& weight, int tile, int) {
    return feature_of<kTile>(weight, tile, threadIdx.x % kGroups * kEach);
  }

  // Asks for the tile's first rows.
  static __device__ void prefetch_start(Weight const& weight, int expert, int tile, int first, int last) {
    static_assert(kStart == kTile * sizeof(T));
    const int width = width_of<kTile>(weight), halved = weight.parts - 1;
    const int k = first + (int(threadIdx.x) >> halved), part = threadIdx.x & halved;
    const int columns = min(width, weight.n - tile * width);
    if (int(threadIdx.x) >= kTile * weight.parts || k >= last) return;
    const int64_t row = int64_t{expert} * weight.k + k;
    prefetch(static_cast<T const*>(weight.data) + (row * weight.parts + part) * weight.n + tile * width, columns * sizeof(T));
  }

  // sums[r][column] of the rows list[0 ... rows - 1] and the elements first ... last - 1 of the contracted axis.
  static __device__ void multiply(Product const& product, Shared& shared, int expert, Place feature, int first, int last,
                                  uint8_t const* list, int rows, float (&sums)[Rows][kTile]) {
    Weight const& weight = product.weight;
    const int group = threadIdx.x % kGroups, run = threadIdx.x / kGroups;
    const int64_t width = int64_t{weight.parts} * weight.n;
    float totals[Rows][kEach] = {};
    cudaGridDependencySynchronize();  // the rows of the second product are there
    if (feature >= 0) {
      T const* w = static_cast<T const*>(weight.data) + int64_t{expert} * weight.k * width + feature;
      T const* x[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const int row = row_of(product, list[r < rows ? r : 0]);
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
