// One row times one or two dense weights, in one launch: the router's logits and the latent projection of one token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kernel.h"

namespace latent_moe::decode {

constexpr int kMostParts = 8;      // blocks of a cluster
constexpr int kTileBytes = 128;    // bytes of a weight's row, whose columns a cluster computes

constexpr bool is_parts(int parts) { return parts == 1 || parts == 2 || parts == 4 || parts == kMostParts; }

// logits = x kernel in float32, and out = x projection in the format of x. A weight without columns is left out.
struct Projections {
  Format format;
  void const* x;  // [1][k]
  int k;
  void const* kernel;  // [k][experts], in float32 or in the format of x
  bool is_kernel_float32;
  int experts;
  float* logits;           // [1][experts]
  void const* projection;  // [k][width]
  int width;
  void* out;  // [1][width]
  int parts;  // parts of the contracted axis; each block of a cluster multiplies one
};

// An early launch begins before the kernel that stores x has ended, and waits for its end. The first kernel of a call of the
// library is not early.
cudaError_t multiply(Projections const& projections, bool is_early, cudaStream_t stream);

}  // namespace latent_moe::decode
