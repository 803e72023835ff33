// Stores accumulators to memory: rounded, through an ungated activation, or through an activation's gradient.
//
// Each warp moves its 16 rows through its own 2 KB of shared memory, to write 128 bytes of a row at a time.
#pragma once

#include "common/schedule.cuh"
#include "sm90/activation.cuh"
#include "sm90/piece.cuh"

namespace latent_moe::sm90 {

// Spec has the static constants kFormat, kActivation, kResidual, kTile, kActivates and kDifferentiates (spec.h).
template <class Spec>
class RowEpilogue {
  static constexpr Tile kTile = Spec::kTile;
  static constexpr Activation kActivation = Spec::kActivation;
  static constexpr bool kGradient = Spec::kDifferentiates;
  static constexpr int kColumnBlocks = kTile.columns / kBlock;
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr int kHalves = kGated ? 2 : 1;
  // A gradient that reads the pre-activation also computes the hidden rows again, times their weights, as SonicMoE does
  // (arXiv 2512.14080).
  static constexpr bool kRemakes = kGradient && Spec::kResidual == Residual::kPre;
  // Blocks of the residual that are in shared memory, or being loaded, while the tile is multiplied.
  static constexpr int kAhead = kGated || kRemakes ? 1 : 3;
  using T = Element<product_format(Spec::kFormat)>;
  using Accumulator = float[kTile.columns / 2];

 public:
  static constexpr int kPiecesOfWarp = kGradient ? kAhead * kHalves + kRemakes : 1;
  static constexpr int kSharedBytes = Spec::kConsumers * 4 * kPiecesOfWarp * kPieceBytes;

  __device__ RowEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args),
        params_(args),
        base_(cute::cast_smem_ptr_to_uint(shared) + (warpgroup * 4 + thread / 32) * kPiecesOfWarp * kPieceBytes),
        warp_(thread / 32),
        lane_(thread % 32) {}

  // Called before the products of a tile: starts to load the first blocks of the residual.
  __device__ __forceinline__ void begin(Work const& work) const {
    if constexpr (kGradient) {
#pragma unroll
      for (int step = 0; step < kAhead; ++step) read_residual(work, step);
    }
  }

  // Stores a tile with rows in `Blocks` 64-row blocks.
  template <int Blocks>
  __device__ __forceinline__ void finish(Accumulator const (&acc)[Blocks], Work const& work) const {
    if constexpr (kGradient) {
      store_gradient<Blocks>(acc, work);
    } else {
#pragma unroll
      for (int block = 0; block < Blocks; ++block) store_block(acc[block], work, block);
    }
  }

  // Stores one 64-row block of a tile, which is not a gradient.
  __device__ __forceinline__ void store_block(Accumulator const& acc, Work const& work, int block) const {
    if constexpr (Spec::kActivates) {
      store_activation(acc, work, block);
    } else {
      const Strip<T> out = strip(args_.out, work, block);
#pragma unroll
      for (int c = 0; c < kColumnBlocks; ++c) store(acc, c, out, c);
    }
  }

 private:
  __device__ __forceinline__ Piece<T> piece(int i) const { return Piece<T>(base_ + i * kPieceBytes, lane_); }

  // This warp's rows in a row block of the tile. Half 1 is the up half of a gated activation.
  __device__ __forceinline__ Strip<T> strip(void* matrix, Work const& work, int block, int halves = 1, int half = 0) const {
    const int first = block * kBlock + warp_ * kWarpRows, columns = args_.problem.out_columns;
    const int64_t pitch = halves * columns;
    auto* start = static_cast<T*>(matrix) + (work.row + first) * pitch + half * columns + work.column;
    return {start, pitch, work.valid - first, columns - work.column, lane_};
  }

  __device__ __forceinline__ void write(Piece<T> const& piece, Strip<T> const& to, int c) const {
    __syncwarp();
    piece.write(to, c);
    __syncwarp();
  }

