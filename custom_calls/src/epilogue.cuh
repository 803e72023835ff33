// From accumulators to memory: rounded, through the expert's activation or its gradient.
//
// Each warp sends its 16 rows through 2 KB of shared memory of its own, to write 128 bytes of a row at a time. Stores of
// the copy engine would wait in its queue behind the loads of the coming tiles, and the warpgroup with them.
#pragma once

#include "activation.cuh"
#include "schedule.cuh"

namespace latent_moe {

constexpr int kWarpRows = 16;
constexpr int kPieceBytes = kWarpRows * 128;  // a warp's part of a [64][64] block

// Part of a matrix of 16-bit elements in memory: `rows` rows of `columns`, from `start` on; others are not touched.
template <class T>
struct Part {
  T* start;
  int64_t pitch;
  int rows, columns;
};

// A warp's [16][64] elements in shared memory, swizzled so that neither way of access meets a bank twice.
template <class T>
class Piece {
 public:
  __device__ explicit Piece(char* base) : base_(base) {}

  // As one thread of a warpgroup holds them after a product, as pairs, 16 columns (a quarter) at a time: pair i stands
  // in row 8 (i % 2) + lane / 4, at column 16 quarter + 8 (i / 2) + 2 (lane % 4).
  __device__ __forceinline__ void put(uint32_t const (&p)[4], int quarter, int lane) const {
    cute::SM90_U32x4_STSM_N::copy(p[0], p[1], p[2], p[3], *at(lane % 16, 2 * quarter + lane / 16));
  }
  __device__ __forceinline__ void get(uint32_t (&p)[4], int quarter, int lane) const {
    cute::SM75_U32x4_LDSM_N::copy(*at(lane % 16, 2 * quarter + lane / 16), p[0], p[1], p[2], p[3]);
  }

  // Writes what the whole warp has put.
  __device__ __forceinline__ void write(Part<T> const& to, int lane) const {
    const int column = lane % 8;
    if (column * 8 >= to.columns) return;
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const int row = lane / 8 + 4 * i;
      if (row < to.rows) *reinterpret_cast<cute::uint128_t*>(to.start + row * to.pitch + column * 8) = *at(row, column);
    }
  }

  // Starts to read, for the whole warp; rows and columns beyond the part become zero.
  __device__ __forceinline__ void read(Part<T> const& from, int lane) const {
    const int column = lane % 8;
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const int row = lane / 8 + 4 * i;
      const bool inside = row < from.rows && column * 8 < from.columns;
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<cute::uint128_t const*>(inside ? from.start + row * from.pitch + column * 8 : from.start),
          *at(row, column), inside);
    }
  }

 private:
  __device__ __forceinline__ cute::uint128_t* at(int row, int column) const {
    return reinterpret_cast<cute::uint128_t*>(base_ + row * 128 + ((column ^ (row & 7)) << 4));
  }

  char* base_;
};

template <int I>
class RowEpilogue {
  static constexpr Instance kInstance = kInstances[I];
  static constexpr Tile kTile = kInstance.tile;
  static constexpr Activation kActivation = kInstance.activation;
  static constexpr bool kOuter = kInstance.contraction == Contraction::kOuter;
  static constexpr bool kGradient = kInstance.epilogue == Epilogue::kActivationGrad;
  static constexpr int kColumnBlocks = kTile.columns / kBlock;
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr int kHalves = kGated ? 2 : 1;
  // Whether the gradient also makes the hidden rows again, times their weights, of the pre-activation that it reads
  // (SonicMoE does).
  static constexpr bool kRemakes = kGradient && !keeps_hidden(kActivation);
  // Blocks of what was kept that are in shared memory, or on their way there while the tile is multiplied.
  static constexpr int kAhead = kRemakes ? 2 : 3;
  using T = std::conditional_t<kInstance.type == Type::kF16, __half, __nv_bfloat16>;
  using Accumulator = float[kTile.columns / 2];

