// On the CPU, what src/decode/instructions.cuh has for a GPU.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include <cuda_bf16.h>

namespace latent_moe::decode {

inline uint4 load_once(void const* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::fprintf(stderr, "an address is not aligned\n"), std::abort();
  return *static_cast<uint4 const*>(from);
}

inline uint4 load_along(void const* from) { return load_once(from); }

// The copies that each thread has begun. They arrive when it waits for them.
inline std::array<std::vector<std::pair<uint4*, uint4 const*>>, 1024> copies;

inline void copy_ahead(void* to, void const* from) {
  if ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 != 0) {
    std::fprintf(stderr, "a copy is not aligned\n"), std::abort();
  }
  copies[threadIdx.x].push_back({static_cast<uint4*>(to), static_cast<uint4 const*>(from)});
}

inline void wait_for_copies() {
  for (auto const& [to, from] : copies[threadIdx.x]) *to = *from;
  copies[threadIdx.x].clear();
}

inline void prefetch(void const* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes <= 0 || bytes % 16 != 0) {
    std::fprintf(stderr, "a prefetch is not aligned\n"), std::abort();
  }
}

// As much as a block of an SM can have. tests/emulation/listed.cc fills it with NaN.
inline uint4* dynamic_shared() {
  alignas(16) static uint4 memory[227 * 1024 / 16];
  return memory;
}

inline uint32_t masked(uint32_t a, uint32_t mask, uint32_t bits) { return a & mask | bits; }

inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t found = __byte_perm(a, b, selector);
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = found >> 8 * i & 0xff;
    if (selector >> 4 * i & 8) found = found & ~(0xffu << 8 * i) | (byte & 0x80 ? 0xffu : 0u) << 8 * i;
  }
  return found;
}

inline float bfloat16(uint32_t pair, int half) { return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u); }

// The fragments of mma.m16n8k16 by the PTX manual: lane 4 g + q has a0, a1, a2, a3 of the rows g, g + 8, g, g + 8 and of the
// columns 2 q and 2 q + 1, the last two 8 further; b0 and b1 of the same elements of column g; and c of the rows g, g, g + 8,
// g + 8 and of the columns 2 q, 2 q + 1, 2 q, 2 q + 1.
inline void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto lanes = emulation::of_warp(std::array<uint32_t, 6>{a0, a1, a2, a3, b0, b1});
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      auto const& left = lanes[row % 8 * 4 + k % 8 / 2];
      auto const& right = lanes[column * 4 + k % 8 / 2];
      sum += double(bfloat16(left[row / 8 + k / 8 * 2], k % 2)) * bfloat16(right[4 + k / 8], k % 2);
    }
    c[i] = sum;
  }
}

}  // namespace latent_moe::decode
