// Hopper's instructions for epilogues, on the CPU, in place of custom_calls/src/sm90/instructions.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/device.cuh"

namespace emulation {

alignas(1024) inline char shared[64 << 10];

// A copy from memory to shared memory, which is done when the thread waits for it.
struct Copy {
  void const* from;
  void* to;
  bool inside;
};

inline std::vector<Copy> copies[1024];  // of each thread

}  // namespace emulation

inline void* __cvta_shared_to_generic(uint32_t address) { return emulation::shared + address; }

namespace cute {

struct alignas(16) uint128_t {
  uint32_t words[4];
};

inline uint32_t cast_smem_ptr_to_uint(void* pointer) { return static_cast<char*>(pointer) - emulation::shared; }

// Lane L has row L / 4 of each of the four matrices, at column 2 (L % 4). Lane 8 i + j gives the address of row j of matrix i.
struct SM90_U32x4_STSM_N {
  static void copy(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint128_t& mine) {
    const auto rows = emulation::of_warp<uint128_t*>(&mine);
    const uint32_t values[4] = {a, b, c, d};
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) rows[8 * i + lane / 4]->words[lane % 4] = values[i];
  }
};

// Lane L has the elements 2 (L % 4) and 2 (L % 4) + 1 of column L / 4 of each of the four matrices.
struct SM90_U16x8_STSM_T {
  static void copy(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint128_t& mine) {
    const auto rows = emulation::of_warp<uint128_t*>(&mine);
    const uint32_t values[4] = {a, b, c, d};
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 8; ++i) {
      auto* row = reinterpret_cast<uint16_t*>(rows[8 * (i / 2) + lane % 4 * 2 + i % 2]);
      row[lane / 4] = values[i / 2] >> 16 * (i % 2);
    }
  }
};

struct SM75_U32x4_LDSM_N {
  static void copy(uint128_t const&, uint32_t&, uint32_t&, uint32_t&, uint32_t&) { std::abort(); }
};

template <class T>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL {
  static void copy(T const& from, T& to, bool inside) {
    emulation::copies[threadIdx.x].push_back({&from, &to, inside});
  }
};

inline void cp_async_fence() {}

template <int Newer>
void cp_async_wait() {
  static_assert(Newer == 0);
  for (emulation::Copy const& copy : emulation::copies[threadIdx.x]) {
    copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  }
  emulation::copies[threadIdx.x].clear();
}

}  // namespace cute

namespace latent_moe::sm90 {

constexpr int kWarpgroup = 128, kRowBytes = 128, kBlock = 64;

inline float exp_fast(float x) { return std::exp(x); }
inline float reciprocal(float x) { return 1 / x; }

template <class T>
uint32_t relu_of_pair(uint32_t pair) {
  const float2 values = unpack<T>(pair);
  return pack<T>(values.x < 0.0f ? 0.0f : values.x, values.y < 0.0f ? 0.0f : values.y);
}

template <class T>
uint32_t square_of_pair(uint32_t pair) {
  const float2 values = unpack<T>(pair);
  return pack<T>(values.x * values.x, values.y * values.y);
}

inline uint32_t load_shared_word(uint32_t from) {
  if (from % 4 != 0) std::fprintf(stderr, "an address is not aligned\n"), std::abort();
  uint32_t found;
  std::memcpy(&found, emulation::shared + from, sizeof found);
  return found;
}

// All warpgroups of the block meet, which wait equally often.
inline void sync_warpgroup(int) { __syncthreads(); }

}  // namespace latent_moe::sm90
