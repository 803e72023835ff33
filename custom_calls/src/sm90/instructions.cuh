// Hopper's instructions for the kernels: thin functions over CuTe's wrappers.
#pragma once

#include <cstdint>
#include <utility>

#include "common/device.cuh"
#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/copy_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_desc.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cute/arch/mma_sm90_gmma_ext.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"

namespace latent_moe::sm90 {

using cute::SM90::GMMA::Major;
using Barrier = cutlass::arch::ClusterTransactionBarrier;

constexpr int kSharedMemory = 227 * 1024;  // the most that one block of an SM may take
constexpr int kWarpgroup = 128;
constexpr int kRowBytes = 128;  // of a swizzled row in shared memory
constexpr int kBlock = 64;      // 16-bit elements of such a row, and rows of one wgmma

// Two 16-bit elements, each at least 0. NaN stays.
template <class T>
__device__ __forceinline__ uint32_t relu_of_pair(uint32_t pair) {
  uint32_t found;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(found) : "r"(pair), "r"(0));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(pair), "r"(0));
  }
  return found;
}

// The squares of two 16-bit elements, rounded once.
template <class T>
__device__ __forceinline__ uint32_t square_of_pair(uint32_t pair) {
  uint32_t found;
  if constexpr (std::is_same_v<T, __half>) {
    asm("mul.rn.f16x2 %0, %1, %1;" : "=r"(found) : "r"(pair));
  } else {
    asm("mul.rn.bf16x2 %0, %1, %1;" : "=r"(found) : "r"(pair));
  }
  return found;
}

// Exact to a few units in the last place of float32, and without a branch. An exact division or tanh would keep the compiler
// from interleaving several elements, and an epilogue has few threads to hide their latency.
__device__ __forceinline__ float exp_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The instruction for a 64 x N x 16 product of two operands in shared memory, accumulated in registers.
template <class T, int N, Major A, Major B>
struct Wgmma;

#define LATENT_MOE_WGMMA(N)                                                                         \
  template <Major A, Major B>                                                                       \
  struct Wgmma<__nv_bfloat16, N, A, B> : cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<A, B> {}; \
  template <Major A, Major B>                                                                       \
  struct Wgmma<__half, N, A, B> : cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<A, B> {};
LATENT_MOE_WGMMA(8)
LATENT_MOE_WGMMA(16)
LATENT_MOE_WGMMA(24)
LATENT_MOE_WGMMA(32)
LATENT_MOE_WGMMA(40)
LATENT_MOE_WGMMA(48)
LATENT_MOE_WGMMA(56)
LATENT_MOE_WGMMA(64)
LATENT_MOE_WGMMA(72)
LATENT_MOE_WGMMA(80)
LATENT_MOE_WGMMA(88)
LATENT_MOE_WGMMA(96)
LATENT_MOE_WGMMA(104)
LATENT_MOE_WGMMA(112)
LATENT_MOE_WGMMA(120)
LATENT_MOE_WGMMA(128)
LATENT_MOE_WGMMA(136)
LATENT_MOE_WGMMA(144)
LATENT_MOE_WGMMA(152)
LATENT_MOE_WGMMA(160)
LATENT_MOE_WGMMA(168)
LATENT_MOE_WGMMA(176)
LATENT_MOE_WGMMA(184)
LATENT_MOE_WGMMA(192)
#undef LATENT_MOE_WGMMA

// The instruction for a 64 x N x 16 product of bfloat16 in registers and rows in shared memory, both along the contracted axis.
template <int N>
struct FragmentWgmma;

#define LATENT_MOE_FRAGMENT_WGMMA(N) \
  template <>                        \
  struct FragmentWgmma<N> : cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<Major::K, Major::K> {};
LATENT_MOE_FRAGMENT_WGMMA(64)
LATENT_MOE_FRAGMENT_WGMMA(128)
LATENT_MOE_FRAGMENT_WGMMA(160)
LATENT_MOE_FRAGMENT_WGMMA(192)
LATENT_MOE_FRAGMENT_WGMMA(256)
#undef LATENT_MOE_FRAGMENT_WGMMA

template <int N, int Size, int... I>
__device__ __forceinline__ void fragment_wgmma(uint32_t const (&a)[4], uint64_t b, float (&acc)[Size],
                                               std::integer_sequence<int, I...>) {
  FragmentWgmma<N>::fma(a[0], a[1], a[2], a[3], b, acc[I]..., cute::SM90::GMMA::ScaleOut::One);
}

