// Few rows times one or two dense weights, in one launch: the router's logits and the latent projection of the same rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kernel.h"

namespace latent_moe::decode {

constexpr int kMostRows = 8;
constexpr int kMostParts = 8;      // blocks of a cluster
constexpr int kTileBytes = 128;    // of a row of a weight, which are the columns of a cluster

// logits = x kernel in float32, and out = x projection in the format of x. A weight without columns is left out.
struct Projections {
  Format format;
  void const* x;  // [rows][k]
  int rows, k;
  void const* kernel;  // [k][experts], in float32 or in the format of x
  bool is_kernel_float32;
  int experts;
  float* logits;           // [rows][experts]
  void const* projection;  // [k][width]
  int width;
  void* out;  // [rows][width]
  int parts;  // of the contracted axis, each of which a block of a cluster multiplies
};

cudaError_t multiply(Projections const& projections, cudaStream_t stream);

}  // namespace latent_moe::decode