  __device__ __forceinline__ void store(Accumulator const& acc, int acc_block, Strip<T> const& out, int c) const {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint32_t p[4];
      round<T>(p, acc, acc_block, quarter);
      piece(0).put(p, quarter);
    }
    write(piece(0), out, c);
  }

  // Only ungated activations come here. Gated ones have swap-AB tiles (swap_ab_epilogue.cuh).
  __device__ __forceinline__ void store_activation(Accumulator const& acc, Work const& work, int block) const {
    static_assert(kGradient || !kGated);
    if (args_.keep_residual) {
      const Strip<T> pre = strip(args_.out, work, block);
#pragma unroll
      for (int c = 0; c < kColumnBlocks; ++c) store(acc, c, pre, c);
    }
    const Strip<T> out = strip(args_.hidden, work, block);
#pragma unroll
    for (int c = 0; c < kColumnBlocks; ++c) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        uint32_t p[4];
        round<T>(p, acc, c, quarter);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = hidden<T, kActivation>(p[i], 0, params_);
        piece(0).put(p, quarter);
      }
      write(piece(0), out, c);
    }
  }

  // The residual's piece of a step. A step is a column block, row block after row block.
  __device__ __forceinline__ Piece<T> residual(int step, int half) const { return piece(step % kAhead * kHalves + half); }

  __device__ __forceinline__ void read_residual(Work const& work, int step) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int block = step / kColumnBlocks, c = step % kColumnBlocks;
      Strip<T> from = strip(const_cast<void*>(args_.residual), work, block, kHalves, half);
      if (work.steps == 0) from.rows = 0;  // padding rows may hold anything
      residual(step, half).read(from, c);
    }
    cute::cp_async_fence();
  }

  // The accumulators hold the gradient of hidden rows. It becomes the pre-activation's gradient, which may overwrite the
  // residual. If kRemakes, weighted hidden rows are stored too. The gradient is multiplied by the rows' weights here, and the
  // weights' own gradient <dhidden, hidden> is stored as one partial sum per column tile (SonicMoE, arXiv 2512.14080).
  template <int Blocks>
  __device__ __forceinline__ void store_gradient(Accumulator const (&acc)[Blocks], Work const& work) const {
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      const int row = block * kBlock + warp_ * kWarpRows + lane_ / 4;
      float weight[2], dot[2] = {0.0f, 0.0f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = row + 8 * half < work.valid && work.steps > 0;
        weight[half] = inside ? args_.row_weights[work.row + row + 8 * half] : 0.0f;
      }
#pragma unroll
      for (int c = 0; c < kColumnBlocks; ++c) {
        const int step = block * kColumnBlocks + c;
        cute::cp_async_wait<kAhead - 1>();
        __syncwarp();
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
          uint32_t gate[4], up[4], hidden[4];
          residual(step, 0).get(gate, quarter);
          if constexpr (kGated) residual(step, 1).get(up, quarter);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = c * 32 + quarter * 8 + 2 * i;
            const float2 first = unpack<T>(gate[i]), second = kGated ? unpack<T>(up[i]) : float2{};
            const Slopes x = slopes_of_residual<kActivation, Spec::kResidual>(first.x, second.x, params_);
            const Slopes y = slopes_of_residual<kActivation, Spec::kResidual>(first.y, second.y, params_);
            const float dx = acc[block][at], dy = acc[block][at + 1], w = weight[i % 2];
            dot[i % 2] += dx * x.hidden + dy * y.hidden;
            hidden[i] = pack<T>(w * x.hidden, w * y.hidden);
            gate[i] = pack<T>(w * dx * x.gate, w * dy * y.gate);
            if constexpr (kGated) up[i] = pack<T>(w * dx * x.up, w * dy * y.up);
          }
          residual(step, 0).put(gate, quarter);
          if constexpr (kGated) residual(step, 1).put(up, quarter);
          if constexpr (kRemakes) piece(kAhead * kHalves).put(hidden, quarter);
        }
        __syncwarp();
        if constexpr (kRemakes) {
          piece(kAhead * kHalves).write(strip(args_.hidden, work, block), c);
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          residual(step, half).write(strip(args_.out, work, block, kHalves, half), c);
        }
        __syncwarp();
        if (step + kAhead < Blocks * kColumnBlocks) {
          read_residual(work, step + kAhead);
        } else {
          cute::cp_async_fence();  // an empty group, because waits count groups
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        dot[half] += __shfl_xor_sync(~0u, dot[half], 1);
        dot[half] += __shfl_xor_sync(~0u, dot[half], 2);
        if (lane_ % 4 == 0 && row + 8 * half < work.valid && work.column < args_.problem.out_columns) {
          const int64_t column_tile = work.column / kTile.columns;
          args_.partial[column_tile * args_.problem.num_rows + work.row + row + 8 * half] = dot[half];
        }
      }
    }
  }

  Args const& args_;
  ActivationParams params_;
  uint32_t base_;
  int warp_, lane_;
};

}  // namespace latent_moe::sm90
