// From the accumulators of a weight gradient to memory, by the copy engine, which clips a tile at the ends of the product.
//
// A tile of few steps takes hardly longer to multiply than to store, and where warps write to memory themselves, all that
// they ask of shared memory waits behind it. So each warp leaves 16 rows of 64 columns there at a time.
#pragma once

#include "piece.cuh"
#include "schedule.cuh"

namespace latent_moe {

template <int I>
class BoxEpilogue {
  static constexpr Instance kInstance = kInstances[I];
  static constexpr Tile kTile = kInstance.tile;
  static constexpr int kColumnBlocks = kTile.columns / kBlock;
  static constexpr int kPiecesOfTile = kTile.rows / kBlock * kColumnBlocks;  // of a warp
  // Places for them, of which all but one may be on their way to memory; every tile begins with the first.
  static constexpr int kPieces = kPiecesOfTile % 3 == 0 ? 3 : 2;
  static_assert(kPiecesOfTile % kPieces == 0);
  using T = std::conditional_t<kInstance.type == Type::kF16, __half, __nv_bfloat16>;
  using Accumulator = float[kTile.columns / 2];

 public:
  static constexpr int kSharedBytes = kConsumers * 4 * kPieces * kPieceBytes;

  __device__ BoxEpilogue(Args const& args, char* shared, int warpgroup, int thread)
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
        char* place = pieces_ + (block * kColumnBlocks + c) % kPieces * kPieceBytes;
        const Piece<T> piece(cute::cast_smem_ptr_to_uint(place), lane_);
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
          cute::SM90_TMA_STORE_3D::copy(&args_.boxes, place, work.column + c * kBlock, row + block * kBlock, work.expert);
          cute::tma_store_arrive();
        }
      }
    }
  }

  // Before the block ends: all has been read.
  __device__ __forceinline__ void drain() const {
    if (cute::elect_one_sync()) cute::tma_store_wait<0>();
  }

 private:
  Args const& args_;
  char* pieces_;
  int warp_, lane_;
};

}  // namespace latent_moe
