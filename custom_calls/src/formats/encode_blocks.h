// Weights as E4M3 codes with a scale for each block of 128 x 128, in two layouts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe::formats {

constexpr int kBlock = 128;

enum class Source { kF32, kBf16, kF16 };

// Encodes weight [matrices][k][n] to codes [matrices][k][n], transposed [matrices][n][k] and scales
// [matrices][k / 128][n / 128].
// 128 divides k and n. All arrays are aligned to 16 bytes.
struct EncodeBlocks {
  Source source;
  void const* weight;
  uint8_t *codes, *transposed;
  float* scales;
  int64_t matrices, k, n;
  bool power_of_two;  // whether scales are rounded up to powers of two
};

cudaError_t encode_blocks(EncodeBlocks const& call, cudaStream_t stream);

}  // namespace latent_moe::formats
