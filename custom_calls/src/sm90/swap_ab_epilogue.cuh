// Stores the accumulators of a swap-AB tile, which hold the transposed product: rounded, or through a gated activation.
//
// The four warps of a warpgroup move 16 rows of all columns through shared memory. They transpose the rows on the way in,
// and write whole blocks of a row on the way out. With a gated activation, a thread holds the gate and the up half of the
// same element in the two blocks of columns. Hidden rows become a third block, or overwrite the up half.
#pragma once

#include "common/schedule.cuh"
#include "sm90/activation.cuh"
#include "sm90/instructions.cuh"

namespace latent_moe::sm90 {

// Spec has the static constants kFormat, kActivation, kResidual, kTile and kHalves (spec.h).
template <class Spec>
class SwapAbEpilogue {
  static constexpr Tile kTile = Spec::kTile;
  static constexpr Activation kActivation = Spec::kActivation;
  static constexpr bool kGated = Spec::kHalves;
  static constexpr int kBlocks = kTile.columns / kBlock;
  static_assert(!kGated || kBlocks == 2, "one block of gates, and one of the up half");
  static constexpr bool kGate = Spec::kResidual == Residual::kGateHidden;
  static constexpr int kOutBlocks = kGated && !kGate ? 3 : kBlocks;
  static constexpr int kRows = 16;  // that are in shared memory at a time
  static constexpr int kPitch = kOutBlocks * kRowBytes;
  using T = Element<Spec::kFormat>;
  using Accumulator = float[kTile.rows / 2];

 public:
  static constexpr int kSharedBytes = Spec::kConsumers * kRows * kPitch;

  __device__ SwapAbEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args),
        params_(args),
        warpgroup_(warpgroup),
        warp_(thread / 32),
        lane_(thread % 32),
        base_(shared + warpgroup_ * kRows * kPitch) {}

  // Stores a tile: acc[b][i] is the element in row 8 (i / 4) + 2 (lane % 4) + i % 2, at column
  // 64 b + 16 warp + 8 (i / 2 % 2) + lane / 4.
  __device__ __forceinline__ void finish(Accumulator const (&acc)[kBlocks], Work const& work) const {
#pragma unroll
    for (int first = 0; first < kTile.rows; first += kRows) {
      if (first >= work.valid) break;
      uint32_t p[kBlocks][4];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x = acc[block][first / 2 + 2 * i], y = acc[block][first / 2 + 2 * i + 1];
          if (kGate && block == 0) x = gate_to_keep<kActivation>(x), y = gate_to_keep<kActivation>(y);
          p[block][i] = pack<T>(x, y);
        }
        if (!kGated || (args_.keep_residual && !(kGate && block == 1))) put(p[block], block);
      }
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[0][i] = hidden<T, kActivation>(p[0][i], p[1][i], params_);
        put(p[0], kOutBlocks - 1);
      }
      sync_warpgroup(warpgroup_);
      const int row = work.row + first, rows = work.valid - first;
      if constexpr (kGated) {
        if (args_.keep_residual) {
          const int64_t pitch = 2 * int64_t{args_.problem.out_columns};
          write<1>(0, args_.out, pitch, row, rows, work.column, 0);
          write<1>(1, args_.out, pitch, row, rows, work.column, args_.problem.out_columns);
        }
        if (!kGate || !args_.keep_residual) {
          write<1>(kOutBlocks - 1, args_.hidden, args_.problem.out_columns, row, rows, work.column, 0);
        }
      } else {
        write<kBlocks>(0, args_.out, args_.problem.out_columns, row, rows, work.column, 0);
      }
      sync_warpgroup(warpgroup_);
    }
  }

 private:
  __device__ __forceinline__ void put(uint32_t const (&p)[4], int block) const {
    cute::SM90_U16x8_STSM_T::copy(p[0], p[1], p[2], p[3],
                                  *at(lane_ / 16 * 8 + lane_ % 8, block * 8 + warp_ * 2 + lane_ / 8 % 2));
  }

  // Writes the blocks `from`, ... of this warp's four rows to the columns `offset` + column, ... of a matrix, up to its last
  // row (`rows`) and column.
  template <int Blocks>
  __device__ __forceinline__ void write(int from, void* matrix, int64_t pitch, int first, int rows, int column,
                                        int offset) const {
    constexpr int kEights = Blocks * 8;  // of a row
#pragma unroll
    for (int i = 0; i < Blocks; ++i) {
      const int place = i * 32 + lane_, row = warp_ * 4 + place / kEights, eight = place % kEights;
      if (row >= rows || column + eight * 8 >= args_.problem.out_columns) continue;
      T* to = static_cast<T*>(matrix) + (first + row) * pitch + offset + column + eight * 8;
      *reinterpret_cast<cute::uint128_t*>(to) = *at(row, from * 8 + eight);
    }
  }

  // The address of 8 columns of a row, swizzled so that neither access pattern has bank conflicts.
  __device__ __forceinline__ cute::uint128_t* at(int row, int eight) const {
    return reinterpret_cast<cute::uint128_t*>(base_ + row * kPitch + ((eight ^ (row & 7)) << 4));
  }

  Args const& args_;
  ActivationParams params_;
  int warpgroup_, warp_, lane_;
  char* base_;
};

}  // namespace latent_moe::sm90
