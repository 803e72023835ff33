// The L2 slice that is near each SM.
//
// The L2 cache of a large GPU has two slices with a link between them. Data that an SM reads from the far slice crosses the
// link, and the near slice keeps a copy. If the tiles of an expert run near both slices, all of its data crosses the link.
// If they run near one slice, half of it does. (The idea is Arun Demeure's: https://github.com/ademeure/cuda-side-boost.)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe {

// A bit for each SM, by its %smid: which of the two slices is near. Either slice may be the one with the bits set.
struct L2Slices {
  static constexpr int kMaxSms = 256;
  uint32_t bits[kMaxSms / 32];
};

// Times atomics from every SM of the current device: an atomic runs in the slice that holds its address. Waits for the
// stream. Each device is measured once per process.
cudaError_t measure_l2_slices(int device, cudaStream_t stream);

// The result for a device. Before it is measured, all SMs count as near the same slice.
L2Slices const& l2_slices_of(int device);

}  // namespace latent_moe
