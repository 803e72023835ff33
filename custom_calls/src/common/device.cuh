// Small device functions that any kernel may use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/kernel.h"

namespace latent_moe {

// The C++ type of a format's elements.
template <Format F>
using Element = std::conditional_t<F == Format::kF16, __half, __nv_bfloat16>;

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The first lane's value, which the compiler then keeps once for the warp.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }

// Two floats as a register of two 16-bit elements, rounded to nearest even, and back.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t&>(pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<__half2&>(pair));
  } else {
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair));
  }
}

}  // namespace latent_moe
