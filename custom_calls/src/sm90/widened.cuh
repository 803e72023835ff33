// Chunks of 16 bytes of codes as bfloat16, in the order of the contracted axis.
//
// The kernels of few tokens take codes in any order (decode/widen.cuh). Here TMA loads the rows in their own order, so the
// bytes of a word are permuted first: the two codes of a pair then lie at the same place of both halves.
#pragma once

#include "decode/chunk.cuh"

namespace latent_moe::sm90 {

template <Code C>
constexpr int kChunkElements = 16 * packing(C);

template <Code C>
constexpr int kChunkUnits = kChunkElements<C> / 8;  // units of 16 bytes of bfloat16

// Whether a scale multiplies codes and not the sums: the product is rounded to bfloat16 once. Scales of a matrix or of an
// output column multiply the sums.
template <Code C>
constexpr bool kScalesCodes = C != Code::kInt8;

// Byte i of the word, and of `other`, in the lower bytes of both halves. The upper bytes are 0 if all bytes are below 128.
template <int I>
__device__ __forceinline__ uint32_t side_by_side(uint32_t word, uint32_t other) {
  return decode::permuted(word, other, 0xc480 + 0x1111 * I);
}

// Eight E2M1 codes, times 2^-126 (decode/widen.cuh).
template <int I>
__device__ __forceinline__ uint32_t e2m1_in_order(uint32_t even, uint32_t odd) {
  return side_by_side<I>(even, odd) * 0x1040 & 0x81c081c0;
}

template <class Scale>
__device__ __forceinline__ uint4 e2m1_in_order(uint32_t word, Scale scale) {
  const uint32_t even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f;
  return {scale(e2m1_in_order<0>(even, odd)), scale(e2m1_in_order<1>(even, odd)), scale(e2m1_in_order<2>(even, odd)),
          scale(e2m1_in_order<3>(even, odd))};
}

// Two of eight int4 codes. 128 + u has u as its lowest bits.
template <int I>
__device__ __forceinline__ uint32_t int4_in_order(uint32_t word, uint32_t shifted, decode::Widen<Code::kInt4>::Scale scale) {
  const uint32_t pair = decode::masked(__byte_perm(word, shifted, 0x4400 + 0x1111 * I), 0x000f000f, 0x43004300);
  return decode::times(decode::bits(__hsub2(decode::as_pair(pair), decode::as_pair(scale.zero))), scale.scale);
}

// Two of four int8 codes (decode/widen.cuh).
__device__ __forceinline__ uint32_t int8_in_order(uint32_t pair) {
  return decode::bits(__hsub2(decode::as_pair(decode::masked(pair, 0x007f007f, 0x43004300)),
                              decode::as_pair(decode::masked(pair, 0x00800080, 0x43004300))));
}

// Two E4M3 codes times a scale. A code that is no number stays none.
template <int I>
__device__ __forceinline__ uint32_t e4m3_in_order(uint32_t word, float scale) {
  auto const two = static_cast<__nv_fp8x2_storage_t>(word >> 16 * I);
  const float2 values = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
  return decode::bits(__floats2bfloat162_rn(scale * values.x, scale * values.y));
}

// A chunk, with the bits of its scale as `decode::Chunk<C, 1>::scale` reads them. An E8M0 scale above 128 needs two factors.
template <Code C>
__device__ __forceinline__ void widen(uint4 (&units)[kChunkUnits<C>], uint4 codes, uint32_t found, bool takes_two) {
  using Widen = decode::Widen<C>;
#pragma unroll
  for (int i = 0; i < kChunkUnits<C>; ++i) {
    if constexpr (packing(C) == 1) {
      const uint32_t a = (&codes.x)[2 * i], b = (&codes.x)[2 * i + 1];
      if constexpr (C == Code::kInt8) {
        units[i] = {int8_in_order(__byte_perm(a, 0, 0x1100)), int8_in_order(__byte_perm(a, 0, 0x3322)),
                    int8_in_order(__byte_perm(b, 0, 0x1100)), int8_in_order(__byte_perm(b, 0, 0x3322))};
      } else {
        const float scale = __uint_as_float(found);
        units[i] = {e4m3_in_order<0>(a, scale), e4m3_in_order<1>(a, scale), e4m3_in_order<0>(b, scale),
                    e4m3_in_order<1>(b, scale)};
      }
    } else {
      const uint32_t word = (&codes.x)[i];
      if constexpr (C == Code::kMxfp4) {
        if (!takes_two) {
          units[i] = e2m1_in_order(word, [factor = Widen::factor(found)](uint32_t x) { return decode::times(x, factor); });
        } else {
          const auto scale = Widen::scale(found);
          units[i] = e2m1_in_order(
              word, [scale](uint32_t x) { return decode::times(decode::times(x, scale.factor), scale.more); });
        }
      } else if constexpr (C == Code::kNvfp4) {
        const auto scale = Widen::scale(i < 2 ? found & 0xff : found >> 8);
        units[i] = e2m1_in_order(word, [scale](uint32_t x) { return decode::times(x, scale); });
      } else {
        const auto scale = Widen::scale(found & 0xffff, found >> 16);
        const uint32_t shifted = word >> 4;
        units[i] = {int4_in_order<0>(word, shifted, scale), int4_in_order<1>(word, shifted, scale),
                    int4_in_order<2>(word, shifted, scale), int4_in_order<3>(word, shifted, scale)};
      }
    }
  }
}

// What the sums of a column are multiplied by: the scale of the matrix or of the column, and what widened nvfp4 codes lack.
__device__ __forceinline__ float scale_of_sum(Weight const& weight, int64_t matrix, int column) {
  if (weight.code == Code::kNvfp4) {
    return decode::Widen<Code::kNvfp4>::kLeft * static_cast<float const*>(weight.more)[matrix];
  }
  if (packing(weight.code) == 2 || weight.k_shift != kWholeAxis) return 1.0f;
  const int blocks = ((weight.n - 1) >> weight.n_shift) + 1;
  return static_cast<float const*>(weight.scales)[matrix * blocks + (column >> weight.n_shift)];
}

}  // namespace latent_moe::sm90
