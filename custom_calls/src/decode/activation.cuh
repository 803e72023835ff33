// Activations with the functions of CUDA's library: few tokens have few hidden elements. A NaN stays.
#pragma once

#include "common/kernel.h"

namespace latent_moe::decode {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The function of the gate, or of the pre-activation if there is no gate (jax_latent_moe/activations.py).
__device__ inline float of_gate(Activation activation, float x, float beta) {
  switch (activation) {
    case Activation::kRelu2:
      return x < 0.0f ? 0.0f : x * x;
    case Activation::kGelu:
    case Activation::kGeglu:
      return 0.5f * x * erfcf(-0.70710678118654752f * x);
    case Activation::kGeluTanh:
    case Activation::kGegluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::kSwiglu:
      return x * sigmoid(x);
    case Activation::kSituGlu:
      return beta * tanhf(x / beta) * sigmoid(x);
    case Activation::kNone:
      break;
  }
  return x;
}

__device__ inline float of_up(Activation activation, float x, float linear_beta) {
  return activation == Activation::kSituGlu && linear_beta != 0.0f ? linear_beta * tanhf(x / linear_beta) : x;
}

}  // namespace latent_moe::decode
