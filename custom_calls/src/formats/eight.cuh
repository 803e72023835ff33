// Eight neighbouring elements of a row, which a lane moves and encodes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "formats/e4m3.cuh"

namespace latent_moe::formats {

constexpr int kColumns = 8;  // of a lane

// Eight neighbouring elements of a row as they are in memory.
template <class T>
struct Eight {
  uint4 raw[sizeof(T) / 2] = {};

  __device__ __forceinline__ void load(T const* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) raw[i] = __ldcs(reinterpret_cast<uint4 const*>(from) + i);
  }

  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = raw[0]; }

  __device__ __forceinline__ void get(float (&values)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (std::is_same_v<T, float>) {
          values[4 * i + j] = __uint_as_float(words[j]);
        } else if constexpr (std::is_same_v<T, __half>) {
          const float2 pair = __half22float2(reinterpret_cast<__half2 const&>(words[j]));
          values[2 * j] = pair.x, values[2 * j + 1] = pair.y;
        } else {
          values[2 * j] = __uint_as_float(words[j] << 16), values[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
        }
      }
    }
  }

  // Keeps the compiler from unpacking the values before this point. Unpacked ones take twice the registers.
  __device__ __forceinline__ void keep_packed() {
    asm volatile("" : "+r"(raw[0].x), "+r"(raw[0].y), "+r"(raw[0].z), "+r"(raw[0].w));
  }

  // Rounds the values to T, which has 16 bits.
  __device__ __forceinline__ void put(float const (&values)[kColumns]) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(values[2 * j], values[2 * j + 1]);
        words[j] = reinterpret_cast<uint32_t const&>(pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * j], values[2 * j + 1]);
        words[j] = reinterpret_cast<uint32_t const&>(pair);
      }
    }
    raw[0] = make_uint4(words[0], words[1], words[2], words[3]);
  }

  // The largest of the elements of 16 bits, read as unsigned integers.
  __device__ __forceinline__ uint32_t most_bits() const {
    const uint32_t pair = __vmaxu2(__vmaxu2(raw[0].x, raw[0].y), __vmaxu2(raw[0].z, raw[0].w));
    return max(pair >> 16, pair & 0xffff);
  }

  // The largest magnitude, as the bits of a float32.
  __device__ __forceinline__ uint32_t largest() const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      constexpr uint32_t kMagnitudes = 0x7fff7fff;
      const uint32_t pair = __vmaxu2(__vmaxu2(raw[0].x & kMagnitudes, raw[0].y & kMagnitudes),
                                     __vmaxu2(raw[0].z & kMagnitudes, raw[0].w & kMagnitudes));
      return max(pair << 16, pair & 0xffff0000u);
    } else {
      float values[kColumns];
      get(values);
      uint32_t found = 0;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) found = max(found, magnitude(values[i]));
      return found;
    }
  }

  // Stores the codes of the values, of a row whose scale has this inverse.
  __device__ __forceinline__ void store_codes(uint8_t* to, float inverse) const {
    float values[kColumns];
    get(values);
    *reinterpret_cast<uint2*>(to) = make_uint2(encode(make_float4(values[0], values[1], values[2], values[3]), inverse),
                                               encode(make_float4(values[4], values[5], values[6], values[7]), inverse));
  }
};

}  // namespace latent_moe::formats
