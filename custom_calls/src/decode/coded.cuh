// Rows times a tile of columns of a weight in codes, which lie along the contracted axis.
//
// Tensor cores multiply the widened codes. Most other instructions then widen, and up to 8 rows cost as much as one. A warp has
// 16 features. A lane has chunks of 16 bytes of two of them, and the same elements of one row. Both operands need the same order
// along the contracted axis, and any order will do.
#pragma once

#include "decode/dense.cuh"
#include "decode/widen.cuh"

namespace latent_moe::decode {

template <Code C>
struct Coded {
  static constexpr int kRows = 8, kBlocks = 2;  // blocks of an SM
  static constexpr int kPacking = packing(C), kChunk = 16 * kPacking, kStep = 4 * kChunk, kAhead = 4;

  struct Shared {};

  // sums[r][column] of the rows list[0 ... rows - 1] and the elements first ... last - 1 of the contracted axis.
  static __device__ void multiply(Product const& product, Shared&, int expert, int tile, int first, int last,
                                  uint8_t const* list, int rows, float (&sums)[kRows][kTile]) {
    Weight const& weight = product.weight;
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4, place = lane % 4;
    const int width = kTile / weight.parts, matrix = expert * weight.parts + column / width;
    // The lane's two features. Beyond the weight's last feature a lane reads that one, and its sums are not used.
    const int feature = tile * width + column % width;
    const int features[2] = {min(feature, weight.n - 1), min(feature + 8, weight.n - 1)};
    uint8_t const* codes[2];
    int64_t scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = int64_t{matrix} * weight.n + features[i];
      codes[i] = static_cast<uint8_t const*>(weight.data) + row * (weight.k / kPacking);
      scales[i] = (int64_t{matrix} * blocks(weight.n, weight.n_shift) + (features[i] >> weight.n_shift)) *
                  blocks(weight.k, weight.k_shift);
    }
    __nv_bfloat16 const* x = nullptr;
    if (lane / 4 < rows) {
      x = static_cast<__nv_bfloat16 const*>(product.rows) + int64_t{list[lane / 4] / product.row_divisor} * weight.k;
    }
    float totals[4] = {};
    for (int start = first; start < last; start += kAhead * kStep) {
      uint4 loaded[kAhead][2] = {};
      uint32_t found[kAhead][2] = {};
#pragma unroll
      for (int step = 0; step < kAhead; ++step) {
        const int k = start + step * kStep + place * kChunk;
        // A scale of the sums applies to all elements of the step, including those of other lanes.
        const int scaled = kPacking == 1 ? start + step * kStep : k;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (k < last) loaded[step][i] = load_once(codes[i] + k / kPacking);
          if (scaled < last) found[step][i] = scale_at(weight, scales[i] + (scaled >> weight.k_shift));
        }
      }
#pragma unroll
      for (int step = 0; step < kAhead; ++step) {
        const int k = start + step * kStep + place * kChunk;
        uint4 elements[kChunk / 8] = {};
        if (x != nullptr && k < last) {
#pragma unroll
          for (int i = 0; i < kChunk / 8; ++i) elements[i] = reinterpret_cast<uint4 const*>(x + k)[i];
        }
        add_chunk(totals, loaded[step], found[step], elements);
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
                                   uint4 const (&elements)[kChunk / 8]) {
    if constexpr (kPacking == 1) {
      float part[4] = {};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t a = (&codes[0].x)[word], b = (&codes[1].x)[word];
        uint32_t const* x = &elements[word / 2].x + word % 2 * 2;
        multiply_16x8x16(part, Widen<C>::template pair<0>(a), Widen<C>::template pair<0>(b), Widen<C>::template pair<1>(a),
                         Widen<C>::template pair<1>(b), x[0], x[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) totals[i] = fmaf(__uint_as_float(found[i / 2]), part[i], totals[i]);
    } else {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t a = (&codes[0].x)[word], b = (&codes[1].x)[word];
        auto const left = scale_of(found[0], word), right = scale_of(found[1], word);
        uint4 const& x = elements[word];
        multiply_16x8x16(totals, Widen<C>::template pair<0>(a, left), Widen<C>::template pair<0>(b, right),
                         Widen<C>::template pair<1>(a, left), Widen<C>::template pair<1>(b, right), low(x.x, x.z),
                         high(x.x, x.z));
        multiply_16x8x16(totals, Widen<C>::template pair<2>(a, left), Widen<C>::template pair<2>(b, right),
                         Widen<C>::template pair<3>(a, left), Widen<C>::template pair<3>(b, right), low(x.y, x.w),
                         high(x.y, x.w));
      }
    }
  }

  // The scale of a word of 4-bit codes.
  static __device__ auto scale_of(uint32_t found, int word) {
    if constexpr (C == Code::kInt4) {
      return Widen<C>::scale(found & 0xffff, found >> 16);
    } else if constexpr (C == Code::kNvfp4) {
      return Widen<C>::scale(word < 2 ? found & 0xff : found >> 8);
    } else {
      return Widen<C>::scale(found);
    }
  }

  // The first elements of two pairs, and the second ones.
  static __device__ uint32_t low(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
  static __device__ uint32_t high(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }
};

}  // namespace latent_moe::decode
