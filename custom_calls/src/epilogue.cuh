// From accumulators to memory: rounded, through the expert's activation or its gradient, by the copy engine.
#pragma once

#include "activation.cuh"
#include "schedule.cuh"

namespace latent_moe {

// The accumulators that one thread of a warpgroup holds of a [64][64] block, as pairs of 16-bit elements: pair 4 q + i
// stands in row 8 (i % 2) + lane / 4 of its warp's 16 rows, at column 16 q + 8 (i / 2) + 2 (lane % 4).
using Pairs = uint32_t[16];

// Where a thread's 16 bytes of the q-th quarter stand in a block, swizzled as the copy engine expects.
__device__ __forceinline__ cute::uint128_t* quarter(char* block, int q, int thread) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane % 16, column = 2 * q + lane / 16;
  return reinterpret_cast<cute::uint128_t*>(block + row * 128 + ((column ^ (row & 7)) << 4));
}

__device__ __forceinline__ void store_pairs(uint32_t const (&p)[4], char* block, int q, int thread) {
  cute::SM90_U32x4_STSM_N::copy(p[0], p[1], p[2], p[3], *quarter(block, q, thread));
}

__device__ __forceinline__ void load_pairs(uint32_t (&p)[4], char* block, int q, int thread) {
  cute::SM75_U32x4_LDSM_N::copy(*quarter(block, q, thread), p[0], p[1], p[2], p[3]);
}

__device__ __forceinline__ void store_window(CUtensorMap const& map, char* block, int x, Window const& window) {
  cute::SM90_TMA_STORE::copy(&map, block, x, window.y, window.z, int32_t{Window::kAxis});
}

template <int I>
struct EpilogueOf {
  static constexpr Instance kInstance = kInstances[I];
  static constexpr Tile kTile = kInstance.tile;
  static constexpr Activation kActivation = kInstance.activation;
  static constexpr bool kOuter = kInstance.contraction == Contraction::kOuter;
  static constexpr int kColumnBlocks = kTile.columns / kBlock;
  static constexpr bool kGated = is_gated(kActivation);
  using T = std::conditional_t<kInstance.type == Type::kF16, __half, __nv_bfloat16>;
  using Accumulator = float[kTile.columns / 2];

  // A ring of [64][64] blocks in shared memory, on their way to memory.
  class Slots {
   public:
    __device__ explicit Slots(char* base) : base_(base) {}

    template <class... Coordinates>
    __device__ __forceinline__ void put(Pairs const& pairs, CUtensorMap const& map, int warpgroup, int thread,
                                        Coordinates... at_box) {
      char* slot = base_ + next_ * kBlockBytes;
      next_ = next_ + 1 == kTile.slots ? 0 : next_ + 1;
      if (thread == 0) cute::tma_store_wait<kTile.slots - 1>();
      sync_warpgroup(warpgroup);
#pragma unroll
      for (int q = 0; q < 4; ++q) store_pairs(reinterpret_cast<uint32_t const(&)[4]>(pairs[4 * q]), slot, q, thread);
      cute::tma_store_fence();
      sync_warpgroup(warpgroup);
      if (thread == 0) {
        cute::SM90_TMA_STORE::copy(&map, slot, at_box...);
        cute::tma_store_arrive();
      }
    }

   private:
    char* base_;
    int next_ = 0;
  };

  static __device__ __forceinline__ void pairs_of(Pairs& pairs, Accumulator const& acc, int column_block) {
#pragma unroll
    for (int i = 0; i < 16; ++i) pairs[i] = pack<T>(acc[column_block * 32 + 2 * i], acc[column_block * 32 + 2 * i + 1]);
  }

