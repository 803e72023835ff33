// Turns the product of a dgrad of codes, the gradient of hidden rows, into the gradient of relu2's pre-activation. It is
// stored twice: rounded, and as codes with a scale for each 128 columns of a row.
//
// All values, also the sums for the rows' weights, are those of the kernel of relu2's gradient behind the plain product
// (formats/encode_rows.h), to the bit. The product passes through shared memory, so that a lane has eight neighbouring
// columns, as in that kernel. Hidden rows take the same way: they are loaded while the tile is multiplied.
#pragma once

#include "common/schedule.cuh"
#include "formats/relu2.cuh"
#include "sm90/piece.cuh"

namespace latent_moe::sm90 {

// Spec has the static constants kFormat, kConsumers and kColumns, which is 128 (spec.h).
template <class Spec>
class EncodedGradientEpilogue {
  using T = Element<product_format(Spec::kFormat)>;
  using Eight = formats::Eight<T>;
  using Accumulator = float[kScaleBlock / 2];
  static constexpr int kPieces = kScaleBlock / kBlock;  // of a warp's rows, side by side
  static constexpr int kLanes = 8;                      // share a row
  static constexpr int kRows = kWarpRows / (32 / kLanes);  // of a lane
  static_assert(Spec::kColumns == kScaleBlock && kRows == 4);

 public:
  static constexpr int kSharedBytes = Spec::kConsumers * 4 * kPieces * kPieceBytes;

  __device__ EncodedGradientEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args),
        base_(cute::cast_smem_ptr_to_uint(shared) + (warpgroup * 4 + thread / 32) * kPieces * kPieceBytes),
        warp_(thread / 32),
        lane_(thread % 32) {}

  // Called before the products of a 64-row block of a tile: starts to load the hidden rows. Returns the weight of this lane's
  // own row. Padding rows may hold anything, so they and their weights are not read.
  __device__ __forceinline__ float begin(Work const& work, int block) const {
    Strip<T> hidden = strip(const_cast<void*>(args_.residual), work, block);
    if (work.steps == 0) hidden.rows = 0;
#pragma unroll
    for (int c = 0; c < kPieces; ++c) piece(c).read(hidden, c);
    cute::cp_async_fence();
    const int row = own_row(block);
    return row < work.valid && work.steps > 0 ? args_.row_weights[work.row + row] : 0.0f;
  }

  // Stores the block, with the weight that `begin` returned.
  __device__ __forceinline__ void store_block(Accumulator const& acc, Work const& work, int block, float own_weight) const {
    Eight hidden[kPieces][kRows];
    cute::cp_async_wait<0>();
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) hidden[c][i].raw[0] = piece(c).unit(i);
    }
    __syncwarp();  // the product overwrites what other lanes have loaded
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        uint32_t pairs[4];
        round<T>(pairs, acc, c, quarter);
        piece(c).put(pairs, quarter);
      }
    }
    __syncwarp();
    const Strip<T> out = strip(args_.out, work, block);
    Eight gradients[kPieces][kRows];
    float sums[kRows];
    uint32_t largest[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float weight = __shfl_sync(~0u, own_weight, lane_ / kLanes * kLanes + 2 * i);
      sums[i] = 0.0f, largest[i] = 0;
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        Eight& gradient = gradients[c][i];
        // Columns beyond the last may hold NaN, of a row or a weight's block with NaN.
        if (c * Strip<T>::kColumns < out.columns) gradient.raw[0] = piece(c).unit(i);
        hidden[c][i].keep_packed();
        sums[i] += formats::differentiate_relu2(gradient, hidden[c][i], weight);
        if (out.holds(i, c)) gradient.store(out.at(i, c));
        largest[i] = max(largest[i], gradient.largest());
      }
    }
    const float sum = over_rows(sums, [](float a, float b) { return a + b; });
    const uint32_t amax = over_rows(largest, [](uint32_t a, uint32_t b) { return max(a, b); });
    const float scale = formats::scale_of(amax, formats::kLeastOfRows, args_.power_of_two);
    const float inverse = formats::inverse_of(scale);
    if (const int row = own_row(block); lane_ % 2 == 0 && row < work.valid && work.column < args_.problem.out_columns) {
      const int64_t at = int64_t{work.column / kScaleBlock} * args_.problem.num_rows + work.row + row;
      args_.code_scales[at] = scale;
      args_.partial[at] = sum;
    }
    const int64_t first = work.row + block * kBlock + warp_ * kWarpRows + lane_ / kLanes;
    uint8_t* codes = args_.codes + first * args_.problem.out_columns + work.column + lane_ % kLanes * Strip<T>::kUnit;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float of_row = __shfl_sync(~0u, inverse, lane_ / kLanes * kLanes + 2 * i);
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        uint8_t* to = codes + int64_t{4 * i} * args_.problem.out_columns + c * Strip<T>::kColumns;
        if (out.holds(i, c)) gradients[c][i].store_codes(to, of_row);
      }
    }
    __syncwarp();  // the next hidden rows overwrite what other lanes have read
  }

 private:
  __device__ __forceinline__ Piece<T> piece(int c) const { return Piece<T>(base_ + c * kPieceBytes, lane_); }

  // The row, within the tile, whose sums this lane has in the end.
  __device__ __forceinline__ int own_row(int block) const {
    return block * kBlock + warp_ * kWarpRows + lane_ / kLanes + lane_ % kLanes / 2 * 4;
  }

  // This warp's rows in a row block of the tile.
  __device__ __forceinline__ Strip<T> strip(void* matrix, Work const& work, int block) const {
    const int first = block * kBlock + warp_ * kWarpRows, width = args_.problem.out_columns;
    auto* start = static_cast<T*>(matrix) + int64_t{work.row + first} * width + work.column;
    return {start, width, work.valid - first, width - work.column, lane_};
  }

  // Combines the values of eight lanes for each of a lane's four rows. Lanes 2 i and 2 i + 1 get the i-th row's. Lanes are
  // paired as in a butterfly, which gives the same bits, but each lane sends only the rows that it does not keep.
  template <class V, class Combine>
  __device__ __forceinline__ V over_rows(V const (&rows)[kRows], Combine const& combine) const {
    const bool last = lane_ & 4, odd = lane_ & 2;
    V kept[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const V other = __shfl_xor_sync(~0u, last ? rows[i] : rows[2 + i], 4);
      kept[i] = combine(last ? rows[2 + i] : rows[i], other);
    }
    const V other = __shfl_xor_sync(~0u, odd ? kept[0] : kept[1], 2);
    const V one = combine(odd ? kept[1] : kept[0], other);
    return combine(one, __shfl_xor_sync(~0u, one, 1));
  }

  Args const& args_;
  uint32_t base_;
  int warp_, lane_;
};

}  // namespace latent_moe::sm90
