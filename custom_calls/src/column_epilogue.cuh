// From the accumulators of a turned tile, whose product is transposed, to memory.
//
// The four warps of a warpgroup send 16 rows of all its columns through shared memory, turned over on the way in, and
// write 256 bytes of a row at a time out of it.
#pragma once

#include "schedule.cuh"

namespace latent_moe {

template <int I>
class ColumnEpilogue {
  static constexpr Instance kInstance = kInstances[I];
  static constexpr Tile kTile = kInstance.tile;
  static constexpr int kBlocks = kTile.columns / kBlock / (is_shared(kTile) ? kConsumers : 1);  // of a warpgroup
  static constexpr int kRows = 16;                     // that are in shared memory at a time
  static constexpr int kPitch = kBlocks * kBlock * 2;  // bytes
  static constexpr int kEights = kBlocks * 8;          // columns of a row, 8 at a time
  using T = std::conditional_t<kInstance.type == Type::kF16, __half, __nv_bfloat16>;
  using Accumulator = float[kTile.rows / 2];

 public:
  static constexpr int kSharedBytes = kConsumers * kRows * kPitch;

  __device__ ColumnEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args),
        warpgroup_(warpgroup),
        warp_(thread / 32),
        lane_(thread % 32),
        base_(shared + warpgroup_ * kRows * kPitch) {}

  // Stores a warpgroup's tile, or its half of one that both share: acc[b][i] stands in column
  // 64 b + 16 warp + 8 (i / 2 % 2) + lane / 4, at row 8 (i / 4) + 2 (lane % 4) + i % 2.
  __device__ __forceinline__ void finish(Accumulator const (&acc)[kBlocks], Work const& work) const {
#pragma unroll
    for (int first = 0; first < kTile.rows; first += kRows) {
      if (first >= work.valid) break;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = pack<T>(acc[block][first / 2 + 2 * i], acc[block][first / 2 + 2 * i + 1]);
        cute::SM90_U16x8_STSM_T::copy(p[0], p[1], p[2], p[3],
                                      *at(lane_ / 16 * 8 + lane_ % 8, block * 8 + warp_ * 2 + lane_ / 8 % 2));
      }
      sync_warpgroup(warpgroup_);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int place = i * 32 + lane_;  // in this warp's four rows
        const int row = warp_ * 4 + place / kEights, column = work.column + place % kEights * 8;
        if (first + row >= work.valid || column >= args_.out_columns) continue;
        T* to = static_cast<T*>(args_.out) + int64_t{work.row + first + row} * args_.out_columns + column;
        *reinterpret_cast<cute::uint128_t*>(to) = *at(row, place % kEights);
      }
      sync_warpgroup(warpgroup_);
    }
  }

 private:
  // A place of 8 columns of a row, swizzled so that neither way of access meets a bank twice.
  __device__ __forceinline__ cute::uint128_t* at(int row, int eight) const {
    return reinterpret_cast<cute::uint128_t*>(base_ + row * kPitch + ((eight ^ (row & 7)) << 4));
  }

  Args const& args_;
  int warpgroup_, warp_, lane_;
  char* base_;
};

}  // namespace latent_moe
