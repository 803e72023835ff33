// Pairs of 8-bit codes as pairs of bfloat16, in the order of the contracted axis.
//
// The kernels of few tokens take codes in any order (decode/widen.cuh). Here the rows lie in their own order in shared memory. So
// bytes are permuted first. 4-bit codes are stored in this order.
#pragma once

#include "decode/chunk.cuh"

namespace latent_moe::sm90 {

// Two int8 codes (decode/widen.cuh), which lie in the lower bytes of the halves.
__device__ __forceinline__ uint32_t int8_in_order(uint32_t pair) {
  return decode::bits(__hsub2(decode::as_pair(decode::masked(pair, 0x007f007f, 0x43004300)),
                              decode::as_pair(decode::masked(pair, 0x00800080, 0x43004300))));
}

// Two of four E4M3 codes times a scale. A code that is no number stays none.
template <int I>
__device__ __forceinline__ uint32_t e4m3_in_order(uint32_t word, float scale) {
  auto const two = static_cast<__nv_fp8x2_storage_t>(word >> 16 * I);
  const float2 values = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
  return decode::bits(__floats2bfloat162_rn(scale * values.x, scale * values.y));
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
