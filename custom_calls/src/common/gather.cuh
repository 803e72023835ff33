// Copies rows of a table to workspace, where TMA reads them, in the order in which tiles need them, while other rows are
// multiplied. The warps beside the producer thread do it. Loading rows directly into the stages, as SonicMoE does (arXiv
// 2512.14080), was slower here, because every column of tiles loads its rows again
// (benchmarks/results/profiles/h200-2026-11-26.md).
#pragma once

#include "common/args.h"
#include "common/device.cuh"

namespace latent_moe {

constexpr int kGatherers = 2;  // warps of a block of grouped_kernel.cuh; one of widened_kernel.cuh does it alone
constexpr int kChunk = 8;  // rows that a warp takes at a time
static_assert(kReadyRows % kChunk == 0);

// Whether this SM is near the second L2 slice. Its blocks take tiles, and rows to gather, from the end (queue.cuh).
__device__ __forceinline__ bool takes_last_first(L2Slices const& slices) {
  uint32_t sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  return sm < L2Slices::kMaxSms && (slices.bits[sm / 32] >> sm % 32 & 1);
}

// Orders writes of threads to memory, or writes that they have seen, before TMA's reads of it.
__device__ __forceinline__ void fence_tma() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

template <class T>
__device__ __forceinline__ uint4 times(uint4 unit, float weight) {
  const auto product = [&](uint32_t pair) {
    const float2 x = unpack<T>(pair);
    return pack<T>(weight * x.x, weight * x.y);
  };
  return {product(unit.x), product(unit.y), product(unit.z), product(unit.w)};
}

// Each gathering warp calls it. Copies chunks of rows of elements T, in the order in which tiles are taken.
template <class T>
__device__ __forceinline__ void gather_rows(Gather const& gather, int num_rows, bool last_first) {
  const int lane = threadIdx.x % 32, chunks = ceil_div(num_rows, kChunk);
  while (true) {
    unsigned long long taken = 0;
    if (lane == 0) taken = atomicAdd(gather.taken, last_first ? 1ull << 32 : 1);
    taken = __shfl_sync(~0u, taken, 0);
    const int from_first = static_cast<int>(taken), from_last = static_cast<int>(taken >> 32);
    if (from_first + from_last >= chunks) return;
    const int first = (last_first ? chunks - 1 - from_last : from_first) * kChunk;
    const int count = min(kChunk, num_rows - first);
    const int own = first + min(lane, count - 1), id = min(max(gather.row_ids[own], 0), gather.table_rows - 1);
    const float own_weight = gather.weights == nullptr ? 1.0f : gather.weights[own];
    for (int row = 0; row < count; ++row) {
      const auto* from = gather.table + int64_t{__shfl_sync(~0u, id, row)} * gather.units;
      auto* to = gather.rows + int64_t{first + row} * gather.units;
      const float weight = __shfl_sync(~0u, own_weight, row);
      for (int unit = lane; unit < gather.units; unit += 4 * 32) {
        uint4 units[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (unit + 32 * i < gather.units) units[i] = __ldg(from + unit + 32 * i);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (gather.weights != nullptr) units[i] = times<T>(units[i], weight);
          if (unit + 32 * i < gather.units) to[unit + 32 * i] = units[i];
        }
      }
    }
    __threadfence();
    fence_tma();
    __syncwarp();
    if (lane == 0) {
      atomicAdd(gather.ready + 1 + first / kReadyRows, count);
      atomicAdd(gather.ready, count);
    }
  }
}

// The rows that a thread knows to be copied.
class RowsReady {
 public:
  // Waits for rows first ... first + count - 1.
  __device__ __forceinline__ void wait(Gather const& gather, int num_rows, int first, int count) {
    if (all_) return;
    const int last_block = (first + count - 1) / kReadyRows;
    for (int block = first / kReadyRows; block <= last_block; block += 4) {
      if ((all_ = load(gather.ready) == num_rows)) break;
      bool ready;
      do {
        ready = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = min(block + i, last_block);
          ready &= load(gather.ready + 1 + at) == min(kReadyRows, num_rows - at * kReadyRows);
        }
      } while (!ready);
    }
    __threadfence();
    fence_tma();
  }

 private:
  static __device__ __forceinline__ int load(int32_t const* counter) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
  }

  bool all_ = false;
};

}  // namespace latent_moe
