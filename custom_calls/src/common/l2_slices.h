// Which L2 slice is near each SM.
//
// The L2 cache of a large GPU is two slices with a link between them. What an SM reads from the far slice crosses the link,
// and the near slice keeps a copy. So the data of an expert whose tiles run on SMs of both slices crosses the link whole; if
// all its tiles run near one slice, half of it does. (Arun Demeure places work so:
// https://github.com/ademeure/cuda-side-boost.)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe {

// A bit for each SM, by its %smid: which of the two slices is near. Either slice may be the one with the bits set.
struct L2Slices {
  static constexpr int kMaxSms = 256;
  uint32_t bits[kMaxSms / 32];
};

// Times atomics from every SM of the current device: they run in the slice that holds their address. Waits for the stream.
// Measures each device once a process.
cudaError_t measure_l2_slices(int device, cudaStream_t stream);

// What was measured for a device. Before that, all SMs count as near the same slice.
L2Slices const& l2_slices_of(int device);

}  // namespace latent_moe
