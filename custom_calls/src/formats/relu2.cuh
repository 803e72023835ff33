// The gradient of relu2, from the hidden rows relu(u)^2. The kernel of relu2's gradient and the epilogue of FP8 products
// share it, so their bits are equal.
#pragma once

#include "formats/eight.cuh"

namespace latent_moe::formats {

// An approximate reciprocal of the root of a positive number.
__device__ __forceinline__ float inverse_root(float x) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / sqrtf(x);
#endif
}

// Twice the root of a number of at least 0 and below 2^63. It is a step of Newton's method, on a number that is large enough
// for an exact residual. For every number of 16 bits it is correctly rounded, even if the first root is off by three units in
// the last place.
__device__ __forceinline__ float twice_root(float x) {
  const float scaled = x * 0x1p64f, inverse = inverse_root(fmaxf(scaled, 0x1p-80f)), near = scaled * inverse;
  return fmaf(fmaf(-near, near, scaled), inverse, near + near) * 0x1p-32f;
}

// The same for larger numbers too, and 0 for NaN and negative numbers.
__device__ __forceinline__ float twice_root_of_any(float x) {
  const bool large = x >= 0x1p63f;
  const float root = twice_root(large ? x * 0x1p-80f : x) * (large ? 0x1p40f : 1.0f);
  return x > 0.0f ? __float_as_uint(x) == 0x7f800000 ? x : root : 0.0f;
}

// Turns the gradient of eight hidden elements into that of their pre-activation, times the row's weight. Returns the sum of
// gradient * hidden. The operations and their order are as in jax_latent_moe/activations.py, so that the bits are the same.
template <class T>
__device__ __forceinline__ float differentiate_relu2(Eight<T>& gradient, Eight<T> const& hidden, float weight) {
  constexpr uint32_t kSmall = std::is_same_v<T, __half> ? 0x7c00 : 0x5f00;  // the bits of infinity, or of 2^63
  float d[kColumns], h[kColumns], slopes[kColumns], sum = 0.0f;
  gradient.get(d);
  hidden.get(h);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) slopes[i] = twice_root(h[i]);
  if (__builtin_expect(hidden.most_bits() >= kSmall, 0)) {
    // Rare, and therefore short: one element at a time, and eight rotations.
#pragma unroll 1
    for (int i = 0; i < kColumns; ++i) {
      const float first = h[0], slope = twice_root_of_any(first);
#pragma unroll
      for (int j = 0; j + 1 < kColumns; ++j) h[j] = h[j + 1], slopes[j] = slopes[j + 1];
      h[kColumns - 1] = first, slopes[kColumns - 1] = slope;
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    sum += d[i] * h[i];
    d[i] = slopes[i] * (weight * d[i]);
  }
  gradient.put(d);
  return sum;
}

}  // namespace latent_moe::formats
