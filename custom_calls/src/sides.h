// Which half of the L2 cache each multiprocessor is attached to.
//
// The L2 cache of a large GPU is two partitions. What a multiprocessor reads from the far one crosses a link, and the
// near one keeps a copy: an expert whose tiles run on both sides crosses it once whole, one that stays on a side half.
// (Side-aware kernels: https://github.com/ademeure/cuda-side-boost.)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe {

// A bit for each multiprocessor, by its %smid; which of the halves is 1 means nothing.
struct Sides {
  static constexpr int kMost = 256;  // multiprocessors
  uint32_t bits[kMost / 32];
};

// Times atomics, which run where their address is at home, from every multiprocessor of the current device. Waits for
// the stream; once for each device of a process.
cudaError_t measure_sides(int device, cudaStream_t stream);

// What was measured for a device; one side for all before.
Sides const& sides_of(int device);

}  // namespace latent_moe
