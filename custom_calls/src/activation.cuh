// The experts' activations and their derivatives, in float32: the same formulas as jax_latent_moe/activations.py.
#pragma once

#include "hopper.cuh"

namespace latent_moe {

struct ActivationParams {
  float beta, inverse_beta;                // situ_glu: of the gate
  float linear_beta, inverse_linear_beta;  // situ_glu: of the up half; 0 leaves it linear

  __device__ explicit ActivationParams(Args const& args)
      : beta(args.beta),
        inverse_beta(1.0f / args.beta),
        linear_beta(args.linear_beta),
        inverse_linear_beta(1.0f / args.linear_beta) {}
};

// To a few units in the last place of float32, and without a branch: an exact division or tanh would keep the compiler
// from computing several elements at a time, and an epilogue has few threads to hide that.
__device__ __forceinline__ float exp_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp_fast(-x)); }

// Near 0 the difference would lose the digits that x - x^3 / 3 has.
__device__ __forceinline__ float tanh_fast(float x) {
  return fabsf(x) < 0.02f ? x - x * x * x * (1.0f / 3.0f) : 2.0f * sigmoid(2.0f * x) - 1.0f;
}

// A gate function's value and derivative.
struct Value {
  float value, slope;
};

// erfc(y) = t (c0 + t (c1 + ...)) exp(-y^2) with t = 1 / (1 + p y), to 1.5e-7 (Abramowitz and Stegun, 1964, 7.1.26), of
// y = |x| / sqrt(2); half of it is the normal distribution's tail beyond |x|.
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

// The gate where `keeps_gate`, never such that hidden rows are too small to tell what it was multiplied with. It is moved
// where that changes them by less than 10^-12 of what is gated.
template <Activation A>
__device__ __forceinline__ float gate_to_keep(float gate) {
  constexpr float least = A == Activation::kSwiglu ? -40.0f : -8.0f, smallest = 0x1p-40f;
  gate = gate < least ? least : gate;  // a NaN stays
  return fabsf(gate) < smallest ? copysignf(smallest, gate) : gate;
}

// Two elements of hidden rows, from those of the pre-activation as the backward pass will read them, rounded; `up` is not
// read where nothing is gated.
template <class T, Activation A>
__device__ __forceinline__ uint32_t hidden(uint32_t gate, uint32_t up, ActivationParams const& params) {
  const float2 g = unpack<T>(gate);
  float2 u = {1.0f, 1.0f};
  if constexpr (is_gated(A)) {
    u = unpack<T>(up);
    u = {up_value<A>(u.x, params).value, up_value<A>(u.y, params).value};
  }
  return pack<T>(gate_value<A>(g.x, params).value * u.x, gate_value<A>(g.y, params).value * u.y);
}

// A hidden element, and its slopes by what it was made of.
struct Slopes {
  float hidden, gate, up;
};

// From what a forward pass keeps: hidden rows, of relu2, whose root tells the slope; gate and hidden rows; or gate and up
// half.
template <Activation A>
__device__ __forceinline__ Slopes slopes_of_kept(float first, float second, ActivationParams const& params) {
  if constexpr (A == Activation::kRelu2) {
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(first));
    return {first, 2.0f * root, 0.0f};
  } else {
    const Value gate = gate_value<A>(first, params);
    if constexpr (keeps_gate(A)) {
      // Only of rows of nobody, which read as 0, is the value 0.
      const float up = gate.value == 0.0f ? 0.0f : second * reciprocal(gate.value);
      return {second, gate.slope * up, gate.value};
    }
    const Value up = is_gated(A) ? up_value<A>(second, params) : Value{1.0f, 0.0f};
    return {gate.value * up.value, gate.slope * up.value, gate.value * up.slope};
  }
}

}  // namespace latent_moe
