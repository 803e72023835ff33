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

// Rows: the most that a block multiplies at once. Fewer rows leave more memory to the L1 cache, where scales stay.
template <Code C, int Threads, int Blocks = 1024 / Threads, int Rows = 8>
struct Coded {
  static constexpr int kThreads = Threads, kTile = Threads / 2;
  static constexpr int kRows = Rows, kBlocks = Blocks;  // kBlocks: blocks of an SM
  using Lane = Chunk<C, 1, Rows>;
  static constexpr int kPacking = Lane::kPacking, kChunk = Lane::kSize, kStep = Lane::kStep, kUnits = Lane::kUnits, kAhead = 2;
  static constexpr int kPanel = 8 * kThreads;  // elements of the rows in shared memory at a time
  static constexpr int kAtOnce = Rows < 4 ? Rows : 4;  // rows that are loaded before they are stored
  static_assert(kPanel % (kAhead * kStep) == 0);

  struct Shared {
    uint4 rows[kPanel / kStep][kUnits][kRows][4];  // by step, unit, row and lane
  };

  // Byte offsets of the lane's first codes and scales within its expert, for its two features. `part` is 0 for the gate and 1 for
  // the up half. If the format fixes how many elements share a scale, `scales` includes the offset along the contracted axis.
  struct Place {
    int64_t codes[2], scales[2];
    int part;
  };

  static __device__ Place place_of(Weight const& weight, int tile, int first) {
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4, width = width_of<kTile>(weight);
    const int feature = tile * width + (column & (width - 1)), k = first + lane % 4 * kChunk;
    Place place;
    place.part = column >= width;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = min(feature + 8 * i, weight.n - 1);  // a lane beyond the last feature reads that one again, unused
      place.codes[i] = ((int64_t{place.part} * weight.n + own) * weight.k + k) / kPacking;
      place.scales[i] = scales_before_feature<C>(weight, place.part, own);
      if constexpr (kKnownShift<C> != 0) place.scales[i] += scales_before<C>(weight, k);
    }
    return place;
  }

  // Codes are not prefetched: that was slower.
  static __device__ void prefetch_start(Weight const&, int, int, int, int) {}

  // sums[r][column] of the rows in list[0 ... rows - 1], over elements first ... last - 1 of the contracted axis.
  static __device__ void multiply(Product const& product, Shared& shared, int expert, Place const& from, int first, int last,
                                  uint8_t const* list, int rows, float (&sums)[kRows][kTile]) {
    Weight const& weight = product.weight;
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4, place = lane % 4;
    const int row = kRows == 1 ? 0 : min(lane / 4, rows - 1), matrix = expert * weight.parts;
    auto const* codes_of_expert = static_cast<uint8_t const*>(weight.data) + int64_t{matrix} * weight.n * (weight.k / kPacking);
    auto const* scales_of_expert = scales_of<C>(weight, matrix, 0);
    uint8_t const* codes[2] = {codes_of_expert + from.codes[0], codes_of_expert + from.codes[1]};
    uint8_t const* scales[2] = {scales_of_expert + from.scales[0], scales_of_expert + from.scales[1]};
    // Where the contracted axis has ended a lane keeps what it has, and the rows hold zeros.
    uint4 loaded[kAhead][2] = {};
    uint32_t found[kAhead][2] = {};
    // A scale of the sums applies to all elements of the step, including those of other lanes.
    auto const load = [&](int step, int ahead, int start) {
      const int apart = (ahead + step) * kStep, k = start + apart + place * kChunk;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (k < last) loaded[step][i] = load_along(codes[i] + apart / kPacking);
        const int scaled = kPacking == 1 ? start + apart : k, from_pointer = kKnownShift<C> != 0 ? apart : scaled;
        if (scaled < last) found[step][i] = Lane::scale(weight, scales[i] + scales_before<C>(weight, from_pointer));
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
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          codes[i] += kAhead * kStep / kPacking;
          if constexpr (kKnownShift<C> != 0) scales[i] += scales_before<C>(weight, kAhead * kStep);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = Lane::left(weight, matrix + from.part);
      if (2 * place < kRows) sums[2 * place][column + 8 * i] = scale * totals[0][2 * i];
      if (2 * place + 1 < kRows) sums[2 * place + 1][column + 8 * i] = scale * totals[0][2 * i + 1];
    }
  }

 private:
  // The elements of the rows from `panel` on, in order, and zeros up to the end of the last step. A thread has 8 of each row.
  static __device__ void store_rows(Product const& product, Shared& shared, int panel, int last, uint8_t const* list, int rows) {
    // Neighbouring threads have other lanes' units, as they lie side by side in shared memory.
    const int place = threadIdx.x % 4, unit = threadIdx.x / 4 % kUnits, step = threadIdx.x / (4 * kUnits);
    const int k = panel + step * kStep + place * kChunk + unit * 8;
    const int mine = row_of(product, list[min(int(threadIdx.x % kRows), rows - 1)]);
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
