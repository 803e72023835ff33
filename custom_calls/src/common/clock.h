// The device's clock, for measuring what a stream takes without the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe {

// Writes the nanoseconds of the device's clock, the low word first, once the stream has come so far.
cudaError_t read_clock(uint32_t* words, cudaStream_t stream);

}  // namespace latent_moe
