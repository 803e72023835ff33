// Codes as pairs of bfloat16, in registers. The results are those of jax_latent_moe/formats, rounded to bfloat16.
//
// A lane reads 16 bytes of codes of one output feature at a time, a chunk. `pair<i>` widens two codes of a 32-bit word: of
// 8-bit codes the neighbours 2 i and 2 i + 1; of 4-bit codes i and i + 4, which one shift brings into place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>

#include "decode/experts.h"

namespace latent_moe::decode {

__host__ __device__ inline uint32_t bits(__nv_bfloat162 pair) {
  uint32_t found;
  memcpy(&found, &pair, sizeof found);
  return found;
}

__host__ __device__ inline __nv_bfloat162 as_pair(uint32_t found) {
  __nv_bfloat162 pair;
  memcpy(&pair, &found, sizeof pair);
  return pair;
}

__host__ __device__ inline uint32_t twice(uint32_t half) { return half | half << 16; }

__host__ __device__ inline uint32_t times(uint32_t a, uint32_t b) { return bits(__hmul2(as_pair(a), as_pair(b))); }

template <Code C>
struct Widen;

// 8-bit codes have float32 scales, which multiply sums.
template <>
struct Widen<Code::kE4m3> {
  template <int I>
  static __host__ __device__ uint32_t pair(uint32_t word) {
    auto const two = static_cast<__nv_fp8x2_storage_t>(word >> 16 * I);
    auto const halves = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
    const float2 values = __half22float2(__half2(halves));
    return bits(__floats2bfloat162_rn(values.x, values.y));
  }
};

template <>
struct Widen<Code::kInt8> {
  template <int I>
  static __host__ __device__ uint32_t pair(uint32_t word) {
    const uint32_t two = (word ^ 0x80808080u) >> 16 * I;
    return bits(__floats2bfloat162_rn(value(two & 0xff), value(two >> 8 & 0xff)));
  }

 private:
  // 2^23 + u has u as its lowest bits.
  static __host__ __device__ float value(uint32_t u) {
    const uint32_t shifted = 0x4b000000u | u;
    float found;
    memcpy(&found, &shifted, sizeof found);
    return found - 8388736.0f;  // 2^23 + 128
  }
};

// The bits of E2M1 codes as those of bfloat16 are the values times 2^-126.
__host__ __device__ inline uint32_t e2m1_pair(uint32_t word, int shift) {
  const uint32_t two = word >> shift;
  return (two << 12 & 0x80008000u) | (two << 6 & 0x01c001c0u);
}

template <>
struct Widen<Code::kMxfp4> {
  // The byte e is 2^(e - 127). With what undoes 2^-126, bfloat16 can hold the power up to e = 128.
  using Scale = uint32_t;

  static __host__ __device__ Scale scale(uint32_t e) { return e; }

  template <int I>
  static __host__ __device__ uint32_t pair(uint32_t word, Scale e) {
    uint32_t two = times(e2m1_pair(word, 4 * I), twice(((e < 128 ? e : 128) + 126) << 7));
    if (e > 128) two = times(two, twice(e == 255 ? 0x7fc0 : (e - 1) << 7));
    return two;
  }
};

template <>
struct Widen<Code::kNvfp4> {
  // The scale of 16 codes, times 2^116: sums are multiplied by 2^10 with the scale of the matrix.
  using Scale = uint32_t;
  static constexpr float kLeft = 1024.0f;

  static __host__ __device__ Scale scale(uint32_t e4m3) {
    auto const half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(e4m3), __NV_E4M3);
    const float value = 0x1p116f * __half2float(__half(half));
    return bits(__floats2bfloat162_rn(value, value));
  }

  template <int I>
  static __host__ __device__ uint32_t pair(uint32_t word, Scale scale) {
    return times(e2m1_pair(word, 4 * I), scale);
  }
};

template <>
struct Widen<Code::kInt4> {
  struct Scale {
    uint32_t scale, zero;  // 128 + the zero point
  };

  static __host__ __device__ Scale scale(uint32_t scale, uint32_t zero) { return {twice(scale), twice(0x4300 | zero)}; }

  // 128 + u has u as its lowest bits.
  template <int I>
  static __host__ __device__ uint32_t pair(uint32_t word, Scale scale) {
    const uint32_t shifted = (word >> 4 * I & 0x000f000fu) | 0x43004300u;
    return times(bits(__hsub2(as_pair(shifted), as_pair(scale.zero))), scale.scale);
  }
};

}  // namespace latent_moe::decode
