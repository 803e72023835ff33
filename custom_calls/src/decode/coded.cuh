// Rows times a tile of columns of a weight in codes, which lie along the contracted axis.
//
// Most instructions widen codes, so up to 8 rows cost as much as one row. A warp has 16 features. A lane has chunks of 16 bytes
// of two of them, and the same elements of one row. Shared memory holds the rows in the order in which codes widen.
//
// Each chunk's registers are loaded again as soon as it is multiplied, so that a warp always reads.
#pragma once

#include "decode/chunk.cuh"
#include "decode/dense.cuh"

namespace latent_moe::decode {

template <Code C, int Threads>
struct Coded {
  static constexpr int kThreads = Threads, kTile = Threads / 2;
  static constexpr int kRows = 8, kBlocks = 1024 / Threads;  // kBlocks: blocks of an SM
  using Lane = Chunk<C, 1>;
  static constexpr int kPacking = Lane::kPacking, kChunk = Lane::kSize, kStep = Lane::kStep, kUnits = Lane::kUnits, kAhead = 2;
  static constexpr int kPanel = 8 * kThreads;  // elements of the rows in shared memory at a time
  static constexpr int kAtOnce = 4;            // rows that are loaded before they are stored
  static_assert(kPanel % (kAhead * kStep) == 0);

  struct Shared {
    uint4 rows[kPanel / kStep][kUnits][kRows][4];  // by step, unit, row and lane
  };

  // Asks for the first codes of each column.
  static __device__ void prefetch_start(Weight const& weight, int expert, int tile, int first, int last) {
    const int width = kTile / weight.parts, column = threadIdx.x, feature = tile * width + column % width;
    if (column >= kTile || feature >= weight.n || first >= last) return;
    const int64_t row = int64_t{expert * weight.parts + column / width} * weight.n + feature;
    auto const* codes = static_cast<uint8_t const*>(weight.data) + (row * weight.k + first) / kPacking;
    prefetch(codes, min((last - first) / kPacking, kStart));
  }

  // sums[r][column] of the rows in list[0 ... rows - 1], over elements first ... last - 1 of the contracted axis.
  static __device__ void multiply(Product const& product, Shared& shared, int expert, int tile, int first, int last,
                                  uint8_t const* list, int rows, float (&sums)[kRows][kTile]) {
    Weight const& weight = product.weight;
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4, place = lane % 4;
    const int width = kTile / weight.parts, matrix = expert * weight.parts + column / width;
    // The lane's two features and its row. A lane beyond the last feature or row reads the last one again, unused.
    const int feature = tile * width + column % width, row = min(lane / 4, rows - 1);
    const int features[2] = {min(feature, weight.n - 1), min(feature + 8, weight.n - 1)};
    uint8_t const* codes[2];
    uint8_t const* scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t before = (int64_t{matrix} * weight.n + features[i]) * weight.k + first + place * kChunk;
      codes[i] = static_cast<uint8_t const*>(weight.data) + before / kPacking;
      scales[i] = scales_of<C>(weight, matrix, features[i]);
    }
    // Where the contracted axis has ended a lane keeps what it has, and the rows hold zeros.
    uint4 loaded[kAhead][2] = {};
    uint32_t found[kAhead][2] = {};
    auto const load = [&](int step, int ahead, int start) {
      const int k = start + (ahead + step) * kStep + place * kChunk;
      // A scale of the sums applies to all elements of the step, including those of other lanes.
      const int scaled = kPacking == 1 ? start + (ahead + step) * kStep : k;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (k < last) loaded[step][i] = load_along(codes[i] + (ahead + step) * kStep / kPacking);
        if (scaled < last) found[step][i] = Lane::scale(weight, scales[i] + (scaled >> weight.k_shift) * kScaleBytes<C>);
      }
    };
#pragma unroll
    for (int step = 0; step < kAhead; ++step) load(step, 0, first);
    cudaGridDependencySynchronize();  // the rows of the second product are there
    float totals[1][4] = {};
    for (int panel = first; panel < last; panel += kPanel) {
      if (panel != first) __syncthreads();
      store_rows(product, shared, panel, last, list, rows);
      __syncthreads();
      uint4 const* elements = &shared.rows[0][0][row][place];
      for (int start = panel; start < min(panel + kPanel, last); start += kAhead * kStep) {
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
          if (start + step * kStep >= last) break;
          Lane::add(totals, loaded[step], found[step], {elements + step * kUnits * kRows * 4}, Lane::takes_two(found[step]));
          load(step, kAhead, start);
        }
        elements += kAhead * kUnits * kRows * 4;
        codes[0] += kAhead * kStep / kPacking, codes[1] += kAhead * kStep / kPacking;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = Lane::left(weight, matrix);
      sums[2 * place][column + 8 * i] = scale * totals[0][2 * i];
      sums[2 * place + 1][column + 8 * i] = scale * totals[0][2 * i + 1];
    }
  }

 private:
  // The elements of the rows from `panel` on, in order, and zeros up to the end of the last step. A thread has 8 of each row.
  static __device__ void store_rows(Product const& product, Shared& shared, int panel, int last, uint8_t const* list, int rows) {
    // Neighbouring threads have other lanes' units, as they lie side by side in shared memory.
    const int place = threadIdx.x % 4, unit = threadIdx.x / 4 % kUnits, step = threadIdx.x / (4 * kUnits);
    const int k = panel + step * kStep + place * kChunk + unit * 8;
    const int mine = list[min(int(threadIdx.x % kRows), rows - 1)] / product.row_divisor;
#pragma unroll
    for (int some = 0; some < kRows; some += kAtOnce) {
      if (some >= rows) break;
      uint4 elements[kAtOnce] = {};
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int64_t at = int64_t{__shfl_sync(~0u, mine, some + r)} * product.weight.k + k;
        if (some + r < rows && k < last) {
          elements[r] = *reinterpret_cast<uint4 const*>(static_cast<__nv_bfloat16 const*>(product.rows) + at);
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (some + r < rows) Widen<C>::store(&shared.rows[step][0][some + r][place], unit, Lane::kApart, elements[r]);
      }
    }
  }
};

}  // namespace latent_moe::decode