  // Stores one 64-row block of the tile.
  static __device__ __forceinline__ void store(Args const& args, Slots& slots, Accumulator const& acc, Work const& work,
                                               int block, int warpgroup, int thread) {
    const int first = block * kBlock;
    const Window window(work.row + first, min(kBlock, work.valid - first));  // ends with the expert
    const auto put = [&](Pairs const& pairs, CUtensorMap const& map, int x) {
      if constexpr (kOuter) {
        slots.put(pairs, map, warpgroup, thread, x, work.out_row + first, work.expert);
      } else {
        slots.put(pairs, map, warpgroup, thread, x, window.y, window.z, Window::kAxis);
      }
    };

    if constexpr (kInstance.epilogue == Epilogue::kStore) {
#pragma unroll
      for (int c = 0; c < kColumnBlocks; ++c) {
        Pairs pairs;
        pairs_of(pairs, acc, c);
        put(pairs, args.out, work.column + c * kBlock);
      }
    } else {
      constexpr int blocks = kGated ? kColumnBlocks / 2 : kColumnBlocks;
#pragma unroll
      for (int c = 0; c < blocks; ++c) {
        const int x = work.column + c * kBlock;
        Pairs gate, up;
        pairs_of(gate, acc, c);
        if (args.keep_pre) put(gate, args.out, x);
        if constexpr (kGated) {
          pairs_of(up, acc, blocks + c);
          if (args.keep_pre) put(up, args.out3, x);
        }
        // The activation reads what was rounded, as the backward pass will.
#pragma unroll
        for (int i = 0; i < 16; ++i) gate[i] = hidden(args, gate[i], kGated ? up[i] : 0);
        put(gate, args.out2, x);
      }
    }
  }

  static __device__ __forceinline__ uint32_t hidden(Args const& args, uint32_t gate, uint32_t up) {
    const ActivationParams params{args.beta, args.linear_beta};
    float2 g = unpack<T>(gate), u = {1.0f, 1.0f};
    if constexpr (kGated) {
      u = unpack<T>(up);
      u = {up_value<kActivation>(u.x, params).value, up_value<kActivation>(u.y, params).value};
    }
    return pack<T>(gate_value<kActivation>(g.x, params).value * u.x, gate_value<kActivation>(g.y, params).value * u.y);
  }

  // Blocks of the pre-activation on their way in, and of its gradient and the weighted hidden rows on their way out. The
  // gradient takes the place of what it is computed from, and while one block is worked on, the next is loaded: beside
  // the kPre slots of each stands one for the hidden rows.
  class GradientSlots {
   public:
    static constexpr int kPre = kGated ? 2 : 1;
    static_assert(kInstance.epilogue != Epilogue::kActivationGrad || kTile.slots == 2 * kPre + 1);

    __device__ GradientSlots(char* base, Barrier* full) : base_(base), full_(full) {}

    // The block of the step-th turn; `half` 1 is the up half of a gated pre-activation.
    __device__ __forceinline__ char* pre(int step, int half) const { return slot(kPre * step + half); }
    __device__ __forceinline__ char* hidden(int step) const { return slot(kPre * (step + 2)); }

    // Starts the load; by one thread, when all stores from here have been read.
    __device__ __forceinline__ void load(Args const& args, int step, int x, int row) {
      full_->arrive_and_expect_tx(kPre * kBlockBytes);
      load_box<1>(args.pre, *full_, pre(step, 0), 0, x, row, 0);
      if constexpr (kGated) load_box<1>(args.pre_up, *full_, pre(step, 1), 0, x, row, 0);
    }

    __device__ __forceinline__ void wait() {
      full_->wait(phase_);
      phase_ ^= 1;
    }

   private:
    __device__ __forceinline__ char* slot(int i) const { return base_ + i % kTile.slots * kBlockBytes; }

    char* base_;
    Barrier* full_;
    uint32_t phase_ = 0;
  };

  // Before the products of a tile: the first block of its pre-activation is sent for.
  static __device__ __forceinline__ void begin_gradient(Args const& args, GradientSlots& slots, Work const& work,
                                                        int thread) {
    if (thread != 0 || work.steps == 0) return;
    cute::tma_store_wait<0>();
    slots.load(args, 0, work.column, work.row);
  }

