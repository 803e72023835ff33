// From the accumulators of a turned tile, whose product is transposed, to memory: rounded, or through a gated activation.
//
// The four warps of a warpgroup send 16 rows of all its columns through shared memory, turned over on the way in, and
// write whole blocks of a row at a time out of it. Of a gated activation a thread holds gate and up half of the same
// element, in the two blocks of columns; hidden rows become another block.
#pragma once

#include "activation.cuh"
#include "schedule.cuh"

namespace latent_moe {

template <int I>
class ColumnEpilogue {
  static constexpr Instance kInstance = kInstances[I];
  static constexpr Tile kTile = kInstance.tile;
  static constexpr Activation kActivation = kInstance.activation;
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr int kBlocks = kTile.columns / kBlock;
  static_assert(!kGated || kBlocks == 2, "one block of gates, and one of what they are multiplied with");
  static constexpr bool kGate = keeps_gate(kActivation);
  static constexpr int kOutBlocks = kGated && !kGate ? 3 : kBlocks;
  static constexpr int kRows = 16;                        // that are in shared memory at a time
  static constexpr int kPitch = kOutBlocks * kBlock * 2;  // bytes
  using T = std::conditional_t<kInstance.type == Type::kF16, __half, __nv_bfloat16>;
  using Accumulator = float[kTile.rows / 2];

 public:
  static constexpr int kSharedBytes = kConsumers * kRows * kPitch;

  __device__ ColumnEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args),
        params_(args),
        warpgroup_(warpgroup),
        warp_(thread / 32),
        lane_(thread % 32),
        base_(shared + warpgroup_ * kRows * kPitch) {}

  // Stores a tile: acc[b][i] stands in column 64 b + 16 warp + 8 (i / 2 % 2) + lane / 4, at row
  // 8 (i / 4) + 2 (lane % 4) + i % 2.
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
        if (!kGated || (args_.keep_pre && !(kGate && block == 1))) put(p[block], block);
      }
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[0][i] = hidden<T, kActivation>(p[0][i], p[1][i], params_);
        put(p[0], kOutBlocks - 1);
      }
      sync_warpgroup(warpgroup_);
      const int row = work.row + first, rows = work.valid - first;
      if constexpr (kGated) {
        if (args_.keep_pre) {
          const int64_t pitch = 2 * int64_t{args_.out_columns};
          write<1>(0, args_.out, pitch, row, rows, work.column, 0);
          write<1>(1, args_.out, pitch, row, rows, work.column, args_.out_columns);
        }
        if (!kGate || !args_.keep_pre) {
          write<1>(kOutBlocks - 1, args_.hidden, args_.out_columns, row, rows, work.column, 0);
        }
      } else {
        write<kBlocks>(0, args_.out, args_.out_columns, row, rows, work.column, 0);
      }
      sync_warpgroup(warpgroup_);
    }
  }

 private:
  __device__ __forceinline__ void put(uint32_t const (&p)[4], int block) const {
    cute::SM90_U16x8_STSM_T::copy(p[0], p[1], p[2], p[3],
                                  *at(lane_ / 16 * 8 + lane_ % 8, block * 8 + warp_ * 2 + lane_ / 8 % 2));
  }

  // Blocks `from`, ... of this warp's four rows, to columns `offset` + column, ... of a matrix; as many of `rows` rows
  // and `out_columns` columns as there are.
  template <int Blocks>
  __device__ __forceinline__ void write(int from, void* matrix, int64_t pitch, int first, int rows, int column,
                                        int offset) const {
    constexpr int kEights = Blocks * 8;  // of a row
#pragma unroll
    for (int i = 0; i < Blocks; ++i) {
      const int place = i * 32 + lane_, row = warp_ * 4 + place / kEights, eight = place % kEights;
      if (row >= rows || column + eight * 8 >= args_.out_columns) continue;
      T* to = static_cast<T*>(matrix) + (first + row) * pitch + offset + column + eight * 8;
      *reinterpret_cast<cute::uint128_t*>(to) = *at(row, from * 8 + eight);
    }
  }

  // A place of 8 columns of a row, swizzled so that neither way of access meets a bank twice.
  __device__ __forceinline__ cute::uint128_t* at(int row, int eight) const {
    return reinterpret_cast<cute::uint128_t*>(base_ + row * kPitch + ((eight ^ (row & 7)) << 4));
  }

  Args const& args_;
  ActivationParams params_;
  int warpgroup_, warp_, lane_;
  char* base_;
};

}  // namespace latent_moe
