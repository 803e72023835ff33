// Stores the sums of a warpgroup that multiplied features of a widened weight by rows: rounded, or through an activation.
//
// A thread holds the sums of two features, in pairs of neighbouring rows. The warps of a warpgroup transpose 64 rows on their way
// through shared memory, and write up to 128 bytes of a row. With a gated activation a thread's features are a gate and its up
// half.
#pragma once

#include "common/schedule.cuh"
#include "cutlass/arch/memory.h"
#include "sm90/activation.cuh"
#include "sm90/instructions.cuh"

namespace latent_moe::sm90 {

// Spec has the static constants kFormat, kActivation, kResidual, kTile, kHalves and kConsumers (spec.h).
template <class Spec>
class WidenedEpilogue {
  static constexpr Activation kActivation = Spec::kActivation;
  static constexpr bool kGated = Spec::kHalves, kActivates = Spec::kActivates;
  static constexpr bool kGate = Spec::kResidual == Residual::kGateHidden;
  static constexpr int kRows = 64;                    // that are in shared memory at a time
  static constexpr int kColumns = kGated ? 32 : 64;   // features of a warpgroup
  using T = Element<Spec::kFormat>;

 public:
  static constexpr int kSharedBytes = Spec::kConsumers * kRows * kRowBytes;

  __device__ WidenedEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args), params_(args), warpgroup_(warpgroup), thread_(thread), base_(shared + warpgroup * kRows * kRowBytes) {}

  // Stores a tile: acc[i] is the element in row 8 (i / 4) + 2 (lane % 4) + i % 2, of the thread's feature i / 2 % 2. If Scales is
  // true, it is multiplied by that feature's scale.
  template <bool Scales, int Size>
  __device__ __forceinline__ void finish(float const (&acc)[Size], float const (&scales)[2], Work const& work) const {
    const int column = work.column + warpgroup_ * kColumns;
#pragma unroll
    for (int first = 0; first < 2 * Size; first += kRows) {
      if (first >= work.valid) break;
      // Pairs of 16 rows each, by eights of rows and then by features.
      uint32_t p[kRows / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
        float x = acc[first / 2 + 2 * i], y = acc[first / 2 + 2 * i + 1];
        if (Scales) x *= scales[i % 2], y *= scales[i % 2];
        if (kGate && i % 2 == 0) x = gate_to_keep<kActivation>(x), y = gate_to_keep<kActivation>(y);
        p[i / 4][i % 4] = pack<T>(x, y);
      }
      const int row = work.row + first, rows = work.valid - first;
      if constexpr (!kActivates) {
        store(p, args_.out, args_.problem.out_columns, row, rows, column);
      } else if constexpr (!kGated) {
        if (args_.keep_residual) store(p, args_.out, args_.problem.out_columns, row, rows, column);
        activate(p, 0, 1);
        store(p, args_.hidden, args_.problem.out_columns, row, rows, column);
      } else if (kGate && args_.keep_residual) {
        activate(p, 1, 2);
        store(p, args_.out, 2 * int64_t{args_.problem.out_columns}, row, rows, column);
      } else {
        if (args_.keep_residual) store(p, args_.out, 2 * int64_t{args_.problem.out_columns}, row, rows, column);
        activate(p, 0, 2);
        store(p, args_.hidden, args_.problem.out_columns, row, rows, column, kColumns / 8);
      }
    }
  }

 private:
  // Puts hidden elements in the place of every `apart`-th register from `to` on. Gates are in registers of even numbers.
  __device__ __forceinline__ void activate(uint32_t (&p)[kRows / 16][4], int to, int apart) const {
#pragma unroll
    for (int sixteen = 0; sixteen < kRows / 16; ++sixteen) {
#pragma unroll
      for (int i = 0; i < 4; i += apart) {
        p[sixteen][i + to] = hidden<T, kActivation>(p[sixteen][i], kGated ? p[sixteen][i + 1] : 0, params_);
      }
    }
  }

  // Stores 64 rows of the warpgroup's columns, up to the last row (`rows`) and column of a matrix. Only the first `eights` of 8
  // columns are stored. Those of a gated activation's second feature lie out_columns further on.
  __device__ __forceinline__ void store(uint32_t const (&p)[kRows / 16][4], void* matrix, int64_t pitch, int first, int rows,
                                        int column, int eights = 8) const {
    const int warp = thread_ / 32, lane = thread_ % 32, second = lane / 8 % 2;
    sync_warpgroup(warpgroup_);  // the rows before these are written
#pragma unroll
    for (int sixteen = 0; sixteen < kRows / 16; ++sixteen) {
      cute::SM90_U16x8_STSM_T::copy(
          p[sixteen][0], p[sixteen][1], p[sixteen][2], p[sixteen][3],
          *at(16 * sixteen + lane / 16 * 8 + lane % 8, kGated ? warp + 4 * second : 2 * warp + second));
    }
    sync_warpgroup(warpgroup_);
    constexpr int kApart = kWarpgroup / 8, kEach = kRows / kApart;  // rows from one of a thread's rows to the next one
    const int eight = thread_ % 8, row = thread_ / 8, offset = kGated ? eight % 4 * 8 : eight * 8;
    if (eight >= eights || column + offset >= args_.problem.out_columns) return;
    cute::uint128_t units[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) units[i] = *at(row + i * kApart, eight);
    T* to = static_cast<T*>(matrix) + (first + row) * pitch + column + offset;
    if (kGated && eight >= 4) to += args_.problem.out_columns;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      cutlass::arch::global_store<cute::uint128_t, sizeof(cute::uint128_t)>(units[i], to + i * kApart * pitch,
                                                                            row + i * kApart < rows);
    }
  }

  // The address of 8 columns of a row, swizzled so that neither access pattern has bank conflicts.
  __device__ __forceinline__ cute::uint128_t* at(int row, int eight) const {
    return reinterpret_cast<cute::uint128_t*>(base_ + row * kRowBytes + ((eight ^ (row & 7)) << 4));
  }

  Args const& args_;
  ActivationParams params_;
  int warpgroup_, thread_;
  char* base_;
};

}  // namespace latent_moe::sm90
