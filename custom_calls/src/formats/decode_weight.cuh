// A thread decodes 8 neighbours along k and stores them at once. Reading and writing bound the kernel, so values are computed
// in float32 as jax_latent_moe/formats does it, to the bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode/chunk.cuh"
#include "formats/decode_weight.h"

namespace latent_moe::formats {

constexpr int kDecodeThreads = 256, kDecodeFeatures = 8;  // features of a block
constexpr int kAtOnce = 4;                                // units that a thread loads before it stores
constexpr int kUnit = 8;

__device__ inline uint32_t rounded(float a, float b, __nv_bfloat16) { return decode::bits(__floats2bfloat162_rn(a, b)); }

__device__ inline uint32_t rounded(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  uint32_t found;
  memcpy(&found, &pair, sizeof found);
  return found;
}

__device__ inline float e4m3(uint32_t byte) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3)));
}

// The elements of a unit, and how its scale changes them.
template <Code C>
struct Unit {
  static constexpr bool kFourBits = packing(C) == 2;
  uint4 codes;  // of 4 bits, the chunk of 32 that the unit is in
  uint32_t scale, zero;
  float outer;

  __device__ void load(Weight const& weight, int feature, int k) {
    auto const* row = static_cast<uint8_t const*>(weight.data) + int64_t{feature} * (weight.k / packing(C));
    if constexpr (kFourBits) {
      codes = *reinterpret_cast<uint4 const*>(row + k / 32 * 16);
    } else {
      const uint2 eight = *reinterpret_cast<uint2 const*>(row + k);
      codes = make_uint4(eight.x, eight.y, 0, 0);
    }
    const int matrix = feature / weight.n, own = feature % weight.n;
    uint8_t const* at = decode::scales_of<C>(weight, matrix, own) + (k >> weight.k_shift) * decode::kScaleBytes<C>;
    if constexpr (C == Code::kMxfp4) {
      scale = *at == 255 ? 0x7fc00000u : *at == 0 ? 0x00400000u : uint32_t{*at} << 23;
    } else if constexpr (C == Code::kNvfp4) {
      scale = __float_as_uint(e4m3(*at));
      outer = static_cast<float const*>(weight.more)[matrix];
    } else if constexpr (C == Code::kInt4) {
      scale = uint32_t{*reinterpret_cast<uint16_t const*>(at)} << 16;
      auto const* zeros = static_cast<uint8_t const*>(weight.more);
      zero = zeros == nullptr ? 8 : zeros[(at - static_cast<uint8_t const*>(weight.scales)) / 2];
    } else {
      scale = *reinterpret_cast<uint32_t const*>(at);
    }
  }

  // Elements 2 i and 2 i + 1 of the unit, which is number `place` of its chunk.
  __device__ float2 pair(int place, int i) const {
    const float by = __uint_as_float(scale);
    if constexpr (kFourBits) {
      const uint32_t word = (&codes.x)[i];
      if constexpr (C == Code::kInt4) {
        const uint32_t two = word >> 4 * place;
        return {(int(two & 15) - int(zero)) * by, (int(two >> 16 & 15) - int(zero)) * by};
      } else {
        // The bits of bfloat16 numbers that lack a factor of 2^126 (decode/widen.cuh).
        const uint32_t moved = place == 3 ? (word & 0x001b001b) * 0x1084 : __funnelshift_r(word, word, 3 * place);
        const uint32_t two = moved & 0x81c081c0;
        const float a = 0x1p126f * __uint_as_float(two << 16), b = 0x1p126f * __uint_as_float(two & 0xffff0000);
        if constexpr (C == Code::kNvfp4) return {a * by * outer, b * by * outer};
        return {a * by, b * by};
      }
    } else {
      const uint32_t two = (&codes.x)[i / 2] >> 16 * (i % 2);
      if constexpr (C == Code::kInt8) return {int8_t(two & 0xff) * by, int8_t(two >> 8 & 0xff) * by};
      return {e4m3(two & 0xff) * by, e4m3(two >> 8 & 0xff) * by};
    }
  }
};

template <Code C, class T>
__global__ void __launch_bounds__(kDecodeThreads) decode_features(const DecodeWeight call) {
  const int units = call.width / kUnit;
  const int first_feature = blockIdx.x * kDecodeFeatures;
  const int count = min(kDecodeFeatures, call.features - first_feature) * units;
  auto* out = static_cast<T*>(call.out);
  for (int start = threadIdx.x; start < count; start += kDecodeThreads * kAtOnce) {
    Unit<C> loaded[kAtOnce];
    int features[kAtOnce], places[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int unit = min(start + j * kDecodeThreads, count - 1);
      features[j] = first_feature + unit / units;
      places[j] = unit % units;
      loaded[j].load(call.weight, features[j], call.first + places[j] * kUnit);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (start + j * kDecodeThreads >= count) break;
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 values = loaded[j].pair(places[j] % 4, i);
        pairs[i] = rounded(values.x, values.y, T());
      }
      auto* to = reinterpret_cast<uint4*>(out + int64_t{features[j]} * call.width + places[j] * kUnit);
      *to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

}  // namespace latent_moe::formats
