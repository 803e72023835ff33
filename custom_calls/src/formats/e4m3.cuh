// The scale and the codes of a block. The rule is from DeepGEMM (deep_gemm/utils/math.py): scale = max(amax, least) / 448,
// code = value * (1 / scale), as in jax_latent_moe/formats/fp8.py.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace latent_moe::formats {

constexpr float kLargest = 448;
constexpr float kLeastOfRows = 1e-30f;  // the least amax of a block of a row

// The bits of magnitudes have the order of the magnitudes, with NaN above infinity.
__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffff; }

__device__ __forceinline__ float scale_of(uint32_t largest, float least, bool power_of_two) {
  const float amax = __uint_as_float(largest);
  const float scale = __fdiv_rn(amax < least ? least : amax, kLargest);  // NaN stays
  const uint32_t bits = __float_as_uint(scale);
  if (!power_of_two || bits >= 0x7f800000) return scale;
  return __uint_as_float(min((bits >> 23) + ((bits & 0x7fffff) != 0), 254u) << 23);
}

__device__ __forceinline__ uint16_t encode(float2 values, float inverse) {
  return __nv_cvt_float2_to_fp8x2(make_float2(values.x * inverse, values.y * inverse), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint32_t encode(float4 values, float inverse) {
  return encode(make_float2(values.x, values.y), inverse) |
         uint32_t{encode(make_float2(values.z, values.w), inverse)} << 16;
}

}  // namespace latent_moe::formats
