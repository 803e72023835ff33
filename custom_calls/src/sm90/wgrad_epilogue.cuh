// Stores the accumulators of a weight gradient to memory by TMA, which clips a tile at the ends of the product.
//
// A tile of few steps is multiplied about as fast as it is stored. If warps wrote to memory themselves, their accesses to
// shared memory would queue behind these writes. Each warp therefore leaves 16 rows of 64 columns at a time in shared
// memory, for TMA.
#pragma once

#include "common/schedule.cuh"
#include "sm90/piece.cuh"

namespace latent_moe::sm90 {

// Spec has the static constants kFormat and kTile (spec.h).
template <class Spec>
class WgradEpilogue {
  static constexpr Tile kTile = Spec::kTile;
  static constexpr int kColumnBlocks = kTile.columns / kBlock;
  static constexpr int kPiecesOfTile = kTile.rows / kBlock * kColumnBlocks;  // of a warp
  // Buffers for pieces. All but one may be on their way to memory. Every tile begins with the first buffer.
  static constexpr int kPieces = kPiecesOfTile % 3 == 0 ? 3 : 2;
  static_assert(kPiecesOfTile % kPieces == 0);
  using T = Element<Spec::kFormat>;
  using Accumulator = float[kTile.columns / 2];

 public:
  static constexpr int kSharedBytes = Spec::kConsumers * 4 * kPieces * kPieceBytes;

  __device__ WgradEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args),
        pieces_(shared + (warpgroup * 4 + thread / 32) * kPieces * kPieceBytes),
        warp_(thread / 32),
        lane_(thread % 32) {}

  __device__ __forceinline__ void begin(Work const&) const {}

  template <int Blocks>
  __device__ __forceinline__ void finish(Accumulator const (&acc)[Blocks], Work const& work) const {
    const int row = work.out_row + warp_ * kWarpRows;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
#pragma unroll
      for (int c = 0; c < kColumnBlocks; ++c) {
        char* buffer = pieces_ + (block * kColumnBlocks + c) % kPieces * kPieceBytes;
        const Piece<T> piece(cute::cast_smem_ptr_to_uint(buffer), lane_);
        if (cute::elect_one_sync()) cute::tma_store_wait<kPieces - 1>();
        __syncwarp();
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
          uint32_t p[4];
          round<T>(p, acc[block], c, quarter);
          piece.put(p, quarter);
        }
        cute::tma_store_fence();
        __syncwarp();
        if (cute::elect_one_sync()) {
          cute::SM90_TMA_STORE_3D::copy(&args_.boxes, buffer, work.column + c * kBlock, row + block * kBlock, work.expert);
          cute::tma_store_arrive();
        }
      }
    }
  }

  // Called before the block ends: waits until TMA has read everything.
  __device__ __forceinline__ void drain() const {
    if (cute::elect_one_sync()) cute::tma_store_wait<0>();
  }

 private:
  Args const& args_;
  char* pieces_;
  int warp_, lane_;
};

}  // namespace latent_moe::sm90
