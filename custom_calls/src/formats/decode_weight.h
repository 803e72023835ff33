// The values of a weight in codes, dense.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kernel.h"
#include "common/weight.h"

namespace latent_moe::formats {

// Decodes the elements first ... first + width - 1 along k of all features to out [experts][parts * n][width], in bfloat16 or
// float16. Both numbers are multiples of a chunk of 16 bytes of codes. All arrays are aligned to 16 bytes.
struct DecodeWeight {
  Weight weight;
  int features;  // of all experts
  int first, width;
  Format format;
  void* out;
};

cudaError_t decode_weight(DecodeWeight const& call, cudaStream_t stream);

}  // namespace latent_moe::formats