 public:
  static constexpr int kPiecesOfWarp = kGradient ? kAhead * kHalves + kRemakes : 1;
  static constexpr int kSharedBytes = kConsumers * 4 * kPiecesOfWarp * kPieceBytes;

  __device__ RowEpilogue(Args const& args, char* shared)
      : args_(args),
        params_{args.beta, 1.0f / args.beta, args.linear_beta, 1.0f / args.linear_beta},
        base_(shared + threadIdx.x / 32 * kPiecesOfWarp * kPieceBytes),
        warp_(threadIdx.x / 32 % 4),
        lane_(threadIdx.x % 32) {}

  // Before the products of a tile: the first blocks of what was kept are sent for.
  __device__ __forceinline__ void begin(Work const& work) const {
    if constexpr (kGradient) {
#pragma unroll
      for (int step = 0; step < kAhead; ++step) read_kept(work, step);
    }
  }

  // Stores a tile of which `Blocks` 64-row blocks hold rows.
  template <int Blocks>
  __device__ __forceinline__ void finish(Accumulator const (&acc)[Blocks], Work const& work) const {
    if constexpr (kGradient) {
      store_gradient<Blocks>(acc, work);
    } else {
#pragma unroll
      for (int block = 0; block < Blocks; ++block) {
#pragma unroll
        for (int c = 0; c < (kGated ? kColumnBlocks / 2 : kColumnBlocks); ++c) {
          if constexpr (kInstance.epilogue == Epilogue::kStore) {
            store(acc[block], c, args_.out, work, block, c);
          } else {
            store_activation(acc[block], work, block, c);
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ Piece<T> piece(int i) const { return Piece<T>(base_ + i * kPieceBytes); }

  // This warp's part of a column block of the tile; `half` 1 is the up half of gated pre-activations.
  __device__ __forceinline__ Part<T> part(void* matrix, Work const& work, int block, int c, int width, int half) const {
    const int first = block * kBlock + warp_ * kWarpRows, column = work.column + c * kBlock;
    const int64_t row = kOuter ? int64_t{work.expert} * args_.out_rows + work.out_row + first : work.row + first;
    const int rows = (kOuter ? args_.out_rows - work.out_row : work.valid) - first;
    auto* start = static_cast<T*>(matrix) + row * width + half * args_.out_columns + column;
    return {start, width, rows, args_.out_columns - column};
  }

  __device__ __forceinline__ void write(Piece<T> const& piece, Part<T> const& to) const {
    __syncwarp();
    piece.write(to, lane_);
    __syncwarp();
  }

  static __device__ __forceinline__ void round(uint32_t (&p)[4], Accumulator const& acc, int column_block, int quarter) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = column_block * 32 + quarter * 8 + 2 * i;
      p[i] = pack<T>(acc[at], acc[at + 1]);
    }
  }

  __device__ __forceinline__ void store(Accumulator const& acc, int acc_block, void* out, Work const& work, int block,
                                        int c, int half = 0) const {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint32_t p[4];
      round(p, acc, acc_block, quarter);
      piece(0).put(p, quarter, lane_);
    }
    write(piece(0), part(out, work, block, c, kHalves * args_.out_columns, half));
  }

  __device__ __forceinline__ void store_activation(Accumulator const& acc, Work const& work, int block, int c) const {
    if (args_.keep_pre) {
      store(acc, c, args_.out, work, block, c);
      if constexpr (kGated) store(acc, kColumnBlocks / 2 + c, args_.out, work, block, c, 1);
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint32_t gate[4], up[4] = {};
      round(gate, acc, c, quarter);
      if constexpr (kGated) round(up, acc, kColumnBlocks / 2 + c, quarter);
      // The activation reads what was rounded, as the backward pass will.
#pragma unroll
      for (int i = 0; i < 4; ++i) gate[i] = hidden(gate[i], up[i]);
      piece(0).put(gate, quarter, lane_);
    }
    write(piece(0), part(args_.hidden, work, block, c, args_.out_columns, 0));
  }

  __device__ __forceinline__ uint32_t hidden(uint32_t gate, uint32_t up) const {
    float2 g = unpack<T>(gate), u = {1.0f, 1.0f};
    if constexpr (kGated) {
      u = unpack<T>(up);
      u = {up_value<kActivation>(u.x, params_).value, up_value<kActivation>(u.y, params_).value};
    }
    return pack<T>(gate_value<kActivation>(g.x, params_).value * u.x, gate_value<kActivation>(g.y, params_).value * u.y);
  }

  // Piece of what was kept of a step: a step is a column block, row block after row block.
  __device__ __forceinline__ Piece<T> kept(int step, int half) const { return piece(step % kAhead * kHalves + half); }

  __device__ __forceinline__ void read_kept(Work const& work, int step) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int block = step / kColumnBlocks, c = step % kColumnBlocks;
      Part<T> from = part(const_cast<void*>(args_.kept), work, block, c, kHalves * args_.out_columns, half);
      if (work.steps == 0) from.rows = 0;  // rows of nobody may hold anything
      kept(step, half).read(from, lane_);
    }
    cute::cp_async_fence();
  }