// acc += a x b, N columns wide, with a thread's part of a in registers.
template <int N, int Size>
__device__ __forceinline__ void fragment_wgmma(uint32_t const (&a)[4], uint64_t b, float (&acc)[Size]) {
  fragment_wgmma<N>(a, b, acc, std::make_integer_sequence<int, N / 2>{});
}

// The instruction for a 64 x N x 32 product of E4M3 codes, both along the contracted axis.
template <int N>
struct CodesWgmma;
template <>
struct CodesWgmma<128> : cute::SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_SS_TN<> {};
template <>
struct CodesWgmma<192> : cute::SM90::GMMA::MMA_64x192x32_F32E4M3E4M3_SS_TN<> {};

template <int N, int... I>
__device__ __forceinline__ void codes_wgmma(uint64_t a, uint64_t b, float (&acc)[N / 2], cute::SM90::GMMA::ScaleOut add,
                                            std::integer_sequence<int, I...>) {
  CodesWgmma<N>::fma(a, b, acc[I]..., add);
}

// acc = a x b, or with `add` acc += a x b, of N columns of E4M3 codes.
template <int N>
__device__ __forceinline__ void codes_wgmma(uint64_t a, uint64_t b, float (&acc)[N / 2], bool add) {
  using cute::SM90::GMMA::ScaleOut;
  codes_wgmma<N>(a, b, acc, add ? ScaleOut::One : ScaleOut::Zero, std::make_integer_sequence<int, N / 2>{});
}

template <class Op, int Size, int... I>
__device__ __forceinline__ void wgmma(uint64_t a, uint64_t b, float (&acc)[Size], std::integer_sequence<int, I...>) {
  Op::fma(a, b, acc[I]..., cute::SM90::GMMA::ScaleOut::One);
}

// acc += a x b, N columns wide. The descriptors address [64][64] blocks with 128-byte swizzle.
template <class T, int N, Major A, Major B, int Size>
__device__ __forceinline__ void wgmma(uint64_t a, uint64_t b, float (&acc)[Size]) {
  wgmma<Wgmma<T, N, A, B>>(a, b, acc, std::make_integer_sequence<int, N / 2>{});
}

// Lower half of the descriptor of an operand of swizzled [..][64] blocks: its address, and the bytes between blocks that are
// neighbours along M or N. The address's upper bits, which number the block in its cluster, are left out.
__device__ __forceinline__ uint32_t operand(uint32_t address, uint32_t block_bytes) {
  return (address & 0x3ffff) >> 4 | block_bytes >> 4 << 16;
}

// The whole descriptor, of what lies `bytes` behind the operand.
__device__ __forceinline__ uint64_t descriptor(uint32_t operand, uint32_t bytes) {
  constexpr uint32_t upper = (8 * 128) >> 4 | 1 << 30;  // rows of 8 lie 1024 bytes apart; 128-byte swizzle
  return static_cast<uint64_t>(upper) << 32 | (operand + (bytes >> 4));
}

// Bytes to the k16-th 16 elements of the contracted axis: they are 32 bytes of a K-major row, or 16 MN-major rows.
template <Major major>
__host__ __device__ constexpr uint32_t bytes_to(int k16) {
  return k16 * (major == Major::K ? 32 : 16 * kRowBytes);
}

// Loads one box. With Multicast > 1 every block of the cluster that `mask` names gets it, at the same address.
template <int Multicast, class... Coordinates>
__device__ __forceinline__ void load_box(CUtensorMap const& map, Barrier& full, void* smem, uint16_t mask,
                                         Coordinates... at) {
  auto* barrier = reinterpret_cast<uint64_t*>(&full);
  constexpr auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  if constexpr (Multicast > 1) {
    cute::SM90_TMA_LOAD_MULTICAST::copy(&map, barrier, mask, hint, smem, at...);
  } else {
    cute::SM90_TMA_LOAD::copy(&map, barrier, hint, smem, at...);
  }
}

// Asks for the line of an address in memory to be in the L2 cache soon.
__device__ __forceinline__ void prefetch_line(void const* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Loads 4 bytes at an address in shared memory.
__device__ __forceinline__ uint32_t load_shared_word(uint32_t from) {
  uint32_t found;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(from) : "memory");
  return found;
}

__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(warpgroup + 1), "n"(kWarpgroup) : "memory");
}

}  // namespace latent_moe::sm90
