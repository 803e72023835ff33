// The experts' activations and their derivatives, in float32: the same formulas as jax_latent_moe/activations.py.
#pragma once

#include "instance.h"

namespace latent_moe {

struct ActivationParams {
  float beta;         // situ_glu: of the gate
  float linear_beta;  // situ_glu: of the up half; 0 leaves it linear
};

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrtTwoPi = 0.39894228040143268f;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// A gate function's value and derivative.
struct Value {
  float value, slope;
};

__device__ __forceinline__ Value gelu_exact(float x) {
  float cdf = 0.5f * (1.0f + erff(x * kSqrtHalf));
  return {x * cdf, cdf + x * kInvSqrtTwoPi * __expf(-0.5f * x * x)};
}

__device__ __forceinline__ Value gelu_tanh(float x) {
  constexpr float scale = 0.79788456080286536f, cubic = 0.044715f;
  float t = tanhf(scale * (x + cubic * x * x * x));
  return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * scale * (1.0f + 3.0f * cubic * x * x)};
}

// The ungated activation, or the gate's half of a gated one.
template <Activation A>
__device__ __forceinline__ Value gate_value(float x, ActivationParams const& params) {
  if constexpr (A == Activation::kRelu2) {
    float r = fmaxf(x, 0.0f);
    return {r * r, 2.0f * r};
  } else if constexpr (A == Activation::kGelu || A == Activation::kGeglu) {
    return gelu_exact(x);
  } else if constexpr (A == Activation::kGeluTanh || A == Activation::kGegluTanh) {
    return gelu_tanh(x);
  } else if constexpr (A == Activation::kSwiglu) {
    float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else {
    float s = sigmoid(x), t = tanhf(x / params.beta);
    return {params.beta * t * s, s * (1.0f - t * t) + params.beta * t * s * (1.0f - s)};
  }
}

template <Activation A>
__device__ __forceinline__ Value up_value(float u, ActivationParams const& params) {
  if constexpr (A == Activation::kSituGlu) {
    if (params.linear_beta != 0.0f) {
      float t = tanhf(u / params.linear_beta);
      return {params.linear_beta * t, 1.0f - t * t};
    }
  }
  return {u, 1.0f};
}

// The same from what a forward pass keeps: of relu2 hidden rows, whose root tells the slope, else what it was applied to.
template <Activation A>
__device__ __forceinline__ Value gate_value_of_kept(float kept, ActivationParams const& params) {
  if constexpr (keeps_hidden(A)) {
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(kept));
    return {kept, 2.0f * root};
  } else {
    return gate_value<A>(kept, params);
  }
}

}  // namespace latent_moe
