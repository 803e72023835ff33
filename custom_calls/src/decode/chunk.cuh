// A lane's 16 bytes of codes of two features, times the same elements of up to 8 rows, or of two or more groups of 8.
//
// Tensor cores multiply the widened codes. Codes are widened once for all groups. Both operands need the same order along the
// contracted axis, and any order will do: the rows are in the order in which codes widen.
#pragma once

#include "decode/widen.cuh"

namespace latent_moe::decode {

// Bytes of a scale.
template <Code C>
constexpr int kScaleBytes = packing(C) == 1 ? 4 : C == Code::kInt4 ? 2 : 1;

// log2 of the elements that share a scale. 0 if the format does not fix it; Weight::k_shift has it then.
template <Code C>
constexpr int kKnownShift = C == Code::kMxfp4 ? 5 : C == Code::kNvfp4 ? 4 : 0;

// The bytes of the scales before so many elements of a feature.
template <Code C>
__device__ __forceinline__ int scales_before(Weight const& weight, int elements) {
  return (elements >> (kKnownShift<C> != 0 ? kKnownShift<C> : weight.k_shift)) * kScaleBytes<C>;
}

// The bytes of the scales before a feature of a matrix.
template <Code C>
__device__ int64_t scales_before_feature(Weight const& weight, int64_t matrix, int feature) {
  auto const blocks = [](int size, int shift) { return ((size - 1) >> shift) + 1; };
  const int64_t row = matrix * blocks(weight.n, weight.n_shift) + (feature >> weight.n_shift);
  return row * blocks(weight.k, weight.k_shift) * kScaleBytes<C>;
}

// The first scale of a feature.
template <Code C>
__device__ uint8_t const* scales_of(Weight const& weight, int64_t matrix, int feature) {
  return static_cast<uint8_t const*>(weight.scales) + scales_before_feature<C>(weight, matrix, feature);
}

// Rows: of a group, in shared memory.
template <Code C, int Groups, int Rows = 8>
struct Chunk {
  static constexpr int kPacking = packing(C), kSize = 16 * kPacking;  // kSize: elements of a lane
  static constexpr int kStep = 4 * kSize;                            // elements of a warp
  static constexpr int kUnits = kSize / 8;                           // groups of 8 elements of a lane
  static constexpr int kApart = Rows * Groups * 4;                   // from a unit of a row to the next one

  // What is stored for the codes of a chunk: the bits of a float, or all bits of the narrow scales and of the zero point.
  static __device__ uint32_t scale(Weight const& weight, uint8_t const* at) {
    if constexpr (kPacking == 1) {
      return *reinterpret_cast<uint32_t const*>(at);
    } else if constexpr (C == Code::kMxfp4) {
      return *at;
    } else if constexpr (C == Code::kNvfp4) {
      return *reinterpret_cast<uint16_t const*>(at);
    } else {
      auto const* zeros = static_cast<uint8_t const*>(weight.more);
      const int64_t place = (at - static_cast<uint8_t const*>(weight.scales)) / kScaleBytes<C>;
      return *reinterpret_cast<uint16_t const*>(at) | (zeros == nullptr ? 8u : uint32_t{zeros[place]}) << 16;
    }
  }

  // Whether one factor is not enough for a scale of the warp. It is for most of them.
  static __device__ bool takes_two(uint32_t const (&found)[2]) {
    if constexpr (C != Code::kMxfp4) return false;
    return __ballot_sync(~0u, max(found[0], found[1]) > Widen<Code::kMxfp4>::kMost) != 0;
  }

  // Adds the products of a chunk with the elements of each group's row. The whole warp takes one factor, or two.
  static __device__ void add(float (&totals)[Groups][4], uint4 const (&codes)[2], uint32_t const (&found)[2],
                             uint4 const* const (&elements)[Groups], bool takes_two) {
    if constexpr (kPacking == 1) {
      float parts[Groups][4] = {};
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        uint4 x[Groups];
#pragma unroll
        for (int g = 0; g < Groups; ++g) x[g] = elements[g][unit * kApart];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t a = (&codes[0].x)[2 * unit + half], b = (&codes[1].x)[2 * unit + half];
          const uint32_t pairs[4] = {Widen<C>::template pair<0>(a), Widen<C>::template pair<0>(b),
                                     Widen<C>::template pair<1>(a), Widen<C>::template pair<1>(b)};
#pragma unroll
          for (int g = 0; g < Groups; ++g) multiply(parts[g], pairs, half == 0 ? x[g].x : x[g].z, half == 0 ? x[g].y : x[g].w);
        }
      }
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) totals[g][i] = fmaf(__uint_as_float(found[i / 2]), parts[g][i], totals[g][i]);
      }
    } else if constexpr (C == Code::kMxfp4) {
      if (!takes_two) {
        add_scaled(totals, codes, elements, [&](int i, int) { return Widen<C>::factor(found[i]); });
      } else {
        add_scaled(totals, codes, elements, [&](int i, int) { return Widen<C>::scale(found[i]); });
      }
    } else {
      add_scaled(totals, codes, elements, [&](int i, int half) { return scale_of(found[i], half); });
    }
  }

  // The sums, times what is left of a matrix's scale.
  static __device__ float left(Weight const& weight, int64_t matrix) {
    if constexpr (C == Code::kNvfp4) return Widen<C>::kLeft * static_cast<float const*>(weight.more)[matrix];
    return 1.0f;
  }

 private:
  static __device__ void multiply(float (&totals)[4], uint32_t const (&pairs)[4], uint32_t first, uint32_t second) {
    multiply_16x8x16(totals, pairs[0], pairs[1], pairs[2], pairs[3], first, second);
  }

  template <class ScaleOf>
  static __device__ void add_scaled(float (&totals)[Groups][4], uint4 const (&codes)[2], uint4 const* const (&elements)[Groups],
                                    ScaleOf scale_of) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t a = (&codes[0].x)[word], b = (&codes[1].x)[word];
      uint4 x[Groups];
#pragma unroll
      for (int g = 0; g < Groups; ++g) x[g] = elements[g][word * kApart];
      const uint32_t first[4] = {Widen<C>::template pair<0>(a, scale_of(0, 0)), Widen<C>::template pair<0>(b, scale_of(1, 0)),
                                 Widen<C>::template pair<1>(a, scale_of(0, 0)), Widen<C>::template pair<1>(b, scale_of(1, 0))};
#pragma unroll
      for (int g = 0; g < Groups; ++g) multiply(totals[g], first, x[g].x, x[g].y);
      const uint32_t second[4] = {Widen<C>::template pair<2>(a, scale_of(0, 1)), Widen<C>::template pair<2>(b, scale_of(1, 1)),
                                  Widen<C>::template pair<3>(a, scale_of(0, 1)), Widen<C>::template pair<3>(b, scale_of(1, 1))};
#pragma unroll
      for (int g = 0; g < Groups; ++g) multiply(totals[g], second, x[g].z, x[g].w);
    }
  }

  // The scale of the first or second 16 elements in int4 or nvfp4.
  static __device__ auto scale_of(uint32_t found, int half) {
    if constexpr (C == Code::kInt4) {
      return Widen<C>::scale(found & 0xffff, found >> 16);
    } else {
      return Widen<C>::scale(half == 0 ? found & 0xff : found >> 8);
    }
  }
};

}  // namespace latent_moe::decode
