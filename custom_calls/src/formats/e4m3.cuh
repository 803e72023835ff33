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

// The quotient by 448, of a number of at least 1e-30, NaN or infinity. The remainder is exact, so the second estimate is the
// correctly rounded quotient. A division is a call of a function, around which nothing else is scheduled.
__device__ __forceinline__ float over_largest(float x) {
  constexpr float kInverse = 1 / kLargest;
  const float near = x * kInverse;
  const float quotient = fmaf(fmaf(-near, kLargest, x), kInverse, near);
  return __float_as_uint(x) >= 0x7f800000 ? x : quotient;
}

__device__ __forceinline__ float scale_of(uint32_t largest, float least, bool power_of_two) {
  const float amax = __uint_as_float(largest);
  const float scale = over_largest(amax < least ? least : amax);  // NaN stays
  const uint32_t bits = __float_as_uint(scale);
  if (!power_of_two || bits >= 0x7f800000) return scale;
  return __uint_as_float(min((bits >> 23) + ((bits & 0x7fffff) != 0), 254u) << 23);
}

// The factor of a block's values. The reciprocal is correctly rounded, as the division is, and shorter.
__device__ __forceinline__ float inverse_of(float scale) { return __frcp_rn(scale); }

__device__ __forceinline__ uint16_t encode(float2 values, float inverse) {
  return __nv_cvt_float2_to_fp8x2(make_float2(values.x * inverse, values.y * inverse), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint32_t encode(float4 values, float inverse) {
  return encode(make_float2(values.x, values.y), inverse) |
         uint32_t{encode(make_float2(values.z, values.w), inverse)} << 16;
}

}  // namespace latent_moe::formats
