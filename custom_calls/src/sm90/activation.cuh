// The experts' activations and their derivatives in float32, by the formulas of jax_latent_moe/activations.py.
#pragma once

#include "common/args.h"
#include "sm90/instructions.cuh"

namespace latent_moe::sm90 {

struct ActivationParams {
  float beta, inverse_beta;                // situ_glu's bound of the gate
  float linear_beta, inverse_linear_beta;  // situ_glu's bound of the up half, or 0 for none

  __device__ explicit ActivationParams(Args const& args)
      : beta(args.beta),
        inverse_beta(1.0f / args.beta),
        linear_beta(args.linear_beta),
        inverse_linear_beta(1.0f / args.linear_beta) {}
};

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp_fast(-x)); }

// Near 0, 2 sigmoid(2x) - 1 cancels, and x - x^3 / 3 is exact.
__device__ __forceinline__ float tanh_fast(float x) {
  return fabsf(x) < 0.02f ? x - x * x * x * (1.0f / 3.0f) : 2.0f * sigmoid(2.0f * x) - 1.0f;
}

// The value and the derivative of a function of one number.
struct Value {
  float value, slope;
};

// The normal distribution's tail beyond |x| is erfc(y) / 2 at y = |x| / sqrt(2), and to 1.5e-7 erfc(y) is
// t (c0 + t (c1 + ...)) exp(-y^2) with t = 1 / (1 + p y) (Abramowitz and Stegun, 1964, 7.1.26).
__device__ __forceinline__ Value gelu_exact(float x) {
  float density = exp_fast(-0.5f * x * x), t = reciprocal(1.0f + 0.3275911f * 0.70710678118654752f * fabsf(x));
  float tail = 1.061405429f;
  tail = tail * t - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail *= 0.5f * t * density;
  float cdf = x < 0.0f ? tail : 1.0f - tail;
  return {x * cdf, cdf + x * 0.39894228040143268f * density};
}

// (1 + tanh(z)) / 2 is sigmoid(2z).
__device__ __forceinline__ Value gelu_tanh(float x) {
  constexpr float scale = 2.0f * 0.79788456080286536f, cubic = 0.044715f;
  float cdf = sigmoid(scale * (x + cubic * x * x * x));
  return {x * cdf, cdf + x * cdf * (1.0f - cdf) * scale * (1.0f + 3.0f * cubic * x * x)};
}

// The ungated activation, or a gated one's function of the gate.
template <Activation A>
__device__ __forceinline__ Value gate_value(float x, ActivationParams const& params) {
  if constexpr (A == Activation::kRelu2) {
    float r;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));  // fmaxf would lose a NaN
    return {r * r, 2.0f * r};
  } else if constexpr (A == Activation::kGelu || A == Activation::kGeglu) {
    return gelu_exact(x);
  } else if constexpr (A == Activation::kGeluTanh || A == Activation::kGegluTanh) {
    return gelu_tanh(x);
  } else if constexpr (A == Activation::kSwiglu) {
    float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else {
    float s = sigmoid(x), t = tanh_fast(x * params.inverse_beta);
    return {params.beta * t * s, s * (1.0f - t * t) + params.beta * t * s * (1.0f - s)};
  }
}

template <Activation A>
__device__ __forceinline__ Value up_value(float u, ActivationParams const& params) {
  if constexpr (A == Activation::kSituGlu) {
    if (params.linear_beta != 0.0f) {
      float t = tanh_fast(u * params.inverse_linear_beta);
      return {params.linear_beta * t, 1.0f - t * t};
    }
  }
  return {u, 1.0f};
}

// A gate, changed so that the hidden rows are large enough to determine the up half (Residual::kGateHidden). This changes
// the gate's function by less than 10^-12.
template <Activation A>
__device__ __forceinline__ float gate_to_keep(float gate) {
  constexpr float least = A == Activation::kSwiglu ? -40.0f : -8.0f, smallest = 0x1p-40f;
  gate = gate < least ? least : gate;  // a NaN stays
  return fabsf(gate) < smallest ? copysignf(smallest, gate) : gate;
}

// Two hidden elements, from the pre-activation as it is rounded for the backward pass. Only gated activations read `up`.
template <class T, Activation A>
__device__ __forceinline__ uint32_t hidden(uint32_t gate, uint32_t up, ActivationParams const& params) {
  if constexpr (A == Activation::kRelu2) return square_of_pair<T>(relu_of_pair<T>(gate));
  const float2 g = unpack<T>(gate);
  float2 u = {1.0f, 1.0f};
  if constexpr (is_gated(A)) {
    u = unpack<T>(up);
    u = {up_value<A>(u.x, params).value, up_value<A>(u.y, params).value};
  }
  return pack<T>(gate_value<A>(g.x, params).value * u.x, gate_value<A>(g.y, params).value * u.y);
}

// A hidden element, and its derivatives with respect to the gate (or the pre-activation) and the up half.
struct Slopes {
  float hidden, gate, up;
};

// Computes them from the residual: from `first` only, or from the two halves of a gated activation.
template <Activation A, Residual R>
__device__ __forceinline__ Slopes slopes_of_residual(float first, float second, ActivationParams const& params) {
  if constexpr (R == Residual::kHidden) {  // relu2's slope is twice the root
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(first));
    return {first, 2.0f * root, 0.0f};
  } else {
    const Value gate = gate_value<A>(first, params);
    if constexpr (R == Residual::kGateHidden) {
      // The value is 0 only in padding rows, which read as 0.
      const float up = gate.value == 0.0f ? 0.0f : second * reciprocal(gate.value);
      return {second, gate.slope * up, gate.value};
    }
    const Value up = is_gated(A) ? up_value<A>(second, params) : Value{1.0f, 0.0f};
    return {gate.value * up.value, gate.slope * up.value, gate.value * up.slope};
  }
}

}  // namespace latent_moe::sm90