  // From the gradient of hidden rows (accumulated) to that of the pre-activation, which takes the place of what was
  // kept, and to weighted hidden rows where these were not; the rows' weights enter here, and their own gradient
  // <dhidden, hidden> leaves as one partial sum a column tile (SonicMoE, arXiv 2512.14080).
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
          kept(step, 0).get(gate, quarter, lane_);
          if constexpr (kGated) kept(step, 1).get(up, quarter, lane_);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = c * 32 + quarter * 8 + 2 * i;
            const float2 g = unpack<T>(gate[i]), u = kGated ? unpack<T>(up[i]) : float2{1.0f, 1.0f};
            const float dx = acc[block][at], dy = acc[block][at + 1], w = weight[i % 2];
            const Value gx = gate_value_of_kept<kActivation>(g.x, params_);
            const Value gy = gate_value_of_kept<kActivation>(g.y, params_);
            const Value ux = up_value<kActivation>(u.x, params_), uy = up_value<kActivation>(u.y, params_);
            const float hx = gx.value * ux.value, hy = gy.value * uy.value;
            dot[i % 2] += dx * hx + dy * hy;
            hidden[i] = pack<T>(w * hx, w * hy);
            gate[i] = pack<T>(w * dx * gx.slope * ux.value, w * dy * gy.slope * uy.value);
            if constexpr (kGated) up[i] = pack<T>(w * dx * gx.value * ux.slope, w * dy * gy.value * uy.slope);
          }
          kept(step, 0).put(gate, quarter, lane_);
          if constexpr (kGated) kept(step, 1).put(up, quarter, lane_);
          if constexpr (kRemakes) piece(kAhead * kHalves).put(hidden, quarter, lane_);
        }
        __syncwarp();
        if constexpr (kRemakes) {
          piece(kAhead * kHalves).write(part(args_.hidden, work, block, c, args_.out_columns, 0), lane_);
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          kept(step, half).write(part(args_.out, work, block, c, kHalves * args_.out_columns, half), lane_);
        }
        __syncwarp();
        if (step + kAhead < Blocks * kColumnBlocks) {
          read_kept(work, step + kAhead);
        } else {
          cute::cp_async_fence();  // an empty group: waits count groups
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        dot[half] += __shfl_xor_sync(~0u, dot[half], 1);
        dot[half] += __shfl_xor_sync(~0u, dot[half], 2);
        if (lane_ % 4 == 0 && row + 8 * half < work.valid && work.column < args_.out_columns) {
          const int64_t column_tile = work.column / kTile.columns;
          args_.partial[column_tile * args_.num_rows + work.row + row + 8 * half] = dot[half];
        }
      }
    }
  }

  Args const& args_;
  ActivationParams params_;
  char* base_;
  int warp_, lane_;
};

}  // namespace latent_moe
