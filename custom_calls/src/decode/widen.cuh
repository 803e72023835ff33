// Codes as pairs of bfloat16, in registers. The results are as in jax_latent_moe/formats, rounded to bfloat16.
//
// A lane reads 16 bytes of codes of one output feature at a time, a chunk. `pair<i>` widens two codes of a 32-bit word, and
// `store` brings 8 elements of a row into the order of the pairs: of E4M3 the neighbours 2 i and 2 i + 1; of int8 i and i + 2,
// which lie at the same place of both halves of the word. 4-bit codes are stored so that pair i of word w is the neighbours
// 8 i + 2 w and 8 i + 2 w + 1 of the chunk (jax_latent_moe/formats/packing.py).
//
// In a cycle an SM does half as many bitwise operations and shifts as additions and multiplications of floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>

#include "decode/experts.h"
#include "decode/instructions.cuh"

namespace latent_moe::decode {

__device__ inline uint32_t bits(__nv_bfloat162 pair) {
  uint32_t found;
  memcpy(&found, &pair, sizeof found);
  return found;
}

__device__ inline __nv_bfloat162 as_pair(uint32_t found) {
  __nv_bfloat162 pair;
  memcpy(&pair, &found, sizeof pair);
  return pair;
}

__device__ inline uint32_t twice(uint32_t half) { return half | half << 16; }

__device__ inline uint32_t times(uint32_t a, uint32_t b) { return bits(__hmul2(as_pair(a), as_pair(b))); }

// Halves of two words, the lower ones or the upper ones.
__device__ inline uint32_t lower(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ inline uint32_t upper(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

template <Code C>
struct Widen;

// The order of 8-bit codes. A chunk in shared memory has units of 8 elements, so many times 16 bytes apart.
template <class Order>
struct EightBits {
  static __device__ void store(uint4* chunk, int unit, int apart, uint4 x) { chunk[unit * apart] = Order::ordered(x); }
};

// 8-bit codes have float32 scales, which multiply sums.
template <>
struct Widen<Code::kE4m3> : EightBits<Widen<Code::kE4m3>> {
  static __device__ uint4 ordered(uint4 x) { return x; }

  template <int I>
  static __device__ uint32_t pair(uint32_t word) {
    auto const two = static_cast<__nv_fp8x2_storage_t>(word >> 16 * I);
    auto const halves = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
    const float2 values = __half22float2(__half2(halves));
    return bits(__floats2bfloat162_rn(values.x, values.y));
  }
};

template <>
struct Widen<Code::kInt8> : EightBits<Widen<Code::kInt8>> {
  static __device__ uint4 ordered(uint4 x) {
    return {lower(x.x, x.y), upper(x.x, x.y), lower(x.z, x.w), upper(x.z, x.w)};
  }

  // 128 + u has u < 128 as its lowest bits. The sign bit makes 256 of the 128 that is subtracted.
  template <int I>
  static __device__ uint32_t pair(uint32_t word) {
    const uint32_t two = word >> 8 * I;
    return bits(__hsub2(as_pair(masked(two, 0x007f007f, 0x43004300)), as_pair(masked(two, 0x00800080, 0x43004300))));
  }
};

// The order of 4-bit codes: each unit has a pair of all four words.
struct FourBits {
  static __device__ void store(uint4* chunk, int unit, int apart, uint4 x) {
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) reinterpret_cast<uint32_t*>(chunk + word * apart)[unit] = pairs[word];
  }
};

// The bits of E2M1 codes as those of bfloat16 are the values times 2^-126. Each pair comes to its place by one instruction, or by
// none. A product has the bits of pair 3 at several places, the right ones among them.
template <int I>
__device__ inline uint32_t e2m1_pair(uint32_t word) {
  return (I == 3 ? (word & 0x001b001b) * 0x1084 : __funnelshift_r(word, word, 3 * I)) & 0x81c081c0;
}

template <>
struct Widen<Code::kMxfp4> : FourBits {
  // The byte e is 2^(e - 127). With what undoes 2^-126, bfloat16 can hold the power up to e = 128.
  static constexpr uint32_t kMost = 128;
  struct Scale {
    uint32_t factor, more;
  };

  static __device__ uint32_t factor(uint32_t e) { return e * 0x00800080u + 126 * 0x00800080u; }

  static __device__ Scale scale(uint32_t e) {
    return {factor(e < kMost ? e : kMost), twice(e == 255 ? 0x7fc0 : ((e > kMost ? e : kMost) - 1) << 7)};
  }

  template <int I>
  static __device__ uint32_t pair(uint32_t word, uint32_t factor) {
    return times(e2m1_pair<I>(word), factor);
  }

  template <int I>
  static __device__ uint32_t pair(uint32_t word, Scale scale) {
    return times(pair<I>(word, scale.factor), scale.more);
  }
};

template <>
struct Widen<Code::kNvfp4> : FourBits {
  // The scale of 16 codes, times 2^116: sums are multiplied by 2^10 with the scale of the matrix.
  using Scale = uint32_t;
  static constexpr float kLeft = 1024.0f;

  static __device__ Scale scale(uint32_t e4m3) {
    auto const half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(e4m3), __NV_E4M3);
    const float value = 0x1p116f * __half2float(__half(half));
    return bits(__floats2bfloat162_rn(value, value));
  }

  template <int I>
  static __device__ uint32_t pair(uint32_t word, Scale scale) {
    return times(e2m1_pair<I>(word), scale);
  }
};

template <>
struct Widen<Code::kInt4> : FourBits {
  struct Scale {
    uint32_t scale, zero;  // 128 + the zero point
  };

  static __device__ Scale scale(uint32_t scale, uint32_t zero) { return {twice(scale), twice(0x4300 | zero)}; }

  // 128 + u has u as its lowest bits.
  template <int I>
  static __device__ uint32_t pair(uint32_t word, Scale scale) {
    const uint32_t shifted = masked(word >> 4 * I, 0x000f000f, 0x43004300);
    return times(bits(__hsub2(as_pair(shifted), as_pair(scale.zero))), scale.scale);
  }
};

}  // namespace latent_moe::decode
