// The instructions of a cluster of blocks.
#pragma once

#include <cstdint>

namespace latent_moe::decode {

// A barrier of all threads of a cluster, in two halves. What was stored before the first half is seen after the second. Threads
// that have stored nothing begin instead, which waits for no memory.
__device__ __forceinline__ void begin_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_in_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Stores to the shared memory of the cluster's first block, at the address that `to` has in this block's.
__device__ __forceinline__ void store_in_first_block(float* to, float value) {
  uint32_t address = __cvta_generic_to_shared(to);
  asm volatile("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

}  // namespace latent_moe::decode
