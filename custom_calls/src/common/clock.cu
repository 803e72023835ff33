#include "common/clock.h"

namespace latent_moe {
namespace {

__global__ void store_clock(uint32_t* words) {
  uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  words[0] = static_cast<uint32_t>(nanoseconds), words[1] = static_cast<uint32_t>(nanoseconds >> 32);
}

}  // namespace

cudaError_t read_clock(uint32_t* words, cudaStream_t stream) {
  store_clock<<<1, 1, 0, stream>>>(words);
  return cudaGetLastError();
}

}  // namespace latent_moe