  // From the gradient of hidden rows (accumulated) to that of the pre-activation; the rows' weights enter here, and
  // their own gradient <dhidden, hidden> leaves as one partial sum a column tile (SonicMoE, arXiv 2512.14080).
  template <int Blocks>
  static __device__ __forceinline__ void store_gradient(Args const& args, GradientSlots& slots,
                                                        float const (&acc)[Blocks][kTile.columns / 2], Work const& work,
                                                        int warpgroup, int thread) {
    const ActivationParams params{args.beta, args.linear_beta};
    const int lane = thread % 32;
    const bool rows_of_nobody = work.steps == 0;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      const int first = block * kBlock, row_in_tile = first + thread / 32 * 16 + lane / 4;
      const Window window(work.row + first, min(kBlock, work.valid - first));
      float weight[2], dot[2] = {0.0f, 0.0f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = row_in_tile + 8 * half < work.valid && !rows_of_nobody;
        weight[half] = inside ? args.row_weights[work.row + row_in_tile + 8 * half] : 0.0f;
      }
#pragma unroll
      for (int c = 0; c < kColumnBlocks; ++c) {
        const int step = block * kColumnBlocks + c, x = work.column + c * kBlock;
        if (!rows_of_nobody) slots.wait();
        if (thread == 0) cute::tma_store_wait<0>();
        sync_warpgroup(warpgroup);
        if (thread == 0 && !rows_of_nobody && step + 1 < Blocks * kColumnBlocks) {
          const int next = (step + 1) % kColumnBlocks, next_block = (step + 1) / kColumnBlocks;
          slots.load(args, step + 1, work.column + next * kBlock, work.row + next_block * kBlock);
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          uint32_t gate[4] = {}, up[4] = {}, hidden[4];
          if (!rows_of_nobody) {
            load_pairs(gate, slots.pre(step, 0), q, thread);
            if constexpr (kGated) load_pairs(up, slots.pre(step, 1), q, thread);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 g = unpack<T>(gate[i]), u = kGated ? unpack<T>(up[i]) : float2{1.0f, 1.0f};
            const float dx = acc[block][c * 32 + 8 * q + 2 * i], dy = acc[block][c * 32 + 8 * q + 2 * i + 1];
            const float w = weight[i % 2];
            const Value gx = gate_value<kActivation>(g.x, params), gy = gate_value<kActivation>(g.y, params);
            const Value ux = up_value<kActivation>(u.x, params), uy = up_value<kActivation>(u.y, params);
            const float hx = gx.value * ux.value, hy = gy.value * uy.value;
            dot[i % 2] += dx * hx + dy * hy;
            hidden[i] = pack<T>(w * hx, w * hy);
            gate[i] = pack<T>(w * dx * gx.slope * ux.value, w * dy * gy.slope * uy.value);
            if constexpr (kGated) up[i] = pack<T>(w * dx * gx.value * ux.slope, w * dy * gy.value * uy.slope);
          }
          store_pairs(gate, slots.pre(step, 0), q, thread);
          if constexpr (kGated) store_pairs(up, slots.pre(step, 1), q, thread);
          store_pairs(hidden, slots.hidden(step), q, thread);
        }
        cute::tma_store_fence();
        sync_warpgroup(warpgroup);
        if (thread == 0) {
          store_window(args.out, slots.pre(step, 0), x, window);
          if constexpr (kGated) store_window(args.out3, slots.pre(step, 1), x, window);
          store_window(args.out2, slots.hidden(step), x, window);
          cute::tma_store_arrive();
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        dot[half] += __shfl_xor_sync(~0u, dot[half], 1);
        dot[half] += __shfl_xor_sync(~0u, dot[half], 2);
        const int row = row_in_tile + 8 * half;
        if (lane % 4 == 0 && row < work.valid && work.column < args.out_columns) {
          const int64_t column_tile = work.column / kTile.columns;
          args.partial[column_tile * args.num_rows + work.row + row] = dot[half];
        }
      }
    }
  }
};

}  // namespace latent_moe
