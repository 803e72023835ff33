// From accumulators to memory: rounded, through the expert's activation or its gradient, by the copy engine.
#pragma once

#include "activation.cuh"
#include "schedule.cuh"

namespace latent_moe {

// The 64 columns of accumulators that one thread of a warpgroup holds of a [64][64] block, as pairs of 16-bit elements:
// pair 4 q + i stands in row 8 (i % 2) + lane / 4 of its warp's 16 rows, at column 16 q + 8 (i / 2) + 2 (lane % 4).
using Pairs = uint32_t[16];

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
      const int lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int column = 2 * q + lane / 16;  // in units of 16 bytes, swizzled as the copy engine expects
        auto* at = reinterpret_cast<cute::uint128_t*>(slot + row * 128 + ((column ^ (row & 7)) << 4));
        cute::SM90_U32x4_STSM_N::copy(pairs[4 * q], pairs[4 * q + 1], pairs[4 * q + 2], pairs[4 * q + 3], *at);
      }
      cute::tma_store_fence();
      sync_warpgroup(warpgroup);
      if (thread == 0) {
        cute::SM90_TMA_STORE::copy(&map, slot, at_box...);
        cute::tma_store_arrive();
      }
    }

    __device__ void drain(int thread) {
      if (thread == 0) cute::tma_store_wait<0>();
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
        put(gate, args.out, x);
        if constexpr (kGated) {
          pairs_of(up, acc, blocks + c);
          put(up, args.out3, x);
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

  // What the gradient of one 64-row block needs of the pre-activation: read ahead, one [64][64] block at a time.
  class PreActivation {
   public:
    Pairs gate, up;

    __device__ __forceinline__ void read(Args const& args, Work const& work, int first, int column_block, int thread) {
      const int lane = thread % 32;
      const int64_t width = static_cast<int64_t>(kGated ? 2 : 1) * args.out_columns;
      const int x = work.column + column_block * kBlock + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + thread / 32 * 16 + lane / 4 + 8 * half;
        T const* from = static_cast<T const*>(args.pre) + (work.row + row) * width + x;
        const bool inside = row < work.valid && work.steps > 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bool read = inside && x + 8 * i < args.out_columns;
          gate[2 * i + half] = load(from + 8 * i, read);
          if constexpr (kGated) up[2 * i + half] = load(from + args.out_columns + 8 * i, read);
        }
      }
    }

   private:
    // Volatile, so that the compiler leaves it where it was written: ahead of the products that hide its latency.
    static __device__ __forceinline__ uint32_t load(T const* from, bool read) {
      uint32_t pair;
      asm volatile(
          "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.b32 %0, [%1];\n}"
          : "=&r"(pair)  // written before the address is read
          : "l"(from), "r"(static_cast<int>(read)));
      return pair;
    }
  };

  // From the gradient of hidden rows (accumulated) to that of the pre-activation; the rows' weights enter here, and
  // their own gradient <dhidden, hidden> leaves as one partial sum a column tile (SonicMoE, arXiv 2512.14080). `pre`
  // holds the first block; the next is read while one is worked on.
  template <int Blocks>
  static __device__ __forceinline__ void store_gradient(Args const& args, Slots& slots, PreActivation& pre,
                                                        float const (&acc)[Blocks][kTile.columns / 2], Work const& work,
                                                        int warpgroup, int thread) {
    const ActivationParams params{args.beta, args.linear_beta};
    const int lane = thread % 32;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      const int first = block * kBlock, row_in_tile = first + thread / 32 * 16 + lane / 4;
      const Window window(work.row + first, min(kBlock, work.valid - first));
      const auto put = [&](Pairs const& pairs, CUtensorMap const& map, int x) {
        slots.put(pairs, map, warpgroup, thread, x, window.y, window.z, Window::kAxis);
      };
      float weight[2], dot[2] = {0.0f, 0.0f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = row_in_tile + 8 * half < work.valid && work.steps > 0;
        weight[half] = inside ? args.row_weights[work.row + row_in_tile + 8 * half] : 0.0f;
      }
#pragma unroll
      for (int c = 0; c < kColumnBlocks; ++c) {
        PreActivation next;
        if (c + 1 < kColumnBlocks) {
          next.read(args, work, first, c + 1, thread);
        } else if (block + 1 < Blocks) {
          next.read(args, work, first + kBlock, 0, thread);
        }
        Pairs weighted;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float2 g = unpack<T>(pre.gate[i]), u = kGated ? unpack<T>(pre.up[i]) : float2{1.0f, 1.0f};
          const float dx = acc[block][c * 32 + 2 * i], dy = acc[block][c * 32 + 2 * i + 1], w = weight[i % 2];
          const Value gx = gate_value<kActivation>(g.x, params), gy = gate_value<kActivation>(g.y, params);
          const Value ux = up_value<kActivation>(u.x, params), uy = up_value<kActivation>(u.y, params);
          const float hx = gx.value * ux.value, hy = gy.value * uy.value;
          dot[i % 2] += dx * hx + dy * hy;
          weighted[i] = pack<T>(w * hx, w * hy);
          pre.gate[i] = pack<T>(w * dx * gx.slope * ux.value, w * dy * gy.slope * uy.value);
          if constexpr (kGated) pre.up[i] = pack<T>(w * dx * gx.value * ux.slope, w * dy * gy.value * uy.slope);
        }
        const int x = work.column + c * kBlock;
        put(pre.gate, args.out, x);
        if constexpr (kGated) put(pre.up, args.out3, x);
        put(weighted, args.out2, x);
        pre = next;
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
