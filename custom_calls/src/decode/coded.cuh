// Rows times a tile of columns of a weight in codes, which lie along the contracted axis.
//
// Tensor cores multiply the widened codes. Most other instructions then widen codes, and up to 8 rows cost as much as one row.
// A warp has 16 features. A lane has chunks of 16 bytes of two of them, and the same elements of one row. Both operands need
// the same order along the contracted axis, and any order will do: shared memory holds the rows in the order in which codes
// widen.
//
// Each chunk's registers are loaded again as soon as it is multiplied, so that a warp always reads.
#pragma once

#include "decode/dense.cuh"
#include "decode/widen.cuh"

namespace latent_moe::decode {

template <Code C>
struct Coded {
  static constexpr int kRows = 8, kBlocks = 4;  // kBlocks: blocks of an SM
  static constexpr int kPacking = packing(C), kChunk = 16 * kPacking, kStep = 4 * kChunk, kAhead = 2;
  static constexpr int kUnits = kChunk / 8;    // groups of 8 elements in a lane's chunk
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
    int64_t scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t before = (int64_t{matrix} * weight.n + features[i]) * weight.k + first + place * kChunk;
      codes[i] = static_cast<uint8_t const*>(weight.data) + before / kPacking;
      scales[i] = (int64_t{matrix} * blocks(weight.n, weight.n_shift) + (features[i] >> weight.n_shift)) *
                  blocks(weight.k, weight.k_shift);
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
        if (scaled < last) found[step][i] = scale_at(weight, scales[i] + (scaled >> weight.k_shift));
      }
    };
#pragma unroll
    for (int step = 0; step < kAhead; ++step) load(step, 0, first);
    float totals[4] = {};
    for (int panel = first; panel < last; panel += kPanel) {
      if (panel != first) __syncthreads();
      store_rows(product, shared, panel, last, list, rows);
      __syncthreads();
      uint4 const* elements = &shared.rows[0][0][row][place];
      for (int start = panel; start < min(panel + kPanel, last); start += kAhead * kStep) {
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
          if (start + step * kStep >= last) break;
          add_chunk(totals, loaded[step], found[step], elements + step * kUnits * kRows * 4);
          load(step, kAhead, start);
        }
        elements += kAhead * kUnits * kRows * 4;
        codes[0] += kAhead * kStep / kPacking, codes[1] += kAhead * kStep / kPacking;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float scale = 1.0f;
      if constexpr (C == Code::kNvfp4) scale = Widen<C>::kLeft * static_cast<float const*>(weight.more)[matrix];
      sums[2 * place][column + 8 * i] = scale * totals[2 * i];
      sums[2 * place + 1][column + 8 * i] = scale * totals[2 * i + 1];
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
        if (some + r < rows) shared.rows[step][unit][some + r][place] = Widen<C>::ordered(elements[r]);
      }
    }
  }

  static __device__ int blocks(int size, int shift) { return ((size - 1) >> shift) + 1; }

  // What is stored for the codes of a chunk: the bits of a float, or all bits of the narrow scales and of the zero point.
  static __device__ uint32_t scale_at(Weight const& weight, int64_t at) {
    if constexpr (kPacking == 1) {
      return static_cast<uint32_t const*>(weight.scales)[at];
    } else if constexpr (C == Code::kMxfp4) {
      return static_cast<uint8_t const*>(weight.scales)[at];
    } else if constexpr (C == Code::kNvfp4) {
      return *reinterpret_cast<uint16_t const*>(static_cast<uint8_t const*>(weight.scales) + at);
    } else {
      auto const* zeros = static_cast<uint8_t const*>(weight.more);
      return static_cast<uint16_t const*>(weight.scales)[at] | (zeros == nullptr ? 8u : uint32_t{zeros[at]}) << 16;
    }
  }

  // Adds the products of a chunk of two features with the elements of a row.
  static __device__ void add_chunk(float (&totals)[4], uint4 const (&codes)[2], uint32_t const (&found)[2],
                                   uint4 const* elements) {
    if constexpr (kPacking == 1) {
      float part[4] = {};
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        const uint4 x = elements[unit * kRows * 4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t a = (&codes[0].x)[2 * unit + half], b = (&codes[1].x)[2 * unit + half];
          multiply_16x8x16(part, Widen<C>::template pair<0>(a), Widen<C>::template pair<0>(b), Widen<C>::template pair<1>(a),
                           Widen<C>::template pair<1>(b), half == 0 ? x.x : x.z, half == 0 ? x.y : x.w);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) totals[i] = fmaf(__uint_as_float(found[i / 2]), part[i], totals[i]);
    } else if constexpr (C == Code::kMxfp4) {
      // One factor is enough for most scales.
      if (__ballot_sync(~0u, max(found[0], found[1]) > Widen<C>::kMost) == 0) {
        add_scaled(totals, codes, elements, [&](int i, int) { return Widen<C>::factor(found[i]); });
      } else {
        add_scaled(totals, codes, elements, [&](int i, int) { return Widen<C>::scale(found[i]); });
      }
    } else {
      add_scaled(totals, codes, elements, [&](int i, int word) { return scale_of(found[i], word); });
    }
  }

  template <class ScaleOf>
  static __device__ void add_scaled(float (&totals)[4], uint4 const (&codes)[2], uint4 const* elements, ScaleOf scale_of) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t a = (&codes[0].x)[word], b = (&codes[1].x)[word];
      auto const left = scale_of(0, word), right = scale_of(1, word);
      const uint4 x = elements[word * kRows * 4];
      multiply_16x8x16(totals, Widen<C>::template pair<0>(a, left), Widen<C>::template pair<0>(b, right),
                       Widen<C>::template pair<1>(a, left), Widen<C>::template pair<1>(b, right), x.x, x.y);
      multiply_16x8x16(totals, Widen<C>::template pair<2>(a, left), Widen<C>::template pair<2>(b, right),
                       Widen<C>::template pair<3>(a, left), Widen<C>::template pair<3>(b, right), x.z, x.w);
    }
  }

  // The scale of a word of int4 or nvfp4.
  static __device__ auto scale_of(uint32_t found, int word) {
    if constexpr (C == Code::kInt4) {
      return Widen<C>::scale(found & 0xffff, found >> 16);
    } else {
      return Widen<C>::scale(word < 2 ? found & 0xff : found >> 8);
    }
  }
};

}  // namespace latent_moe::decode
