// The instructions that CUDA has no function for.
#pragma once

#include <cstdint>

namespace latent_moe::decode {

// Loads 16 bytes that are read once, without evicting others from the L1 cache.
__device__ __forceinline__ uint4 load_once(void const* from) {
  uint4 found;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(from));
  return found;
}

// The same, if other lanes or later loads read the rest of the line of 128 bytes.
__device__ __forceinline__ uint4 load_along(void const* from) {
  uint4 found;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(from));
  return found;
}

// Begins to copy 16 bytes that are read once from global to shared memory.
__device__ __forceinline__ void copy_ahead(void* to, void const* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}

// Waits for all copies that this thread has begun. Others see them behind a barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks for memory to be in the L2 cache soon. The address and the size are multiples of 16 bytes.
__device__ __forceinline__ void prefetch(void const* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// The shared memory whose size the launch gives.
__device__ __forceinline__ uint4* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

// a & mask | bits in one instruction; the compiler would use one for each constant.
__device__ __forceinline__ uint32_t masked(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(found) : "r"(a), "r"(mask), "r"(bits));
  return found;
}

// Bytes of two words. Four bits choose a byte of b:a, and the uppermost one of them asks for its sign bit in all places.
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
  return found;
}

// c += a b of a warp, with a [16][16] and b [16][8] in bfloat16 and c [16][8] in float32 (PTX: mma.m16n8k16).
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace latent_moe::decode
